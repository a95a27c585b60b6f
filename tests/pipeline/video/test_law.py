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

# Combinations of which the law does not hold yet, each with its cause.
EXCEPTIONS = {
    ("mpeg1video", "mpeg1video"): "the demuxer's times of B-frames run backwards",
    ("mpeg1video", "asf"): "the container's times belong to other pictures where B-frames are reordered",
    ("mpeg2video", "asf"): "the container's times belong to other pictures where B-frames are reordered",
    ("h261", "asf"): "the stated rate is wrong, and times near its multiples are moved to them",
    ("h263", "asf"): "the stated rate is wrong, and times near its multiples are moved to them",
    ("rpza", "mov"): "every picture is marked as a keyframe",
    ("h263p", "wtv"): "every picture is marked as a keyframe",
    ("wmv2", "wtv"): "no packet is marked as a keyframe, and the decoder marks every picture as concealed",
}


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
        if lines and (codec, container_format) not in EXCEPTIONS:
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
