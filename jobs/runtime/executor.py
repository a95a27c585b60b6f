"""Executors: run the stages on a Ray cluster, or in this process.

Jobs use only this interface. It converts Ray's errors to `StageFailedError`.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa
from rich.console import Console

from vidshard.jobs.runtime.errors import cause_of, innermost
from vidshard.pipeline.cancel import CancelToken, ClusterCancelToken, LocalCancelToken
from vidshard.pipeline.decode_stage import SpanDecoder
from vidshard.pipeline.devices import GpuReport, examine_gpu
from vidshard.pipeline.encode_stage import EncoderSpec
from vidshard.pipeline.local import run_locally
from vidshard.pipeline.output.commit import LocalWriters, Writers, deliver
from vidshard.pipeline.output.shard_writer import ShardSettings
from vidshard.pipeline.resources import GpuNode, StageResources, WorkerPool
from vidshard.schemas.errors import EXIT_AGAIN, RunCutShortError, RunFailedError, VidshardError
from vidshard.schemas.fields import ClusterSettings
from vidshard.schemas.text import counted

if TYPE_CHECKING:
    from vidshard.jobs.runtime.cluster import Cluster

_GPU_SHARE = 0.01
"""Share of a GPU that its examination takes, so that it starts beside other jobs."""
_EXAMINATION_SECONDS = 120.0
"""Time for the GPUs' nodes to answer; importing torch takes seconds, on a cold file system a minute."""


LOOKS_BEFORE_ABANDONING = 3
"""Seconds without a result, in which machines that left leave too few CPUs, before what runs is abandoned."""


class StageFailedError(RunFailedError):
    """A stage failed by a defect, or because a worker died repeatedly; not by a rejection."""


class StageCutShortError(StageFailedError, RunCutShortError):
    """A stage failed as a storage, or a part of the cluster, was gone."""


