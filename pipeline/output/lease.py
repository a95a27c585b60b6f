"""Lease: one run at a time on an output, by files that any storage can hold.

    lease/000001.json, lease/000002.json, ...

A run takes the lease by creating the file of the next number (``storage.create_exclusive``: of two runs that try, one
succeeds). It renews the lease by rewriting that file, every sixth of its time. A run that finds a lease not given back
watches the file. If the file changes, the holder is alive and the run is refused. If it does not change for the whole
time, the holder is dead and the run creates the next number. The time is the larger of the holder's own, which stands
in the file, and of the run's. No clocks of two machines are compared. On the machine of the holder its process is
looked for instead, so that a killed run is followed at once. A process that cannot be seen (``hidepid``, another user,
another namespace) is not taken for dead: its file is watched.

A holder that was asleep (a suspended machine, a stopped process) notices a higher number before its next write
(:meth:`Lease.check`). In the milliseconds between that check and the end of the write it could still write one more
file; a span that is in two shards for that reason leaves one of them in the next run (``pipeline.output.resume``).
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import LEASES
from vidshard.schemas.errors import EXIT_AGAIN, VidshardError
from vidshard.schemas.text import readable

_KEPT = 3
"""Former leases that stay, for people to look at."""
_UNSTATED_TTL_SECONDS = 60.0
"""Time to live of leases that do not state theirs, by versions that had this default."""
_MAX_TTL_SECONDS = 7 * 86400.0
"""Longest time to live that is believed."""
_MAX_LEASE_BYTES = 1 << 16
_CHECK_SECONDS = 5.0
"""Seconds for which a check of the storage counts, where the caller allows that."""


class LeaseHeldError(VidshardError):
    """Another run is at work on the output; the message names it."""


class LeaseLostError(VidshardError):
    """Another run has taken over the output, or this one could not show that it is alive."""

    exit_code = EXIT_AGAIN


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lease, as the file describes it."""

    token: str
    """Random, unique to this lease."""
    host: str
    pid: int
    machine: str
    """Id of the machine's boot and of the process ids' namespace; empty where the system does not tell them."""
    process: str
    """Start time of the process, in clock ticks since the boot."""
    started_at: str
    """UTC, ISO 8601, for people."""
    beat: int = 0
    """Number of renewals."""
    released: bool = False
    """Whether the holder gave the lease back."""
    ttl_seconds: float | None = None
    """Seconds without a renewal after which the holder is dead; None in leases of versions that did not state it."""

    def __post_init__(self) -> None:
        texts = (self.token, self.host, self.machine, self.process, self.started_at)
        if not all(isinstance(text, str) for text in texts) or type(self.pid) is not int or type(self.beat) is not int:
            raise ValueError("a lease holds text, an integer process id and an integer beat")
        if type(self.released) is not bool:
            raise ValueError(f"released must be true or false, got {self.released!r}")
        if self.ttl_seconds is not None and not 0 < float(self.ttl_seconds) <= _MAX_TTL_SECONDS:
            raise ValueError(f"ttl_seconds must lie in (0, {_MAX_TTL_SECONDS:g}], got {self.ttl_seconds}")

    @classmethod
    def of_this_process(cls, ttl_seconds: float | None = None) -> Holder:
        """Make the holder for a new lease of this process, with its time to live."""
        return cls(
            ttl_seconds=None if ttl_seconds is None else min(ttl_seconds, _MAX_TTL_SECONDS),
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_machine(),
            process=_process_start(os.getpid()) or "",
            started_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )

    def to_bytes(self) -> bytes:
        """Encode it as JSON, as in the file."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def of_bytes(cls, data: bytes) -> Holder | None:
        """Decode it; None if the file holds no lease, written by another program or by one that died meanwhile.

        Values that this version does not know are left out.
        """
        names = {field.name for field in fields(cls)}
        try:
            return cls(**{name: value for name, value in json.loads(data).items() if name in names})
        except (ValueError, TypeError, AttributeError, RecursionError):
            return None

    @property
    def is_alive(self) -> bool | None:
        """Whether the holder's process is alive; None where that cannot be seen from here.

        It can be seen on the same host, in the same boot and namespace of process ids, where ``/proc`` shows the
        process, or the kernel says that there is no process of that id.
        """
        here = bool(self.machine) and self.machine == _machine() and self.host == socket.gethostname()
        if not here or not self.process or self.pid <= 0:
            return None
        start = _process_start(self.pid)
        return None if start is None else start == self.process


def _machine() -> str:
    """Id of the machine's boot and of the process ids' namespace; empty where the system does not tell them."""
    with suppress(OSError):
        if os.readlink("/proc/self") != str(os.getpid()):
            return ""  # a /proc of another namespace, which counts processes otherwise
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _process_start(pid: int) -> str | None:
    """Start time of a process of this machine, in clock ticks since the boot.

    Returns:
        The time; empty if there is certainly no such process, or it has ended; None if it may be there but cannot be
        seen, as with ``/proc`` mounted with ``hidepid``.
    """
    with suppress(OSError, IndexError, UnicodeDecodeError):
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if stat[0] in "ZX" else stat[19]
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return ""
    except (OSError, OverflowError):
        return None  # EPERM: it is there, and another user's
    return None


_held: set[Lease] = set()


def release_held_leases() -> None:
    """Give back every lease that this process holds, before it ends out of order."""
    for lease in tuple(_held):
        with suppress(Exception):  # what cannot be given back expires
            lease.release()


class Lease:
    """The lease of an output, a context manager: held until its exit. A thread renews it."""

    def __init__(self, folder: str, number: int, holder: Holder, ttl_seconds: float) -> None:
        """Start to renew a lease that was just taken; use :meth:`acquire`."""
        self._folder, self._number, self._holder, self._ttl_seconds = folder, number, holder, ttl_seconds
        self._lost: str | None = None
        self._checked = time.monotonic()
        self._stop = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewer.start()
        _held.add(self)

    @classmethod
    def acquire(
        cls, out: str, *, ttl_seconds: float = 60.0, on_wait: Callable[[str], object] = lambda _text: None
    ) -> Lease:
        """Take the lease of an output.

        Args:
            out: the output.
            ttl_seconds: a holder that renewed nothing for so long, or for its own time to live where that is longer,
                is dead; finding that out may take as long.
            on_wait: called with the reason when that wait begins.

        Raises:
            LeaseHeldError: another run is alive.
            storage.StorageError: the output could not be reached.
        """
        folder = storage.join(out, LEASES)
        while True:
            paths = storage.list_files(folder, ".json")
            latest = max((_number(path) for path in paths), default=0)
            if latest:
                _make_sure_it_is_over(_path(folder, latest), ttl_seconds, on_wait)
            holder = Holder.of_this_process(ttl_seconds)
            if storage.create_exclusive(_path(folder, latest + 1), holder.to_bytes()):
                for path in paths:
                    if _number(path) <= latest - _KEPT:
                        storage.remove(path)
                return cls(folder, latest + 1, holder, ttl_seconds)
            # another run was faster: try again, against its lease

    @property
    def number(self) -> int:
        """Number of this lease; later leases of the output have higher ones."""
        return self._number

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Give the lease back, so that the next run need not wait."""
        self._stop.set()
        self._renewer.join()
        _held.discard(self)
        if self._lost is None:
            with suppress(storage.StorageError):
                self._look()
                if self._lost is None:
                    self._write(replace(self._holder, released=True))

    def check(self, *, now: bool = True) -> None:
        """Make sure that the lease is still held.

        Args:
            now: ask the storage in any case; otherwise only if that was done more than five seconds ago.

        Raises:
            LeaseLostError: it is held no more; nothing may be written.
            storage.StorageError: the storage cannot be asked.
        """
        if self._lost is None and (now or time.monotonic() - self._checked > _CHECK_SECONDS):
            self._look()
        if self._lost is not None:
            raise LeaseLostError(self._lost)

    def _look(self) -> None:
        numbers = [_number(path) for path in storage.list_files(self._folder, ".json")]
        self._checked = time.monotonic()
        if max(numbers, default=0) > self._number:
            self._lost = (
                "another run has taken over this output, as this one gave no sign of life; nothing more is written"
            )
        elif self._number not in numbers:
            self._lost = f"the lease of this run in {self._folder} was removed; nothing more is written"

    def _renew(self) -> None:
        while not self._stop.wait(self._ttl_seconds / 6):
            with suppress(storage.StorageError):  # the next turn tries again; check() asks the storage by itself
                self._look()
                if self._lost is not None:
                    return
                self._holder = replace(self._holder, beat=self._holder.beat + 1)
                self._write(self._holder)

    def _write(self, holder: Holder) -> None:
        storage.write_atomic(_path(self._folder, self._number), holder.to_bytes())


