"""Watch of the Ray processes that a driver needs: raylet and GCS, of a Ray of our own or of a joined cluster.

Ray itself notices after 15 to 60 seconds, or with its next use of the object store, and then ends this process without
a word of what to do. So the kernel wakes this watch when a process on this machine ends, and what to do is said first.

The processes of an own Ray are children. Those of a joined cluster are known by their sockets: a connection to each is
held, which the kernel closes when the process ends. Losing it costs a new connection; only a refusal tells that nobody
listens.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Protocol

import ray

from vidshard.jobs.runtime.errors import print_error
from vidshard.schemas.errors import RunCutShortError, VidshardError

_WATCHING_SECONDS = 0.5
_RESTING_SECONDS = 0.05
_CONNECTING_SECONDS = 2.0
REFUSED_SECONDS = 3.0
"""Seconds that a GCS may refuse connections before it is dead."""
RESTART_SECONDS = 60.0
"""The same for a GCS whose state lies outside of it (Redis), which a supervisor starts again; Ray waits as long."""
SILENT_SECONDS = 30.0
"""Seconds that an address may give no answer at all, as in a network that is gone for a moment."""


class RayDiedError(RunCutShortError):
    """A process of Ray ended without which this run cannot go on."""

    has_lost_workers = True
    is_printed = True


class Watched(Protocol):
    """A process that a driver needs."""

    @property
    def descriptor(self) -> int | None:
        """A file descriptor that can be read once the process ends, or earlier; None for none."""
        ...

    def death(self) -> str | None:
        """Describe its end, as the start of a sentence; None while it lives."""
        ...

    def close(self) -> None:
        """Give back what the watch holds."""
        ...


class ChildProcess:
    """A process of an own Ray."""

    def __init__(self, name: str, process: subprocess.Popen[bytes]) -> None:
        self._name, self._process = name, process
        self.descriptor: int | None = None
        with suppress(OSError):  # it ended, or this kernel has no such descriptors
            self.descriptor = os.pidfd_open(process.pid)

    def death(self) -> str | None:
        """Describe its end by its exit code or signal."""
        code = self._process.poll()
        if code is None:
            return None
        if code >= 0:
            cause = f"with exit code {code}"
        else:
            cause = f"by {signal.Signals(-code).name if -code in set(signal.Signals) else f'signal {-code}'}"
            cause += ", perhaps as the machine was out of memory" if -code == signal.SIGKILL else ""
        return f"Ray's process {self._name} ended ({cause})"

    def close(self) -> None:
        """Close the descriptor."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class Listener:
    """A process of a joined cluster, known by the address on which it listens."""

    def __init__(self, name: str, connect: Callable[[], socket.socket], refused_seconds: float) -> None:
        """Start to watch; the first connection is made by the first call of :meth:`death`.

        Args:
            name: name of the process in messages.
            connect: makes a connection, or raises OSError.
            refused_seconds: seconds of refused connections after which the process is dead.
        """
        self._name, self._connect, self._refused_seconds = name, connect, refused_seconds
        self._connection: socket.socket | None = None
        self._failing_since: float | None = None

    @property
    def descriptor(self) -> int | None:
        """That of the connection."""
        return None if self._connection is None else self._connection.fileno()

    def death(self) -> str | None:
        """Look at the connection that is held, and make a new one if it was closed."""
        if self._connection is not None and self._is_open():
            return None
        self.close()
        try:
            self._connection = self._connect()
        except OSError as error:
            now = time.monotonic()
            self._failing_since = self._failing_since or now
            is_refused = isinstance(error, ConnectionRefusedError | FileNotFoundError)
            if now - self._failing_since >= (self._refused_seconds if is_refused else SILENT_SECONDS):
                return f"Ray's process {self._name} does not live any more, or cannot be reached ({error})"
        else:
            self._failing_since = None
            self._connection.setblocking(False)
        return None

    def _is_open(self) -> bool:
        assert self._connection is not None
        try:
            return bool(self._connection.recv(1 << 16))  # a GCS greets; nothing else is ever said
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def processes_of_own_ray() -> list[Watched]:
    """Raylet and GCS that ``ray.init`` has started from this process."""
    started = getattr(ray._private.worker._global_node, "all_processes", {})
    return [ChildProcess(name, info.process) for name in ("gcs_server", "raylet") for info in started.get(name, [])]


