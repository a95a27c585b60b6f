"""Processes of the sandbox: starting an interpreter, forking confined children of one, and ending them.

A process here is what ``subprocess.Popen`` is to its caller: an id, and ways to kill it, look at it and wait for it.
"""

from __future__ import annotations

import math
import os
import pickle
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from vidshard.pipeline.video.child import FORK, GRACE_SECONDS, NUMBER, REQUEST, WAIT, Role

R = TypeVar("R")


class Process(Protocol):
    """Interface of a child, as of ``subprocess.Popen``."""

    @property
    def pid(self) -> int:
        """Process id."""
        ...

    def kill(self) -> None:
        """Send SIGKILL; nothing where it has ended."""
        ...

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Exit code once it has ended; raises ``subprocess.TimeoutExpired``."""
        ...


class ForkingProcess:
    """The process of which confined children are forks: an interpreter with all modules, which sees no video."""

    def __init__(self, memory_limit_bytes: int | None) -> None:
        """Start it; the limit is of its forks."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = started(theirs, memory_limit_bytes, "confined")
        except BaseException:
            ours.close()
            raise
        self._socket = ours
        self.end = weakref.finalize(self, end_process, process, ours)

    def fork(self, connection: socket.socket, request: bytes, deadline: float) -> Fork:
        """Fork a child that serves a connection, with the modules loaded that its first request needs.

        Raises:
            ConnectionError: this process is dead.
            TimeoutError: it had no answer by the deadline.
        """
        return Fork(self, self._ask(FORK, request, deadline, [connection.fileno()]))

    def exit_code(self, pid: int) -> int:
        """The exit code of a child that has ended, negative for a signal."""
        with suppress(OSError):
            return self._ask(WAIT, pid, time.monotonic() + GRACE_SECONDS)
        return -signal.SIGKILL  # it ended with this process

    def _ask(self, command: str, value: object, deadline: float, fds: Sequence[int] = ()) -> int:
        request = pickle.dumps((command, value))
        self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
        socket.send_fds(self._socket, [REQUEST.pack(len(request), len(fds))], fds)
        self._socket.sendall(request)
        answer = self._socket.recv(NUMBER.size, socket.MSG_WAITALL)
        if len(answer) < NUMBER.size:
            raise ConnectionResetError
        return int(NUMBER.unpack(answer)[0])


class Fork:
    """A confined child. Its parent keeps its process id from being another's until it is asked for the exit code."""

    def __init__(self, forks: ForkingProcess, pid: int) -> None:
        """Take over a fork by its process id."""
        self.pid = pid
        self._forks = forks
        self._code: int | None = None
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError:  # a kernel before 5.3
            self._pidfd = -1

    def kill(self) -> None:
        """Send SIGKILL; nothing where it has ended."""
        if self._code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Exit code once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not ended in these seconds.
        """
        if self._code is not None:
            return self._code
        if self._pidfd < 0:
            if timeout == 0:
                raise subprocess.TimeoutExpired("decoder", timeout)
            self.kill()
        else:
            ended = select.poll()
            ended.register(self._pidfd, select.POLLIN)
            if not ended.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired("decoder", timeout or 0)
            os.close(self._pidfd)
        self._code = self._forks.exit_code(self.pid)
        return self._code


def started(connection: socket.socket, memory_limit_bytes: int | None, role: Role) -> subprocess.Popen[bytes]:
    """Start an interpreter that serves a connection; the kernel ends it with this process."""
    return _from_lasting_thread(lambda: _start(connection.fileno(), memory_limit_bytes, role))


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
            "JE_ARROW_MALLOC_CONF": "background_thread:false",  # Arrow's; a fork would lack it
        },
        process_group=0,  # a terminal's Ctrl-C is for the parent, which decides
    )


def _is_harmless(name: str) -> bool:
    """Whether an environment variable is one that a confined child needs; credentials are in others."""
    names = {"PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHASHSEED"}
    return name in names or name.startswith(("LC_", "MALLOC_", "OMP_", "COV_", "COVERAGE_"))


def processor_seconds(pid: int) -> float:
    """Processor time that a process has used; infinite where it cannot be told."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # as clock_getcpuclockid makes it
    except OSError:
        return math.inf


def end_process(process: Process, connection: socket.socket) -> None:
    """Kill a process, wait for it and close its connection."""
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
