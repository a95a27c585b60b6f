"""Parts of videos that become clips: strides, limited numbers, times of a manifest, frame sizes by aspect ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.decoding import assert_same
from tests.support.videos import Recipe, read_frame_number, write_damaged, write_video
from vidshard.pipeline.storage import open_binary
from vidshard.pipeline.video.decode import decode_spans
from vidshard.pipeline.video.frames import frames_covering
from vidshard.pipeline.video.geometry import nearest_bucket
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.sampling import CUT_TOLERANCE_SECONDS, ClipTimeline, expected_clips, plan_spans
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Clip, ClipSpec, Part, Span, SpanClips, VideoProbe, VideoRef, VideoSource

SPEC = ClipSpec(fps=Fraction(5), num_frames=5, height=48, width=48)
RATE = Fraction(25)
NUM_FRAMES = 700


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 seconds."""
    return write_video(tmp_path_factory.mktemp("parts") / "v.mp4", Recipe(num_frames=NUM_FRAMES, b_frames=2, gop=50))


PROBE = VideoProbe(
    video_id="v",
    uri="/v.mp4",
    num_bytes=1 << 40,
    time_base=Fraction(1, 90000),
    grid_start_pts=0,
    duration_seconds_from_header=0.0,
    source=VideoSource(width=16, height=16, codec="h264", fps=25.0, rotation_degrees=0),
)


def spans_of(path: Path, spec: ClipSpec, clips_per_span: int = 1000, part: Part | None = None) -> list[Span]:
    return plan_spans(probe_video(VideoRef(uri=str(path), num_bytes=-1), open_binary), spec, clips_per_span, part)


def clips_of(path: Path, spec: ClipSpec, clips_per_span: int = 1000, part: Part | None = None) -> list[Clip]:
    clips: list[Clip] = []
    for span in spans_of(path, spec, clips_per_span, part):
        clips += whole(decode_spans([span], spec, str(path), max_clips=1000)[0])
    return clips


def whole(result: SpanClips) -> list[Clip]:
    if result.error is not None:
        raise result.error
    return result.clips


def numbers(clips: Sequence[Clip]) -> list[list[int]]:
    return [[read_frame_number(frame) for frame in clip.frames[: clip.num_valid_frames]] for clip in clips]


def by_definition(starts: Sequence[Fraction], spec: ClipSpec, part: Part) -> list[list[int]]:
    """Frame numbers of clips by definition: at each grid time the last frame not after it."""
    end = NUM_FRAMES / RATE
    if part.end_seconds is not None:
        end = min(end, part.end_seconds - CUT_TOLERANCE_SECONDS)
    early = CUT_TOLERANCE_SECONDS if part.start_seconds else 0
    clips = []
    for start in starts:
        times = [start + n / spec.fps for n in range(spec.num_frames)]
        clips.append([math.floor((time + early) * RATE) for time in times if time < end])
    return clips


PARTS = [Part(), Part.of(3.3, None), Part.of(None, 9.5), Part.of(2.04, 2.5), Part.of(26.9, 40.0)]


