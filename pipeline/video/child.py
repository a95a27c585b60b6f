"""The child's side of the sandbox: answers requests one after the other, until its parent is gone.

    request    length of the pickle (uint64), number of descriptors (uint32) and they themselves; then the pickle of
               (function, arguments, keyword arguments, seconds)
    answer     number of arrays (uint64), length of the text (uint64), size of each array (uint64), the text; the arrays
               are in shared memory, each at a multiple of 64
    or first   2**64 - 1 and a number of bytes (uint64): asks for shared memory; its size (int64) and descriptor come

Confined processes are forks of one that loads modules and sees no video. Such a fork has one thread, so the confinement
holds for all of it.

Requests are pickles: the parent is trusted. Answers are not: ``pipeline.video.answers``.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import resource
import signal
import socket
import stat
import struct
import sys
import traceback
from contextlib import suppress
from itertools import accumulate
from typing import BinaryIO, Literal, NoReturn, cast

from vidshard.pipeline.video.answers import error_to_text, to_text
from vidshard.pipeline.video.byte_ranges import RangeFile
from vidshard.pipeline.video.confinement import confine, library_paths, ruleset_of

Role = Literal["fetch", "decode", "confined"]

GRACE_SECONDS = 5.0
"""Seconds after the time limit at which a child ends itself, if its parent is no longer there to do so."""

WAIT, FORK = "wait", "fork"
"""Requests to a process that forks: to wait for a fork and answer its exit code; to load the modules that a request
needs, fork, and answer the process id."""

REQUEST = struct.Struct("<QI")
NUMBER = struct.Struct("<q")
HEADER = struct.Struct("<QQ")
WANTS_MEMORY = 2**64 - 1
"""Stands in place of the number of arrays where the child asks for memory of the size that follows."""

_MAX_DESCRIPTORS = 4
_PR_SET_PDEATHSIG = 1

_descriptors: list[int] = []
_file: BinaryIO | None = None
_missing: list[str] = []


def given_descriptors() -> tuple[int, ...]:
    """The descriptors that came with the request; the caller closes them."""
    taken = tuple(_descriptors)
    _descriptors.clear()
    return taken


def given_file() -> BinaryIO:
    """The open file that came with the request: a descriptor of it, or a socket over which its bytes come.

    It is closed when the request is answered. The position is that of the last reader.
    """
    global _file
    if _file is None:
        [fd] = given_descriptors()
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            _file = cast(BinaryIO, RangeFile(socket.socket(fileno=fd)))
        else:
            _file = os.fdopen(fd, "rb")
    return _file


def missing_confinement() -> list[str]:
    """In a confined child, the parts of the confinement that this system lacks."""
    return _missing


def begin(socket_fd: int, memory_limit_bytes: int, role: Role, parent: int) -> None:
    """Answer requests from a socket until it closes, in this process or, if they are to be confined, in forks of it."""
    _end_with(parent)
    for number in (signal.SIGINT, signal.SIGHUP):  # sent to all by a terminal; the parent finishes what is begun
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # unblock what the parent's thread had blocked
    connection = socket.socket(fileno=socket_fd)
    if role != "fetch":
        import av.logging

        av.logging.set_libav_level(av.logging.PANIC)
    if role == "confined":
        _fork_on_request(connection, memory_limit_bytes)
    if memory_limit_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit_bytes, memory_limit_bytes))
    _serve(_next_request(connection), connection)


def _end_with(parent: int) -> None:
    """Let the kernel end this process with the thread that started it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)  # it ended before that call


def _fork_on_request(connection: socket.socket, memory_limit_bytes: int) -> NoReturn:
    """Fork a confined process whenever the worker asks for one, and say how one ended.

    This process loads modules and sees no video, so each fork is as it was before the first one.
    """
    ruleset = ruleset_of(library_paths())
    here = os.getpid()
    while True:
        command, value = pickle.loads(_next_request(connection))  # noqa: S301  from our own parent
        if command == WAIT:
            code = os.waitstatus_to_exitcode(os.waitpid(value, 0)[1])
            connection.sendall(NUMBER.pack(code))
            continue
        [fd] = given_descriptors()
        num_modules = len(sys.modules)
        with suppress(Exception):  # the fork fails for the same reason, and says so
            pickle.loads(value)  # noqa: S301  from our own parent; it loads the modules that the fork needs
        if len(sys.modules) > num_modules:
            gc.collect()
            gc.freeze()  # a collection in a fork then copies no memory
        pid = os.fork()
        if pid == 0:
            try:
                connection.close()
                _end_with(here)
                _serve_confined(socket.socket(fileno=fd), ruleset, memory_limit_bytes)
            finally:
                os._exit(1)
        os.close(fd)
        connection.sendall(NUMBER.pack(pid))


