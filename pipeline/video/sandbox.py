"""Sandbox: decoding in a child process that may die, so that a hostile file costs one row and no worker.

A hostile file can segfault, abort, hang or exhaust memory inside the decoder. ``DecodeSandbox`` runs plain functions
in one child process, started once and reused, and turns its death into a VideoError that names the signal. The next
call starts a new child. ``pipeline.video.child`` is what runs there.

The child is a fresh interpreter, never a fork: it may be started from a process full of threads, such as a Ray
worker, and imports nothing of the caller's main module. The kernel ends it with its parent, however the parent ended.

Cost: 0.06 ms a call, and 10 ms (21 on two busy cores) for nine clips of 17x256x256 frames, 30 MB, which come back
through shared memory; 0.25 s to start a child.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import accumulate
from typing import Any, Protocol, Self, TypeVar, cast

from vidshard.pipeline.video.answers import MalformedAnswerError, from_text
from vidshard.pipeline.video.child import GRACE_SECONDS, HEADER, REQUEST, WANTS_MEMORY, Role, aligned
from vidshard.schemas.rejections import Reason, VideoError

R = TypeVar("R")

ANSWER_BYTES = 1 << 30
"""Default of the largest size of the arrays in an answer."""
ANSWER_RECORDS = 64
"""Default of the largest number of records in an answer, such as clips."""

_RECORD_BYTES, _OTHER_BYTES = 1 << 10, 256 << 10
"""Text that a record in an answer may take, and the rest of it with an error and its traceback; a clip takes 0.3 KB."""


class _HasDescriptor(Protocol):
    def fileno(self) -> int: ...


class ChildProcess:
    """Runs functions in a child process. One call at a time; calls from several threads wait for each other."""

    def __init__(self, *, role: Role, memory_limit_bytes: int | None = None) -> None:
        """Start nothing yet: the child starts with the first call.

        Args:
            role: ``"fetch"``: has the environment and the network, and its word about outages counts. ``"decode"``:
                nothing is confined. ``"confined"``: confined with ``pipeline.video.confinement`` before its first
                call, it opens no file but libraries and has no secrets in its environment.
            memory_limit_bytes: memory the child may allocate (RLIMIT_DATA: heap and anonymous mappings, including
                about 100 MB for the interpreter and its libraries); None for no limit.

        Raises:
            ValueError: the limit is not positive.
        """
        if memory_limit_bytes is not None and memory_limit_bytes < 1:
            raise ValueError(f"memory_limit_bytes must be positive or None, got {memory_limit_bytes}")
        self._role: Role = role
        self._memory_limit_bytes = memory_limit_bytes
        self._child: _Child | None = None
        self._lock = threading.Lock()

    def run(
        self,
        function: Callable[..., R],
        *args: object,
        timeout_seconds: float,
        answer_bytes: int = ANSWER_BYTES,
        answer_records: int = ANSWER_RECORDS,
        files: Sequence[_HasDescriptor] = (),
        **kwargs: object,
    ) -> R:
        """Call ``function(*args, **kwargs)`` in the child.

        Args:
            function: a function of an importable module; the child finds it by name.
            args: anything that pickles.
            timeout_seconds: the child is killed when it has not answered by then; positive.
            answer_bytes: largest size of the arrays in the answer.
            answer_records: largest number of records in the answer.
            files: open files and sockets whose descriptors the function gets from `given_file` or
                `given_descriptors`.
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
        request = pickle.dumps((function, args, kwargs, timeout_seconds + GRACE_SECONDS), protocol=5)
        who = "process that fetches" if self._role == "fetch" else "decoding process"
        with self._lock:
            deadline = time.monotonic() + timeout_seconds
            try:
                child = self._send(request, files, deadline)
                value = child.receive(deadline, answer_bytes, answer_records)
            except TimeoutError:
                self._end_child()
                words = f"the {who} had no answer within {timeout_seconds:g} s and was ended"
                raise VideoError(Reason.DECODE_TIMEOUT, words) from None
            except MemoryError as error:
                self._end_child()  # its heap is fragmented
                limit = f" under a limit of {self._memory_limit_bytes:,} bytes" if self._memory_limit_bytes else ""
                raise VideoError(Reason.DECODER_CRASHED, f"the {who} ran out of memory{limit}") from error
            except MalformedAnswerError as error:
                self._end_child()  # a program of ours does not send this: the file may have taken it over
                words = f"the {who} sent an answer that is none ({error}) and was ended"
                raise VideoError(Reason.DECODER_CRASHED, words) from None
            except _Death as death:
                self._end_child()
                raise VideoError(Reason.DECODER_CRASHED, f"the {who} {death}") from None
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, request: bytes, files: Sequence[_HasDescriptor], deadline: float) -> _Child:
        """Send the request to the child, or to a new one if it died since the last call."""
        if self._child is not None:
            with suppress(ConnectionError):
                self._child.send(request, files, deadline)
                return self._child
            self._end_child()
        self._child = _Child(self._memory_limit_bytes, self._role)
        with suppress(ConnectionError):  # it died while starting: receive() says how
            self._child.send(request, files, deadline)
        return self._child

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