def processes_of_joined_ray() -> list[Watched]:
    """The raylet of this machine and the GCS of the cluster that ``ray.init`` has joined."""
    node = ray._private.worker._global_node
    if node is None:  # Ray's client mode, whose connection reports its own end
        return []
    gcs_address = node.gcs_address
    restarts = _gcs_storage() not in ("memory", None)
    return [
        Listener("raylet on this machine", partial(_connect_local, node.raylet_socket_name), 0.0),
        Listener(
            f"gcs_server at {gcs_address}, the cluster's head,",
            partial(_connect_remote, gcs_address),
            RESTART_SECONDS if restarts else REFUSED_SECONDS,
        ),
    ]


def _gcs_storage() -> str | None:
    """Place of the GCS's state as the head has noted it, "memory" as a rule; None where that is not known."""
    with suppress(Exception):  # a note for Ray's statistics, which no interface promises
        noted = ray.experimental.internal_kv._internal_kv_get("extra_usage_tag_gcs_storage", namespace="usage_stats")
        return None if noted is None else noted.decode()
    return None


def _connect_local(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_CONNECTING_SECONDS)
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def _connect_remote(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECTING_SECONDS)
    # a machine that is gone closes nothing: the kernel asks it after 5 s, every 2 s, five times
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 5)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection


@contextmanager
def death_noticed(
    watched: Sequence[Watched], *, remedy: str, patience_seconds: float, end: Callable[[], None]
) -> Iterator[None]:
    """Raise RayDiedError in the main thread once one of the processes has ended. Only the main thread may call this.

    The error is printed before it is raised, as Ray may end this process at any moment from then on.

    Args:
        watched: the processes.
        remedy: last sentence of the message.
        patience_seconds: time for the main thread to leave this context after that.
        end: called by the watching thread if the main thread does not.
    """
    main_thread = threading.get_ident()
    deaths: list[str] = []
    is_over = threading.Event()

    def watch() -> None:
        try:
            while not is_over.is_set():
                found = [death for each in watched if (death := each.death()) is not None]
                if found:
                    deaths.append(f"the run stopped: {found[0]}; what is committed is valid. {remedy}")
                    print_error(deaths[0])
                    signal.pthread_kill(main_thread, signal.SIGUSR1)
                    if not is_over.wait(patience_seconds):
                        end()
                    return
                is_over.wait(_RESTING_SECONDS)  # a server may close every connection at once
                _await_event(watched)
        finally:
            for each in watched:
                each.close()

    def fail(_number: int, _frame: FrameType | None) -> None:
        if deaths:
            sys.unraisablehook = partial(_report_unless_of_ray, sys.unraisablehook)
            raise RayDiedError(deaths[0])

    before = signal.signal(signal.SIGUSR1, fail)
    threading.Thread(target=watch, name="ray-watch", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        signal.signal(signal.SIGUSR1, before)


def _await_event(watched: Sequence[Watched]) -> None:
    """Wait until the kernel has news of one of the processes, at most for ``_WATCHING_SECONDS``."""
    news = select.poll()
    for each in watched:
        if each.descriptor is not None:
            news.register(each.descriptor, select.POLLIN)
    news.poll(1000 * _WATCHING_SECONDS)


def _report_unless_of_ray(report: Callable[[sys.UnraisableHookArgs], object], raised: sys.UnraisableHookArgs) -> None:
    """Report an exception of a finalizer, unless it lacks a Ray whose death has its own message."""
    if not isinstance(raised.exc_value, VidshardError | ray.exceptions.RayError):
        report(raised)
