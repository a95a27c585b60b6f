"""Speed of this machine at present, other programs included: what makes a forecast comparable with a later run.

A fixed computation runs on all cores for a moment, again and again. A forecast that was made while the machine had
twice the speed is half the time of a run, and the comparison says so.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from types import TracebackType
from typing import Self

from vidshard.jobs.runtime.executor import Executor

_BLOCK = bytes(256 << 10)


class SpeedWatch:
    """Takes samples of the machine's speed in a thread of its own, as a context manager.

    Args:
        every_seconds: time between samples.
        sample_seconds: length of a sample; its share of the time is taken from the work that is measured.
    """

    def __init__(self, every_seconds: float, sample_seconds: float = 0.1) -> None:
        self._every = every_seconds
        self._length = sample_seconds
        self._samples: list[float] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vidshard-speed", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    @property
    def speed(self) -> float | None:
        """Mean of the samples, in bytes per second of all cores together; None before the first one."""
        return sum(self._samples) / len(self._samples) if self._samples else None

    def _watch(self) -> None:
        while True:
            self._samples.append(machine_speed(self._length))
            if self._end.wait(self._every):
                return


def is_one_machine(executor: Executor) -> bool:
    """Whether all work happens on the machine whose speed a `SpeedWatch` takes."""
    return executor.num_nodes == 1 and executor.num_gpus == 0


def machine_speed(seconds: float) -> float:
    """Bytes per second that all cores together hash, for so many seconds."""
    started = time.perf_counter()
    counts = [0] * len(os.sched_getaffinity(0))

    def hash_blocks(core: int) -> None:
        while time.perf_counter() - started < seconds:
            hashlib.sha256(_BLOCK)  # which lets other threads run
            counts[core] += 1

    threads = [threading.Thread(target=hash_blocks, args=(core,), daemon=True) for core in range(len(counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) * len(_BLOCK) / (time.perf_counter() - started)
