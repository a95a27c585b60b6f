"""Sandbox: decoding in a child process that may die, so that a hostile file costs one row and no worker.

A hostile file can segfault, abort, hang or exhaust memory inside the decoder. ``DecodeSandbox`` runs plain functions
in one child process, started once and reused, and turns its death into a VideoError that names the signal. The next
call starts a new child.

The child is a fresh interpreter, never a fork: it may be started from a process full of threads, such as a Ray
worker, and imports nothing of the caller's main module. It ends when the parent does, however the parent ended.

Cost: 0.06 ms a call, and 10 ms (21 on two busy cores) for nine clips of 17x256x256 frames, 30 MB, which come back
through shared memory; 0.25 s to start a child.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from typing import BinaryIO, TypeVar, cast

from vidshard.pipeline.video.answers import (
    MAX_BUFFERS,
    MAX_TEXT_BYTES,
    MalformedAnswerError,
    error_to_text,
    from_text,
    to_text,
)
from vidshard.pipeline.video.confinement import confine
from vidshard.schemas.rejections import Reason, VideoError

R = TypeVar("R")

_GRACE_SECONDS = 5.0
"""Seconds after the time limit at which a child ends itself, if its parent is no longer there to do so."""

ANSWER_BYTES = 1 << 30
"""Default of the largest size of the arrays in an answer."""

_COUNT = struct.Struct("<Q")
_WANTS_MEMORY = 2**64 - 1
"""Stands in place of the number of arrays where the child asks for memory of the size that follows."""


class DecodeSandbox:
    """Runs functions in a child process. One call at a time; calls from several threads wait for each other."""

    def __init__(self, *, memory_limit_bytes: int | None = None, confined: bool = False) -> None:
        """Start nothing yet: the child starts with the first call.

        Args:
            confined: confine the child with ``pipeline.video.confinement`` before its first call. It then reads no
                file but libraries and the one that `run` is given.
            memory_limit_bytes: memory the child may allocate (RLIMIT_DATA: heap and anonymous mappings, including
                about 100 MB for the interpreter and its libraries); None for no limit.

        Raises:
            ValueError: the limit is not positive.
        """
        if memory_limit_bytes is not None and memory_limit_bytes < 1:
            raise ValueError(f"memory_limit_bytes must be positive or None, got {memory_limit_bytes}")
        self._memory_limit_bytes = memory_limit_bytes
        self._confined = confined
        self._child: _Child | None = None
        self._lock = threading.Lock()

    def run(
        self,
        function: Callable[..., R],
        *args: object,
        timeout_seconds: float,
        answer_bytes: int = ANSWER_BYTES,
        file: BinaryIO | None = None,
        **kwargs: object,
    ) -> R:
        """Call ``function(*args, **kwargs)`` in the child.

        Args:
            function: a function of an importable module; the child finds it by name.
            args: anything that pickles.
            timeout_seconds: the child is killed when it has not answered by then; positive.
            answer_bytes: largest size of the arrays in the answer.
            file: open local file that the function gets from `given_file`.
            kwargs: anything that pickles.

        Returns:
            The function's result, of the types that ``pipeline.video.answers`` lists.

        Raises:
            VideoError: DECODER_CRASHED when the child died, ran out of memory or sent an answer that is none,
                DECODE_TIMEOUT when it took too long.
            ValueError: the function cannot be found by name in another process.
            Exception: what the function raised, with the child's traceback as a note; a RuntimeError for types that
                ``pipeline.video.answers`` does not list.
        """
        if timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds must be positive, got {timeout_seconds}")
        if function.__module__ == "__main__" or "<" in function.__qualname__:
            raise ValueError(f"{function.__module__}.{function.__qualname__} is not a function of an importable module")
        request = pickle.dumps((function, args, kwargs, timeout_seconds + _GRACE_SECONDS, file is not None), protocol=5)
        with self._lock:
            deadline = time.monotonic() + timeout_seconds
            child = self._send(request, file)
            try:
                value = child.receive(deadline, answer_bytes)
            except TimeoutError:
                self._end_child()
                words = f"the decoder had no answer within {timeout_seconds:g} s and was ended"
                raise VideoError(Reason.DECODE_TIMEOUT, words) from None
            except MemoryError as error:
                self._end_child()  # its heap is fragmented
                limit = f" under a limit of {self._memory_limit_bytes:,} bytes" if self._memory_limit_bytes else ""
                raise VideoError(Reason.DECODER_CRASHED, f"the decoder ran out of memory{limit}") from error
            except MalformedAnswerError as error:
                self._end_child()  # a program of ours does not send this: the file may have taken it over
                words = f"the decoding process sent an answer that is none ({error}) and was ended"
                raise VideoError(Reason.DECODER_CRASHED, words) from None
            except _Death as death:
                self._end_child()
                raise VideoError(Reason.DECODER_CRASHED, str(death)) from None
            except KeyboardInterrupt:
                self._end_child()  # nobody waits for its answer any more
                raise
        if isinstance(value, Exception):
            raise value
        return cast(R, value)

    @property
    def pid(self) -> int | None:
        """Process id of the child; None where none is running."""
        return self._child.process.pid if self._child is not None and self._child.process.poll() is None else None

    def close(self) -> None:
        """End the child. A later call starts another one."""
        with self._lock:
            self._end_child()

    def __enter__(self) -> DecodeSandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, request: bytes, file: BinaryIO | None) -> _Child:
        """Send the request to the child, or to a new one if it died since the last call."""
        if self._child is not None:
            with suppress(BrokenPipeError, ConnectionError):
                self._child.send(request, file)
                return self._child
            self._end_child()
        self._child = _Child(self._memory_limit_bytes, self._confined)
        with suppress(BrokenPipeError, ConnectionError):  # it died while starting: receive() says how
            self._child.send(request, file)
        return self._child

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


class _Death(Exception):  # noqa: N818  a death is no error of ours
    """The child ended without an answer; the message says how."""


class _Child:
    """One child process, the pipe of requests and the socket of answers."""

    def __init__(self, memory_limit_bytes: int | None, confined: bool) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self.process = subprocess.Popen(  # noqa: S603  our own interpreter and module
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        "vidshard.pipeline.video.sandbox",
                        str(theirs.fileno()),
                        str(memory_limit_bytes or 0),
                        str(int(confined)),
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL if confined else None,  # a terminal takes orders from what it is shown
                    pass_fds=(theirs.fileno(),),
                    # the same modules as here, whatever put them on the path; one thread for each numerical library
                    env={
                        **{name: text for name, text in os.environ.items() if not confined or _is_harmless(name)},
                        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                        "OMP_NUM_THREADS": "1",
                        "OPENBLAS_NUM_THREADS": "1",
                    },
                    process_group=0,  # a terminal's Ctrl-C is for the parent, which decides
                )
            except BaseException:
                ours.close()
                raise
        self._answers = ours
        self._shared = memoryview(b"")
        self.end = weakref.finalize(self, _end, self.process, ours)

    def send(self, request: bytes, file: BinaryIO | None) -> None:
        """Send a request, and the file that goes with it.

        Raises:
            BrokenPipeError: the child is dead; another ConnectionError means the same.
        """
        assert self.process.stdin is not None
        if file is not None:
            socket.send_fds(self._answers, [b"f"], [file.fileno()])
        self.process.stdin.write(_COUNT.pack(len(request)) + request)
        self.process.stdin.flush()

    def receive(self, deadline: float, answer_bytes: int) -> object:
        """The function's result, or the exception it raised.

        Raises:
            TimeoutError: no answer by the deadline (of ``time.monotonic``).
            MemoryError: the child had no memory left.
            MalformedAnswerError: the answer is none, or larger than allowed.
            _Death: there will be no answer.
        """
        num_buffers, payload_bytes = struct.unpack("<QQ", self._read(16, deadline))
        if num_buffers == _WANTS_MEMORY:
            self._give_memory(payload_bytes, answer_bytes)
            num_buffers, payload_bytes = struct.unpack("<QQ", self._read(16, deadline))
        if num_buffers > MAX_BUFFERS or payload_bytes > MAX_TEXT_BYTES:
            raise MalformedAnswerError(f"{num_buffers} arrays, {payload_bytes} bytes of text")
        sizes = struct.unpack(f"<{num_buffers}Q", self._read(num_buffers * 8, deadline))
        if sum(map(_aligned, sizes)) > len(self._shared):
            raise MalformedAnswerError("more arrays than there is memory for")
        payload = self._read(payload_bytes, deadline)
        offsets = accumulate(map(_aligned, sizes), initial=0)
        # copied out, so that the child can use the memory again: new shared pages for every answer cost more
        # than the copy (30 MB: 19 ms to write new ones, 7 ms to rewrite them, 3 ms for the copy)
        buffers = [
            bytearray(self._shared[offset : offset + size]) for offset, size in zip(offsets, sizes, strict=False)
        ]
        value = from_text(payload, buffers)
        if isinstance(value, MemoryError):
            raise value
        return value

    def _give_memory(self, num_bytes: int, most: int) -> None:
        """Make memory for an answer, and send it. Its size is sealed, so the child cannot take it from under us.

        Raises:
            MalformedAnswerError: more was asked for than an answer may have.
        """
        if not len(self._shared) < num_bytes <= most + MAX_BUFFERS * 64:
            raise MalformedAnswerError(f"{num_bytes} bytes of memory asked for, {most} allowed")
        fd = os.memfd_create("answers", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._shared = memoryview(mmap.mmap(fd, num_bytes, mmap.MAP_SHARED))
            with suppress(OSError):  # the child died: _read says how
                socket.send_fds(self._answers, [b"m"], [fd])
        finally:
            os.close(fd)

    def _read(self, num_bytes: int, deadline: float) -> bytes:
        """Exactly ``num_bytes`` bytes."""
        data = bytearray()
        while len(data) < num_bytes:
            self._answers.settimeout(max(1e-3, deadline - time.monotonic()))
            try:
                part = self._answers.recv(num_bytes - len(data))
            except ConnectionError:
                part = b""
            if not part:
                raise _Death(self._death())
            data += part
        return bytes(data)

    def _death(self) -> str:
        try:
            code = self.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:  # it closed its end, and lives
            self.process.kill()
            code = self.process.wait()
        if code >= 0:
            return f"the decoding process ended itself with exit code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = " (killed from outside: perhaps the system was out of memory)" if -code == signal.SIGKILL else ""
        return f"the decoding process died of {name}{hint}"


def _is_harmless(name: str) -> bool:
    """Whether an environment variable is one that a confined child needs; credentials are in others."""
    names = {"PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHASHSEED"}
    return name in names or name.startswith(("LC_", "MALLOC_", "OMP_", "COV_", "COVERAGE_"))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 64) * 64


def _end(process: subprocess.Popen[bytes], answers: socket.socket) -> None:
    process.kill()
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()
    process.wait()
    answers.close()


# The child's side.


_given: BinaryIO | None = None
_missing: list[str] | None = None


def given_file() -> BinaryIO | None:
    """In the child, the open file that came with the request; None where there was none."""
    return _given


def missing_confinement() -> list[str]:
    """In a confined child, the parts of the confinement that this system lacks."""
    return [] if _missing is None else _missing


def _serve(answers_fd: int, memory_limit_bytes: int, confined: bool) -> None:
    """Answer requests from standard input until it closes."""
    for number in (signal.SIGINT, signal.SIGHUP):  # sent to all by a terminal; the parent finishes what is begun
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # unblock what the parent's thread had blocked
    answers = socket.socket(fileno=answers_fd)
    shared = _SharedMemory()
    arrived: list[bytes] = []
    ready = threading.Semaphore(0)

    def listen() -> None:
        # beside the work, so that the end of the parent is noticed in the middle of it
        while True:
            arrived.append(_next_request())
            ready.release()

    import av.logging

    av.logging.set_libav_level(av.logging.PANIC)
    if confined:  # before any other thread starts, as a thread that runs already is not confined
        arrived.append(_next_request())
        _confine(arrived[0], memory_limit_bytes)
        ready.release()
    threading.Thread(target=listen, daemon=True).start()
    if memory_limit_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit_bytes, memory_limit_bytes))
    while True:
        ready.acquire()
        _answer(arrived.pop(), answers, shared)


def _confine(request: bytes, memory_limit_bytes: int) -> None:
    """Confine this process for ever, with the modules loaded that a request needs."""
    global _missing
    pickle.loads(request)  # noqa: S301  from our own parent
    _missing = confine(max_file_bytes=memory_limit_bytes or None)


def _next_request() -> bytes:
    return _read_all(0, _COUNT.unpack(_read_all(0, _COUNT.size))[0])


def _read_all(fd: int, num_bytes: int) -> bytes:
    """Exactly ``num_bytes`` bytes; the process ends if the parent is gone."""
    data = bytearray()
    while len(data) < num_bytes:
        part = os.read(fd, num_bytes - len(data))
        if not part:
            os._exit(0)
        data += part
    return bytes(data)


def _answer(request: bytes, answers: socket.socket, shared: _SharedMemory) -> None:
    global _given
    views: list[memoryview] = []
    try:
        function, args, kwargs, limit_seconds, has_file = pickle.loads(request)  # noqa: S301  from our own parent
        if has_file:
            _, (fd,), _, _ = socket.recv_fds(answers, 1, 1)
            _given = os.fdopen(fd, "rb")
        # by the kernel, should the parent be gone and the decoder hang without letting Python run
        signal.setitimer(signal.ITIMER_REAL, limit_seconds)
        try:
            result = function(*args, **kwargs)
            payload = to_text(result, views)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if _given is not None:
                _given.close()
                _given = None
    except Exception as error:  # noqa: BLE001  nothing is swallowed: the parent raises it
        views.clear()
        payload = error_to_text(error, "".join(traceback.format_exception(error)))
    sizes = [view.nbytes for view in views]
    header = struct.pack(f"<{len(sizes) + 2}Q", len(sizes), len(payload), *sizes)
    shared.reserve(sum(map(_aligned, sizes)), answers)
    for view, offset in zip(views, accumulate(map(_aligned, sizes), initial=0), strict=False):
        shared.write(view, offset)
    answers.sendall(header + payload)


class _SharedMemory:
    """Shared memory of child and parent; it stays as large as the largest answer."""

    def __init__(self) -> None:
        self.fd = -1
        self._num_bytes = 0

    def reserve(self, num_bytes: int, answers: socket.socket) -> None:
        """Make room, by asking the parent for memory where there is too little."""
        if num_bytes <= self._num_bytes:
            return
        if self.fd >= 0:
            os.close(self.fd)
        answers.sendall(struct.pack("<QQ", _WANTS_MEMORY, num_bytes))
        _, (self.fd,), _, _ = socket.recv_fds(answers, 1, 1)
        self._num_bytes = num_bytes

    def write(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.pwrite(self.fd, view, offset)
            view, offset = view[count:], offset + count


if __name__ == "__main__":
    from vidshard.pipeline.video.sandbox import (
        _serve as serve,  # by its importable name, which the answers' classes carry
    )

    serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")