def _path(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:06d}.json")


def _number(path: str) -> int:
    name = path.rsplit("/", 1)[-1].split(".")[0]
    return int(name) if name.isascii() and name.isdigit() else 0


def _make_sure_it_is_over(path: str, ttl_seconds: float, on_wait: Callable[[str], object]) -> None:
    """Return when the holder of a lease has given it back or is dead.

    Raises:
        LeaseHeldError: the holder is alive.
    """
    first = storage.read_bytes(path, max_bytes=_MAX_LEASE_BYTES)
    holder = Holder.of_bytes(first)
    if holder is not None and (holder.released or holder.is_alive is False):
        return
    who = "another run" if holder is None else f"another run ({readable(holder.host)}, process {holder.pid})"
    if holder is not None and holder.is_alive:
        raise LeaseHeldError(
            f"{who} is at work on this output since {readable(holder.started_at)}: wait for its end, or stop it; the "
            "same command then goes on where it ended"
        )
    if holder is not None:
        ttl_seconds = max(ttl_seconds, holder.ttl_seconds or _UNSTATED_TTL_SECONDS)
    on_wait(f"{who} was at work on this output and did not end in order: watching for {ttl_seconds:g} s if it is alive")
    deadline = time.monotonic() + ttl_seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, ttl_seconds / 10))
        now = storage.read_bytes(path, max_bytes=_MAX_LEASE_BYTES)
        if now != first:
            holder = Holder.of_bytes(now)
            if holder is not None and holder.released:
                return
            raise LeaseHeldError(
                f"{who} is at work on this output and alive: wait for its end, or stop it; the same command then goes "
                "on where it ended"
            )