def _serve_confined(connection: socket.socket, ruleset: int | None, memory_limit_bytes: int) -> None:
    """Confine this process for ever, with the modules loaded that the first request needs, and answer requests."""
    global _missing
    request = _next_request(connection)
    with suppress(Exception):  # it comes again where it is answered
        pickle.loads(request)  # noqa: S301  from our own parent
    limit = memory_limit_bytes or None
    _missing = confine(ruleset, max_file_bytes=limit, max_memory_bytes=limit)
    _serve(request, connection)


def _serve(request: bytes, connection: socket.socket) -> NoReturn:
    shared = _SharedMemory(connection)
    while True:
        _answer(request, connection, shared)
        request = _next_request(connection)


def _next_request(connection: socket.socket) -> bytes:
    head, fds, _, _ = socket.recv_fds(connection, REQUEST.size, _MAX_DESCRIPTORS)
    head += _read(connection, REQUEST.size - len(head))
    length, num_descriptors = REQUEST.unpack(head)
    assert len(fds) == num_descriptors
    _descriptors[:] = fds
    return _read(connection, length)


def _read(connection: socket.socket, num_bytes: int) -> bytes:
    """Exactly ``num_bytes`` bytes; the process ends if the parent is gone."""
    data = bytearray()
    while len(data) < num_bytes:
        part = connection.recv(num_bytes - len(data))
        if not part:
            os._exit(0)
        data += part
    return bytes(data)


def _answer(request: bytes, connection: socket.socket, shared: _SharedMemory) -> None:
    views: list[memoryview] = []
    try:
        function, args, kwargs, limit_seconds = pickle.loads(request)  # noqa: S301  from our own parent
        # by the kernel, should the parent be gone and the decoder hang without letting Python run
        signal.setitimer(signal.ITIMER_REAL, limit_seconds)
        try:
            result = function(*args, **kwargs)
            payload = to_text(result, views)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            _close_given()
    except Exception as error:  # noqa: BLE001  nothing is swallowed: the parent raises it
        views.clear()
        payload = error_to_text(error, "".join(traceback.format_exception(error)))
    sizes = [view.nbytes for view in views]
    shared.reserve(sum(map(aligned, sizes)))
    for view, offset in zip(views, accumulate(map(aligned, sizes), initial=0), strict=False):
        shared.write(view, offset)
    connection.sendall(HEADER.pack(len(sizes), len(payload)) + struct.pack(f"<{len(sizes)}Q", *sizes) + payload)


def _close_given() -> None:
    global _file
    if _file is not None:
        _file.close()
        _file = None
    for fd in given_descriptors():
        os.close(fd)


def aligned(num_bytes: int) -> int:
    """The size of an array with the gap up to the next one."""
    return -(-num_bytes // 64) * 64


class _SharedMemory:
    """Shared memory of child and parent; it stays as large as the largest answer."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._fd = -1
        self._num_bytes = 0

    def reserve(self, num_bytes: int) -> None:
        """Make room, by asking the parent for memory where there is too little."""
        if num_bytes <= self._num_bytes:
            return
        if self._fd >= 0:
            os.close(self._fd)
        self._connection.sendall(HEADER.pack(WANTS_MEMORY, num_bytes))
        size, (self._fd,), _, _ = socket.recv_fds(self._connection, NUMBER.size, 1)
        [self._num_bytes] = NUMBER.unpack(size)

    def write(self, view: memoryview, offset: int) -> None:
        """Write an array."""
        while view:
            count = os.pwrite(self._fd, view, offset)
            view, offset = view[count:], offset + count


if __name__ == "__main__":
    from vidshard.pipeline.video.child import (
        begin as begin_here,  # by its importable name, whose variables the functions see
    )

    begin_here(int(sys.argv[1]), int(sys.argv[2]), cast(Role, sys.argv[3]), int(sys.argv[4]))
