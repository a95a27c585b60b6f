"""Lease: one run at a time on an output, by files that any storage can hold.

    lease/000001.json, lease/000002.json, ...

A run takes the lease by creating the file of the next number (``storage.create_exclusive``: of two runs that try, one
succeeds). It renews the lease by rewriting that file, every sixth of its time. A run that finds a lease not given back
watches the file. If the file changes, the holder is alive and the run is refused; if it does not change for the whole
time, the holder is dead and the run creates the next number. No clocks of two machines are compared. On the machine of
the holder its process is looked for instead, so that a killed run is followed at once.

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import LEASES
from vidshard.schemas.errors import EXIT_FAILED, VidshardError

_KEPT = 3
"""Former leases that stay, for people to look at."""
_CHECK_SECONDS = 5.0
"""How long a check of the storage counts, where the caller allows that."""


class LeaseHeldError(VidshardError):
    """Another run is at work on the output; the message names it."""


class LeaseLostError(VidshardError):
    """Another run has taken over the output, or this one could not show that it is alive."""

    exit_code = EXIT_FAILED


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

    @classmethod
    def of_this_process(cls) -> Holder:
        """Make the holder for a new lease of this process."""
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_machine(),
            process=_process_start(os.getpid()),
            started_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )

    def to_bytes(self) -> bytes:
        """Encode it as JSON, as in the file."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def of_bytes(cls, data: bytes) -> Holder | None:
        """Decode it; None if the file holds no lease, written by another program or by one that died meanwhile."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None

    @property
    def is_known_dead(self) -> bool:
        """Whether the holder was a process of this machine, and has ended."""
        return bool(self.machine) and self.machine == _machine() and _process_start(self.pid) != self.process


def _machine() -> str:
    """Id of the machine's boot and of the process ids' namespace; empty where the system does not tell them."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _process_start(pid: int) -> str:
    """Start time of a process of this machine, in clock ticks since the boot; empty if there is no such process."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


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

    @classmethod
    def acquire(
        cls, out: str, *, ttl_seconds: float = 60.0, on_wait: Callable[[str], object] = lambda _text: None
    ) -> Lease:
        """Take the lease of an output.

        Args:
            out: the output.
            ttl_seconds: a holder that renewed nothing for so long is dead; finding that out may take as long.
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
            holder = Holder.of_this_process()
            if storage.create_exclusive(_path(folder, latest + 1), holder.to_bytes()):
                for path in paths:
                    if _number(path) <= latest - _KEPT:
                        storage.remove(path)
                return cls(folder, latest + 1, holder, ttl_seconds)
            # another run was faster: try again, against its lease

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Give the lease back, so that the next run need not wait."""
        self._stop.set()
        self._renewer.join()
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
    return int(name) if name.isdigit() else 0


def _make_sure_it_is_over(path: str, ttl_seconds: float, on_wait: Callable[[str], object]) -> None:
    """Return when the holder of a lease has given it back or is dead.

    Raises:
        LeaseHeldError: the holder is alive.
    """
    first = storage.read_bytes(path)
    holder = Holder.of_bytes(first)
    if holder is not None and (holder.released or holder.is_known_dead):
        return
    who = "another run" if holder is None else f"another run ({holder.host}, process {holder.pid})"
    if holder is not None and holder.machine and holder.machine == _machine():
        raise LeaseHeldError(
            f"{who} is at work on this output since {holder.started_at}: wait for its end, or stop it; the same "
            "command then goes on where it ended"
        )
    on_wait(f"{who} was at work on this output and did not end in order: watching for {ttl_seconds:g} s if it is alive")
    deadline = time.monotonic() + ttl_seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, ttl_seconds / 10))
        now = storage.read_bytes(path)
        if now != first:
            holder = Holder.of_bytes(now)
            if holder is not None and holder.released:
                return
            raise LeaseHeldError(
                f"{who} is at work on this output and alive: wait for its end, or stop it; the same command then goes "
                "on where it ended"
            )
