"""Spans of several frame rates are decoded together, in windows that hold each span once."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.videos import Recipe, write_video
from vidshard.pipeline.decode_stage import SpanDecoder, probe
from vidshard.pipeline.evaluation.decoder import WINDOW_SCHEMA, WindowDecoder, in_windows
from vidshard.pipeline.rows import clip_frames, span_row
from vidshard.pipeline.video import decode
from vidshard.pipeline.video.decode import decode_spans
from vidshard.pipeline.video.presentation import frames_covering
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.video import ClipSpec, Span, SpanClips, VideoProbe, VideoRef, VideoSource

SLOW = ClipSpec(fps=Fraction(4), num_frames=5, height=32, width=32)
FAST = ClipSpec(fps=Fraction(10), num_frames=8, height=32, width=48)
SPECS = (SLOW, FAST)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight seconds."""
    return write_video(tmp_path_factory.mktemp("video") / "v.mp4", Recipe(num_frames=80, rate=Fraction(10)))


def spans_of(video: Path, spec: ClipSpec, clips_per_span: int) -> list[Span]:
    found = probe(VideoRef(uri=str(video), num_bytes=-1))
    assert isinstance(found, VideoProbe)
    return plan_spans(found, spec, clips_per_span)


def rows_of(video: Path, clips_per_span: tuple[int, int]) -> list[dict[str, Any]]:
    return [
        span_row(span, spec, None) | {"group": group}
        for group, (spec, clips) in enumerate(zip(SPECS, clips_per_span, strict=True))
        for span in spans_of(video, spec, clips)
    ]


def test_clips_of_two_rates_from_one_pass_are_those_of_a_pass_each(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = [span for spec in SPECS for span in spans_of(video, spec, 2)]
    specs = [spec for spec in SPECS for _ in spans_of(video, spec, 2)]
    alone = [
        result for spec in SPECS for result in decode_spans(spans_of(video, spec, 2), spec, str(video), max_clips=20)
    ]
    passes: list[str] = []

    def counted(*arguments: Any) -> Any:
        passes.append("pass")
        return frames_covering(*arguments)

    monkeypatch.setattr(decode, "frames_covering", counted)
    together = decode_spans(spans, specs, str(video), max_clips=20)
    assert len(passes) == 1
    assert sum(len(result.clips) for result in together) > 10
    for one, other in zip(together, alone, strict=True):
        assert [clip.clip_index for clip in one.clips] == [clip.clip_index for clip in other.clips]
        for clip, there in zip(one.clips, other.clips, strict=True):
            assert np.array_equal(clip.frames, there.frames)
            assert np.array_equal(clip.frame_pts_seconds, there.frame_pts_seconds)


def test_a_window_is_decoded_at_once_and_gives_a_row_for_each_span(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = in_windows(rows_of(video, (3, 2)), SPECS)
    decoder = WindowDecoder(specs=SPECS, decoder=SpanDecoder(spec=SLOW, max_clips=30, clips_per_pass=3))
    calls: list[int] = []
    together = SpanDecoder.decode_together

    def counted(self: SpanDecoder, spans: Sequence[Span], *rest: Any) -> list[SpanClips]:
        calls.append(len(spans))
        return together(self, spans, *rest)

    monkeypatch.setattr(SpanDecoder, "decode_together", counted)
    for window in windows:
        decoded = list(decoder(window))
        assert [row["span_id"][0] for row in decoded] == list(window["span_id"])
        for row in decoded:
            spec = SPECS[row["group"][0].as_py()]
            assert row["rejection"].null_count == 1
            [clips] = clip_frames(row, spec.num_frames)
            assert clips[0].shape == (spec.num_frames, spec.height, spec.width, 3)
    assert calls == [window.num_rows for window in windows]
    assert len(calls) < len(rows_of(video, (3, 2)))


def made_up(group: int, video: str, first: int, end: int | None) -> dict[str, Any]:
    span = Span(
        video_id=video,
        uri=video,
        time_base=Fraction(1, 100),
        grid_start_pts=0,
        first_clip=first,
        end_clip=end,
        duration_seconds_from_header=100.0,
        source=VideoSource(width=32, height=32, codec="h264", fps=10.0, rotation_degrees=0),
    )
    return span_row(span, SPECS[group], None) | {"group": group}


spans = st.tuples(st.integers(0, 1), st.sampled_from("ab"), st.integers(0, 9), st.none() | st.integers(1, 5))


@given(st.lists(spans, max_size=12, unique_by=lambda span: span[:3]))
def test_every_span_is_in_one_window_of_its_video_and_windows_do_not_begin_within_another(chosen: Any) -> None:
    rows = [
        made_up(group, video, first, None if count is None else first + count) for group, video, first, count in chosen
    ]
    windows = in_windows(rows, SPECS)
    placed = [row for window in windows for row in window.to_pylist()]
    assert sorted((r["group"], r["span_id"]) for r in placed) == sorted((r["group"], r["span_id"]) for r in rows)
    assert [row["window"] for row in placed] == sorted(row["window"] for row in placed)
    until: dict[str, float] = {}
    for window in windows:
        assert window.schema == WINDOW_SCHEMA
        members = window.to_pylist()
        [uri] = {row["uri"] for row in members}
        starts = [row["first_clip"] * float(SPECS[row["group"]].stride) for row in members]
        assert min(starts) >= until.get(uri, 0.0) - 1e-9
        ends = [
            float("inf") if row["end_clip"] is None else row["end_clip"] * float(SPECS[row["group"]].stride)
            for row, start in zip(members, starts, strict=True)
            if start < min(starts) + 1e-9
        ]
        assert max(starts) < max(ends) - 1e-9
        until[uri] = max(ends)
