"""Runs that carry signals, such as actions and poses, beside the clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.cli import tokenize
from tests.support.shards import clips_of
from tests.support.videos import Recipe, write_video
from vidshard.pipeline.output.rejects import read_rejects


def test_every_clip_row_receives_its_signals(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", Recipe(num_frames=60))  # 2.4 s, 40 ms a frame
    plain = write_video(tmp_path / "plain.mp4", Recipe(num_frames=20))
    seconds = np.arange(300) / 100
    values = np.stack([seconds * 10, -seconds], axis=1).astype(np.float32)
    np.savez(tmp_path / "a.npz", seconds=seconds, values=values)
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    broken = write_video(tmp_path / "broken.mp4", Recipe(num_frames=30))
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"uri,actions,poses\n{video},a.npz,a.npz\n{plain},,\n{broken},a.npz,bad.npy\n")
    flags = ("--tokenizer", "tiny", "--fps", "5", "--frames", "5", "--size", "32", "--clips-per-span", "1")
    arguments = (manifest, "--out", tmp_path / "out", "--signals", "actions=linear,poses=window")
    result = tokenize(*arguments, *flags)
    assert result.exit_code == 0, result.output
    rows = [clip.values for clip in clips_of(tmp_path / "out")]
    mine = sorted((row for row in rows if row["uri"] == str(video)), key=lambda row: row["clip_index"])
    assert len(mine) == 3
    for row in mine:
        times = np.array(row["frame_pts_seconds"])
        np.testing.assert_allclose(np.array(row["actions"]), np.stack([times * 10, -times], axis=1), rtol=1e-5)
        assert [len(frame) for frame in row["poses"]] == [len(times) for times in row["poses_seconds"]]
    windows = [time for row in mine for frame in row["poses_seconds"] for time in frame]
    assert windows == pytest.approx(list(seconds[seconds < 2.4 - 1e-9]))
    assert mine[-1]["num_valid_frames"] == 2
    assert mine[-1]["poses"][2:] == [[], [], []]
    assert all(row["actions"] is None and row["poses"] is None for row in rows if row["uri"] == str(plain))
    rejects = read_rejects(str(tmp_path / "out")).to_pylist()
    assert {(Path(row["uri"]).name, row["reason"]) for row in rejects} == {("broken.mp4", "bad_signal")}
    missing = tokenize(manifest, "--out", tmp_path / "other", "--signals", "forces=linear", *flags)
    assert missing.exit_code == 2
    assert "has a column 'forces'" in " ".join(missing.output.split())


@pytest.mark.parametrize("signals", ["start=window", "geometry=linear", "a=window,a_seconds=linear"])
def test_a_signal_that_would_take_another_columns_place_is_refused(tmp_path: Path, signals: str) -> None:
    (tmp_path / "m.csv").write_text("uri,start,geometry,a,a_seconds\nv.mp4,s.npy,s.npy,s.npy,s.npy\n")
    result = tokenize(tmp_path / "m.csv", "--out", tmp_path / "out", "--tokenizer", "tiny", "--signals", signals)
    assert result.exit_code == 2
    assert "the shards have another column" in " ".join(result.output.split())