@pytest.mark.parametrize("stride", ["1/5", "1/3", "1", "7/4", "13"])
@pytest.mark.parametrize("part", PARTS, ids=str)
def test_clips_begin_every_stride_until_one_reaches_the_end(video: Path, part: Part, stride: str) -> None:
    spec = replace(SPEC, stride_seconds=Fraction(stride))
    clips = clips_of(video, spec, part=part)
    starts = [part.start_seconds]
    end = min(NUM_FRAMES / RATE, (part.end_seconds or 1000) - (CUT_TOLERANCE_SECONDS if part.end_seconds else 0))
    while starts[-1] + max(spec.stride, spec.clip_seconds) < end:
        starts.append(starts[-1] + spec.stride)
    assert numbers(clips) == by_definition(starts, spec, part)
    assert [clip.start_seconds for clip in clips] == pytest.approx([float(start) for start in starts])
    for clips_per_span in (1, 3):
        assert_same(clips_of(video, spec, clips_per_span, part), clips)


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("placement", ["even", "random"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_limited_number_of_clips_is_spread_over_the_video(
    video: Path, part: Part, placement: Any, count: int
) -> None:
    spec = replace(SPEC, clips_per_video=count, placement=placement)
    clips = clips_of(video, spec, part=part)
    starts = [Fraction(clip.start_seconds).limit_denominator(1000) for clip in clips]
    assert numbers(clips) == by_definition(starts, spec, part)
    end = min(NUM_FRAMES / RATE, part.end_seconds or 1000)
    room = max(0, math.floor((end - part.start_seconds - spec.clip_seconds) * spec.fps)) + 1
    assert len(clips) == min(count, room)
    for number, start in enumerate(starts):
        at = (start - part.start_seconds) * spec.fps
        assert number * room // len(clips) <= at < (number + 1) * room // len(clips)
    assert_same(clips_of(video, spec, 1, part), clips)
    if placement == "random" and room > 100:
        others = clips_of(video, replace(spec, placement_seed=1), part=part)
        assert [clip.start_seconds for clip in others] != [clip.start_seconds for clip in clips]


def test_clips_with_too_little_video_are_left_out(video: Path) -> None:
    part = Part.of(None, 2.5)  # two clips and a half
    lengths = {
        seconds: [c.num_valid_frames for c in clips_of(video, replace(SPEC, min_seconds=Fraction(seconds)), part=part)]
        for seconds in ("0", "2/5", "3/5", "1")
    }
    assert lengths == {"0": [5, 5, 3], "2/5": [5, 5, 3], "3/5": [5, 5, 3], "1": [5, 5]}
    with pytest.raises(VideoError, match=r"3 of the 5 frames") as caught:
        clips_of(video, replace(SPEC, min_seconds=Fraction(1)), part=Part.of(0.0, 0.6))
    assert caught.value.reason is Reason.TOO_SHORT


def test_a_part_after_the_end_is_refused_by_name(video: Path) -> None:
    with pytest.raises(VideoError, match=r"no frame of the video lies in 30\.0\.\.31\.0 s") as caught:
        clips_of(video, SPEC, part=Part.of(30.0, 31.0))
    assert caught.value.reason is Reason.TOO_SHORT


@pytest.mark.parametrize("digits", [3, 6])
def test_shots_written_with_rounded_times_do_not_show_their_neighbors(tmp_path: Path, digits: int) -> None:
    rate = Fraction(30000, 1001)
    path = write_video(tmp_path / "v.mp4", Recipe(num_frames=300, rate=rate))
    cuts = [0, 37, 52, 53, 149, 211, 300]
    for first, after in pairwise(cuts):
        start, end = (math.floor(float(n / rate) * 10**digits + 0.5) / 10**digits for n in (first, after))
        clips = clips_of(path, replace(SPEC, fps=rate), part=Part.of(start, end))
        assert [n for clip in numbers(clips) for n in clip] == list(range(first, after))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(0, 290), st.integers(1, 40)).map(lambda t: Part.of(t[0] / 10, (t[0] + t[1]) / 10)),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([None, Fraction(1, 2), Fraction(12)]),
)
def test_parts_decoded_in_one_pass_are_those_decoded_alone(
    video: Path, parts: list[Part], stride: Fraction | None
) -> None:
    spec = replace(SPEC, stride_seconds=stride)
    spans = [span for part in parts for span in spans_of(video, spec, 3, part)]
    together = decode_spans(spans, spec, str(video), max_clips=100)
    for span, result in zip(spans, together, strict=True):
        [alone] = decode_spans([span], spec, str(video), max_clips=100)
        assert_same(result.clips, alone.clips)
        assert str(result.error) == str(alone.error)


