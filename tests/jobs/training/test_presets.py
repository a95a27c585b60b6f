"""Presets of training: complete runs, and those of the paper."""

from __future__ import annotations

from fractions import Fraction

import pytest

from vidshard.jobs.training.presets import TRAININGS
from vidshard.models.vidtok.config import PRESETS
from vidshard.schemas.training import TrainRun


@pytest.mark.parametrize("name", TRAININGS)
def test_presets_are_complete_runs(name: str) -> None:
    run = TRAININGS[name](["videos"], "out")
    assert run.tokenizer in PRESETS
    for stage in run.stages.values():
        PRESETS[run.tokenizer or ""].latent_shape(stage.frames, *stage.size)
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
