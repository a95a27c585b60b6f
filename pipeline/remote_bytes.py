"""Bytes of remote videos for confined decoders: a process of its own holds network and credentials, and runs no FFmpeg.

The decoder's process gets an open descriptor and nothing else: that of a memory file with the whole content of a small
video, or one end of a pair of sockets over which it asks for ranges of a large one (``pipeline.video.byte_ranges``).
The process that fetches keeps the connections, retries and caches of ``pipeline.storage``, and reports failures of the
storage to the worker by itself, so that no decoder can claim an outage.

Cost: a process of 90 MB for each worker that meets a remote file, started in 0.8 s.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO, cast

from vidshard.pipeline import storage
from vidshard.pipeline.unchanged import refuse_changed
from vidshard.pipeline.video.byte_ranges import Allowance, Served, serve_ranges
from vidshard.pipeline.video.child import given_descriptors
from vidshard.pipeline.video.input_file import open_file
from vidshard.pipeline.video.sandbox import ChildProcess
from vidshard.schemas.errors import OutageError
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Limits

FETCH_TIMEOUT_SECONDS = 120.0 + storage.RETRY_SECONDS
"""Time limit for opening a remote file, or fetching it whole, including retries of slow object stores."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


_MEANINGLESS = frozenset({"_", "PWD", "OLDPWD", "SHLVL", "PYTEST_CURRENT_TEST"})
"""Variables of the environment that change often, and that no client of a storage reads."""


def fetching_process(memory_bytes: int) -> ChildProcess:
    """The process of this worker that fetches, started at its first remote file and reused for later ones.

    It has the environment of its start. Once this process's environment is another one, as after credentials were set
    in a notebook, a new process takes its place.
    """
    environment = frozenset(item for item in os.environ.items() if item[0] not in _MEANINGLESS)
    return _fetching_process(memory_bytes, environment)


@lru_cache(maxsize=2)
def _fetching_process(memory_bytes: int, _environment: frozenset[tuple[str, str]]) -> ChildProcess:
    return ChildProcess(role="fetch", memory_limit_bytes=memory_bytes)


def forget_fetching_processes() -> None:
    """Start new processes from now on, with new connections."""
    _fetching_process.cache_clear()


@contextmanager
def remote_file(uri: str, limits: Limits, fingerprint: str | None = None) -> Iterator[BinaryIO | socket.socket]:
    """Open a remote file for a decoder's process.

    Args:
        uri: a URL.
        limits: the run's, for the memory of the process that fetches and the web servers it may connect to.
        fingerprint: state of the file when it was planned; None to skip the check.

    Yields:
        What the decoder's process is to be given: something with a descriptor.

    Raises:
        VideoError: UNREADABLE: the storage refused. CHANGED: it is another file than was planned. DECODER_CRASHED: the
            decoder asked for what none asks, or the process that fetches died. DECODE_TIMEOUT: it did not answer.
        OutageError: the storage does not answer.
    """
    fetching = fetching_process(limits.memory_bytes)
    ours, theirs = socket.socketpair()
    memory = open(os.memfd_create("video", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "r+b", buffering=0)  # noqa: SIM115
    with ours, theirs, memory:
        number = fetching.run(
            _begin,
            uri,
            limits.private_hosts,
            fingerprint,
            timeout_seconds=FETCH_TIMEOUT_SECONDS,
            files=(theirs, memory),
        )
        theirs.close()
        if number is None:
            memory.seek(0)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
            yield memory
            return
        failed = True
        try:
            yield ours
            failed = False
        finally:
            ours.close()
            fetching.run(_finish, number, failed, timeout_seconds=FETCH_TIMEOUT_SECONDS)


# In the process that fetches.


@dataclass(slots=True)
class _Serving:
    """A file that is being served."""

    uri: str
    fingerprint: str | None
    client: socket.socket
    served: Served
    thread: threading.Thread


_serving: dict[int, _Serving] = {}
_numbers = itertools.count(os.getpid() << 32)  # a file of a process that died is no other one's

_PATIENCE_SECONDS = 1.0
"""Seconds that a read of the storage may go on after its decoder has ended; it is left to itself then."""


def _begin(uri: str, private_hosts: tuple[str, ...] | None, fingerprint: str | None) -> int | None:
    """Open a file; write it into the memory file that was given, or begin to serve its ranges over the socket.

    Returns:
        The number of the file that is served, for ``_finish``; None where all of it is in the memory file.
    """
    socket_fd, memory_fd = given_descriptors()
    with socket.socket(fileno=socket_fd) as client, open(memory_fd, "r+b", buffering=0) as memory:
        storage.restrict_addresses(private_hosts)
        if fingerprint is not None:
            refuse_changed(uri, fingerprint)
        file = open_file(uri, storage.open_video)
        if not isinstance(file, storage.RemoteVideo):
            content = memoryview(file.read())
            while content:
                content = content[memory.write(content) :]
            return None
        number = next(_numbers)
        served = Served(Allowance.of(file.num_bytes))
        end = client.dup()
        thread = threading.Thread(target=_serve, args=(end, file, served), daemon=True)
        _serving[number] = _Serving(uri, fingerprint, end, served, thread)
        thread.start()
        return number


def _serve(client: socket.socket, file: storage.RemoteVideo, served: Served) -> None:
    with client, file:
        serve_ranges(client, cast(BinaryIO, file), file.num_bytes, served)


def _finish(number: int, failed: bool) -> None:
    """End the serving of a file.

    Args:
        failed: whether decoding failed anyway, so that the file is not asked whether it changed.

    Raises:
        VideoError: CHANGED, DECODER_CRASHED: it asked for what no decoder asks.
        OutageError: the storage does not answer.
        Exception: what else went wrong with the file, other than an error of reading, which the decoder was told.
    """
    serving = _serving.pop(number, None)
    if serving is None:
        raise VideoError(Reason.UNREADABLE, "the process that fetches its bytes died meanwhile")
    with suppress(OSError):
        serving.client.shutdown(socket.SHUT_RDWR)
    serving.thread.join(_PATIENCE_SECONDS)
    served = serving.served
    if served.refused:
        raise VideoError(
            Reason.DECODER_CRASHED, f"the decoding process asked for what no decoder asks: {served.refused}"
        )
    if isinstance(served.error, OutageError) or (served.error is not None and not isinstance(served.error, OSError)):
        raise served.error
    if serving.fingerprint is not None and not failed:
        refuse_changed(serving.uri, serving.fingerprint)  # it was read in parts
