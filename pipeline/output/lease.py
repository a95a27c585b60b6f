"""One run at a time on an output: a lease in files that any storage can hold.

    lease/000001.json, lease/000002.json, ...

Whoever creates the next number holds the lease (``storage.create_exclusive``: of two that try, one does) and renews
it by writing its own file again, every sixth of its time. A run that finds a lease which was not given back watches
the file: if it changes, its holder is alive, and the run is refused; if it does not for the whole time, its holder is
dead, and the run creates the next number. Nobody compares clocks of two machines. On the machine of the holder its
process is looked for instead, so that a killed run is gone on with at once.

A holder that was asleep (a suspended machine, a stopped process) finds out before its next write that there is a
higher number: :meth:`Lease.check`. Between that look and the end of the write lie milliseconds in which it could
still write one more file; a span that is in two shards for that reason is taken out of one by the next run
(``pipeline.output.committed``).
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
_CHECK_SECONDS = 5.0


class LeaseHeldError(VidshardError):
    """Another run is at work on the output; the message says which."""


class LeaseLostError(VidshardError):
    """Another run has taken over the output, or this one could not show that it is alive."""

    exit_code = EXIT_FAILED


@dataclass(frozen=True, kw_only=True)
class Holder:
    """What a lease says of the process that holds it."""

    token: str
    """Unlike any other's."""
    host: str
    pid: int
    machine: str
    """Of one boot of one machine, and one space of process ids on it; empty where that cannot be told."""
    process: str
    """When the process started, in the machine's own terms."""
    started_at: str
    """For people."""
    beat: int = 0
    """Raised at each renewal."""
    released: bool = False

    @classmethod
    def of_this_process(cls) -> Holder:
        """A new one."""
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_machine(),
            process=_process_start(os.getpid()),
            started_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )

    def to_bytes(self) -> bytes:
        """As it stands in the file."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def of_bytes(cls, data: bytes) -> Holder | None:
        """None if that is no lease: whoever wrote it is not one of us, or died on the way."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None

    @property
    def is_known_dead(self) -> bool:
        """Whether it was a process of this machine, which is gone."""
        return bool(self.machine) and self.machine == _machine() and _process_start(self.pid) != self.process


def _machine() -> str:
    """One boot of one machine, and the process ids' name space."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _process_start(pid: int) -> str:
    """When a process of this machine started, in clock ticks since the boot; empty if there is none."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


class Lease:
    """Held while it is entered."""

    def __init__(self, folder: str, number: int, holder: Holder, ttl_seconds: float) -> None:
        """Use :meth:`acquire`."""
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
            ttl_seconds: a holder that showed no life for so long is dead; how long finding that out may take.
            on_wait: told why it takes long.

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
            # somebody was faster: the same again, with that one's lease

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Give it back, so that the next run need not wait."""
        self._stop.set()
        self._renewer.join()
        if self._lost is None:
            with suppress(storage.StorageError):
                self._look()
                if self._lost is None:
                    self._write(replace(self._holder, released=True))

    def check(self, *, now: bool = True) -> None:
        """Make sure that it is still held.

        Args:
            now: look at the storage; otherwise only if that was done more than five seconds ago.

        Raises:
            LeaseLostError: it is not; nothing may be written any more.
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
            with suppress(storage.StorageError):  # the next turn tries again; check() looks by itself
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
    """Return when whoever holds this lease has given it back, or is dead.

    Raises:
        LeaseHeldError: it is alive.
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
