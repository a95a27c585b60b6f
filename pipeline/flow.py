"""The whole Ray Data graph of a tokenization run, and nothing else.

    plan.parquet ──▶ SpanDecoder ──▶ ClipEncoder ──▶ rows for the driver's TokenShardSink
     one row a span   CPU tasks        actor pool      shards/, rejects/

Every stage gives one row for each it takes. Frames cross the object store as uint8. Token rows are small (10 kB a
clip where its frames were 3.3 MB), so one process gathers them: it alone knows when a shard is full, when it is
time to commit, and what to save when the user interrupts.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from pipeline import storage
from pipeline.encode import ClipEncoder, EncoderSpec
from pipeline.stages import SpanDecoder

MAX_RETRIES = 2
"""Times that a task whose process died is tried again; Ray's own default is for ever."""

ENCODER_ENVIRONMENT = {
    # glibc hands large blocks back to the system at once and faults every page in again at the next clip. Kept, a
    # 17x128x128 clip of the tiny model takes 84 ms instead of 108 (two cores, medians of 20). One arena, as threads
    # other than the main one, which Ray's are, get arenas that cannot hold such blocks: 4.9 s instead of 7.5 for
    # fsq_causal_488_32768.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_ARENA_MAX": "1",
    # threads that spin at the end of every operator take the core that a decoder needs: 275 ms instead of 142 for
    # the same clip beside one busy process
    "OMP_WAIT_POLICY": "passive",
}
"""What an encoder's process starts with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where the stages run."""

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


def build_flow(plan: str | pa.Table, *, decoder: SpanDecoder, encoder: EncoderSpec, placement: Placement) -> Dataset:
    """The graph up to the sink, as a lazy dataset.

    Args:
        plan: its Parquet file; or its rows, where URIs carry credentials that no file may hold.
    """
    return (
        _rows_of(plan)
        # a small plan is one block to Ray, and one block is one task
        .repartition(target_num_rows_per_block=placement.rows_per_task)
        .map_batches(
            decoder,
            batch_format="pyarrow",
            batch_size=None,
            zero_copy_batch=True,
            num_cpus=1,
            compute=TaskPoolStrategy(placement.decode_workers),
            max_retries=MAX_RETRIES,
        )
        .map_batches(
            ClipEncoder,
            fn_constructor_args=(encoder,),
            batch_format="pyarrow",
            batch_size=placement.rows_per_batch,
            zero_copy_batch=True,
            num_gpus=placement.gpus_per_worker or None,
            num_cpus=placement.cpus_per_worker or None,
            compute=ActorPoolStrategy(size=placement.encode_workers),
            runtime_env={"env_vars": ENCODER_ENVIRONMENT},
            max_restarts=MAX_RETRIES,
            max_task_retries=MAX_RETRIES,
        )
    )


def _rows_of(plan: str | pa.Table) -> Dataset:
    if isinstance(plan, pa.Table):
        return ray.data.from_arrow(plan.combine_chunks())
    if storage.is_local(plan):
        return ray.data.read_parquet(plan)
    fs, inner = storage.filesystem(plan)
    return ray.data.read_parquet(inner, filesystem=fs)
