"""Clips of a video file by the plain functions of the decoding library, and what they must show."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.support.videos import read_frame_number
from vidshard.pipeline.video.decode import decode_span
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.rejections import VideoError
from vidshard.schemas.video import Clip, ClipSpec, Limits, VideoProbe, VideoRef

SPEC = ClipSpec(fps=Fraction(10), num_frames=5, height=48, width=48)


def probe(path: Path, limits: Limits | None = None) -> VideoProbe:
    """Probe a local file."""
    return probe_video(VideoRef(uri=str(path), num_bytes=path.stat().st_size), lambda uri: open(uri, "rb"), limits)


def decode(
    path: Path,
    spec: ClipSpec = SPEC,
    clips_per_span: int = 1000,
    max_clips: int = 1000,
    limits: Limits | None = None,
) -> list[Clip]:
    """Every clip of a video, span by span."""
    spans = plan_spans(probe(path, limits), spec, clips_per_span)
    return [clip for span in spans for clip in decode_span(span, spec, str(path), max_clips=max_clips, limits=limits)]


def rejection(path: Path, spec: ClipSpec = SPEC) -> VideoError:
    """The error of a video that cannot be decoded; its detail is one line."""
    with pytest.raises(VideoError) as caught:
        decode(path, spec)
    assert "\n" not in caught.value.detail
    return caught.value


def numbers(clips: Sequence[Clip]) -> list[int]:
    """Numbers of the frames that are no padding."""
    return [read_frame_number(frame) for clip in clips for frame in clip.frames[: clip.num_valid_frames]]


def expected(times: list[Fraction], end: Fraction, fps: Fraction) -> list[int]:
    """Straight from the definition: for each grid time, the last frame not after it."""
    result: list[int] = []
    while (time := times[0] + len(result) / fps) < end:
        result.append(max(n for n, shown in enumerate(times) if shown <= time))
    return result


def assert_same(some: Sequence[Clip], others: Sequence[Clip]) -> None:
    """Equal clips, frame for frame."""
    assert [clip.clip_index for clip in some] == [clip.clip_index for clip in others]
    for one, other in zip(some, others, strict=True):
        assert np.array_equal(one.frames, other.frames), one
        assert np.array_equal(one.frame_pts_seconds, other.frame_pts_seconds), one
        assert (one.start_seconds, one.num_valid_frames, one.geometry) == (
            other.start_seconds,
            other.num_valid_frames,
            other.geometry,
        )
