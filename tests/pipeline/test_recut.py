"""A seeded share of the spans is decoded again with another cut, and a difference is a rejection, never silence."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.support.cli import SMALL, printed_by
from tests.support.decoding import probe
from tests.support.videos import Recipe, write_video
from vidshard.pipeline import decode_stage
from vidshard.pipeline.output.rejects import read_rejects
from vidshard.pipeline.recut import Recutting
from vidshard.pipeline.video.decode import decode_spans
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import ClipSpec, Span, SpanClips

SPEC = ClipSpec(fps=Fraction(10), num_frames=5, height=32, width=32)
ALWAYS = Recutting(share=1, seed="a run")
Decode = Callable[[Span], SpanClips]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "v.mp4", Recipe(codec="mpeg4", num_frames=73, gop=7))


def decoder(path: Path, change: Callable[[Span, SpanClips], SpanClips] = lambda _, result: result) -> Decode:
    def decode(span: Span) -> SpanClips:
        [result] = decode_spans([span], SPEC, str(path), max_clips=100)
        return change(span, result)

    return decode


def compared(path: Path, clips_per_span: int, decode: Decode) -> list[VideoError | None]:
    spans = plan_spans(probe(path), SPEC, clips_per_span)
    return [ALWAYS.compare(span, decoder(path)(span).clips, decode) for span in spans]


@pytest.mark.parametrize("clips_per_span", [1, 2, 3, 100])
def test_equal_clips_pass_however_the_spans_are_cut(path: Path, clips_per_span: int) -> None:
    cuts: list[tuple[int, int | None]] = []
    decode = decoder(path)

    def noting(span: Span) -> SpanClips:
        cuts.append((span.first_clip, span.end_clip))
        return decode(span)

    assert set(compared(path, clips_per_span, noting)) == {None}
    assert not {(span.first_clip, span.end_clip) for span in plan_spans(probe(path), SPEC, clips_per_span)} & set(cuts)


@pytest.mark.parametrize("what", ["a pixel", "a time", "a clip less", "a refusal"])
def test_any_difference_is_named(path: Path, what: str) -> None:
    def changed(span: Span, result: SpanClips) -> SpanClips:
        last = result.clips[-1]
        if what == "a pixel":
            frames = last.frames.copy()
            frames[0, 0, 0, 0] ^= 1
            last = replace(last, frames=frames)
        elif what == "a time":
            last = replace(last, frame_pts_seconds=np.nextafter(last.frame_pts_seconds, 100))
        elif what == "a clip less":
            return SpanClips(clips=result.clips[:-1])
        else:
            return SpanClips(clips=[], error=VideoError(Reason.DECODE_ERROR, "damaged"))
        return SpanClips(clips=[*result.clips[:-1], last])

    for error in compared(path, 3, decoder(path, changed)):
        assert error is not None
        assert error.reason is Reason.CUT_DEPENDENT
        assert error.detail.startswith("decoded again with another cut, ")


def test_damage_before_the_span_and_lack_of_time_say_nothing(path: Path) -> None:
    spans = plan_spans(probe(path), SPEC, 3)

    def damaged_before(span: Span, result: SpanClips) -> SpanClips:
        damage = SpanClips(clips=[], error=VideoError(Reason.DECODE_ERROR, "damaged"))
        return damage if span.first_clip == spans[1].first_clip - 1 else result

    clips = decoder(path)(spans[1]).clips
    assert ALWAYS.compare(spans[1], clips, decoder(path, damaged_before)) is None
    late = VideoError(Reason.DECODE_TIMEOUT, "late")
    with pytest.raises(VideoError, match="late"):
        ALWAYS.compare(spans[1], clips, lambda _: SpanClips(clips=[], error=late))


def test_the_share_is_kept_and_the_choice_repeats(path: Path) -> None:
    [span] = plan_spans(probe(path), SPEC, 100)
    spans = [replace(span, first_clip=n, end_clip=n + 1) for n in range(4000)]
    chosen = [each for each in spans if Recutting(share=0.1, seed="a run").chooses(each)]
    assert 300 < len(chosen) < 500
    assert chosen == [each for each in spans if Recutting(share=0.1, seed="a run").chooses(each)]
    assert chosen != [each for each in spans if Recutting(share=0.1, seed="another").chooses(each)]
    assert not any(Recutting(share=0, seed="a run").chooses(each) for each in spans)
    assert all(ALWAYS.chooses(each) for each in spans)


def test_a_run_compares_its_spans_and_rejects_those_that_depend_on_the_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("a", "b"):
        write_video(
            videos / f"{name}.mp4", Recipe(codec="mpeg4", num_frames=60, gop=7, width=96 if name == "a" else 80)
        )
    flags = ("--fps", 10, "--clips-per-span", 2, "--recut-share", 1)
    sound = printed_by("tokenize", *SMALL, *flags, videos, "--out", tmp_path / "sound", "--local")
    num_spans = len(pq.read_table(tmp_path / "sound" / "plan"))
    assert f"{num_spans} spans decoded again with another cut: all the same" in sound
    decode = decode_stage._decode_spans
    planned = set(pq.read_table(tmp_path / "sound" / "plan")["span_id"].to_pylist())

    def odd(spans: Sequence[Span], *arguments: object, **options: object) -> list[SpanClips]:
        results = decode(spans, *arguments, **options)  # type: ignore[arg-type]
        if Path(spans[0].uri).name == "b.mp4" and not {span.span_id for span in spans} <= planned:
            for result in results:
                for clip in result.clips:
                    clip.frames[:] = 0
        return results

    monkeypatch.setattr(decode_stage, "_decode_spans", odd)
    broken = printed_by("tokenize", *SMALL, *flags, videos, "--out", tmp_path / "broken", "--local")
    rejects = read_rejects(str(tmp_path / "broken")).to_pylist()
    assert {(Path(row["uri"]).name, row["reason"]) for row in rejects} == {("b.mp4", "cut_dependent")}
    assert f"{len(rejects)} of them DIFFER and are rejected" in broken
    summary = json.loads((tmp_path / "broken" / "summary.json").read_text())
    assert summary["num_recut_spans"] == num_spans