class DecodeSandbox(ChildProcess):
    """Runs functions that decode in a child process."""

    def __init__(self, *, memory_limit_bytes: int | None = None, confined: bool = False) -> None:
        """Start nothing yet.

        Args:
            memory_limit_bytes: as for ``ChildProcess``.
            confined: confine the child before its first call. It then reads no file but libraries and the one that
                `run` is given.
        """
        super().__init__(role="confined" if confined else "decode", memory_limit_bytes=memory_limit_bytes)


class _Death(Exception):  # noqa: N818  a death is no error of ours
    """The child ended without an answer; the message says how."""


class _Child:
    """One child process, and the socket of requests and answers."""

    def __init__(self, memory_limit_bytes: int | None, role: Role) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self.process = _from_lasting_thread(lambda: _start(theirs.fileno(), memory_limit_bytes, role))
            except BaseException:
                ours.close()
                raise
        self._socket = ours
        self._trusted = role == "fetch"
        self._shared = memoryview(b"")
        self.end = weakref.finalize(self, _end, self.process, ours)

    def send(self, request: bytes, files: Sequence[_HasDescriptor], deadline: float) -> None:
        """Send a request, and the files that go with it.

        Raises:
            ConnectionError: the child is dead.
            TimeoutError: it did not take the request in by the deadline (of ``time.monotonic``).
        """
        fds = [file.fileno() for file in files]
        self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
        socket.send_fds(self._socket, [REQUEST.pack(len(request), len(fds))], fds)
        self._socket.sendall(request)

    def receive(self, deadline: float, answer_bytes: int, answer_records: int) -> object:
        """The function's result, or the exception it raised.

        Raises:
            TimeoutError: no answer by the deadline (of ``time.monotonic``).
            MemoryError: the child had no memory left.
            MalformedAnswerError: the answer is none, or larger than allowed.
            _Death: there will be no answer.
        """
        num_buffers, payload_bytes = HEADER.unpack(self._read(HEADER.size, deadline))
        if num_buffers == WANTS_MEMORY:
            self._give_memory(payload_bytes, answer_bytes + 64 * 2 * answer_records)
            num_buffers, payload_bytes = HEADER.unpack(self._read(HEADER.size, deadline))
        if num_buffers > 2 * answer_records or payload_bytes > _OTHER_BYTES + _RECORD_BYTES * answer_records:
            raise MalformedAnswerError(f"{num_buffers} arrays, {payload_bytes} bytes of text")
        sizes = struct.unpack(f"<{num_buffers}Q", self._read(num_buffers * 8, deadline))
        if sum(map(aligned, sizes)) > len(self._shared):
            raise MalformedAnswerError("more arrays than there is memory for")
        payload = self._read(payload_bytes, deadline)
        offsets = accumulate(map(aligned, sizes), initial=0)
        # copied out, so that the child can use the memory again: new shared pages for every answer cost more
        # than the copy (30 MB: 19 ms to write new ones, 7 ms to rewrite them, 3 ms for the copy)
        buffers = [
            bytearray(self._shared[offset : offset + size]) for offset, size in zip(offsets, sizes, strict=False)
        ]
        value = from_text(payload, buffers, may_claim_outages=self._trusted)
        if isinstance(value, MemoryError):
            raise value
        return value

    def _give_memory(self, num_bytes: int, most: int) -> None:
        """Make memory for an answer, and send it. Its size is sealed, so the child cannot take it from under us.

        Raises:
            MalformedAnswerError: more was asked for than an answer may have.
        """
        if not len(self._shared) < num_bytes <= most:
            raise MalformedAnswerError(f"{num_bytes} bytes of memory asked for, {most} allowed")
        fd = os.memfd_create("answers", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._shared = memoryview(mmap.mmap(fd, num_bytes, mmap.MAP_SHARED))
            with suppress(ConnectionError):  # the child died: _read says how
                socket.send_fds(self._socket, [b"m"], [fd])
        finally:
            os.close(fd)

    def _read(self, num_bytes: int, deadline: float) -> bytes:
        """Exactly ``num_bytes`` bytes."""
        data = bytearray()
        while len(data) < num_bytes:
            self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
            try:
                part = self._socket.recv(num_bytes - len(data))
            except ConnectionError:
                part = b""
            if not part:
                raise _Death(self._death())
            data += part
        return bytes(data)

    def _death(self) -> str:
        try:
            code = self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:  # it closed its end, and lives
            self.process.kill()
            code = self.process.wait()
        if code >= 0:
            return f"ended itself with exit code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = " (killed from outside: perhaps the system was out of memory)" if -code == signal.SIGKILL else ""
        return f"died of {name}{hint}"


def _start(socket_fd: int, memory_limit_bytes: int | None, role: Role) -> subprocess.Popen[bytes]:
    arguments = [str(socket_fd), str(memory_limit_bytes or 0), role, str(os.getpid())]
    return subprocess.Popen(  # noqa: S603  our own interpreter and module
        [sys.executable, "-P", "-m", "vidshard.pipeline.video.child", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if role == "confined" else None,  # a terminal takes orders from what it is shown
        pass_fds=(socket_fd,),
        # the same modules as here, whatever put them on the path; one thread for each numerical library
        env={
            **{name: text for name, text in os.environ.items() if role != "confined" or _is_harmless(name)},
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
        process_group=0,  # a terminal's Ctrl-C is for the parent, which decides
    )


def _is_harmless(name: str) -> bool:
    """Whether an environment variable is one that a confined child needs; credentials are in others."""
    names = {"PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHASHSEED"}
    return name in names or name.startswith(("LC_", "MALLOC_", "OMP_", "COV_", "COVERAGE_"))


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    process.kill()
    process.wait()
    connection.close()


# The kernel ends a child with the thread that started it (PR_SET_PDEATHSIG), so that thread must last.

_Call = tuple[Callable[[], Any], Future[Any]]
_calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
_lasting: tuple[int, threading.Thread] | None = None
_lasting_lock = threading.Lock()


def _from_lasting_thread(call: Callable[[], R]) -> R:
    """Call something in a thread that lasts as long as this process."""
    global _calls, _lasting
    with _lasting_lock:
        if _lasting is None or _lasting[0] != os.getpid() or not _lasting[1].is_alive():
            _calls = queue.SimpleQueue()  # a fork has no threads
            thread = threading.Thread(target=_serve_calls, args=(_calls,), name="starts children", daemon=True)
            thread.start()
            _lasting = os.getpid(), thread
    future: Future[R] = Future()
    _calls.put((call, future))
    return future.result()


def _serve_calls(calls: queue.SimpleQueue[_Call]) -> None:
    while True:
        call, future = calls.get()
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  it is the caller's
            future.set_exception(error)
        del call, future
