"""Flow of a tokenization run: the Ray Data graph from the work list to the driver.

    todo.parquet ──▶ SpanDecoder ──▶ EncoderActor ──▶ receipts for the driver, which keeps the account
     row per span     CPU tasks        actor pool
                                         │ payload, on the same node
                                         ▼
                                      NodeWriter ──▶ staged shards, which the driver publishes

Every stage returns one row for each row it takes. Frames cross the object store as uint8. The payload stays on the node
of its encoder (``pipeline.node_writers``); the driver gets some 100 bytes for each span.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy

from vidshard.pipeline import storage
from vidshard.pipeline.attempts import MAX_ATTEMPTS, start_attempts
from vidshard.pipeline.decode_stage import SpanDecoder, read_groups
from vidshard.pipeline.node_writers import NodeDelivery
from vidshard.pipeline.output.commit import deliver
from vidshard.pipeline.resources import StageResources
from vidshard.pipeline.rows import DECODED_ON, frame_bytes
from vidshard.schemas.errors import one_line

if TYPE_CHECKING:
    from vidshard.pipeline.encode_stage import EncoderSpec

log = logging.getLogger(__name__)

ENCODER_ENVIRONMENT = {
    # By default glibc returns large blocks to the system at once, and every page faults again at the next clip. If
    # they are kept, a 17x128x128 clip of the tiny model takes 84 ms instead of 108 (two cores, medians of 20).
    # One arena, because Ray's threads are not the main thread, and their own arenas cannot hold such blocks: 4.9 s
    # instead of 7.5 for fsq_causal_488_32768.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_ARENA_MAX": "1",
    # By default threads spin at the end of every operator and take the core that a decoder needs: the same clip
    # beside one busy process then takes 275 ms instead of 142.
    "OMP_WAIT_POLICY": "passive",
}
"""Environment variables of an encoder's process."""


@dataclass(frozen=True)
class DecodeTask:
    """Decode stage as a Ray task, which says on which node its frames are."""

    decoder: Callable[[pa.Table], Iterator[pa.Table]]

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Decode rows, as `SpanDecoder`, with ``DECODED_ON``."""
        node = ray.get_runtime_context().get_node_id()
        for decoded in self.decoder(rows):
            yield decoded.append_column(DECODED_ON, pa.array([node] * decoded.num_rows))


class EncoderActor:
    """`ClipEncoder` as a Ray actor, with a limit on the attempts at a batch that kills its process."""

    def __init__(self, spec: EncoderSpec, attempts: ActorHandle, coordinator: ActorHandle | None = None) -> None:
        """Make an encoder that loads its model at the first call.

        Args:
            spec: settings of the encoder.
            attempts: the counter of attempts.
            coordinator: knows the nodes' writers; None to return the encoded rows themselves.
        """
        self._encode = spec.encoder()
        self._attempts = attempts
        self._delivery = None if coordinator is None else NodeDelivery(coordinator)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Encode rows, as `ClipEncoder`; with a coordinator hand them to the writer of this node, and return receipts.

        After a fault of the GPU this process ends itself: nothing more can be computed in it. Ray then starts another
        one, perhaps on another GPU, and the attempt counts as one whose process died.

        Raises:
            RuntimeError: the process or its node died in all ``MAX_ATTEMPTS`` earlier attempts at these rows.
        """
        from vidshard.pipeline.devices import end_process, is_gpu_fault

        spans = rows["span_id"].to_pylist()
        attempt = ray.get(self._attempts.begin.remote(spans[0]))
        if attempt > MAX_ATTEMPTS:
            others = f" and {len(spans) - 1} more" if len(spans) > 1 else ""
            fault = ray.get(self._attempts.last_fault.remote(spans[0]))
            look = "look for the kernel's out-of-memory killer"
            cause = f"the last fault was {fault}; {look}" if fault else look
            raise RuntimeError(
                f"the encoder's process died {MAX_ATTEMPTS} times at span {spans[0]}{others}, of video "
                f"{storage.public_uri(rows['uri'][0].as_py())}: {cause}, or faults of a GPU or its driver, in the "
                "node's log"
            )
        frames = frame_bytes(rows, ray.get_runtime_context().get_node_id())
        try:
            encoded = self._encode(rows.drop_columns([DECODED_ON.name]))
        except Exception as error:
            if not is_gpu_fault(error):
                raise
            message = f"{type(error).__name__} on {socket.gethostname()}: {one_line(error, 300)}"
            log.error("the GPU failed, and this process ends: %s", message)
            ray.get(self._attempts.fault.remote(spans[0], message))
            end_process()
            raise
        if self._delivery is not None:
            encoded = deliver(encoded, self._delivery.add, frames)
        self._attempts.end.remote(spans[0])
        return encoded


