"""Joined transport and program streams whose clocks begin anew: nothing of a later recording is shown as the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import tests.support.videos as videos
from tests.support.decoding import SPEC, numbers, probe
from tests.support.law import EVERY_DECODER
from tests.support.videos import Recipe, numbered_frame, write_video
from vidshard.pipeline.video import clock_order, decoding_pass
from vidshard.pipeline.video.decode import decode_spans
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.rejections import Reason

SPEC_25 = replace(SPEC, fps=Fraction(25), height=32, width=48)
STREAMS = {
    "h264 in ts": ("ts", Recipe(num_frames=40, gop=10)),
    "hevc in ts": ("ts", Recipe(num_frames=40, gop=10, codec="libx265", b_frames=2)),
    "mpeg2 in m2ts": ("m2ts", Recipe(num_frames=40, gop=10, codec="mpeg2video", b_frames=2)),
    "mpeg2 in vob": ("vob", Recipe(num_frames=40, gop=10, codec="mpeg2video")),
    "mpeg1 in mpg": ("mpg", Recipe(num_frames=40, gop=10, codec="mpeg1video")),
}


def recording(path: Path, recipe: Recipe, first_number: int, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A recording whose frames carry numbers from one on."""
    with monkeypatch.context() as patch:
        patch.setattr(
            videos, "numbered_frame", lambda n, width, height: numbered_frame(n + first_number, width, height)
        )
        return write_video(path, recipe).read_bytes()


def shown(path: Path, clips_per_span: int) -> tuple[list[int], list[Reason]]:
    """Numbers of the frames of all spans, and why the others were refused."""
    found: list[int] = []
    reasons: list[Reason] = []
    for span in plan_spans(probe(path, EVERY_DECODER), SPEC_25, clips_per_span):
        [result] = decode_spans([span], SPEC_25, str(path), max_clips=1000, limits=EVERY_DECODER)
        found += numbers(result.clips)
        reasons += [result.error.reason] if result.error is not None else []
    return found, reasons


@pytest.mark.parametrize("lengths", [(40,), (80,), (20,), (40, 20)], ids=str)
@pytest.mark.parametrize("name", STREAMS)
def test_recordings_that_begin_at_the_same_time_are_not_mixed(
    name: str, lengths: Sequence[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix, recipe = STREAMS[name]
    parts = [recording(tmp_path / f"0.{suffix}", recipe, 0, monkeypatch)]
    for number, length in enumerate(lengths, 1):
        later = replace(recipe, num_frames=length)
        parts.append(recording(tmp_path / f"{number}.{suffix}", later, 100 * number, monkeypatch))
    path = tmp_path / f"joined.{suffix}"
    path.write_bytes(b"".join(parts))
    for clips_per_span in (1000, 4, 2, 1):
        found, reasons = shown(path, clips_per_span)
        assert found == [*range(len(found))]
        assert reasons
        assert set(reasons) == {Reason.DECODE_ERROR}


def test_the_clock_of_a_large_file_is_looked_at_in_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock_order, "_SAMPLE_BYTES", 2048)
    monkeypatch.setattr(clock_order, "_NUM_SAMPLES", 4)
    recipe = Recipe(num_frames=120, gop=10, width=192, height=128)
    parts = [recording(tmp_path / f"{n}.ts", recipe, 200 * n, monkeypatch) for n in range(2)]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(parts))
    assert len(parts[0]) > 8 * 2048
    found, reasons = shown(path, 4)
    assert found == [*range(len(found))]
    assert reasons


@pytest.mark.parametrize("name", STREAMS)
def test_one_recording_is_sought_by_its_clock(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suffix, recipe = STREAMS[name]
    path = write_video(tmp_path / f"whole.{suffix}", recipe)
    answers: list[bool] = []

    def look(*arguments: Any) -> bool:
        answers.append(clock_order.clock_runs_back(*arguments))
        return answers[-1]

    monkeypatch.setattr(decoding_pass, "clock_runs_back", look)
    found, reasons = shown(path, 1)
    assert found == [*range(40)]
    assert not reasons
    assert answers
    assert not any(answers)


def test_a_clock_may_begin_again_from_zero() -> None:
    assert clock_order._ticks_after(5, (1 << 33) - 5) == 10
    assert clock_order._ticks_after((1 << 33) - 5, 5) == -10
