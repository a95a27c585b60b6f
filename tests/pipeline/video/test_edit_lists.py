"""Edit lists of mp4: the frames that a list names, each once, however the video is cut into spans."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from tests.support.decoding import SPEC, assert_same, decode, numbers, probe
from tests.support.mp4 import replace_box, with_edits, with_long_last_frame
from tests.support.videos import Recipe, write_video
from vidshard.pipeline.video.decode import decode_spans
from vidshard.pipeline.video.frames import decode_from
from vidshard.pipeline.video.input_file import WatchedFile
from vidshard.pipeline.video.packets import SeekPoint
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Clip, ClipSpec

PAL, NTSC = Fraction(25), Fraction(30000, 1001)


@pytest.fixture(scope="module", params=["h264", "h264-ntsc", "hevc", "mpeg4"])
def media(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Fraction, list[int]]:
    """A video with B-frames, its rate, and the tick of each of its frames."""
    codec = {"h264": "libx264", "hevc": "libx265"}.get(request.param.split("-")[0], "mpeg4")
    rate = NTSC if request.param.endswith("ntsc") else PAL
    recipe = Recipe(codec=codec, num_frames=75, rate=rate, b_frames=2, options=(("preset", "veryfast"),))
    recipe = recipe if codec != "mpeg4" else replace(recipe, options=())
    path = write_video(tmp_path_factory.mktemp("media") / "whole.mp4", recipe)
    with path.open("rb") as file:
        watched = WatchedFile(file, num_bytes=path.stat().st_size)
        ticks = [frame.pts for frame in decode_from(watched, SeekPoint(with_edits=False))]
    assert len(ticks) == 75
    return path, rate, ticks


def test_the_frames_that_the_cuts_name_are_shown_each_once_however_spans_are_cut(
    media: tuple[Path, Fraction, list[int]], tmp_path: Path
) -> None:
    whole, rate, ticks = media
    spec = replace(SPEC, fps=rate)
    draw = random.Random(0)
    for case in range(8):
        shown: list[int] = []
        edits = []
        # FFmpeg applies a list of one cut, and shows a frame of which only rounding to milliseconds makes a part
        for _ in range(draw.choice((1, 1, 2, 3, 5) if rate == PAL else (2, 3, 5))):
            first = draw.randrange(70)
            last = draw.randrange(first + 1, min(75, first + 25))
            shown += range(first, last)
            edits.append(((last - first) / rate, ticks[first], 1))
        cut = with_edits(whole, tmp_path / f"{case}.mp4", edits)
        one_pass = decode(cut, spec)
        assert numbers(one_pass) == shown, edits
        assert probe(cut).duration_seconds_from_header == pytest.approx(len(shown) / rate, abs=0.002)
        assert_same(decode(cut, spec, clips_per_span=1), one_pass)


@pytest.mark.parametrize("media", ["h264", "hevc", "mpeg4"], indirect=True)  # whose lengths need no rounding
def test_a_gap_shows_the_frame_before_it_and_a_dwell_holds_one_picture(
    media: tuple[Path, Fraction, list[int]], tmp_path: Path
) -> None:
    whole, rate, ticks = media
    one = 1 / rate
    edits = [(4 * one, ticks[30], 1), (3 * one, -1, 1), (5 * one, ticks[8], 0), (2 * one, ticks[50], 1)]
    cut = with_edits(whole, tmp_path / "gap.mp4", edits)
    spec = replace(SPEC, fps=rate)
    shown = [30, 31, 32, 33, 33, 33, 33, 8, 8, 8, 8, 8, 50, 51]
    assert numbers(decode(cut, spec)) == shown
    assert numbers(decode(cut, spec, clips_per_span=1)) == shown


def test_frames_of_cuts_are_skipped_and_sought_as_those_of_any_video(
    media: tuple[Path, Fraction, list[int]], tmp_path: Path
) -> None:
    whole, rate, ticks = media
    cut = with_edits(whole, tmp_path / "two.mp4", [(40 / rate, ticks[20], 1), (30 / rate, ticks[5], 1)])
    spec = replace(SPEC, fps=rate / 4, num_frames=2)
    assert numbers(decode(cut, spec)) == [*range(20, 60, 4), *range(5, 35, 4)]
    spans = plan_spans(probe(cut), spec, 1)[::3]  # gaps in between
    together = decode_spans(spans, spec, str(cut), max_clips=9)
    alone = [decode_spans([span], spec, str(cut), max_clips=9)[0] for span in spans]
    for some, other in zip(together, alone, strict=True):
        assert_same(some.clips, other.clips)


def test_a_last_frame_that_lasts_for_an_hour_by_the_index_is_a_reason_and_no_hour_of_one_picture(
    tmp_path: Path,
) -> None:
    whole = write_video(tmp_path / "whole.mp4", Recipe(num_frames=100, rate=PAL))
    long = with_long_last_frame(whole, tmp_path / "long.mp4", seconds=3600, rate=25)
    cut = with_edits(long, tmp_path / "cut.mp4", [(Fraction(4), 0, 1)])
    for path in (long, cut):
        with pytest.raises(VideoError, match=r"the header says 4\.00 s") as refused:
            decode(path, replace(SPEC, fps=PAL))
        assert refused.value.reason is Reason.LONGER_THAN_HEADER


@pytest.mark.parametrize("media", ["h264", "mpeg4"], indirect=True)
def test_a_gap_behind_the_only_cut_and_a_lone_picture_that_is_held(
    media: tuple[Path, Fraction, list[int]], tmp_path: Path
) -> None:
    whole, rate, ticks = media  # FFmpeg plays the media from its start in the gap, and plays on for the held picture
    spec = replace(SPEC, fps=rate)
    one = 1 / rate
    for edits, shown in (
        ([(4 * one, ticks[30], 1), (10 * one, -1, 1)], [30, 31, 32, 33]),
        ([(5 * one, ticks[8], 0)], [8] * 5),
        ([(2 * one, -1, 1), (5 * one, ticks[8], 0)], [8] * 5),
    ):
        cut = with_edits(whole, tmp_path / "one.mp4", edits)
        assert numbers(decode(cut, spec)) == shown, edits
        assert numbers(decode(cut, spec, clips_per_span=1)) == shown, edits


@pytest.mark.parametrize("media", ["h264", "hevc"], indirect=True)
def test_a_picture_that_the_edit_list_hides_does_not_prolong_the_last_one(
    media: tuple[Path, Fraction, list[int]], tmp_path: Path
) -> None:
    whole, rate, _ = media
    data = whole.read_bytes()
    path = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"ctts")
    at = data.index(b"ctts") + 4
    table = bytearray(data[at : at + 8 + 8 * int.from_bytes(data[at + 4 : at + 8], "big")])
    entry = 8 + 8 * 30
    table[entry + 4 : entry + 8] = (10_000_000).to_bytes(4, "big")  # a picture of the middle, at 13 minutes
    late = tmp_path / "late.mp4"
    late.write_bytes(replace_box(data, path, bytes(table)))
    spec = replace(SPEC, fps=rate)
    one_pass = decode(late, spec)
    assert 70 <= sum(clip.num_valid_frames for clip in one_pass) <= 75
    assert_same(decode(late, spec, clips_per_span=1), one_pass)


@pytest.mark.parametrize("media", ["h264", "mpeg4"], indirect=True)
def test_an_odd_edit_list_is_shown_or_refused_alike_wherever_the_video_is_cut(
    media: tuple[Path, Fraction, list[int]], tmp_path: Path
) -> None:
    whole, rate, ticks = media
    spec = replace(SPEC, fps=rate)
    draw = random.Random(3)
    lists = [
        [(Fraction(28, 25), 1_000_000, 1), (Fraction(19, 25), -1, 1)],
        [(1 / rate, -2, 1), (9000 / rate, ticks[70], 1)],
    ]
    for _ in range(40):
        lists.append(
            [
                (
                    Fraction(draw.choice((0, 1, 40, 999, 40 * draw.randrange(1, 30))), 1000),
                    draw.choice((-1, -2, 0, 1, ticks[-1], ticks[-1] + 600, 1_000_000, ticks[draw.randrange(75)])),
                    draw.choice((1, 1, 1, 0, 2)),
                )
                for _ in range(draw.choice((1, 2, 3)))
            ]
        )
    for edits in lists:
        cut = with_edits(whole, tmp_path / "odd.mp4", edits)
        one_pass, spans = clips_or_reason(cut, spec, 1000), clips_or_reason(cut, spec, 1)
        if isinstance(one_pass, Reason) or isinstance(spans, Reason):
            assert one_pass is spans, edits
        else:
            assert_same(spans, one_pass)


def clips_or_reason(path: Path, spec: ClipSpec, clips_per_span: int) -> list[Clip] | Reason:
    try:
        return decode(path, spec, clips_per_span)
    except VideoError as error:
        return error.reason
