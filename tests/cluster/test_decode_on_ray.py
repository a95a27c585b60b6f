"""Decoding whole videos on Ray: what one process gives, by actors that may die."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import pytest

from tests.support.cli import SMALL, printed_by, run, tokenize
from tests.support.videos import Recipe, write_video

pytestmark = pytest.mark.usefixtures("ray_session")


def lines_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "decoded.jsonl").read_text().splitlines()]


def test_actors_decode_what_one_process_decodes_and_the_next_run_nothing(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for number in range(3):
        video = Recipe(num_frames=20 + 5 * number, rate=Fraction(10))
        write_video(tmp_path / f"videos/{number}.mp4", video)
    assert tokenize(tmp_path / "videos", "--out", tmp_path / "out", *SMALL, "--continuous").exit_code == 0
    printed_by("decode", tmp_path / "out", "--all", tmp_path / "here", "--local")
    assert "3 written now" in printed_by("decode", tmp_path / "out", "--all", tmp_path / "ray", "--workers", 1)
    assert lines_of(tmp_path / "ray") == lines_of(tmp_path / "here")
    for line in lines_of(tmp_path / "ray"):
        with av.open(str(tmp_path / "ray" / str(line["file"]))) as container:
            assert sum(1 for _ in container.decode(video=0)) == line["num_frames"]
    assert "nothing new was written" in run("decode", tmp_path / "out", "--all", tmp_path / "ray").output
