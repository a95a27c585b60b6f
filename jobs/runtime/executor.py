"""Where a run's stages are carried out: on a Ray cluster, or in this process.

Jobs know this interface alone. Ray's own errors end here: what a job gets is `StageFailedError` in our words.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from vidshard.jobs.runtime.errors import cause_of
from vidshard.pipeline.cancel import CancelToken, ClusterCancelToken, LocalCancelToken
from vidshard.pipeline.decode_stage import SpanDecoder
from vidshard.pipeline.encode_stage import EncoderSpec
from vidshard.pipeline.local import run_locally
from vidshard.pipeline.resources import StageResources
from vidshard.schemas.errors import RunFailedError, VidshardError
from vidshard.schemas.runs import TokenizeRun

if TYPE_CHECKING:
    from vidshard.jobs.runtime.cluster import Cluster


class StageFailedError(RunFailedError):
    """A stage broke in a way that is no rejection: a defect, or a worker that died again and again."""


class Executor(Protocol):
    """Runs the stages."""

    @property
    def num_cpus(self) -> int:
        """CPUs for all stages together."""
        ...

    @property
    def num_gpus(self) -> float:
        """GPUs for encoders."""
        ...

    @property
    def num_nodes(self) -> int:
        """Machines that the CPUs belong to."""
        ...

    def cancel_token(self) -> CancelToken:
        """A new token that the stages can see."""
        ...

    def map_videos(self, tables: Sequence[pa.Table], probe: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
        """Tables of videos through the probing stage, in no order.

        Raises:
            StageFailedError: it broke.
        """
        ...

    def run(
        self, work: str | pa.Table, *, decoder: SpanDecoder, encoder: EncoderSpec, resources: StageResources
    ) -> Iterator[pa.Table]:
        """Encoded rows of a work list as they come out; the stages start at the first one.

        Raises:
            StageFailedError: a stage broke.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LocalExecutor:
    """Every stage in this process, one after the other; FFmpeg in its sandbox."""

    num_cpus: int
    num_gpus: float
    num_nodes: int = 1

    @classmethod
    def of_this_machine(cls) -> LocalExecutor:
        """The CPUs that this process may use, and a GPU if PyTorch sees one."""
        import torch

        return cls(num_cpus=len(os.sched_getaffinity(0)), num_gpus=float(torch.cuda.is_available()))

    def __str__(self) -> str:
        gpus = ", one GPU" if self.num_gpus else ", no GPU"
        return f"this process alone, without Ray: {self.num_cpus} CPUs{gpus}"

    def cancel_token(self) -> CancelToken:
        """A token of this process."""
        return LocalCancelToken()

    def map_videos(self, tables: Sequence[pa.Table], probe: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
        """As `Executor.map_videos`, in order."""
        with _defects_named():
            yield from map(probe, tables)

    def run(
        self, work: str | pa.Table, *, decoder: SpanDecoder, encoder: EncoderSpec, resources: StageResources
    ) -> Iterator[pa.Table]:
        """As `Executor.run`."""
        with _defects_named():
            yield from run_locally(
                work,
                decoder=decoder,
                encoder=encoder,
                rows_per_task=resources.rows_per_task,
                rows_per_batch=resources.rows_per_batch,
            )


@dataclass(frozen=True, kw_only=True)
class ClusterExecutor:
    """A Ray cluster."""

    cluster: Cluster

    @property
    def num_cpus(self) -> int:
        """CPUs of the cluster."""
        return self.cluster.num_cpus

    @property
    def num_gpus(self) -> float:
        """GPUs of the cluster."""
        return self.cluster.num_gpus

    @property
    def num_nodes(self) -> int:
        """Nodes of the cluster."""
        return self.cluster.num_nodes

    def __str__(self) -> str:
        return str(self.cluster)

    def cancel_token(self) -> CancelToken:
        """A token for the workers of the cluster."""
        return ClusterCancelToken()

    def map_videos(self, tables: Sequence[pa.Table], probe: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
        """As `Executor.map_videos`."""
        from vidshard.pipeline.flow import map_videos

        with _ray_failures_named():
            yield from map_videos(tables, probe)

    def run(
        self, work: str | pa.Table, *, decoder: SpanDecoder, encoder: EncoderSpec, resources: StageResources
    ) -> Iterator[pa.Table]:
        """As `Executor.run`."""
        from vidshard.pipeline.flow import build_flow

        with _ray_failures_named():
            flow = build_flow(work, decoder=decoder, encoder=encoder, resources=resources)
            yield from flow.iter_batches(batch_format="pyarrow", batch_size=None)


@contextmanager
def open_executor(run: TokenizeRun, *, local: bool) -> Iterator[LocalExecutor | ClusterExecutor]:
    """The executor of a run for as long as it is entered; a Ray that was started for it is stopped at the end.

    Args:
        local: every stage in this process.

    Raises:
        StorageError: there is no cluster at the address, or Ray cannot be started here.
    """
    if local:
        yield LocalExecutor.of_this_machine()
        return
    from vidshard.jobs.runtime.cluster import ray_cluster  # seconds that a local run need not wait

    with ray_cluster(address=run.ray_address, object_store_bytes=run.object_store, verbose=run.verbose) as cluster:
        yield ClusterExecutor(cluster=cluster)


@contextmanager
def _defects_named() -> Iterator[None]:
    """Turn a defect of a stage in this process into the error that it is on a cluster."""
    try:
        yield
    except VidshardError:
        raise
    except Exception as error:
        raise _stage_failed(error) from error


@contextmanager
def _ray_failures_named() -> Iterator[None]:
    from ray.data.exceptions import UserCodeException
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, UserCodeException) as error:
        raise _stage_failed(error) from error


def _stage_failed(error: Exception) -> StageFailedError:
    return StageFailedError(
        f"the run stopped: {cause_of(error)}; what is committed is valid. Run the same command again, with -v or "
        "--verbose for Ray's log"
    )
