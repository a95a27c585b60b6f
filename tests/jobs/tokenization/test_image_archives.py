"""Runs on archives of pictures."""

from __future__ import annotations

from pathlib import Path

from tests.support.archives import sequence, write_archive
from tests.support.cli import run, tokenize
from tests.support.shards import clips_of
from vidshard.pipeline.output.rejects import read_rejects


def test_archives_are_tokenized_and_verified(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    write_archive(folder / "images.tar", sequence(50))
    write_archive(folder / "none.zip", [("a.txt", b"")])
    out = tmp_path / "out"
    command = (folder, "--out", out, "--tokenizer", "tiny", "--fps", 5, "--frames", 5, "--size", 32, "--image-fps")
    result = tokenize(*command, 10)
    assert result.exit_code == 0, result.output
    rows = [clip.values for clip in clips_of(out)]
    assert sorted(row["start_seconds"] for row in rows) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert {(row["source_codec"], row["source_fps"]) for row in rows} == {("png", 10.0)}
    [reject] = read_rejects(str(out)).to_pylist()
    assert reject["reason"] == "not_a_video"
    verified = run("verify", out, "--exact", 1)
    assert verified.exit_code == 0, verified.output
    assert "encoded 5 clips again" in verified.output
    changed = tokenize(*command, 12)
    assert changed.exit_code == 2
    assert "image_fps" in changed.output
