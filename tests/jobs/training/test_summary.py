"""The end of a training says what was measured, and what could not be."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.training import run_of
from vidshard.jobs.training.resolve import resolve
from vidshard.jobs.training.summary import Result, StageResult, print_result, why_unmeasured, write_summary
from vidshard.pipeline.training_data.videos import ITEM_SCHEMA, TrainingVideos
from vidshard.schemas.training import MADE


@pytest.mark.parametrize(
    ("share", "says"),
    [(0.0, "no video is held out; give --validation-share above 0"), (0.1, "no held-out video can be decoded")],
)
def test_a_run_that_could_not_measure_says_so_at_its_end_and_in_its_summary(
    share: float, says: str, tmp_path: Path
) -> None:
    training = resolve(run_of(tmp_path, tmp_path / "run", validation_share=share))
    blind = StageResult(name="stage1", steps=400, is_finished=True, unmeasured=why_unmeasured(share))
    seeing = StageResult(name="stage1", steps=400, is_finished=True, measured={"psnr": 20.0})
    videos = TrainingVideos(
        train=ITEM_SCHEMA.empty_table(), held_out=ITEM_SCHEMA.empty_table(), rejections=[], num_videos=4
    )
    for stage, is_blind in ((blind, True), (seeing, False)):
        result, text = Result(stages=[stage]), io.StringIO()
        print_result(result, str(tmp_path), Console(file=text, width=200))
        write_summary(training, result, videos)
        for shown in (text.getvalue(), (tmp_path / "run" / "summary.md").read_text()):
            assert ("nothing was measured" in shown) == is_blind, shown
            assert (says in shown) == is_blind


def test_codebook_use_has_its_ceiling_in_the_summary(tmp_path: Path) -> None:
    training = resolve(run_of(tmp_path, tmp_path / "run"))
    measured = {"psnr": 20.0, "codebook_utilization": 70 / 32768, "codebook_share_of_ceiling": 70 / 72}
    videos = TrainingVideos(
        train=ITEM_SCHEMA.empty_table(), held_out=ITEM_SCHEMA.empty_table(), rejections=[], num_videos=4
    )
    write_summary(training, Result(stages=[StageResult(name="stage1", measured=measured)]), videos)
    assert "| 0.2% | 97% |" in (tmp_path / "run" / "summary.md").read_text()


def test_ways_in_which_clips_were_made_are_in_words(tmp_path: Path) -> None:
    training = resolve(run_of(tmp_path, tmp_path / "run"))
    videos = TrainingVideos(
        train=ITEM_SCHEMA.empty_table(), held_out=ITEM_SCHEMA.empty_table(), rejections=[], num_videos=4
    )
    made = {way: number for number, way in enumerate(MADE)}
    write_summary(training, Result(stages=[StageResult(name="stage1", made=made)]), videos)
    text = (tmp_path / "run" / "summary.md").read_text()
    assert "2 mirrored" in text
    assert "5 of another frame rate" in text
    assert "other_fps" not in text
