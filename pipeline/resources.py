"""Resources of the stages of a run, which ``pipeline.flow`` passes to Ray."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuNode:
    """Resources of a machine with GPUs."""

    node_id: str
    """Ray's id of the node; empty for this machine without Ray."""
    num_cpus: float
    num_gpus: float

    def num_encoders(self, share: float) -> int:
        """Number of encoders that fit its GPUs, if each takes this share of one: a share never spans two GPUs."""
        whole, part = divmod(self.num_gpus, 1)
        return int(whole) * int(1 / share + _ROUNDING) + int(part / share + _ROUNDING)

    def cpu_share(self, share: float) -> float:
        """CPUs for each of its encoders, at most 1, so that at least one CPU is left for decoding; perhaps 0."""
        encoders = self.num_encoders(share)
        if encoders == 0 or self.num_cpus <= 1:
            return 0.0
        return min(1.0, math.floor((self.num_cpus - 1) / encoders * 1000) / 1000)


_ROUNDING = 1e-9


def cpus_beside_decoding(threads: int, workers: int, num_cpus: int) -> float:
    """CPUs that each process with a network reserves where there is no GPU, so that one is left to decode.

    Args:
        threads: threads of each.
        workers: number of them.
        num_cpus: CPUs of all machines.

    Returns:
        A whole number or a fraction below 1, as Ray takes no other fractions.
    """
    cpus = min(max(1, threads - 1), (num_cpus - 1) / workers)
    return cpus if cpus < 1 else float(int(cpus))


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerPool:
    """Number of processes that hold a network, and what each reserves."""

    workers: int
    """The smallest number if it may change."""
    gpus_per_worker: float
    """GPUs, or a fraction of one; 0 without GPUs."""
    cpus_per_worker: float
    """CPUs, or a fraction of one, so that decoders have the others; 0 reserves none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResources:
    """Number of workers of each stage, and the amount of work per call."""

    encode_workers: int
    """Number of encoders; the smallest and first one if it may change."""
    gpus_per_worker: float
    """GPUs reserved for each encoder, or a fraction of one; 0 without GPUs."""
    cpus_per_worker: float
    """CPUs reserved for each encoder, or a fraction of one, so that decoders have the others; 0 reserves none."""
    decode_workers: int | None
    """Largest number of decode tasks at once; None for no limit but the CPUs."""
    rows_per_task: int
    """Spans per decode task."""
    rows_per_batch: int
    """Spans per call of an encoder, which batches their clips."""
    is_elastic: bool = False
    """Whether encoders are added while there is room in the cluster and work for them, and taken away without."""
    most_encode_workers: int | None = None
    """Largest number of encoders if it may change; None for as many as fit."""

    @property
    def encoders(self) -> WorkerPool:
        """The encoders."""
        return WorkerPool(
            workers=self.encode_workers, gpus_per_worker=self.gpus_per_worker, cpus_per_worker=self.cpus_per_worker
        )
