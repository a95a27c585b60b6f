"""Workers and CPUs of a run, on machines that are only declared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.support.gpus import Declared
from vidshard.jobs.runtime.executor import Executor
from vidshard.jobs.tokenization.placement import most_clips
from vidshard.jobs.tokenization.resources import plan_resources
from vidshard.models.cost import MOST_VALUES
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.resources import GpuNode
from vidshard.schemas.errors import UserError
from vidshard.schemas.runs import TokenizeRun


def with_gpus(*nodes: tuple[float, float]) -> Executor:
    found = [GpuNode(node_id=str(at), num_cpus=cpus, num_gpus=gpus) for at, (cpus, gpus) in enumerate(nodes)]
    declared: Any = Declared(num_cpus=int(sum(cpus for cpus, _ in nodes)), gpu_nodes=found)
    return declared  # type: ignore[no-any-return]


def placed(**settings: Any) -> ResolvedRun:
    run = TokenizeRun.model_validate({"inputs": ["clips"], "out": "out", "tokenizer": "tiny", "size": 32} | settings)
    return ResolvedRun.of(run).placed(device="cuda", precision="float16")


@given(
    cpus=st.integers(1, 256),
    gpus=st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0, 8.0]),
    share=st.one_of(st.sampled_from([0.25, 0.3, 1 / 3, 0.5, 0.7, 1.0]), st.floats(0.05, 1.0)),
)
@example(cpus=2, gpus=1.0, share=0.25)
@example(cpus=4, gpus=8.0, share=0.25)
@example(cpus=1, gpus=1.0, share=1.0)
def test_encoders_fit_their_gpus_and_leave_a_cpu_for_decoding(cpus: int, gpus: float, share: float) -> None:
    node = GpuNode(node_id="", num_cpus=cpus, num_gpus=gpus)
    encoders = node.num_encoders(share)
    assert encoders * share <= gpus + 1e-6
    on_one_gpu = int(min(1.0, gpus) / share + 1e-9)
    assert encoders == max(1, int(gpus)) * on_one_gpu
    assert 0 <= node.cpu_share(share) <= 1
    assert cpus - encoders * node.cpu_share(share) >= min(1, cpus)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_gpu_encoders_ask_for_a_share_of_the_cpus(share: float) -> None:
    resources, encoder = plan_resources(placed(gpus_per_worker=share), 100, 1.0, with_gpus((2, 1)))
    assert resources.encode_workers == int(1 / share)
    assert resources.gpus_per_worker == share
    assert resources.cpus_per_worker == share
    assert encoder.device == "cuda"
    assert encoder.precision == "float16"


def test_the_poorest_node_decides_about_the_share_of_cpus() -> None:
    resources, _ = plan_resources(placed(), 100, 1.0, with_gpus((4, 8), (96, 8), (2, 1)))
    assert resources.encode_workers == 17
    assert resources.cpus_per_worker == 0.375


def test_more_encoders_than_fit_are_refused_as_they_would_never_start() -> None:
    with pytest.raises(UserError, match=r"--encode-workers 5: 4 fit the GPUs of .* at --gpus-per-worker 0\.5"):
        plan_resources(placed(gpus_per_worker=0.5, encode_workers=5), 100, 1.0, with_gpus((8, 2)))
    assert plan_resources(placed(encode_workers=1), 100, 1.0, with_gpus((8, 2)))[0].encode_workers == 1


def test_no_gpu_that_holds_the_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"--gpus-per-worker 0\.5: no node"):
        plan_resources(placed(gpus_per_worker=0.5), 100, 1.0, with_gpus((8, 0.25)))


def test_a_cpu_run_reserves_cpus_by_number_even_on_a_single_one() -> None:
    run = placed().placed(device="cpu", precision="float32")
    declared: Any = Declared(num_cpus=1)
    assert plan_resources(run, 100, 1.0, declared)[0].cpus_per_worker == 0.0
    assert plan_resources(run, 100, 1.0, declared)[0].gpus_per_worker == 0.0


SMALL_MODEL: dict[str, Any] = {"tokenizer": "fsq_causal_488_small", "random_weights": 0}
VALUES_PER_PIXEL = 22 * 16
"""The model's first level has 16 channels; 17 frames become 20, and 22 with the context before them."""


def test_no_batch_has_a_map_of_more_values_than_a_gpu_counts() -> None:
    run = placed(**SMALL_MODEL, buckets="1536,1024,256x128")
    most = most_clips(run)
    assert most == {
        (height, width): MOST_VALUES // (VALUES_PER_PIXEL * height * width)
        for height, width in [(1536, 1536), (1024, 1024), (256, 128)]
    }
    assert (most[1536, 1536], most[1024, 1024]) == (2, 5)
    encoder = plan_resources(run, 100, 1.0, with_gpus((2, 1)))[1]
    assert encoder.batch_size == 8
    assert dict(encoder.most_clips) == most
    assert hash(encoder) == hash(encoder)


def test_a_clip_that_is_too_large_by_itself_is_refused_unless_it_is_tiled() -> None:
    with pytest.raises(UserError, match=r"17x4096x4096 has a map of 5,905,580,032 values .*--tile-size"):
        most_clips(placed(**SMALL_MODEL, size=4096))
    tiled = most_clips(placed(**SMALL_MODEL, size=4096, tile_size=256))
    assert tiled == {(4096, 4096): MOST_VALUES // (VALUES_PER_PIXEL * 256 * 256)}


@pytest.mark.parametrize(
    ("text", "can_grow", "expected"),
    [
        (None, False, (2, False, 2)),
        (None, True, (2, True, None)),
        ("1", True, (1, False, 1)),
        ("1..2", True, (1, True, 2)),
        ("1..16", True, (1, True, 16)),
        ("1..", False, (1, True, None)),
        ("2..2", True, (2, False, 2)),
    ],
)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_encoders_follow_the_cluster_within_their_range(
    text: str | None, can_grow: bool, expected: tuple[int, bool, int | None], device: str
) -> None:
    settings = {} if text is None else {"encode_workers": text}
    run = placed(**settings)
    resolved = replace(run, run=run.run.model_copy(update={"device": device}))
    machines: Any = replace(cast(Any, with_gpus((8, 2))), can_grow=can_grow)
    resources, _ = plan_resources(resolved, 100, 1.0, machines)
    found = (resources.encode_workers, resources.is_elastic, resources.most_encode_workers)
    assert found == expected


def test_a_range_begins_with_what_fits_and_may_end_beyond() -> None:
    plan_resources(placed(encode_workers="2..99"), 100, 1.0, with_gpus((8, 2)))
    with pytest.raises(UserError, match=r"For a cluster that grows give 2\.\.99"):
        plan_resources(placed(encode_workers="3..99"), 100, 1.0, with_gpus((8, 2)))


@pytest.mark.parametrize("text", ["0", "0..4", "4..2", "..4", "a", "1...2", "1-4", "-1", "1.5", True, "9999999"])
def test_what_is_no_number_of_workers_is_refused(text: object) -> None:
    with pytest.raises(ValidationError, match=r"a (number|range) of workers|no values here"):
        placed(encode_workers=text)


@pytest.mark.parametrize(("text", "recorded"), [(4, 4), ("4", 4), ("4..4", 4), ("2..8", "2..8"), ("2..", "2..")])
def test_a_fixed_number_of_workers_is_recorded_as_before_and_every_record_is_read_back(
    text: object, recorded: object
) -> None:
    run = placed(encode_workers=text).run
    record = run.model_dump(mode="json")
    assert record["encode_workers"] == recorded
    assert TokenizeRun.model_validate(record).encode_workers == run.encode_workers
