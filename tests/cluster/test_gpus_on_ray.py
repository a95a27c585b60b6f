"""GPUs in a real Ray: declared ones on a machine without any, and an encoder whose GPU fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from ray.cluster_utils import Cluster as RayCluster

from tests.support.encoding import clip_spec, decoded_row, encoder_spec
from tests.support.processes import RUN, started
from tests.support.videos import Recipe, write_video
from vidshard.jobs.runtime.cluster import ray_cluster
from vidshard.jobs.runtime.executor import ClusterExecutor
from vidshard.jobs.tokenization.resources import plan_resources
from vidshard.models.tokenizer import Tokenizer
from vidshard.pipeline.attempts import start_attempts
from vidshard.pipeline.flow import build_flow
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.resources import StageResources
from vidshard.pipeline.tokenizer_source import TokenizerSource
from vidshard.schemas.runs import TokenizeRun


@pytest.fixture
def declared_gpu() -> Iterator[str]:
    """Address of a Ray with two CPUs and a GPU that this machine does not have."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    node = {"num_cpus": 2, "num_gpus": 1, "include_dashboard": False, "object_store_memory": 200 << 20}
    cluster = RayCluster(initialize_head=True, head_node_args=node)
    yield cluster.address
    cluster.shutdown()


class Decoder:
    """Stands for the decode stage: rows that are decoded already pass."""

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        for at in range(rows.num_rows):
            yield rows.slice(at, 1)


@pytest.mark.slow
def test_a_declared_gpu_is_refused_by_the_command_and_its_shares_never_hang(declared_gpu: str, tmp_path: Path) -> None:
    """One Ray for both, as its start takes most of the time."""
    video = write_video(tmp_path / "a.mp4", Recipe(num_frames=30))
    out = tmp_path / "tokens"
    with started(video, "--out", out, *RUN, "--ray-address", declared_gpu) as process:
        printed, _ = process.communicate(timeout=200)
    assert process.returncode == 2, printed
    text = " ".join(printed.split())
    assert "cannot be used" in text
    assert f"torch {torch.__version__} built" in text
    assert "--device cpu" in text
    assert not (out / "plan").exists()

    run = TokenizeRun.model_validate({"inputs": ["clips"], "out": "out", "tokenizer": "tiny", "size": 32})
    rows = pa.concat_tables([decoded_row(number, clip_spec(32), 1) for number in range(8)])
    with ray_cluster(address=declared_gpu, object_store_bytes=None, verbose=False) as cluster:
        executor = ClusterExecutor(cluster=cluster)
        for share in (0.25, 0.5, 1.0):
            settings = run.model_copy(update={"gpus_per_worker": share})
            resolved = ResolvedRun.of(settings).placed(device="cuda", precision="float32")
            resources, _ = plan_resources(resolved, 8, 1.0, executor)
            assert resources.encode_workers == 1 / share
            decoder: Any = Decoder()
            flow = build_flow(rows, decoder=decoder, encoder=encoder_spec(1), resources=resources)
            encoded = pa.concat_tables(flow.iter_batches(batch_format="pyarrow", batch_size=None))
            assert sorted(encoded["span_id"].to_pylist()) == sorted(rows["span_id"].to_pylist())


@dataclass(frozen=True, kw_only=True, slots=True)
class Failing(TokenizerSource):
    """A tokenizer whose GPU fails in the first so many processes."""

    folder: str
    times: int
    message: str

    def load(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Tokenizer:
        tokenizer = TokenizerSource.load(self, device, dtype)
        number = len(list(Path(self.folder).iterdir()))
        if number < self.times:

            def fail(*_: object, **__: object) -> None:
                (Path(self.folder) / str(number)).touch()
                raise RuntimeError(self.message)

            tokenizer.encode = fail  # type: ignore[method-assign, assignment]
        return tokenizer


def encoded_by(source: Failing) -> pa.Table:
    resources = StageResources(
        encode_workers=1, gpus_per_worker=0, cpus_per_worker=0.5, decode_workers=1, rows_per_task=1, rows_per_batch=1
    )
    rows = pa.concat_tables([decoded_row(number, clip_spec(32), 1) for number in range(2)])
    decoder: Any = Decoder()
    flow = build_flow(rows, decoder=decoder, encoder=replace(encoder_spec(1), source=source), resources=resources)
    return pa.concat_tables(flow.iter_batches(batch_format="pyarrow", batch_size=None))


@pytest.mark.usefixtures("ray_session")
def test_a_fault_of_a_gpu_ends_its_process_and_the_run_goes_on(tmp_path: Path) -> None:
    source = encoder_spec(1).source
    message = "CUDA error: an illegal memory access was encountered"
    failing = Failing(
        config=source.config, weights=None, seed=source.seed, folder=str(tmp_path), times=2, message=message
    )
    encoded = encoded_by(failing)
    assert encoded.num_rows == 2
    assert all(len(tokens) == 1 for tokens in encoded["tokens"].to_pylist())
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.usefixtures("ray_session")
def test_the_last_fault_of_a_batch_is_kept_until_the_batch_is_done() -> None:
    attempts = start_attempts()
    attempts.begin.remote("span")
    ray.get(attempts.fault.remote("span", "CUDA error: unspecified launch failure"))
    assert ray.get(attempts.last_fault.remote("span")) == "CUDA error: unspecified launch failure"
    ray.get(attempts.end.remote("span"))
    assert ray.get(attempts.last_fault.remote("span")) is None
