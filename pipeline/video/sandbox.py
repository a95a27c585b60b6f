"""Sandbox: decoding in a child process that may die, so that a hostile file costs one row and no worker.

A hostile file can segfault, abort, hang or exhaust memory inside the decoder. ``DecodeSandbox`` runs plain functions
in one child process, started once and reused, and turns its death into a VideoError that names the signal. The next
call starts a new child. ``pipeline.video.child`` is what runs there.

The child is a fresh interpreter, never a fork of the caller: it may be started from a process full of threads, such
as a Ray worker, and imports nothing of the caller's main module. A confined child is a fork of such an interpreter,
which has one thread and sees no video; it is replaced between files, so that a video that takes it over cannot falsify
all later ones. The kernel ends children with their parent, however the parent ended.

Cost: 0.06 ms a call, and 10 ms (21 on two busy cores) for nine clips of 17x256x256 frames, 30 MB, which come back
through shared memory; 0.25 s to start a child.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import pickle
import signal
import socket
import struct
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Protocol, Self, TypeVar, cast

from vidshard.pipeline.video.answers import MalformedAnswerError, from_text
from vidshard.pipeline.video.child import GRACE_SECONDS, HEADER, NUMBER, REQUEST, WANTS_MEMORY, Role, aligned
from vidshard.pipeline.video.child_processes import (
    Fork,
    ForkingProcess,
    Process,
    end_process,
    processor_seconds,
    started,
)
from vidshard.schemas.rejections import Reason, VideoError

R = TypeVar("R")

ANSWER_BYTES = 1 << 30
"""Default of the largest size of the arrays in an answer."""
ANSWER_RECORDS = 64
"""Default of the largest number of records in an answer, such as clips."""

RENEWAL_SECONDS = 4.0
"""Processor time after which a confined child gets no other file; a new one costs some 20 ms."""
FILES_PER_CHILD = 16
"""Default number of files that a confined child sees. One that was taken over may answer without using time."""

_RECORD_BYTES, _OTHER_BYTES = 1 << 10, 256 << 10
"""Text that a record in an answer may take, and the rest of it with an error and its traceback; a clip takes 0.3 KB."""


class _HasDescriptor(Protocol):
    def fileno(self) -> int: ...


class ChildProcess:
    """Runs functions in a child process. One call at a time; calls from several threads wait for each other."""

    def __init__(
        self, *, role: Role, memory_limit_bytes: int | None = None, files_per_child: int = FILES_PER_CHILD
    ) -> None:
        """Start nothing yet: the child starts with the first call.

        Args:
            role: ``"fetch"``: has the environment and the network, and its word about outages counts. ``"decode"``:
                nothing is confined. ``"confined"``: confined with ``pipeline.video.confinement`` before its first
                call, it opens no file but libraries and has no secrets in its environment.
            memory_limit_bytes: memory the child may allocate (RLIMIT_DATA: heap and anonymous mappings, including
                about 100 MB for the interpreter and its libraries); None for no limit.
            files_per_child: number of files that one confined child may see, at least 1.

        Raises:
            ValueError: a limit is not positive.
        """
        if memory_limit_bytes is not None and memory_limit_bytes < 1:
            raise ValueError(f"memory_limit_bytes must be positive or None, got {memory_limit_bytes}")
        if files_per_child < 1:
            raise ValueError(f"files_per_child must be at least 1, got {files_per_child}")
        self._role: Role = role
        self._files_per_child = files_per_child
        self._num_files = 0
        self._memory_limit_bytes = memory_limit_bytes
        self._child: _Child | None = None
        self._forks: ForkingProcess | None = None
        self._shared = _Shared()
        self._subject: str | None = None
        self._lock = threading.Lock()

    def run(
        self,
        function: Callable[..., R],
        *args: object,
        timeout_seconds: float,
        answer_bytes: int = ANSWER_BYTES,
        answer_records: int = ANSWER_RECORDS,
        files: Sequence[_HasDescriptor] = (),
        subject: str | None = None,
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
            subject: name of the file that the call is about. A confined child that has seen ``files_per_child`` files,
                or worked for ``RENEWAL_SECONDS``, is replaced before it gets another one; None to keep it.
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
            self._renew(subject)
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
            self._end_forks()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _renew(self, subject: str | None) -> None:
        """End a child that has seen enough other files, as one of them may have taken it over."""
        if subject is not None and subject != self._subject:
            self._subject = subject
            self._num_files += 1
            child = self._child if self._role == "confined" else None
            if child is not None and (
                self._num_files > self._files_per_child or processor_seconds(child.process.pid) >= RENEWAL_SECONDS
            ):
                self._end_child()
            if self._child is None:
                self._num_files = 1

    def _send(self, request: bytes, files: Sequence[_HasDescriptor], deadline: float) -> _Child:
        """Send the request to the child, or to a new one if it died since the last call."""
        if self._child is not None:
            with suppress(ConnectionError):
                self._child.send(request, files, deadline)
                return self._child
            self._end_child()
        self._child = self._new_child(request, deadline)
        with suppress(ConnectionError):  # it died while starting: receive() says how
            self._child.send(request, files, deadline)
        return self._child

    def _new_child(self, request: bytes, deadline: float) -> _Child:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process: Process
                if self._role == "confined":
                    process = self._fork(theirs, request, deadline)
                else:
                    process = started(theirs, self._memory_limit_bytes, self._role)
        except BaseException:
            ours.close()
            raise
        return _Child(process, ours, self._shared, trusted=self._role == "fetch")

    def _fork(self, connection: socket.socket, request: bytes, deadline: float) -> Fork:
        """A fork of the process that forks, or of a new one where that died."""
        for is_new in (False, True):
            if self._forks is None or is_new:
                self._end_forks()
                self._forks = ForkingProcess(self._memory_limit_bytes)
            try:
                return self._forks.fork(connection, request, deadline)
            except ConnectionError:
                continue
            except BaseException:
                self._end_forks()  # its answer may still come
                raise
        raise _Death("could not be started")

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None

    def _end_forks(self) -> None:
        if self._forks is not None:
            self._forks.end()
            self._forks = None


class DecodeSandbox(ChildProcess):
    """Runs functions that decode in a child process."""

    def __init__(
        self,
        *,
        memory_limit_bytes: int | None = None,
        confined: bool = False,
        files_per_child: int = FILES_PER_CHILD,
    ) -> None:
        """Start nothing yet.

        Args:
            memory_limit_bytes: as for ``ChildProcess``.
            files_per_child: as for ``ChildProcess``.
            confined: confine the child before its first call. It then reads no file but libraries and the one that
                `run` is given.
        """
        super().__init__(
            role="confined" if confined else "decode",
            memory_limit_bytes=memory_limit_bytes,
            files_per_child=files_per_child,
        )


class _Death(Exception):  # noqa: N818  a death is no error of ours
    """The child ended without an answer; the message says how."""


class _Child:
    """One child process, and the socket of requests and answers."""

    def __init__(self, process: Process, connection: socket.socket, shared: _Shared, *, trusted: bool) -> None:
        self.process = process
        self._socket = connection
        self._trusted = trusted
        self._shared = shared
        self.end = weakref.finalize(self, end_process, process, connection)

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
        if sum(map(aligned, sizes)) > len(self._shared.memory):
            raise MalformedAnswerError("more arrays than there is memory for")
        payload = self._read(payload_bytes, deadline)
        offsets = accumulate(map(aligned, sizes), initial=0)
        # copied out, so that the child can use the memory again: new shared pages for every answer cost more
        # than the copy (30 MB: 19 ms to write new ones, 7 ms to rewrite them, 3 ms for the copy)
        buffers = [
            bytearray(self._shared.memory[offset : offset + size]) for offset, size in zip(offsets, sizes, strict=False)
        ]
        value = from_text(payload, buffers, may_claim_outages=self._trusted)
        if isinstance(value, MemoryError):
            raise value
        return value

    def _give_memory(self, num_bytes: int, most: int) -> None:
        """Send memory for an answer.

        Raises:
            MalformedAnswerError: more was asked for than an answer may have.
        """
        if not 0 < num_bytes <= most:
            raise MalformedAnswerError(f"{num_bytes} bytes of memory asked for, {most} allowed")
        self._shared.grow(num_bytes)
        with suppress(ConnectionError):  # the child died: _read says how
            socket.send_fds(self._socket, [NUMBER.pack(len(self._shared.memory))], [self._shared.fd])

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


class _Shared:
    """Memory for answers, made and sized here; later children get it too, as new pages cost more than old ones."""

    def __init__(self) -> None:
        self.fd = -1
        self.memory = memoryview(b"")

    def grow(self, num_bytes: int) -> None:
        """Make it at least this large. Its size is sealed, so no child can take it from under us."""
        if num_bytes <= len(self.memory):
            return
        fd = os.memfd_create("answers", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            memory = memoryview(mmap.mmap(fd, num_bytes, mmap.MAP_SHARED))
        except BaseException:
            os.close(fd)
            raise
        self.close()
        self.fd, self.memory = fd, memory

    def close(self) -> None:
        """Close the descriptor; the memory goes with its last view."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd, self.memory = -1, memoryview(b"")

    def __del__(self) -> None:
        self.close()
