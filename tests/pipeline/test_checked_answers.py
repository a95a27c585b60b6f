"""Values in a decoder's answers: what no video leads to is refused, whatever its type."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from vidshard.pipeline.checked_answers import checked_clips, checked_probe
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Clip, ClipSpec, Geometry, Limits, Span, SpanClips, VideoProbe, VideoRef, VideoSource

ID = "0123456789abcdef01234567"
SPEC = ClipSpec(fps=Fraction(4), num_frames=5, height=4, width=6)
SOURCE = VideoSource(width=96, height=64, codec="h264", fps=25.0, rotation_degrees=0)
PROBE = VideoProbe(
    video_id=ID,
    uri="shown",
    num_bytes=1000,
    time_base=Fraction(1, 12800),
    grid_start_pts=-512,
    duration_seconds_from_header=10.0,
    source=SOURCE,
)
SPAN = Span(
    video_id=ID,
    uri="s3://bucket/v",
    time_base=Fraction(1, 25),
    grid_start_pts=0,
    first_clip=2,
    end_clip=4,
    duration_seconds_from_header=10.0,
    source=SOURCE,
)
CLIP = Clip(
    video_id=ID,
    clip_index=3,
    frames=np.zeros((5, 4, 6, 3), np.uint8),
    start_seconds=3.75,
    frame_pts_seconds=np.arange(5.0),
    num_valid_frames=5,
    geometry=Geometry(policy="crop", scaled_width=6, scaled_height=4, left=0, top=0),
)


def test_a_header_gets_the_address_that_was_asked_about() -> None:
    found = checked_probe(PROBE, VideoRef(uri="s3://bucket/v?secret", num_bytes=-1), Limits())
    assert found == replace(PROBE, uri="s3://bucket/v?secret")


ODD_HEADERS: dict[str, object] = {
    "another record": SPAN,
    "nothing": None,
    "a negative size": replace(PROBE, num_bytes=-1),
    "a huge size": replace(PROBE, num_bytes=2**63),
    "no clock": replace(PROBE, time_base=Fraction(0)),
    "a clock that runs backwards": replace(PROBE, time_base=Fraction(-1, 25)),
    "a clock too fine": replace(PROBE, time_base=Fraction(1, 2**64)),
    "a clock too coarse": replace(PROBE, time_base=Fraction(2**64)),
    "a start too late": replace(PROBE, grid_start_pts=2**63),
    "a start too early": replace(PROBE, grid_start_pts=-(2**70)),
    "a negative length": replace(PROBE, duration_seconds_from_header=-1.0),
    "a length without end": replace(PROBE, duration_seconds_from_header=math.inf),
    "a length that is none": replace(PROBE, duration_seconds_from_header=math.nan),
    "a length over the limit": replace(PROBE, duration_seconds_from_header=172801.0),
    "no width": replace(PROBE, source=replace(SOURCE, width=0)),
    "a negative height": replace(PROBE, source=replace(SOURCE, height=-5)),
    "a huge height": replace(PROBE, source=replace(SOURCE, height=2**31)),
    "a rate that is none": replace(PROBE, source=replace(SOURCE, fps=math.nan)),
    "a rate without end": replace(PROBE, source=replace(SOURCE, fps=math.inf)),
    "a negative rate": replace(PROBE, source=replace(SOURCE, fps=-1.0)),
    "a turn that is none": replace(PROBE, source=replace(SOURCE, rotation_degrees=45)),
    "a codec that steers a terminal": replace(PROBE, source=replace(SOURCE, codec="h264\x1b]52;c;x")),
    "a long codec": replace(PROBE, source=replace(SOURCE, codec="x" * 65)),
}


@pytest.mark.parametrize("name", ODD_HEADERS)
def test_a_header_that_no_video_has_is_refused(name: str) -> None:
    with pytest.raises(VideoError) as caught:
        checked_probe(ODD_HEADERS[name], VideoRef(uri="v", num_bytes=-1), Limits())
    assert caught.value.reason is Reason.DECODER_CRASHED


def with_clips(*clips: Clip) -> list[object]:
    return [SpanClips(clips=list(clips))]


def shifted(**changes: int | str) -> Clip:
    return replace(CLIP, geometry=replace(CLIP.geometry, **changes))  # type: ignore[arg-type]


ODD_CLIPS: dict[str, object] = {
    "no list": SpanClips(clips=[CLIP]),
    "fewer spans": [],
    "more spans": with_clips(CLIP) * 2,
    "another record": [PROBE],
    "a negative number of errors": [SpanClips(clips=[CLIP], num_errors=-1)],
    "a huge number of errors": [SpanClips(clips=[CLIP], num_errors=2**40)],
    "another video": with_clips(replace(CLIP, video_id="f" * 24)),
    "a clip before the span": with_clips(replace(CLIP, clip_index=1)),
    "a clip after the span": with_clips(replace(CLIP, clip_index=4)),
    "a negative clip": with_clips(replace(CLIP, clip_index=-1)),
    "a clip twice": with_clips(CLIP, CLIP),
    "clips in another order": with_clips(CLIP, replace(CLIP, clip_index=2)),
    "other frames": with_clips(replace(CLIP, frames=np.zeros((5, 6, 4, 3), np.uint8))),
    "a start that is none": with_clips(replace(CLIP, start_seconds=math.nan)),
    "a start without end": with_clips(replace(CLIP, start_seconds=math.inf)),
    "times that are none": with_clips(replace(CLIP, frame_pts_seconds=np.array([0, 1, math.nan, 3, 4]))),
    "times that run backwards": with_clips(replace(CLIP, frame_pts_seconds=np.arange(5.0)[::-1].copy())),
    "times of another type": with_clips(replace(CLIP, frame_pts_seconds=np.arange(5))),
    "another geometry": with_clips(shifted(policy="pad")),
    "a place too far": with_clips(shifted(left=2**31)),
    "a size too large": with_clips(shifted(scaled_width=-(2**40))),
    "frames before the first one": with_clips(
        replace(CLIP, lead_frames=2, frame_pts_seconds=np.arange(3.0), num_valid_frames=3)
    ),
}


@pytest.mark.parametrize("name", ODD_CLIPS)
def test_clips_that_were_not_asked_for_are_refused(name: str) -> None:
    with pytest.raises(VideoError) as caught:
        checked_clips(ODD_CLIPS[name], [SPAN], [SPEC], 10)
    assert caught.value.reason is Reason.DECODER_CRASHED


CASES: dict[str, tuple[Callable[[], Span], ClipSpec, list[int]]] = {
    "a span": (lambda: SPAN, SPEC, [2, 3]),
    "a damaged one": (lambda: SPAN, SPEC, [3]),
    "an empty one": (lambda: SPAN, SPEC, []),
    "with its halo": (lambda: SPAN, replace(SPEC, halo_clips=1), [1, 2, 3]),
    "an open end": (lambda: replace(SPAN, end_clip=None), SPEC, list(range(2, 12))),
    "an open end with a halo": (lambda: replace(SPAN, end_clip=None), replace(SPEC, halo_clips=2), list(range(12))),
}


@pytest.mark.parametrize("name", CASES)
def test_what_was_asked_for_passes(name: str) -> None:
    span, spec, indices = CASES[name]
    results = [SpanClips(clips=[replace(CLIP, clip_index=index) for index in indices])]
    assert checked_clips(results, [span()], [spec], 10) is results
