"""Measurement of one implementation's pass, in this process or in one with other settings of the allocator.

glibc reads the settings of its allocator when a process starts, so an implementation with other settings runs in a
process of its own (`Elsewhere`).
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vidshard.pipeline.devices import make_reproducible
from vidshard.pipeline.flow import ENCODER_ENVIRONMENT

Passes = dict[str, Callable[[], Tensor]]
"""Passes of an implementation by direction, "encode" and "decode"."""
Build = Callable[[], Passes]
"""Function that makes an implementation; it can be pickled."""


class Measured(NamedTuple):
    """Result of one pass."""

    milliseconds: float
    """On the clock."""
    cpu_milliseconds: float
    """CPU time of all threads of the process."""
    peak_bytes: int
    """Peak of the memory held, above that held before; it means nothing unless the pass was run anew."""
    output: Tensor
    """float32, on the CPU if the pass ran in another process."""


@dataclass(kw_only=True)
class Contender:
    """One implementation of one direction, and its figures so far."""

    name: str
    run: Callable[[], Measured]
    """Runs a pass, with the memory that the process has kept from earlier ones."""
    run_anew: Callable[[], Measured]
    """The same after all free memory went back to the system, so that the peak of this pass can be told."""
    milliseconds: list[float] = field(default_factory=list)
    cpu_milliseconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    output: Tensor | None = None

    def prepare(self) -> None:
        """Run two passes: the first chooses kernels and loads libraries, the second tells the memory."""
        self.run()
        self.peak_bytes = self.run_anew().peak_bytes

    def take_turn(self) -> None:
        """Measure the time of one pass."""
        self.output = None
        measured = self.run()
        self.milliseconds.append(measured.milliseconds)
        self.cpu_milliseconds.append(measured.cpu_milliseconds)
        self.output = measured.output


def measured(run: Callable[[], Tensor], device: str, *, anew: bool) -> Measured:
    """Run a pass in this process.

    Args:
        run: the pass.
        device: "cpu" or "cuda".
        anew: give free memory back to the system first. The pass then fetches all of it again, so its time is not
            that of a pass in a job: on a virtual machine it was 11.0 s instead of 7.6.
    """
    gc.collect()
    before = _reset_peak(device) if anew else 0
    start, cpu_start = time.perf_counter(), time.process_time()
    output = run()
    if device == "cuda":
        torch.cuda.synchronize()
    cpu_milliseconds = (time.process_time() - cpu_start) * 1000
    milliseconds = (time.perf_counter() - start) * 1000
    return Measured(milliseconds, cpu_milliseconds, _read_peak(device) - before, output.float())


class Elsewhere:
    """Process that runs an implementation as a plain script would: without the job's settings of the allocator."""

    def __init__(self, build: Build) -> None:
        """Start the process.

        Args:
            build: function that makes the implementation there.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # A daemon ends with this process.
        process = context.Process(target=_serve, args=(theirs, build, torch.get_num_threads()), daemon=True)
        kept = {name: os.environ.pop(name) for name in ENCODER_ENVIRONMENT if name in os.environ}
        try:
            process.start()  # the new process reads its environment now
        finally:
            os.environ.update(kept)
        theirs.close()

    def measure(self, direction: str, *, anew: bool) -> Measured:
        """Run a pass there, as `measured` does.

        Raises:
            EOFError: the process died.
        """
        self._connection.send((direction, anew))
        milliseconds, cpu_milliseconds, peak_bytes, output = self._connection.recv()
        return Measured(milliseconds, cpu_milliseconds, peak_bytes, torch.from_numpy(output))


def _serve(connection: Connection, build: Build, num_threads: int) -> None:
    torch.set_grad_enabled(False)
    make_reproducible("cpu", num_threads)
    passes: Mapping[str, Callable[[], Tensor]] = build()
    while True:
        try:
            direction, anew = connection.recv()
        except EOFError:
            return
        *figures, output = measured(passes[direction], "cpu", anew=anew)
        connection.send((*figures, output.numpy()))


def _reset_peak(device: str) -> int:
    """Return freed memory to the system and reset the peak; gives the bytes held now."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _read_peak(device: str) -> int:
    """Peak of the bytes held since `_reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
