from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.sampling import frame_indices
from vidshard.pipeline.video.sampling import Grid, plan_spans
from vidshard.schemas.video import ClipSpec, VideoProbe, VideoSource

RATES = [Fraction(8), Fraction(10), Fraction(24), Fraction(25), Fraction(30), Fraction(30000, 1001), Fraction(15, 2)]
TIME_BASES = [Fraction(1, 90000), Fraction(1, 1000), Fraction(1, 12800), Fraction(1001, 30000), Fraction(1, 25)]

grids = st.builds(
    lambda start, time_base, fps: Grid(start_pts=start, time_base=time_base, fps=fps),
    st.integers(-(2**40), 2**40),
    st.sampled_from(TIME_BASES),
    st.sampled_from(RATES),
)
# steps between frames in ticks, none included (repeated times); the last is how long the last frame stays
steps = st.lists(st.integers(0, 500), min_size=1, max_size=20).map(lambda s: [*s[:-1], s[-1] + 1])


def constant_rate(source_fps: Fraction, num_frames: int, time_base: Fraction) -> tuple[np.ndarray, int]:
    ticks = [int(n / source_fps / time_base) for n in range(num_frames + 1)]
    return np.array(ticks[:-1]), ticks[-1]


@settings(deadline=None)
@given(grids, steps)
def test_each_grid_time_takes_the_last_frame_presented_at_or_before_it(grid: Grid, steps: list[int]) -> None:
    pts = np.array([grid.start_pts, *(grid.start_pts + s for s in accumulate(steps[:-1]))])
    end = grid.start_pts + sum(steps)
    indices = frame_indices(pts, end, grid)
    for number, index in enumerate(indices.tolist()):
        time = grid.seconds_at(number)
        assert pts[index] * grid.time_base <= time, "early"
        assert index == len(pts) - 1 or pts[index + 1] * grid.time_base > time, "stale"


@settings(deadline=None)
@given(grids, steps)
def test_the_grid_runs_while_a_frame_is_on_screen(grid: Grid, steps: list[int]) -> None:
    end = grid.start_pts + sum(steps)
    num_times = len(frame_indices(np.array([grid.start_pts]), end, grid))
    assert num_times >= 1
    assert grid.seconds_at(num_times - 1) < end * grid.time_base <= grid.seconds_at(num_times)


@settings(deadline=None)
@given(grids, st.integers(0, 10**6))
def test_the_tick_of_a_grid_time_is_the_last_one_not_after_it(grid: Grid, index: int) -> None:
    tick = grid.pts_at(index)
    assert tick * grid.time_base <= grid.seconds_at(index) < (tick + 1) * grid.time_base
    assert grid.first_index_at(tick) <= index < grid.first_index_at(tick + 1)


@pytest.mark.parametrize(
    ("source_fps", "target_fps", "first_indices"),
    [
        (Fraction(24), Fraction(10), [0, 2, 4, 7, 9, 12, 14, 16, 19, 21, 24]),
        (Fraction(10), Fraction(30), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]),
        (Fraction(30000, 1001), Fraction(8), [0, 3, 7, 11, 14, 18, 22, 26, 29, 33, 37]),
        (Fraction(25), Fraction(8), [0, 3, 6, 9, 12, 15, 18, 21, 25, 28, 31]),
    ],
)
def test_known_rates_give_the_frames_counted_by_hand(
    source_fps: Fraction, target_fps: Fraction, first_indices: list[int]
) -> None:
    time_base = 1 / (source_fps * 1000)  # every frame time is a whole number of ticks
    pts, end = constant_rate(source_fps, 60, time_base)
    indices = frame_indices(pts, end, Grid(start_pts=0, time_base=time_base, fps=target_fps))
    assert indices[:11].tolist() == first_indices


def test_variable_rate_repeats_a_frame_as_long_as_it_is_shown() -> None:
    grid = Grid(start_pts=500, time_base=Fraction(1, 1000), fps=Fraction(10))
    indices = frame_indices(np.array([500, 540, 1100, 1120, 1199]), 1400, grid)
    assert indices.tolist() == [0, 1, 1, 1, 1, 1, 2, 4, 4]


def test_a_century_in_fine_ticks_does_not_overflow() -> None:
    century = 100 * 365 * 86400 * 10**9
    grid = Grid(start_pts=0, time_base=Fraction(1, 10**9), fps=Fraction(1001, 30_000_000))
    indices = frame_indices(np.array([0, century]), century + 40_000 * 10**9, grid)
    assert len(indices) == 105_227
    assert indices[-2:].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("pts", "words"), [([], "at least one"), ([2, 1], "non-decreasing"), ([7], "before the first frame")]
)
def test_impossible_times_are_refused(pts: list[int], words: str) -> None:
    grid = Grid(start_pts=0, time_base=Fraction(1), fps=Fraction(1))
    with pytest.raises(ValueError, match=words):
        frame_indices(np.array(pts, np.int64), 10, grid)


SPEC = ClipSpec(fps=Fraction(8), num_frames=17, height=16, width=16)
PROBE = VideoProbe(
    video_id="v",
    uri="/v.mp4",
    num_bytes=10**6,
    time_base=Fraction(1, 90000),
    grid_start_pts=0,
    duration_seconds_from_header=0.0,
    source=VideoSource(width=16, height=16, codec="h264", fps=25.0, rotation_degrees=0),
)


@settings(deadline=None)
@given(st.floats(0, 40000), st.integers(1, 20))
def test_spans_cover_every_clip_once_and_none_is_likely_to_be_empty(seconds: float, clips_per_span: int) -> None:
    spans = plan_spans(replace(PROBE, duration_seconds_from_header=seconds), SPEC, clips_per_span)
    assert spans[0].first_clip == 0
    assert spans[-1].end_clip is None
    for span, following in pairwise(spans):
        assert span.end_clip == following.first_clip == span.first_clip + clips_per_span
    last_clips = Fraction(seconds) / SPEC.clip_seconds - spans[-1].first_clip
    assert last_clips < clips_per_span + 2
    assert last_clips >= 2 or len(spans) == 1
    assert len({span.span_id for span in spans}) == len(spans)


@pytest.mark.parametrize("seconds", [0.0, -3.0, float("nan"), float("inf"), 1e15, 130_000.0])
def test_a_duration_nobody_believes_is_one_open_span(seconds: float) -> None:
    [span] = plan_spans(replace(PROBE, duration_seconds_from_header=seconds), SPEC, 4)
    assert (span.first_clip, span.end_clip) == (0, None)