def map_videos(tables: Sequence[pa.Table], probe: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
    """Run the probe stage on tables of videos as Ray tasks; results come in any order."""
    # otherwise Ray Data wraps an error of a stage and loses its cause, and with it the message
    DataContext.get_current().raise_original_map_exception = True
    dataset = _from_tables(tables).map_batches(
        probe, batch_format="pyarrow", batch_size=None, max_retries=MAX_ATTEMPTS - 1
    )
    yield from dataset.iter_batches(batch_format="pyarrow", batch_size=None, prefetch_batches=0)


def build_flow(
    plan: str | pa.Table,
    *,
    decoder: SpanDecoder,
    encoder: EncoderSpec,
    resources: StageResources,
    coordinator: ActorHandle | None = None,
) -> Dataset:
    """Build the flow up to the encoded rows, or their receipts, as a lazy dataset.

    Args:
        plan: path of the work list's Parquet file, or its rows if URIs carry credentials, which no file may hold.
        coordinator: the `node_writers.Coordinator` of the run; None for a flow that gives the encoded rows.
    """
    # otherwise Ray Data wraps an error of a stage and loses its cause, and with it the message
    DataContext.get_current().raise_original_map_exception = True
    if coordinator is None:
        attempts = start_attempts()
    else:
        attempts = coordinator
        coordinator.begin_pass.remote()
    return (
        _rows_of(plan)
        # a small plan is one block to Ray, and one block is one task
        .repartition(target_num_rows_per_block=resources.rows_per_task)
        .map_batches(
            DecodeTask(decoder),
            batch_format="pyarrow",
            batch_size=None,
            zero_copy_batch=True,
            num_cpus=1,
            compute=TaskPoolStrategy(resources.decode_workers),
            max_retries=MAX_ATTEMPTS - 1,
        )
        .map_batches(
            EncoderActor,
            fn_constructor_args=(encoder, attempts, coordinator),
            batch_format="pyarrow",
            batch_size=resources.rows_per_batch,
            zero_copy_batch=True,
            num_gpus=resources.gpus_per_worker or None,
            num_cpus=resources.cpus_per_worker,  # also where it is 0: without a number Ray reserves a whole CPU
            compute=_encoder_pool(resources),
            runtime_env={"env_vars": ENCODER_ENVIRONMENT},
            max_restarts=-1,
            max_task_retries=-1,
        )
    )


def blocks_of(flow: Dataset) -> Iterator[pa.Table]:
    """Yield the blocks of a flow in this process as they are finished.

    Each is got by one call here. `Dataset.iter_batches` moves blocks through three threads and their queues, which took
    a fifth of the driver's time for each clip (by thread, `python -m benchmarks.driver`).
    """
    for bundle in flow.iter_internal_ref_bundles():
        for block in bundle.block_refs:
            rows = ray.get(block)
            if rows.num_rows:  # a task of a cancelled run gives a block without rows and columns
                yield rows


def _encoder_pool(resources: StageResources) -> ActorPoolStrategy:
    """Pool of encoders. Ray Data asks for another one while the others have a queue and the cluster has room for it."""
    if not resources.is_elastic:
        return ActorPoolStrategy(size=resources.encode_workers)
    return ActorPoolStrategy(min_size=resources.encode_workers, max_size=resources.most_encode_workers)


def _rows_of(plan: str | pa.Table) -> Dataset:
    """Rows of the work list, read through pipeline.storage because Ray's Parquet reader does not retry HTTP 503."""
    if isinstance(plan, pa.Table):
        return _from_tables([plan.combine_chunks()])
    with storage.open_binary(plan) as file:
        num_groups = storage.ParquetFile(file).num_row_groups
    groups = [pa.table({"group": pa.array([number], pa.int64())}) for number in range(num_groups)]
    return _from_tables(groups).map_batches(
        read_groups, fn_args=(plan,), batch_format="pyarrow", batch_size=None, max_retries=MAX_ATTEMPTS - 1
    )


def _from_tables(tables: Sequence[pa.Table]) -> Dataset:
    """Dataset with a block for each table; unlike `ray.data.from_arrow` it runs no task for each to learn its size."""
    return ray.data.from_blocks(list(tables))
