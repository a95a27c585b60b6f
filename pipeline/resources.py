"""Resources of a run's stages, as ``pipeline.flow`` tells them to Ray."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResources:
    """Workers of each stage, and how much work each of them gets at once."""

    encode_workers: int
    gpus_per_worker: float
    """0 on machines without GPUs."""
    cpus_per_worker: float
    """CPUs kept from the other stages for each encoder; 0 where it has a GPU."""
    decode_workers: int | None
    """At most so many decoding tasks at once; None for as many as there are CPUs."""
    rows_per_task: int
    """Spans that one decoding task takes."""
    rows_per_batch: int
    """Spans whose clips an encoder batches together."""
