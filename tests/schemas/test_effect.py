"""Settings that change nothing in some mode of a job: each setting says in which, and a job says so."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import printed_by
from tests.support.videos import Recipe, write_video
from vidshard.schemas.evaluation import EvaluateRun
from vidshard.schemas.fields import In, Settings, With, Without, WorkerCount, setting_of, without_effect
from vidshard.schemas.runs import TokenizeRun

MODES: dict[str, set[str]] = {
    "local, CPU": set(),
    "local, GPU": {"gpu"},
    "own Ray, CPU": {"workers", "own_ray"},
    "own Ray, GPU": {"workers", "own_ray", "gpu"},
    "joined, CPU": {"workers", "joined"},
    "joined, GPU": {"workers", "joined", "gpu"},
}
EVERYWHERE = {"progress", "log_json", "verbose", "device", "batch_size", "encode_threads", "clips_per_span"}
"""Settings of execution that have an effect in every mode."""
OTHERS: dict[str, Any] = {
    "ray_address": "auto",
    "object_store": 10**9,
    "encode_workers": WorkerCount(2, 2),
    "wait_for_gpus": Fraction(60),
    "gpus_per_worker": 0.5,
    "gpu_kernels": "compiled",
    "compile_cache": "cache/",
    "decode_workers": 2,
    "audit": 0.5,
    "audit_min_psnr": 30.0,
    "vgg_weights": "vgg.pth",
    "tile_size": (64, 64),
    "tile_overlap": 32,
    "size": (128, 128),
    "buckets": [(64, 64)],
    "clips_per_video": 2,
    "clip_placement": "random",
    "clip_seed": 3,
}
"""A value of each setting that has no effect somewhere, and of those that these depend on."""


def _run(**settings: object) -> Settings:
    return TokenizeRun.model_construct(
        **{name: field.get_default() for name, field in TokenizeRun.model_fields.items()} | settings
    )


def test_every_setting_of_execution_says_in_which_modes_it_has_an_effect() -> None:
    for model in (TokenizeRun, EvaluateRun):
        fields = {name: setting_of(field) for name, field in model.model_fields.items()}
        decided = {name for name, each in fields.items() if each.effect is not None}
        execution = {name for name, each in fields.items() if each.section == "Execution"}
        if model is TokenizeRun:
            assert execution - decided == EVERYWHERE
            assert decided <= OTHERS.keys()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [n for n, f in TokenizeRun.model_fields.items() if setting_of(f).effect is not None])
def test_a_setting_without_effect_is_said_and_one_with_an_effect_is_not(name: str, mode: str) -> None:
    effect = setting_of(TokenizeRun.model_fields[name]).effect
    flag = f"--{name.replace('_', '-')} has no effect"
    alone = [text for text in without_effect(_run(**{name: OTHERS[name]}), MODES[mode]) if text.startswith(flag)]
    assert without_effect(_run(), MODES[mode]) == [], "nothing is said of defaults"
    match effect:
        case In(where):
            assert bool(alone) == (where not in MODES[mode])
        case With(other):
            assert alone == [f"{flag} without --{other.replace('_', '-')}"]
            both = {name: OTHERS[name], other: OTHERS[other]}
            assert not any(text.startswith(flag) for text in without_effect(_run(**both), MODES[mode]))
        case Without(other):
            assert alone == []
            both = {name: OTHERS[name], other: OTHERS[other]}
            assert f"{flag} beside --{other.replace('_', '-')}" in without_effect(_run(**both), MODES[mode])


def test_a_run_in_this_process_says_which_of_its_settings_change_nothing(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", Recipe(num_frames=10, codec="mpeg4", width=64, height=64))
    small = ("--tokenizer", "tiny", "--fps", "4", "--frames", "5", "--size", "32", "--local")
    useless = ("--object-store", "1GB", "--decode-workers", "2", "--tile-overlap", "32", "--gpus-per-worker", "0.5")
    said = printed_by("tokenize", video, "--out", tmp_path / "tokens", *small, *useless)
    for flag in useless[::2]:
        assert f"!! {flag} has no effect" in said
    assert said.count("has no effect") == 4