class Executor(Protocol):
    """Runs the stages of a run."""

    @property
    def num_cpus(self) -> int:
        """Number of CPUs for all stages together."""
        ...

    @property
    def num_gpus(self) -> float:
        """Number of GPUs for encoders."""
        ...

    @property
    def num_nodes(self) -> int:
        """Number of machines that have these CPUs."""
        ...

    @property
    def gpu_nodes(self) -> Sequence[GpuNode]:
        """Machines with GPUs."""
        ...

    @property
    def can_grow(self) -> bool:
        """Whether machines may join while a job runs."""
        ...

    @property
    def modes(self) -> frozenset[str]:
        """Modes of `schemas.fields.In` that it is in, ``gpu`` left out."""
        ...

    @property
    def memory_bytes(self) -> float | None:
        """Memory of all machines for the processes of all stages; None where it is not known."""
        ...

    def examine_gpus(self) -> list[GpuReport]:
        """Report on a GPU of each machine that has some, as PyTorch sees it in an encoder's place."""
        ...

    def watched(self, console: Console) -> AbstractContextManager[None]:
        """Context in which the machines are watched, and what happens to them is told."""
        ...

    def cancel_token(self, writers: Writers) -> CancelToken:
        """Make a cancellation token that the stages can read, for a run with writers of this executor."""
        ...

    def map_videos(self, tables: Sequence[pa.Table], probe: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
        """Run the probe stage on tables of videos; results come in any order.

        Raises:
            StageFailedError: the stage failed.
        """
        ...

    def open_writers(self, settings: ShardSettings) -> Writers:
        """Make the writers of a run's shards; no process is started before there are rows for it."""
        ...

    def run(
        self,
        work: str | pa.Table,
        *,
        decoder: SpanDecoder,
        encoder: EncoderSpec,
        resources: StageResources,
        writers: Writers | None = None,
    ) -> Iterator[pa.Table]:
        """Run all stages; yields rows as they are finished. The stages start when the first one is requested.

        Args:
            work: path of the work list's Parquet file, or its rows.
            decoder: decode stage.
            encoder: settings of the encoders.
            resources: workers of each stage.
            writers: writers of this executor that take the encoded rows; receipts are yielded then
                (``RECEIPT_SCHEMA``). Without writers the encoded rows themselves are.

        Raises:
            StageFailedError: a stage failed.
        """
        ...

    def shrunk_below(self, pool: WorkerPool) -> Executor | None:
        """This executor as it is, if machines left and a pool on CPUs leaves none for decoding; else None."""
        ...

    def abandon(self) -> None:
        """End what `run` does: its iterator ends soon, and rows in flight are lost."""
        ...


@dataclass(frozen=True, kw_only=True)
class LocalExecutor:
    """Runs every stage in this process, one after the other; FFmpeg still runs in the sandbox."""

    num_cpus: int
    num_gpus: float
    num_nodes: int = 1
    can_grow: bool = False
    modes: frozenset[str] = frozenset()
    memory_bytes: float | None = None
    verbose: bool = False
    """Print the traceback of a defect."""

    @classmethod
    def of_this_machine(cls, *, verbose: bool = False) -> LocalExecutor:
        """Make an executor with the CPUs that this process may use, and a GPU if PyTorch finds one."""
        import torch

        return cls(num_cpus=_usable_cpus(), num_gpus=float(torch.cuda.is_available()), verbose=verbose)

    @property
    def gpu_nodes(self) -> Sequence[GpuNode]:
        """This machine, if it has a GPU."""
        return [GpuNode(node_id="", num_cpus=self.num_cpus, num_gpus=self.num_gpus)] if self.num_gpus else []

    def examine_gpus(self) -> list[GpuReport]:
        """Report on the GPU of this process, as `Executor.examine_gpus`."""
        return [examine_gpu()] if self.num_gpus else []

    def __str__(self) -> str:
        gpus = ", one GPU" if self.num_gpus else ", no GPU"
        return f"this process alone, without Ray: {counted(self.num_cpus, 'CPU')}{gpus}"

    def watched(self, console: Console) -> AbstractContextManager[None]:  # noqa: ARG002  the interface has it
        """Context for this machine, on which nothing is watched."""
        return nullcontext()

    def cancel_token(self, writers: Writers) -> CancelToken:  # noqa: ARG002  the interface has it
        """Make a cancellation token for this process."""
        return LocalCancelToken()

    def failures_named(self) -> AbstractContextManager[None]:
        """Context in which a defect of a stage becomes a StageFailedError."""
        return _defects_named(self.verbose)

    def map_videos(self, tables: Sequence[pa.Table], probe: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
        """Run the probe stage, as `Executor.map_videos`; results keep their order."""
        with _defects_named(self.verbose):
            yield from map(probe, tables)

    def open_writers(self, settings: ShardSettings) -> LocalWriters:
        """Make the one writer of this process, as `Executor.open_writers`."""
        return LocalWriters(settings)

    def run(
        self,
        work: str | pa.Table,
        *,
        decoder: SpanDecoder,
        encoder: EncoderSpec,
        resources: StageResources,
        writers: Writers | None = None,
    ) -> Iterator[pa.Table]:
        """Run all stages, as `Executor.run`."""
        with _defects_named(self.verbose):
            rows = run_locally(
                work,
                decoder=decoder,
                encoder=encoder,
                rows_per_task=resources.rows_per_task,
                rows_per_batch=resources.rows_per_batch,
            )
            if writers is None:
                yield from rows
            else:
                assert isinstance(writers, LocalWriters)
                yield from (deliver(encoded, writers.add) for encoded in rows)

    def shrunk_below(self, pool: WorkerPool) -> Executor | None:  # noqa: ARG002  the interface has it
        """None, as no machine leaves."""
        return None

    def abandon(self) -> None:
        """Do nothing, as rows are made when they are asked for."""


@dataclass(frozen=True, kw_only=True)
class ClusterExecutor:
    """Runs the stages on a Ray cluster."""

    cluster: Cluster

    @property
    def num_cpus(self) -> int:
        """Number of CPUs of the cluster."""
        return self.cluster.num_cpus

    @property
    def num_gpus(self) -> float:
        """Number of GPUs of the cluster."""
        return self.cluster.num_gpus

    @property
    def num_nodes(self) -> int:
        """Number of nodes of the cluster."""
        return self.cluster.num_nodes

    @property
    def gpu_nodes(self) -> Sequence[GpuNode]:
        """Nodes with GPUs."""
        return self.cluster.gpu_nodes

    @property
    def can_grow(self) -> bool:
        """Whether the cluster is one that others can add nodes to."""
        return not self.cluster.is_own

    @property
    def modes(self) -> frozenset[str]:
        """Modes of `schemas.fields.In`, as `Executor.modes`."""
        return frozenset({"workers", "own_ray" if self.cluster.is_own else "joined"})

    @property
    def memory_bytes(self) -> float | None:
        """Memory of the cluster for processes, as `Executor.memory_bytes`."""
        return self.cluster.memory_bytes

    def awaiting_gpus(self, seconds: float) -> ClusterExecutor | None:
        """This executor once its cluster has GPUs; None if none has come in that time."""
        from vidshard.jobs.runtime.cluster import await_gpus

        cluster = await_gpus(self.cluster, seconds)
        return None if cluster is None else ClusterExecutor(cluster=cluster)

    def examine_gpus(self) -> list[GpuReport]:
        """Report on a GPU of each node, as `Executor.examine_gpus`; nodes whose GPUs are taken do not answer."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        examine = ray.remote(num_cpus=0, max_retries=2)(examine_gpu)
        asked = [
            examine.options(
                num_gpus=min(_GPU_SHARE, node.num_gpus),
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
            ).remote()
            for node in self.gpu_nodes
        ]
        with ray_failures_named():
            answered, silent = ray.wait(asked, num_returns=len(asked), timeout=_EXAMINATION_SECONDS)
            for task in silent:
                ray.cancel(task, force=True)
            reports: list[GpuReport] = ray.get(answered)
        return reports

    def __str__(self) -> str:
        return str(self.cluster)

    def watched(self, console: Console) -> AbstractContextManager[None]:
        """Context in which the nodes are watched, as `Executor.watched`."""
        from vidshard.jobs.runtime.node_watch import nodes_watched

        return nodes_watched(console, is_own=self.cluster.is_own)

    def cancel_token(self, writers: Writers) -> CancelToken:
        """Make a cancellation token for the workers of the cluster."""
        from vidshard.pipeline.node_writers import NodeWriters

        assert isinstance(writers, NodeWriters)
        return ClusterCancelToken(writers.coordinator)

    def failures_named(self) -> AbstractContextManager[None]:
        """Context in which an error of Ray becomes a StageFailedError."""
        return ray_failures_named()

    def map_videos(self, tables: Sequence[pa.Table], probe: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
        """Run the probe stage, as `Executor.map_videos`."""
        from vidshard.pipeline.flow import map_videos

        with ray_failures_named():
            yield from map_videos(tables, probe)

    def open_writers(self, settings: ShardSettings) -> Writers:
        """Make writers that start on the nodes of the encoders, as `Executor.open_writers`."""
        from vidshard.pipeline.node_writers import NodeWriters

        with ray_failures_named():
            return NodeWriters(settings)

    def run(
        self,
        work: str | pa.Table,
        *,
        decoder: SpanDecoder,
        encoder: EncoderSpec,
        resources: StageResources,
        writers: Writers | None = None,
    ) -> Iterator[pa.Table]:
        """Run all stages, as `Executor.run`."""
        from vidshard.pipeline.flow import blocks_of, build_flow
        from vidshard.pipeline.node_writers import NodeWriters

        with ray_failures_named():
            coordinator = writers.coordinator if isinstance(writers, NodeWriters) else None
            flow = build_flow(work, decoder=decoder, encoder=encoder, resources=resources, coordinator=coordinator)
            yield from blocks_of(flow)

    def shrunk_below(self, pool: WorkerPool) -> Executor | None:
        """This executor as it is, as `Executor.shrunk_below`."""
        from vidshard.jobs.runtime.cluster import shrunk_below

        if pool.gpus_per_worker or not self.can_grow:
            return None
        with ray_failures_named():
            cluster = shrunk_below(self.cluster, least_workers=pool.workers, cpus_per_worker=pool.cpus_per_worker)
        return None if cluster is None else ClusterExecutor(cluster=cluster)

    def abandon(self) -> None:
        """End what Ray Data executes, as `Executor.abandon`."""
        from vidshard.jobs.runtime.cluster import abandon_executions

        with ray_failures_named():
            abandon_executions()


@contextmanager
def open_executor(run: ClusterSettings, *, local: bool) -> Iterator[LocalExecutor | ClusterExecutor]:
    """Open the executor of a run; at the end a Ray that was started for it is stopped.

    Args:
        local: run every stage in this process, without Ray.

    Raises:
        StorageError: no cluster answers at the address, or Ray cannot be started.
    """
    if local:
        yield LocalExecutor.of_this_machine(verbose=run.verbose)
        return
    from vidshard.jobs.runtime.cluster import ray_cluster  # imports Ray, which takes seconds that a local run can save

    with ray_cluster(address=run.ray_address, object_store_bytes=run.object_store, verbose=run.verbose) as cluster:
        yield ClusterExecutor(cluster=cluster)


@contextmanager
def _defects_named(verbose: bool) -> Iterator[None]:
    """Convert a defect of a stage to StageFailedError, as a cluster reports it."""
    try:
        yield
    except VidshardError:
        raise
    except Exception as error:
        if verbose:
            traceback.print_exception(error)
        raise _stage_failed(error, "-v or --verbose for the traceback") from error


@contextmanager
def ray_failures_named() -> Iterator[None]:
    """Convert a failure of Ray to StageFailedError."""
    from ray.data.exceptions import UserCodeException
    from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

    try:
        yield
    except (RayError, UserCodeException) as error:
        cause = innermost(error)
        if isinstance(cause, VidshardError):
            may_pass = cause.exit_code == EXIT_AGAIN
        else:  # Ray's own errors tell of processes, nodes and objects that were lost
            may_pass = isinstance(cause, RayError) and not isinstance(cause, (RayTaskError, OutOfMemoryError))
        raise _stage_failed(error, "-v or --verbose for Ray's log", may_pass=may_pass) from error


def _stage_failed(error: Exception, more: str, *, may_pass: bool = False) -> StageFailedError:
    kind = StageCutShortError if may_pass else StageFailedError
    return kind(
        f"the run stopped: {cause_of(error)}; what is committed is valid. Run the same command again, with {more}"
    )


def _usable_cpus() -> int:
    """CPUs that this process may run on, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