def test_neighboring_parts_are_decoded_in_one_pass_and_distant_ones_are_sought(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int | None] = []

    def counted(watched: Any, needed_pts: int | None, *rest: Any) -> Any:
        passes.append(needed_pts)
        return frames_covering(watched, needed_pts, *rest)

    monkeypatch.setattr("vidshard.pipeline.video.decode.frames_covering", counted)

    def number_of_passes(starts: Sequence[float]) -> int:
        passes.clear()
        spans = [span for start in starts for span in spans_of(video, SPEC, 9, Part.of(start, start + 1))]
        assert all(result.clips for result in decode_spans(spans, SPEC, str(video), max_clips=9))
        return len(passes)

    assert number_of_passes([1.0, 2.0, 3.5, 8.0]) == 1
    assert number_of_passes([8.0, 1.0, 2.2]) == 1
    assert number_of_passes([1.0, 24.0]) == 2


def test_damage_costs_only_the_parts_that_hold_it(tmp_path: Path, video: Path) -> None:
    path = write_damaged(tmp_path / "d.mp4", video, share=0.5)
    spans = [span for start in range(0, 28, 2) for span in spans_of(path, SPEC, 9, Part.of(float(start), start + 2.0))]
    together = decode_spans(spans, SPEC, str(path), max_clips=9)
    reasons = [result.error.reason if result.error else None for result in together]
    assert 1 <= reasons.count(Reason.DECODE_ERROR) <= 2
    assert reasons.count(None) == len(spans) - reasons.count(Reason.DECODE_ERROR)
    for span, result in zip(spans, together, strict=True):
        [alone] = decode_spans([span], SPEC, str(path), max_clips=9)
        assert_same(result.clips, alone.clips)


@given(
    st.floats(0.1, 1e5),
    st.sampled_from([None, Fraction(1, 3), Fraction(5)]),
    st.sampled_from([None, 1, 4, 50]),
    st.sampled_from([Part(), Part.of(2.5, None), Part.of(1.0, 3.0)]),
    st.integers(1, 9),
)
@settings(deadline=None)
def test_spans_divide_the_clips_among_them(
    seconds: float, stride: Fraction | None, count: int | None, part: Part, clips_per_span: int
) -> None:
    spec = replace(SPEC, stride_seconds=stride, clips_per_video=count)
    probe = replace(PROBE, duration_seconds_from_header=seconds)
    spans = plan_spans(probe, spec, clips_per_span, part)
    assert spans[0].first_clip == 0
    assert spans[-1].end_clip is None
    assert all(one.end_clip == other.first_clip for one, other in pairwise(spans))
    layout = ClipTimeline.of(probe, part, spec)
    assert sum(expected_clips(span, spec) for span in spans) == layout.num_clips(Fraction(seconds))
    assert len({span.span_id for span in spans}) == len(spans)


def test_ids_differ_by_everything_that_decides_a_clip() -> None:
    specs = [
        SPEC,
        replace(SPEC, stride_seconds=Fraction(1, 2)),
        replace(SPEC, min_seconds=Fraction(1, 2)),
        replace(SPEC, clips_per_video=3),
        replace(SPEC, clips_per_video=3, placement="random"),
        replace(SPEC, clips_per_video=3, placement="random", placement_seed=1),
        replace(SPEC, width=64),
    ]
    ids = {spec.clip_id("v", 0, part) for spec in specs for part in PARTS}
    assert len(ids) == len(specs) * len(PARTS)
    assert SPEC.clip_id("v", 0, Part()) == SPEC.clip_id("v", 0)


@pytest.mark.parametrize(("start", "end"), [(-1.0, None), (2.0, 2.0), (2.0, 1.0), (math.nan, None), (0.0, math.inf)])
def test_parts_that_cannot_be_are_refused(start: float, end: float | None) -> None:
    with pytest.raises(ValueError, match=r"part|finite"):
        Part.of(start, end)


BUCKETS = [(64, 64), (64, 112), (112, 64)]


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((640, 360), (64, 112)),
        ((360, 640), (112, 64)),
        ((600, 480), (64, 64)),
        ((1000, 1000), (64, 64)),
        ((2390, 1000), (64, 112)),
        ((5, 1), (64, 112)),
    ],
)
def test_the_nearest_aspect_ratio_is_taken(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert nearest_bucket(*size, BUCKETS) == bucket
    assert nearest_bucket(*size, BUCKETS[::-1]) == bucket
