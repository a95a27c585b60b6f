"""Runs on damaged videos: rejected whole, or their undamaged clips kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.support.cli import printed_by
from tests.support.lost_packets import without_packets
from tests.support.shards import clips_of
from tests.support.videos import Recipe, write_damaged, write_video
from vidshard.pipeline.output.rejects import read_rejects
from vidshard.schemas.rejections import REMEDIES, Reason

NUM_CLIPS = 24


def test_the_job_keeps_or_rejects_and_says_what_is_missing(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    whole = write_video(tmp_path / "whole.mp4", Recipe(num_frames=300, gop=25, width=160, height=96))
    write_damaged(videos / "damaged.mp4", whole, share=0.5, num_bytes=900)
    common = ("--tokenizer", "tiny", "--fps", "10", "--frames", "5", "--size", "32", "--clips-per-span", "8")

    command = ("tokenize", videos, *common, "--local")
    printed_by(*command, "--out", tmp_path / "strict")
    output = printed_by(*command, "--out", tmp_path / "kept", "--damaged", "keep")
    assert "2 as tokens (1 of them with clips missing)" in output or "3 as tokens (1 of them" in output
    rows = {
        name: {clip.clip_id.rsplit("-", 1)[1]: clip for clip in clips_of(tmp_path / name)}
        for name in ("strict", "kept")
    }
    assert len(rows["strict"]) == 16
    assert 16 < len(rows["kept"]) < NUM_CLIPS
    for index, clip in rows["strict"].items():
        assert np.array_equal(clip.payload["tokens"], rows["kept"][index].payload["tokens"])
        assert clip.values["decode_errors"] == 0
    errors = [clip.values["decode_errors"] for index, clip in rows["kept"].items() if index not in rows["strict"]]
    assert set(errors) == {1}
    [strict] = read_rejects(str(tmp_path / "strict")).to_pylist()
    assert strict["remedy"] == REMEDIES[Reason.DECODE_ERROR]
    assert "--damaged keep" in strict["remedy"], "nothing of that span is kept yet"
    [reject] = read_rejects(str(tmp_path / "kept")).to_pylist()
    assert reject["reason"] == "decode_error"
    assert "clips beside one damaged place" in reject["detail"]
    assert reject["remedy"] == "copy the file again"
    assert "decode_error: copy the file again, or" not in output
    assert "0 written" in printed_by(*command, "--out", tmp_path / "kept", "--damaged", "keep")


def test_who_opens_no_video_is_not_told_to_keep_its_clips(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", Recipe(num_frames=30)).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])  # the index is at the end
    common = ("--tokenizer", "tiny", "--fps", "10", "--frames", "5", "--size", "32", "--local")
    output = printed_by("tokenize", cut, *common, "--out", tmp_path / "out")
    [reject] = read_rejects(str(tmp_path / "out")).to_pylist()
    assert (reject["stage"], reject["reason"]) == ("probe", "truncated")
    assert "--damaged keep" in REMEDIES[Reason.TRUNCATED]
    assert "--damaged keep" not in reject["remedy"]
    assert "--damaged keep" not in output


def test_clips_behind_a_gap_in_which_a_picture_may_be_lost_are_kept_and_reported(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    whole = write_video(tmp_path / "whole.webm", Recipe(codec="libvpx-vp9", num_frames=100, gop=50))
    without_packets(videos / "lacking.webm", whole, "webm", [20], close=False)
    common = ("--tokenizer", "tiny", "--fps", "10", "--frames", "5", "--size", "32", "--clips-per-span", "4")
    output = printed_by("tokenize", videos, *common, "--local", "--out", tmp_path / "out")
    assert "doubtful 1 x possible_loss" in output
    assert "0 rejected" in output
    [reject] = read_rejects(str(tmp_path / "out")).to_pylist()
    errors = sorted(
        (int(clip.clip_id.rsplit("-", 1)[1]), clip.values["decode_errors"]) for clip in clips_of(tmp_path / "out")
    )
    assert errors == [(index, int(index < 4)) for index in range(8)]
    assert (reject["reason"], reject["kept_clips"]) == ("possible_loss", 4)
    assert "one gap in its times before 0.84 s" in reject["detail"]
    assert "0 written" in printed_by("tokenize", videos, *common, "--local", "--out", tmp_path / "out")
