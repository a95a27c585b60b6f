"""`vidshard inspect`: what an output holds, in words."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.support.cli import SMALL, run, tokenize
from tests.support.shards import rows_of
from vidshard.pipeline.output.layout import shard_paths


def test_an_output_without_a_clip_can_be_inspected(bad_videos: Path, tmp_path: Path) -> None:
    assert tokenize(bad_videos / "text.mp4", "--out", tmp_path / "tokens", *SMALL).exit_code == 0
    result = run("inspect", tmp_path / "tokens")
    assert result.exit_code == 0, result.output
    assert "not_a_video" in result.output


def test_inspect_shows_and_verifies(output: Path) -> None:
    shown, verified = (run(command, output) for command in ("inspect", "verify"))
    assert (shown.exit_code, verified.exit_code) == (0, 0), shown.output + verified.output
    for words in ("10 clips of 5 videos", "shape [2, 4, 4]", "truncated"):
        assert words in shown.output
    assert "verified 1 of 1 shard, 10 clips" in verified.output
    tokens = np.concatenate([np.ravel(row["tokens"]) for row in rows_of(output)])
    share = np.unique(tokens, return_counts=True)[1] / tokens.size
    entropy = -(share * np.log2(share)).sum()
    expected = f"{share.size} of 32,768 tokens used ({share.size / 32768:.1%}), entropy {entropy:.2f} bits"
    assert f"codebook: {expected}" in shown.output


def test_inspect_names_a_damaged_shard(output: Path, tmp_path: Path) -> None:
    (path,) = shard_paths(str(output))
    data = bytearray(Path(path).read_bytes())
    data[len(data) // 8 : len(data) // 4] = bytes(len(data) // 4 - len(data) // 8)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "broken.parquet").write_bytes(data)
    result = run("verify", tmp_path)
    assert result.exit_code in (1, 2)
    assert "broken.parquet" in result.output


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nowhere", r"no token shards in \S+: there is no such folder"),
        (".", r"no token shards in \S+: it is not an output of vidshard"),
        ("a.mp4", r"\S+ is a file, and no shard"),
    ],
)
def test_inspecting_something_else_is_refused_with_the_cause(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "a.mp4").touch()
    result = run("inspect", tmp_path / name)
    assert result.exit_code == 2
    assert re.search(why, " ".join(result.output.split()))
