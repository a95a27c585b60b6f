"""Resources of the stages of a run, which ``pipeline.flow`` passes to Ray."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResources:
    """Number of workers of each stage, and the amount of work per call."""

    encode_workers: int
    gpus_per_worker: float
    """GPUs reserved for each encoder, or a fraction of one; 0 without GPUs."""
    cpus_per_worker: float
    """CPUs reserved for each encoder; 0 on a GPU."""
    decode_workers: int | None
    """Largest number of decode tasks at once; None for no limit but the CPUs."""
    rows_per_task: int
    """Spans per decode task."""
    rows_per_batch: int
    """Spans per call of an encoder, which batches their clips."""
