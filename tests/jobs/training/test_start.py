"""Starts of a training, exports of its checkpoints, and a run made longer: what is taken is said, nothing is lost."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.support.cli import printed_by
from tests.support.training import run_of
from vidshard.jobs.runtime.settings import SettingsError
from vidshard.jobs.training.resolve import ResolvedTraining, begin_run, lengthened, read_record, resolve
from vidshard.jobs.training.settings import training_run
from vidshard.jobs.training.start import read_start
from vidshard.models.training.discriminator import Discriminator
from vidshard.models.training.generator import start_tokenizer
from vidshard.models.training.state import TrainState, begin_stage
from vidshard.models.training.step import train_step
from vidshard.models.vidtok.config import PRESETS
from vidshard.models.weights import load_weights, save_tokenizer, weights_digest
from vidshard.pipeline.training_data.checkpoints import Checkpoints
from vidshard.schemas.errors import UserError
from vidshard.schemas.training import StageConfig

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = PRESETS["tiny"]
STAGE = StageConfig(
    frames=5,
    size=(32, 32),
    steps=10,
    batch_size=1,
    schedule="cosine",
    perceptual_weight=0,
    ema_decay=0.5,
    gan_start=0,
    discriminator_width=4,
    discriminator_learning_rate=3e-4,
    precision="float32",
)


def trained(steps: int, stage: StageConfig = STAGE) -> TrainState:
    state = begin_stage(stage, start_tokenizer(TINY, 0))
    for step in range(steps):
        train_step(state, torch.randint(0, 255, (1, 5, 32, 32, 3), dtype=torch.uint8, generator=seeded(step)))
    return state


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def released(path: Path, *, width: int = 4, kind: Any = "2d", with_loss: bool = True) -> tuple[Path, Mapping[str, Any]]:
    """A checkpoint as VidTok releases them: weights, and under ``loss.`` the discriminator and the log variance."""
    torch.manual_seed(7)
    loss = {f"loss.discriminator.{n}": v for n, v in Discriminator(kind, width).state_dict().items()}
    loss |= {"loss.logvar": torch.tensor(-1.5), "loss.perceptual_loss.net.slice1.0.weight": torch.ones(3)}
    weights = start_tokenizer(TINY, 5).state_dict()
    torch.save({"state_dict": {**weights, **(loss if with_loss else {})}, "epoch": 3}, path)
    return path, {**weights, **loss}


# From released checkpoints


def test_a_released_checkpoint_gives_its_discriminator_and_log_variance(tmp_path: Path) -> None:
    path, entries = released(tmp_path / "v1.0.ckpt")
    start = read_start(str(path), TINY)
    tokenizer = start_tokenizer(TINY, 0)
    assert start.weights is not None
    tokenizer.load_state_dict(start.weights)
    state = begin_stage(STAGE, tokenizer, loss=start.loss)
    assert state.bare_generator.logvar.item() == -1.5
    assert state.bare_discriminator is not None
    for name, value in state.bare_discriminator.state_dict().items():
        assert torch.equal(value, entries[f"loss.discriminator.{name}"]), name
    assert all(torch.equal(value, entries[name]) for name, value in state.tokenizer.state_dict().items())


@pytest.mark.parametrize(
    ("made", "changes", "says"),
    [
        ({}, {}, "takes the tokenizer's weights, the log variance (-1.5), the discriminator"),
        ({}, {"learn_logvar": False}, "takes the tokenizer's weights, the discriminator"),
        ({}, {"gan_weight": 0.0}, "takes the tokenizer's weights, the log variance (-1.5)"),
        ({"width": 8}, {}, "(-1.5); begins a new discriminator, as its discriminator is not a 2d one of width 4"),
        ({"kind": "3d"}, {}, "(-1.5); begins a new discriminator, as its discriminator is not a 2d one of width 4"),
        ({"with_loss": False}, {}, "the file holds nothing else to start from, and begins a new discriminator"),
    ],
)
def test_a_run_says_what_it_took_of_the_file_that_it_starts_from(
    made: dict[str, Any], changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path, _ = released(tmp_path / "x.ckpt", **made)
    flags = {**STAGE.model_dump(), "size": "32", "init_from": str(path), **changes}
    training = resolve(run_of(tmp_path, tmp_path / "out", **flags))
    assert training.start_note.endswith(says), training.start_note
    assert training.new_discriminator_at_once == ("begins a new discriminator" in says)


# From our own checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was interrupted at step 4, with checkpoints of three steps; the second is the best."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    training = begin_run(resolve(run_of(out.parent, out, **{**STAGE.model_dump(), "size": "32"})))
    checkpoints = Checkpoints(str(out / "stage1"), training.run_id, keep_last=3)
    for step, psnr in ((1, 10.0), (2, 12.0), (4, 11.0)):
        checkpoints.save({"state": trained(step).state_dict()}, step, {"psnr": psnr})
    return out


@pytest.mark.parametrize(("step", "number"), [("best", 2), ("last", 4), ("1", 1)])
def test_any_kept_step_of_an_interrupted_run_is_exported(step: str, number: int, run: Path) -> None:
    text = printed_by("train", "export", run, "--step", step)
    path = run / "stage1" / f"tokenizer-step-{number}.safetensors"
    assert f"next: vidshard tokenize VIDEOS --out tokens/ --weights {path}" in text
    config, weights = load_weights(path)
    assert config == TINY
    assert weights_digest(weights) == weights_digest(trained(number).weights(averaged=True))


def test_the_weights_of_the_step_itself_can_be_exported_to_any_place(run: Path, tmp_path: Path) -> None:
    printed_by("train", "export", run / "stage1", "--raw", "--to", tmp_path / "raw.safetensors")
    weights = load_weights(tmp_path / "raw.safetensors")[1]
    assert weights_digest(weights) == weights_digest(trained(4).weights(averaged=False))


def test_an_export_of_what_is_not_there_says_what_is(run: Path, tmp_path: Path) -> None:
    assert "keeps the steps 1, 2, 4; or give best or last" in printed_by("train", "export", run, "--step", "3", code=2)
    assert "there is no run in" in printed_by("train", "export", tmp_path, code=2)
    empty = tmp_path / "empty"
    begin_run(resolve(run_of(tmp_path, empty, checkpoint_steps=7, evaluate_steps=7)))
    assert "has no checkpoint; one is written every 7 steps" in printed_by("train", "export", empty, code=2)


def test_an_own_checkpoint_is_weights_and_a_start_with_everything_that_was_learned(run: Path) -> None:
    path = run / "stage1" / "checkpoints" / "step-00000004.pt"
    expected = trained(4)
    config, weights = load_weights(path)
    assert config == TINY
    assert weights_digest(weights) == weights_digest(expected.weights(averaged=True))
    assert weights_digest(load_weights(path, ema=True)[1]) == weights_digest(weights)
    start = read_start(str(path), TINY)
    state = begin_stage(STAGE, start_tokenizer(TINY, 1), previous=start.state)
    assert state.bare_discriminator is not None
    assert expected.bare_discriminator is not None
    kept = expected.bare_discriminator.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in state.bare_discriminator.state_dict().items())
    assert torch.equal(state.bare_generator.logvar, expected.bare_generator.logvar)
    with pytest.raises(ValueError, match="is of tiny, not tiny_kl"):
        read_start(str(path), PRESETS["tiny_kl"])
    training = resolve(run_of(run, run / "other", **{**STAGE.model_dump(), "size": "32", "init_from": str(path)}))
    assert "takes what a training learned: averaged weights of tiny at step 4" in training.start_note


# The model


@pytest.mark.parametrize("kind", ["safetensors", "own checkpoint"])
def test_a_file_that_states_its_model_needs_no_tokenizer(kind: str, run: Path, tmp_path: Path) -> None:
    path = run / "stage1" / "checkpoints" / "step-00000004.pt"
    if kind == "safetensors":
        path = tmp_path / "mine.safetensors"
        save_tokenizer(path, start_tokenizer(TINY, 0))
    flags = {"videos": ["clips"], "out": str(tmp_path / "out"), "init_from": str(path), "size": "32", "frames": 5}
    off = {"perceptual_weight": 0, "gan_weight": 0}
    training = resolve(training_run("domain", ("finetune",), {**flags, **off}))
    assert training.tokenizer == TINY
    assert resolve(training.run).tokenizer == TINY  # as `resume` does
    with pytest.raises(UserError, match="is of tiny, not tiny_kl"):
        resolve(training_run("domain", ("finetune",), {**flags, **off, "tokenizer": "tiny_kl"}))
    with pytest.raises(UserError, match="is of tiny, not fsq_causal_488_32768_v1_1"):
        resolve(training_run("long_video", ("finetune",), {**flags, **off}))


def test_a_file_that_states_none_is_of_the_preset_s_model(tmp_path: Path) -> None:
    path, _ = released(tmp_path / "x.ckpt")
    training = resolve(run_of(tmp_path, tmp_path / "out", init_from=str(path)))
    assert training.tokenizer == TINY
    assert training.run.tokenizer == "tiny"


# All stages of a preset


def test_two_stage_training_leaves_no_stage_out_and_run_takes_all() -> None:
    flags = {"videos": ["clips"], "out": "x"}
    with pytest.raises(SettingsError, match="leave finetune out: use `vidshard train run --preset small`"):
        training_run("paper", ("stage1", "stage2"), {**flags, "preset": "small"})
    assert list(training_run(None, (), {**flags, "preset": "small"}).stages) == ["stage1", "finetune", "stage2"]
    run = training_run(None, (), {**flags, "preset": "small", "seed": 3, "stage2": ("steps=700",)})
    assert [stage.seed for stage in run.stages.values()] == [3, 3, 3]
    assert run.stages["stage2"].steps == 700
    assert list(training_run(None, (), {**flags, "preset": "vidtwin_tiny"}).stages) == ["one_stage"]
    with pytest.raises(SettingsError, match="--preset is missing: name one of tiny"):
        training_run(None, (), flags)
    assert "--preset is missing" in printed_by("train", "run", "--videos", "x", "--out", "y", code=2)


# Longer


def longer(run: Path, steps: int, finished: tuple[str, ...] = ()) -> tuple[ResolvedTraining, str]:
    text = io.StringIO()
    console = Console(file=text, width=300)
    training = resolve(type(run_of(run, run)).model_validate({**read_record(str(run))["run"], "out": str(run)}))
    record = read_record(str(run))
    made = lengthened(
        ResolvedTraining(run=training.run, tokenizer=TINY, run_id=record["run_id"], previous=None, weights=None),
        steps,
        lambda name: name in finished,
        console,
    )
    return made, text.getvalue()


@pytest.mark.parametrize("finished", [(), ("stage1",)])
def test_a_run_made_longer_goes_on_with_all_that_it_has_learned(finished: tuple[str, ...], run: Path) -> None:
    training, text = longer(run, 30, finished)
    assert "stage1: 30 steps instead of 10, on from step 4" in text
    assert "the learning rate goes from 6.55e-06 to 9.57e-06 at step 4" in text
    begun = begin_run(training)
    assert read_record(str(run))["identity"]["stages"]["stage1"]["steps"] == 30
    state = begin_stage(training.run.stages["stage1"], start_tokenizer(TINY, 3))
    checkpoints = Checkpoints(str(run / "stage1"), begun.run_id)
    latest = checkpoints.latest()
    assert latest is not None
    state.load_state_dict(checkpoints.load(latest)["state"])
    assert state.step == 4
    record = json.loads((run / "run.json").read_text())  # back, for the other tests
    record["run"]["stages"]["stage1"]["steps"] = record["identity"]["stages"]["stage1"]["steps"] = 10
    (run / "run.json").write_text(json.dumps(record))


def test_a_run_is_not_made_shorter_nor_longer_without_a_checkpoint(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage1 has 10 steps already, and a run is made longer only"):
        longer(run, 10)
    begin_run(resolve(run_of(tmp_path, tmp_path / "new")))
    with pytest.raises(UserError, match="has no checkpoint to go on from"):
        longer(tmp_path / "new", 1000)


def test_a_longer_stage_that_now_reaches_its_adversary_begins_a_discriminator() -> None:
    short = STAGE.model_copy(update={"gan_start": 12, "steps": 10})
    kept: dict[str, Any] = trained(2, short).state_dict()
    assert not kept["discriminator"]
    state = begin_stage(short.model_copy(update={"steps": 20}), start_tokenizer(TINY, 1))
    state.load_state_dict(kept)
    assert state.step == 2
    assert state.discriminator is not None
