"""Presets of training: complete runs, and those of the paper."""

from __future__ import annotations

from fractions import Fraction

import pytest

from vidshard.jobs.training.presets import TRAININGS
from vidshard.jobs.training.sources import SOURCES
from vidshard.models.tokenizer import PRESETS
from vidshard.models.training.state import check_stage
from vidshard.schemas.training import StageConfig, TrainRun


@pytest.mark.parametrize("name", TRAININGS)
def test_presets_are_complete_runs(name: str) -> None:
    run = TRAININGS[name](["videos"], "out")
    assert run.tokenizer in PRESETS
    for stage in run.stages.values():
        check_stage(stage, PRESETS[run.tokenizer or ""])
    assert TrainRun.model_validate_json(run.model_dump_json()) == run


def test_the_presets_of_the_paper_are_its_stages() -> None:
    run = TRAININGS["paper"](["videos"], "out")
    first, second = run.stages.values()
    assert (first.size, first.frames, first.fps, first.steps, first.batch_size) == (
        (128, 128),
        17,
        Fraction(3),
        50_000,
        16,
    )
    assert (second.size, second.steps, second.batch_size, second.trainable) == ((256, 256), 30_000, 8, "decoder")


@pytest.mark.parametrize("name", SOURCES)
def test_every_setting_of_a_published_preset_has_its_source_and_the_value_stated_there(name: str) -> None:
    [stage] = TRAININGS[name](["videos"], "out").stages.values()
    assert SOURCES[name].keys() == StageConfig.model_fields.keys()
    assert {setting: getattr(stage, setting) for setting in SOURCES[name]} == {
        setting: source.value for setting, source in SOURCES[name].items()
    }


def test_the_presets_of_the_paper_begin_their_adversary_and_average_as_released() -> None:
    for stage in TRAININGS["paper"](["videos"], "out").stages.values():
        assert (stage.gan_start, stage.ema_decay, stage.entropy_affinity) == (10_000, 0, "dot")


def test_presets_that_start_a_codebook_of_ours_take_distances_and_those_of_papers_dot_products() -> None:
    taken = {
        (name, stage.entropy_affinity)
        for name, training in TRAININGS.items()
        for stage in training(["videos"], "out").stages.values()
        if stage.entropy_weight
    }
    assert {name for name, affinity in taken if affinity == "distance"} == {"tiny", "small"}
    assert {name for name, affinity in taken if affinity == "dot"} >= {"paper", "paper_stage1", "domain", "long_video"}
    assert not {name for name, affinity in taken if affinity == "dot"} & {"tiny", "small"}


def test_the_vidtwin_preset_is_table_6_of_its_paper() -> None:
    run = TRAININGS["vidtwin"](["videos"], "out")
    [stage] = run.stages.values()
    assert run.tokenizer == "vidtwin_structure_7_7_4_dynamics_7_8"
    assert (stage.size, stage.frames, stage.fps) == ((224, 224), 16, Fraction(8))
    assert (stage.optimizer, stage.adam_betas, stage.learning_rate, stage.weight_decay) == (
        "adam",
        (0.9, 0.99),
        1.6e-4,
        1e-4,
    )
    assert (stage.warmup_steps, stage.schedule, stage.final_rate_share) == (5000, "cosine", 0)
    assert (stage.perceptual_weight, stage.gan_weight, stage.kl_weight) == (0.05, 0.05, 1e-3)
    assert stage.batch_size == 4 * 6
    assert (stage.gan_loss, stage.discriminator, stage.lecam_weight, stage.max_grad_norm) == ("hinge", "2d", 0, 0)
