"""Use of the machines: hours of video per hour, and the one sentence on what a run waited for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vidshard.jobs.tokenization import placement
from vidshard.jobs.tokenization.usage import Usage
from vidshard.models.tokenizer import get_preset
from vidshard.schemas.runs import TokenizeRun

BALANCED = Usage(
    video_seconds=7200,
    seconds=3600,
    encode_seconds=7000,
    wait_seconds=100,
    decode_seconds=30_000,
    write_seconds=60,
    encoders=2,
    gpus=2,
    cpus=32,
    encoder_cpus=2,
    precision="float16",
)
ON_CPUS = replace(BALANCED, gpus=0, encoder_cpus=2, cpus=8, precision="float32")


def test_the_yield_is_stated_per_gpu_hour_and_per_cpu_hour() -> None:
    assert BALANCED.yields == "1 hours of video per GPU-hour, 0.0625 per CPU-hour"
    assert ON_CPUS.yields == "0.25 hours of video per CPU-hour"
    assert BALANCED.busy_share == pytest.approx(7000 / 7200)


@pytest.mark.parametrize(
    ("usage", "words"),
    [
        (BALANCED, ["waited for encoders", "add GPUs"]),
        (replace(BALANCED, precision="float32"), ["add GPUs", "--precision float16"]),
        (replace(BALANCED, precision="tf32"), ["--precision float16"]),
        (ON_CPUS, ["waited for encoders", "add CPUs"]),
        (replace(ON_CPUS, bfloat16_pays=True), ["--precision bfloat16", "twice as fast"]),
        (
            replace(BALANCED, encode_seconds=3000, wait_seconds=4000, decode_seconds=60_000),
            ["waited for decoders", "20 cores for each GPU are needed, 15 were there", "add CPU nodes, or lower --fps"],
        ),
        (
            replace(BALANCED, encode_seconds=3000, wait_seconds=4000, decode_seconds=6_000, decode_workers=3),
            ["2 cores for each GPU would do", "15 were there", "--decode-workers"],
        ),
        (
            replace(ON_CPUS, encode_seconds=3000, wait_seconds=4000, decode_seconds=300),
            ["0.1 cores for each encoder would do, 3 were there", "first frames", "larger corpus"],
        ),
        (
            replace(ON_CPUS, encode_seconds=3000, wait_seconds=4000, decode_seconds=300, decode_workers=8),
            ["a larger corpus"],
        ),
        (
            replace(ON_CPUS, encoders=1, encode_seconds=2500, wait_seconds=1000, decode_seconds=1000, is_local=True),
            ["in turns", "leave it out"],
        ),
        (
            replace(ON_CPUS, encode_seconds=3000, wait_seconds=4000, decode_seconds=12_000),
            ["4 cores for each encoder are needed, 3 were there", "add CPUs, or lower --fps"],
        ),
        (replace(BALANCED, write_seconds=3500), ["the writers", "faster storage"]),
        (replace(BALANCED, encode_seconds=1000, wait_seconds=100), ["the encoders' start", "--encode-workers"]),
    ],
)
def test_one_sentence_names_the_limit_and_the_setting_that_would_change_it(usage: Usage, words: list[str]) -> None:
    for word in words:
        assert word in usage.verdict
    assert usage.verdict.count(". ") == 0


@pytest.mark.parametrize(
    ("speedup", "tokenizer", "precision", "device", "pays"),
    [
        (2.0, "fsq_causal_488_small", "float32", "cpu", True),
        (2.0, "vidtwin_small_structure_7_7_4_dynamics_7_8", "float32", "cpu", True),
        (0.5, "fsq_causal_488_small", "float32", "cpu", False),
        (2.0, "tiny", "float32", "cpu", False),
        (2.0, "fsq_causal_488_small", "bfloat16", "cpu", False),
        (2.0, "fsq_causal_488_small", "float32", "cuda", False),
    ],
)
def test_bfloat16_pays_on_cpus_whose_products_are_faster_and_for_networks_of_large_products(
    speedup: float, tokenizer: str, precision: str, device: str, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "bfloat16_speedup", lambda: speedup)
    given = {"inputs": ["v.mp4"], "out": "out", "device": device, "precision": precision}
    run = TokenizeRun.model_validate(given)
    assert placement.bfloat16_pays(run, get_preset(tokenizer)) is pays


def test_the_speed_of_bfloat16_is_that_of_its_products_at_their_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert placement.bfloat16_speedup(side=64) > 0, "measured on this CPU"
    now, took = 0.0, {torch.float32: [9.0, 4.0, 5.0], torch.bfloat16: [8.0, 7.0, 2.0]}

    def product(matrix: torch.Tensor, _other: torch.Tensor) -> None:
        nonlocal now
        now += took[matrix.dtype].pop(0)

    monkeypatch.setattr("vidshard.jobs.tokenization.placement.torch.mm", product)
    monkeypatch.setattr("vidshard.jobs.tokenization.placement.time.perf_counter", lambda: now)
    assert placement.bfloat16_speedup(repeats=3) == 4.0 / 2.0


def test_bfloat16_is_offered_only_where_it_would_pay() -> None:
    assert "bfloat16" not in ON_CPUS.verdict
    assert "bfloat16" not in replace(ON_CPUS, bfloat16_pays=True, encode_seconds=2000, wait_seconds=5000).verdict
    assert "bfloat16" not in replace(BALANCED, bfloat16_pays=True).verdict
