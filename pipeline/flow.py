"""The whole Ray Data graph of a tokenization run, and nothing else.

    todo.parquet ──▶ SpanDecoder ──▶ EncoderActor ──▶ rows for the driver's TokenShardSink
     one row a span   CPU tasks        actor pool      shards/, rejects/

Every stage gives one row for each it takes. Frames cross the object store as uint8. Token rows are small (10 kB a
clip where its frames were 3.3 MB), so one process gathers them: it alone knows when a shard is full, when it is
time to commit, and what to save when the user interrupts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vidshard.pipeline import storage
from vidshard.pipeline.attempts import MAX_ATTEMPTS, Attempts
from vidshard.pipeline.decode_stage import SpanDecoder, read_groups
from vidshard.pipeline.encode_stage import ClipEncoder, EncoderSpec
from vidshard.pipeline.resources import StageResources

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


class EncoderActor:
    """`ClipEncoder` in a pool of actors, where a batch that ends its process is not tried for ever."""

    def __init__(self, spec: EncoderSpec, attempts: ActorHandle) -> None:
        self._encode = ClipEncoder(spec)
        self._attempts = attempts

    def __call__(self, rows: pa.Table) -> pa.Table:
        """As `ClipEncoder`.

        Raises:
            RuntimeError: the process or its node died in all earlier attempts at these rows.
        """
        spans = rows["span_id"].to_pylist()
        attempt = ray.get(self._attempts.begin.remote(spans[0]))
        if attempt > MAX_ATTEMPTS:
            others = f" and {len(spans) - 1} more" if len(spans) > 1 else ""
            raise RuntimeError(
                f"the encoder's process died {MAX_ATTEMPTS} times at span {spans[0]}{others}, of video "
                f"{storage.public_uri(rows['uri'][0].as_py())}: look for the kernel's out-of-memory killer, or faults "
                "of a GPU or its driver, in the node's log"
            )
        encoded = self._encode(rows)
        self._attempts.end.remote(spans[0])
        return encoded


def map_videos(tables: Sequence[pa.Table], probe: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
    """Tables of videos through the probing stage, as tasks of the cluster, in no order."""
    dataset = ray.data.from_arrow(list(tables)).map_batches(
        probe, batch_format="pyarrow", batch_size=None, max_retries=MAX_ATTEMPTS - 1
    )
    yield from dataset.iter_batches(batch_format="pyarrow", batch_size=None, prefetch_batches=0)


def build_flow(
    plan: str | pa.Table, *, decoder: SpanDecoder, encoder: EncoderSpec, resources: StageResources
) -> Dataset:
    """The graph up to the sink, as a lazy dataset.

    Args:
        plan: its Parquet file; or its rows, where URIs carry credentials that no file may hold.
    """
    # otherwise an error of a stage comes without its own message: Ray Data's wrapper loses its cause on the way
    DataContext.get_current().raise_original_map_exception = True
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    attempts = Attempts.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    return (
        _rows_of(plan)
        # a small plan is one block to Ray, and one block is one task
        .repartition(target_num_rows_per_block=resources.rows_per_task)
        .map_batches(
            decoder,
            batch_format="pyarrow",
            batch_size=None,
            zero_copy_batch=True,
            num_cpus=1,
            compute=TaskPoolStrategy(resources.decode_workers),
            max_retries=MAX_ATTEMPTS - 1,
        )
        .map_batches(
            EncoderActor,
            fn_constructor_args=(encoder, attempts),
            batch_format="pyarrow",
            batch_size=resources.rows_per_batch,
            zero_copy_batch=True,
            num_gpus=resources.gpus_per_worker or None,
            num_cpus=resources.cpus_per_worker or None,
            compute=ActorPoolStrategy(size=resources.encode_workers),
            runtime_env={"env_vars": ENCODER_ENVIRONMENT},
            max_restarts=-1,
            max_task_retries=-1,
        )
    )


def _rows_of(plan: str | pa.Table) -> Dataset:
    """The plan's rows. Read by our own storage rather than Ray's reader, which gives up at the first answer of 503."""
    if isinstance(plan, pa.Table):
        return ray.data.from_arrow(plan.combine_chunks())
    with storage.open_binary(plan) as file:
        num_groups = pq.ParquetFile(file).num_row_groups
    groups = [pa.table({"group": pa.array([number], pa.int64())}) for number in range(num_groups)]
    return ray.data.from_arrow(groups).map_batches(
        read_groups, fn_args=(plan,), batch_format="pyarrow", batch_size=None, max_retries=MAX_ATTEMPTS - 1
    )
