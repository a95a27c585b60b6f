"""Device and precision of a run: decided before it plans, said, recorded, and refused with a remedy."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from tests.support.cli import printed_by
from tests.support.gpus import GOOD_GPU, Declared
from tests.support.videos import Recipe, write_video
from vidshard.jobs.runtime import cluster
from vidshard.jobs.runtime.cluster import Cluster
from vidshard.jobs.runtime.executor import ClusterExecutor, Executor, LocalExecutor
from vidshard.jobs.runtime.run_record import RunRecord
from vidshard.jobs.tokenization.placement import place, what_lacks, with_gpus
from vidshard.pipeline.devices import GpuReport
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.shard_reader import open_shard
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.resources import GpuNode
from vidshard.schemas.errors import EXIT_REFUSED, UserError
from vidshard.schemas.runs import TokenizeRun

BLIND = replace(GOOD_GPU, name=None, torch_version="2.13.0+cpu", torch_cuda=None)
NO_RECORD = RunRecord(identity={}, code_version="")
SMALL = ("--tokenizer", "tiny", "--fps", "4", "--frames", "5", "--size", "32", "--local")


def placed(
    *reports: GpuReport, record: RunRecord = NO_RECORD, num_gpus: float = 1, **settings: Any
) -> tuple[ResolvedRun, str]:
    run = TokenizeRun.model_validate({"inputs": ["clips"], "out": "out", "tokenizer": "tiny", "size": 32} | settings)
    nodes = [GpuNode(node_id="", num_cpus=2, num_gpus=num_gpus)] if num_gpus else []
    declared: Any = Declared(gpu_nodes=nodes, reports=list(reports))
    said = io.StringIO()
    resolved = place(ResolvedRun.of(run), record, declared, Console(file=said, width=1000))
    return resolved, said.getvalue()


def test_auto_takes_a_gpu_and_says_which_and_in_which_precision() -> None:
    resolved, said = placed(GOOD_GPU)
    assert (resolved.run.device, resolved.run.precision) == ("cuda", "float16")
    assert "device cuda: NVIDIA H200 (140 GiB), torch 2.13.0+cu130 built for CUDA 13.0" in said
    assert "precision float16: the default on a GPU" in said
    assert resolved.identity["precision"] == "float16"


def test_auto_takes_the_cpu_where_there_is_no_gpu_and_says_why() -> None:
    resolved, said = placed(num_gpus=0)
    assert (resolved.run.device, resolved.run.precision) == ("cpu", "float32")
    assert "device cpu: no GPU was found" in said


def test_cpu_leaves_gpus_alone_without_examining_them() -> None:
    resolved, said = placed(BLIND, device="cpu")
    assert (resolved.run.device, resolved.run.precision) == ("cpu", "float32")
    assert "1 GPUs are left alone" in said


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("seen_by_others", [True, False])
def test_a_promised_gpu_that_torch_cannot_use_is_refused(device: str, seen_by_others: bool) -> None:
    reports = [GOOD_GPU, replace(BLIND, node="other")] if seen_by_others else [replace(BLIND, node="other")]
    with pytest.raises(UserError, match=r"GPU of other cannot be used.*\+cpu built without CUDA.*--device cpu"):
        placed(*reports, device=device)


def test_gpus_that_nobody_could_examine_are_not_taken_for_good() -> None:
    with pytest.raises(UserError, match="none was free to be examined"):
        placed(num_gpus=4)


def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="--device cuda"):
        placed(num_gpus=0, device="cuda")


def test_a_broken_cudnn_is_refused_for_the_precision_that_it_breaks() -> None:
    broken = replace(GOOD_GPU, cudnn=91002)
    with pytest.raises(UserError, match=r"cuDNN 9\.10\.2 "):
        placed(broken, precision="bfloat16")
    assert placed(broken)[0].run.precision == "float16"


@pytest.mark.parametrize("stored", ["float32", "tf32", "float16", "bfloat16"])
def test_a_run_that_names_no_precision_goes_on_in_that_of_its_output(stored: str) -> None:
    record = RunRecord(identity={"precision": stored}, code_version="")
    for num_gpus, reports in ((0, []), (1, [GOOD_GPU])):
        resolved, said = placed(*reports, num_gpus=num_gpus, record=record)
        assert resolved.run.precision == stored
        assert f"precision {stored}: that of the output" in said


def test_float32_on_a_gpu_says_what_it_costs() -> None:
    said = placed(GOOD_GPU, precision="float32")[1]
    assert "float32 on a GPU is five to ten times slower" in said
    assert "!!" not in placed(GOOD_GPU, precision="float16")[1]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "a.mp4", Recipe(num_frames=15, rate=Fraction(10)))


def test_device_and_precision_are_recorded_and_an_output_goes_on_without_naming_them(
    video: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    said = printed_by("tokenize", video, "--out", out, *SMALL, "--precision", "tf32", "--device", "cpu")
    assert "device cpu: as --device says" in said
    assert "only GPUs round" in said
    [path] = shard_paths(str(out))
    with open_shard(path) as (_, provenance):
        assert (provenance.run["device"], provenance.run["precision"]) == ("cpu", "tf32")
    again = printed_by("tokenize", video, "--out", out, *SMALL)
    assert "precision tf32: that of the output" in again
    assert "0 written in 0 shards" in again


def test_cuda_is_refused_by_the_command_before_anything_is_written(video: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = tmp_path / "tokens"
    said = printed_by("tokenize", video, "--out", out, *SMALL, "--device", "cuda", code=2)
    assert "torch" in said
    assert "--device cpu" in said
    assert not (out / "run.json").exists()
    assert not (out / "plan").exists()


def test_more_than_one_gpu_for_an_encoder_is_refused(video: Path, tmp_path: Path) -> None:
    said = printed_by("tokenize", video, "--out", tmp_path / "tokens", *SMALL, "--gpus-per-worker", "2", code=2)
    assert "--gpus-per-worker" in said


@pytest.mark.parametrize(
    ("gpus", "seconds", "device", "is_own", "comes", "is_waited"),
    [
        (0, 60, "auto", False, True, True),
        (0, 60, "cuda", False, False, True),
        (0, 0, "auto", False, True, False),
        (2, 60, "auto", False, True, False),
    ],
)
def test_only_a_run_that_asks_for_it_waits_for_gpus_and_it_never_falls_back(
    monkeypatch: pytest.MonkeyPatch, gpus: int, seconds: int, device: str, is_own: bool, comes: bool, is_waited: bool
) -> None:
    def machines(count: int) -> Cluster:
        nodes = tuple(GpuNode(node_id=str(at), num_cpus=2, num_gpus=1) for at in range(count))
        return Cluster(num_cpus=2, num_gpus=count, num_nodes=1 + count, is_own=is_own, gpu_nodes=nodes)

    asked: list[object] = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(cluster, "_look", lambda **_: machines(1 if comes else 0))
    monkeypatch.setattr(cluster, "_LOOKING_SECONDS", 0.001)
    settings = {"inputs": ["clips"], "out": "out", "wait_for_gpus": seconds if comes else 0.01, "device": device}
    run, said = TokenizeRun.model_validate(settings), io.StringIO()
    executor = ClusterExecutor(cluster=machines(gpus))
    console = Console(file=said, width=1000)
    if is_waited and not comes:
        with pytest.raises(UserError, match=r"--wait-for-gpus 0\.01: no GPU node joined .*, or --device cpu"):
            with_gpus(executor, run, console)
    else:
        assert with_gpus(executor, run, console).num_gpus == (1 if is_waited else gpus)
    assert ("waiting for a GPU node" in said.getvalue()) == is_waited
    assert asked == ([[{"GPU": 1}], []] if is_waited else [])


@pytest.mark.parametrize(
    ("executor", "device", "words"),
    [
        (LocalExecutor(num_cpus=2, num_gpus=0), "auto", "waits for nodes that join a cluster"),
        (ClusterExecutor(cluster=Cluster(num_cpus=2, num_gpus=0, num_nodes=1, is_own=True)), "auto", "--ray-address"),
        (ClusterExecutor(cluster=Cluster(num_cpus=2, num_gpus=0, num_nodes=1, is_own=False)), "cpu", "exclude"),
    ],
)
def test_waiting_for_gpus_where_none_can_come_or_is_wanted_is_refused(
    executor: LocalExecutor | ClusterExecutor, device: str, words: str
) -> None:
    run = TokenizeRun.model_validate({"inputs": ["clips"], "out": "out", "wait_for_gpus": 60, "device": device})
    with pytest.raises(UserError, match=words) as refused:
        with_gpus(executor, run, Console(file=io.StringIO()))
    assert refused.value.exit_code == EXIT_REFUSED


def _asked(executor: object, **settings: object) -> list[str]:
    """Warnings of a placed run on CPUs."""
    run = TokenizeRun.model_validate({"inputs": ["clips"], "out": "out", "tokenizer": "tiny", **settings})
    placed = ResolvedRun.of(run.model_copy(update={"random_weights": 0}))
    return what_lacks(placed.placed(device="cpu", precision="float32"), cast(Executor, executor))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"encode_workers": 50}, "has room for 2 encoders, one for each CPU; give 2"),
        ({"encode_workers": "50.."}, "has room for 2 encoders"),
        ({"encode_workers": 2}, "2 encoders of 0.4 GiB each do not fit the 0.7 GiB"),
    ],
)
def test_encoders_for_which_there_is_no_room_are_refused_at_once_or_said_where_nodes_may_join(
    settings: dict[str, object], words: str
) -> None:
    memory = 0.7 * 2**30 if settings["encode_workers"] == 2 else None
    with pytest.raises(UserError, match=words):
        _asked(Declared(memory_bytes=memory), **settings)
    joined = Declared(memory_bytes=memory, can_grow=True, modes=frozenset({"workers", "joined"}))
    [said] = _asked(joined, **settings)
    assert re.search(words, said)
    assert "Until nodes join" in said


@pytest.mark.parametrize(("gigabytes", "advice"), [(16, "; give 2"), (0.7, "; give 1 at most")])
def test_encoders_that_fit_neither_cpus_nor_memory_are_refused_with_one_number(gigabytes: float, advice: str) -> None:
    with pytest.raises(UserError) as caught:
        _asked(Declared(memory_bytes=gigabytes * 2**30), encode_workers=50)
    assert str(caught.value).count("give") == 1
    assert str(caught.value).endswith(advice)


def test_decoders_beyond_the_cpus_of_one_machine_are_said_and_encoders_that_fit_are_not() -> None:
    [said] = _asked(Declared(), decode_workers=50)
    assert "decodes at most 2 videos at once" in said
    assert _asked(Declared(can_grow=True), decode_workers=50) == []
    assert _asked(Declared(memory_bytes=4 * 2**30), encode_workers=2, decode_workers=2) == []
    assert _asked(LocalExecutor(num_cpus=2, num_gpus=0), encode_workers=50) == []  # it has no workers
