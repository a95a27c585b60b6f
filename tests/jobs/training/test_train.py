"""`vidshard train`: requests that cannot be carried out end early, flags and file are laid over a preset."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.support.training import run_of, train
from vidshard.jobs.cli import vidshard
from vidshard.jobs.runtime.settings import SettingsError
from vidshard.jobs.training.settings import training_run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "tiny_xl"}, "tiny_xl"),
        ({"frames": 6}, "stage1: .*frames"),
        ({"size": "30"}, "stage1: .*30"),
        ({"perceptual_weight": 1.0, "vgg_weights": "/nowhere.pth"}, "nowhere.pth.*--perceptual-weight 0"),
        ({"init_from": "/nowhere/stage1"}, "neither a stage of a run, such as runs/mine/stage1, nor weights"),
        ({"init_from": "/nowhere.safetensors"}, "nowhere.safetensors"),
        ({"checkpoint_steps": 7, "evaluate_steps": 3}, "must be a multiple of the other"),
        ({"trainable": "decoder"}, "needs a trained encoder: give --init-from"),
        ({"tokenizer": "vidtwin_tiny"}, "vidtwin_tiny is of family vidtwin, .* stage1 of two-stage training is for"),
        ({"tokenizer": "vidtwin_tiny", "trainable": "decoder"}, "trains the decoder alone is for .* family vidtok"),
        ({"wandb": "project"}, "pip install wandb"),
        ({"cache": "s3://key:SECRET@bucket/x"}, r"s3://bucket/x: the URL carries credentials"),
        ({"videos": ["https://host/v.mp4?sig=SECRET"]}, r"https://host/v.mp4: the URL carries credentials"),
        ({"best_by": "lpips"}, "best by lpips: LPIPS is measured only where --perceptual-weight"),
        ({"best_by": "codebook_utilization", "tokenizer": "tiny_kl"}, "tiny_kl has no codebook"),
        (
            {"best_by": "codebook_utilisation", "tokenizer": "tiny_kl"},
            "best by codebook_utilization: .* has no codebook",
        ),
        ({"discriminator": "3d", "frames": 1, "size": "8"}, "3d discriminator needs clips of more than 4 frames, or"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [videos] = changes.pop("videos", [tmp_path])
    code, _ = train(run_of(videos, tmp_path / "out", **changes))
    assert code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert "SECRET" not in error
    assert not (tmp_path / "out").exists()


def test_flags_and_file_are_laid_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("videos: [a/, b/]\npreset: tiny\nsteps: 50\nstage2: {size: 64, steps: 70}\nperceptual_weight: 0\n")
    flags = {"out": "x", "stage1": ("batch_size=8",), "gan_start": "20"}
    run = training_run("paper", ("stage1", "stage2"), flags, file)
    assert run.videos == ["a/", "b/"]
    assert (run.stages["stage1"].steps, run.stages["stage2"].steps) == (50, 70)
    assert (run.stages["stage1"].batch_size, run.stages["stage2"].batch_size) == (8, 4)
    assert run.stages["stage1"].gan_start == run.stages["stage2"].gan_start == 20
    assert run.stages["stage2"].trainable == "decoder"
    for changes, message in (
        ({"preset": "large"}, "no preset 'large'; these are: tiny"),
        ({"stage1": ("steps",)}, "give KEY=VALUE"),
        ({"stage1": ("stepz=1",)}, "stage1: stepz: unknown setting 'stepz'; did you mean 'steps'"),
        ({"steps": "many"}, "--steps: .*integer"),
        ({"preset": "domain"}, "has no stage1; it has finetune"),
        (
            {"preset": "vidtwin"},
            "two-stage training takes .* vidtwin has no stage1; it has one_stage: use",
        ),
        ({"best_by": "wombat"}, "--best-by"),
    ):
        with pytest.raises(SettingsError, match=message):
            training_run("paper", ("stage1", "stage2"), {"out": "x", **changes}, file)
    with pytest.raises(SettingsError, match="stage2: settings of one stage of several are for `vidshard train two_"):
        training_run("paper_stage1", ("stage1",), {"out": "x"}, file)


def test_help_states_the_defaults_of_the_command() -> None:
    for command, words in (
        ("stage2", ["[default: 256x256]", "[default: decoder]", "[default: paper_stage2]"]),
        ("two_stage", ["[default: 128x128, then 256x256]", "[default: 50000, then 30000]"]),
        ("finetune", ["[default: cosine]", "[default: 10000]"]),
        ("one_stage", ["[default: 224x224]", "[default: 0.00016]", "[default: vidtwin]"]),
    ):
        result = CliRunner().invoke(vidshard, ["train", command, "--help-all"], terminal_width=200)
        assert all(word in " ".join(result.output.split()) for word in words), result.output
