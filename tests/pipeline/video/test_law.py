"""Spans cut anywhere equal one pass, and one pass equals plain decoding: every container and codec that PyAV writes."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import pytest

from tests.support.combinations import RATE, combinations, encoders, formats, write_combination
from tests.support.law import breaches
from tests.support.shared import SHARED
from tests.support.videos import Recipe, write_video

# Combinations that are refused though plain decoding gives frames, and what the refusal says.
REFUSED = {("wmv2", "wtv"): "wtv lost the header without which wmv2 shows noise"}


def broken(pairs: Iterable[tuple[str, str]], folder: Path, most: int) -> tuple[dict[tuple[str, str], list[str]], int]:
    """Breaches of the law by combination, and the number of combinations that could be written."""
    found: dict[tuple[str, str], list[str]] = {}
    num_written = 0
    for codec, container_format in pairs:
        path = write_combination(codec, container_format, folder)
        if path is None:
            continue
        num_written += 1
        lines, _ = breaches(path, RATE)
        words = REFUSED.get((codec, container_format))
        if lines if words is None else not (lines and all(words in line for line in lines)):
            found[codec, container_format] = lines
        path.unlink()
        if num_written == most:
            break
    return found, num_written


def test_spans_cut_anywhere_equal_one_pass_and_that_equals_plain_decoding(tmp_path: Path) -> None:
    found, num_written = broken(combinations(), tmp_path, 50)
    assert num_written == 50
    assert not found


@pytest.mark.slow
def test_the_law_holds_in_every_container_for_every_codec(tmp_path: Path) -> None:
    assert len(encoders()) > 50
    assert len(formats()) > 30
    found, num_written = broken(combinations(), tmp_path, 100_000)
    assert num_written > 250
    assert not found


@pytest.mark.shared
def test_the_law_holds_for_real_videos() -> None:
    paths = [path for path in sorted((SHARED / "videos").iterdir()) if path.suffix in (".mp4", ".mov")]
    assert paths
    found = {}
    for path in paths:
        with av.open(str(path)) as container:
            rate = container.streams.video[0].average_rate or Fraction(25)
        lines, _ = breaches(path, rate, spans_of=(1,), compare_plain=path.stem != "corrupted")
        if lines:
            found[path.name] = lines
    assert not found


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("seconds", [2, 10])
def test_the_law_holds_where_each_picture_stays_for_seconds(tmp_path: Path, seconds: int, suffix: str) -> None:
    # a span ends within a picture, and those after it are there without being decoded: nothing is cut off
    recipe = Recipe(num_frames=12, rate=Fraction(1, seconds), b_frames=2)
    found, refused = breaches(write_video(tmp_path / f"slides.{suffix}", recipe), Fraction(2))
    assert not found
    assert refused is None
