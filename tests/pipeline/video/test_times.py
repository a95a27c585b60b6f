"""Clips follow the frames' own presentation times, whatever headers say of rate, count and length."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import av
import numpy as np
import pytest
from av.packet import Packet
from av.video.stream import VideoStream
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.decoding import assert_same, decode, expected, numbers, probe, rejection
from tests.support.videos import Recipe, numbered_frame, read_frame_number, write_video
from vidshard.pipeline.video.timestamps import TickConverter, frame_rate
from vidshard.schemas.rejections import Reason
from vidshard.schemas.video import Clip, ClipSpec

SPEC = ClipSpec(fps=Fraction(10), num_frames=5, height=32, width=32)
SMALL = Recipe(codec="mpeg4", width=32, height=32)

TimedFrame = list[tuple[Fraction, int]]
"""Start of each frame, in seconds, and its number."""


def shown_by_ffmpeg(path: Path) -> TimedFrame:
    """All frames in presentation order, as a plain loop over the whole file finds them."""
    with av.open(str(path)) as container:
        return [
            (
                frame.pts * frame.time_base,
                read_frame_number(frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)),
            )
            for frame in container.decode(video=0)
            if frame.pts is not None and frame.time_base is not None
        ]


def assert_follows(path: Path, shown: TimedFrame, end: Fraction, spec: ClipSpec = SPEC) -> list[Clip]:
    """Each sampled frame is the last one that began at or before its grid time, and says when that was."""
    clips = decode(path, spec)
    times = [time for time, _ in shown]
    indices = expected(times, end, spec.fps)
    assert numbers(clips) == [shown[index][1] for index in indices]
    said = [time for clip in clips for time in clip.frame_pts_seconds[: clip.num_valid_frames]]
    assert said == [float(times[index]) for index in indices]
    grid = [times[0] + n / spec.fps for n in range(len(indices))]
    assert all(Fraction(time) <= at + Fraction(1, 10**12) for time, at in zip(said, grid, strict=True)), "early"
    assert_same(decode(path, spec, clips_per_span=1), clips)
    return clips


def steady(num_frames: int = 50, start: Fraction = Fraction(0), first: int = 0) -> tuple[TimedFrame, Fraction]:
    """At 25 frames per second: what is shown, and when it ends."""
    shown = [(start + Fraction(n, 25), first + n) for n in range(num_frames)]
    return shown, start + Fraction(num_frames, 25)


def remux(path: Path, source: Path, change: Callable[[list[Packet[VideoStream]]], object], **options: str) -> Path:
    """The packets of a file's video, changed, in another container."""
    with av.open(str(source)) as old, av.open(str(path), "w", container_options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        change(packets)
        for packet in packets:
            packet.stream = stream
            new.mux(packet)
    return path


def patched(path: Path, source: Path, change: Callable[[bytearray], object]) -> Path:
    data = bytearray(source.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


# Edit lists and starts.


def with_edits(data: bytearray, edits: list[tuple[int, int]]) -> None:
    """Replace an mp4's edit list (seconds/1000 of the movie, ticks of the media; -1 for nothing shown)."""
    at = data.index(b"elst") - 4
    size = int.from_bytes(data[at : at + 4], "big")
    entries = b"".join(struct.pack(">IiI", duration, media, 1 << 16) for duration, media in edits)
    body = b"elst" + struct.pack(">II", 0, len(edits)) + entries
    data[at : at + size] = struct.pack(">I", len(body) + 4) + body
    for name in (b"edts", b"trak", b"moov"):
        box = data.rindex(name, 0, at) - 4
        data[box : box + 4] = (int.from_bytes(data[box : box + 4], "big") + len(body) + 4 - size).to_bytes(4, "big")


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("skipped", [12, 13, 24, 30])
@pytest.mark.parametrize("delay_seconds", [0, 3])
def test_an_edit_list_is_followed(tmp_path: Path, skipped: int, b_frames: int, delay_seconds: int) -> None:
    whole = write_video(tmp_path / "whole.mp4", Recipe(b_frames=b_frames))
    with av.open(str(whole)) as container:
        ticks = 1 / (container.streams.video[0].time_base or 1)
    start = -(-skipped * ticks // 25) + (2 * ticks // 25 if b_frames else 0)
    edits = [(delay_seconds * 1000, -1)] * bool(delay_seconds) + [((50 - skipped) * 40, int(start))]
    path = patched(tmp_path / "edited.mp4", whole, lambda data: with_edits(data, edits))
    shown, end = steady(50 - skipped, Fraction(delay_seconds), skipped)
    assert_follows(path, shown, end)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "ts", "flv", "nut"])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_a_late_start_is_where_the_grid_begins(tmp_path: Path, suffix: str, b_frames: int) -> None:
    path = write_video(tmp_path / f"v.{suffix}", Recipe(b_frames=b_frames, start_seconds=Fraction(3)))
    shown = shown_by_ffmpeg(path)
    assert [number for _, number in shown] == list(range(50))
    assert shown[0][0] == pytest.approx(3, abs=2)  # MPEG-TS adds its own delay
    assert_follows(path, shown, shown[0][0] + 2)


def before_zero(path: Path, b_frames: int = 0) -> Path:
    recipe = Recipe(
        b_frames=b_frames, start_seconds=Fraction(-1), container_options=(("avoid_negative_ts", "disabled"),)
    )
    return write_video(path, recipe)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "ts"])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_times_below_zero_are_times_like_others(tmp_path: Path, suffix: str, b_frames: int) -> None:
    path = before_zero(tmp_path / f"v.{suffix}", b_frames)
    shown = shown_by_ffmpeg(path)
    hidden = suffix in ("mp4", "mov")  # their edit list hides what lies before zero
    assert [number for _, number in shown] == list(range(25 if hidden else 0, 50))
    assert_follows(path, shown, shown[0][0] + Fraction(len(shown), 25))


def test_matroska_has_no_times_below_zero_and_frames_that_lose_theirs_are_refused(tmp_path: Path) -> None:
    error = rejection(before_zero(tmp_path / "v.mkv"))
    assert error.reason is Reason.DECODE_ERROR
    assert "run backwards" in error.detail


# Missing and repeated times.


def without_times(data: bytearray, every: int) -> None:
    """Take the times out of PES packets of an MPEG transport stream, but not of the first one."""
    at, number = 0, 0
    while (at := data.find(b"\0\0\1\xe0", at + 1)) >= 0:
        if number % every:
            data[at + 7] &= 0x3F
            count = data[at + 8]
            data[at + 9 : at + 9 + count] = b"\xff" * count
        number += 1


@pytest.mark.parametrize("every", [2, 3, 1000])
def test_missing_times_are_counted_from_the_last_one(tmp_path: Path, every: int) -> None:
    whole = write_video(tmp_path / "whole.ts")
    start = shown_by_ffmpeg(whole)[0][0]
    path = patched(tmp_path / "v.ts", whole, lambda data: without_times(data, every))
    assert_follows(path, *steady(start=start))


# codec, suffix, stated rate (None: the header states none, and 25 counts), encoder's options, B-frames
RAW_STREAMS = [
    ("libx264", "h264", "25", (), 0),
    ("libx264", "h264", "30000/1001", (), 2),
    ("libx264", "h264", "240", (), 0),
    ("libx265", "hevc", None, (("x265-params", "vui-timing-info=0"),), 0),
    ("libx265", "hevc", None, (("x265-params", "vui-timing-info=0"),), 3),
    ("libx265", "hevc", "24000/1001", (), 2),
    ("libx265", "hevc", "250", (), 0),
    ("mpeg4", "m4v", "30000/1001", (), 0),
    ("mpeg4", "m4v", "30", (), 2),
    ("mpeg1video", "m1v", "25", (), 2),
    ("mpeg2video", "m2v", "30000/1001", (), 2),
    ("mjpeg", "mjpeg", None, (), 0),
    ("libsvtav1", "obu", None, (), 0),
]


@pytest.mark.parametrize(("codec", "suffix", "stated", "options", "b_frames"), RAW_STREAMS)
def test_frames_without_times_are_counted_at_the_stated_rate(
    tmp_path: Path, codec: str, suffix: str, stated: str | None, options: tuple[tuple[str, str], ...], b_frames: int
) -> None:
    """FFmpeg's durations of raw streams are invented, and change in mid-stream."""
    recipe = Recipe(
        codec=codec,
        num_frames=110,
        rate=Fraction(stated or 25),
        pixel_format="yuvj420p" if codec == "mjpeg" else "yuv420p",
        options=options,
        b_frames=b_frames,
    )
    path = tmp_path / f"v.{suffix}"
    if suffix == "m4v":  # PyAV takes that for an mp4
        path.write_bytes(pictures_of(write_video(tmp_path / "whole.avi", recipe)))
    else:
        write_video(path, recipe)
    spec = ClipSpec(fps=recipe.rate, num_frames=5, height=64, width=64)
    found = probe(path)
    assert found.source.fps == float(recipe.rate)
    assert found.duration_seconds_from_header == pytest.approx(110 / recipe.rate)
    whole = decode(path, spec)
    assert numbers(whole) == list(range(110))
    assert [clip.start_seconds for clip in whole] == [float(5 * n / recipe.rate) for n in range(22)]
    assert_same(decode(path, spec, clips_per_span=3), whole)


def pictures_of(path: Path) -> bytes:
    """The packets of a video, one behind the other."""
    with av.open(str(path)) as container:
        return b"".join(bytes(packet) for packet in container.demux(video=0))


@pytest.mark.parametrize("rate", ["1/2", "90000", "0"])
def test_a_rate_that_is_the_unit_of_a_clock_is_none(rate: str) -> None:
    """Encoders without a frame rate state that of their clock."""
    stream = SimpleNamespace(
        container=SimpleNamespace(format=SimpleNamespace(name="h264")),
        codec_context=SimpleNamespace(framerate=Fraction(rate), codec=SimpleNamespace(canonical_name="h264")),
    )
    assert frame_rate(cast(VideoStream, stream)) == (Fraction(1, 2) if rate == "1/2" else 25)


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
@pytest.mark.parametrize("codec", ["libx264", "ffv1"])
def test_of_frames_with_the_same_time_the_last_one_is_shown(tmp_path: Path, suffix: str, codec: str) -> None:
    times = [n // 2 * Fraction(2, 25) + n % 2 * Fraction(1, 1000) for n in range(50)]
    options = (("video_track_timescale", "1000"),) if suffix == "mp4" else ()
    whole = write_video(tmp_path / f"whole.{suffix}", Recipe(codec=codec, times=times, container_options=options))
    path = tmp_path / f"v.{suffix}"
    if suffix == "mp4":  # whose muxer refuses repeated times
        patched(path, whole, repeat_times)
    else:
        remux(path, whole, repeat_packets)
    shown = shown_by_ffmpeg(path)
    assert [a == b for (a, _), (b, _) in pairwise(shown)] == [True, False] * 24 + [True]
    clips = assert_follows(path, shown, shown[0][0] + len(numbers(decode(path))) / SPEC.fps)
    assert {number % 2 for number in numbers(clips)} == {1}


def repeat_packets(packets: list[Packet[VideoStream]]) -> None:
    for packet, following in pairwise(packets):
        if packet.pts is not None and following.pts is not None and following.pts - packet.pts <= 1:
            following.pts = following.dts = packet.pts


def repeat_times(data: bytearray) -> None:
    """Durations of one tick become none."""
    at = data.index(b"stts") + 8
    for entry in range(int.from_bytes(data[at : at + 4], "big")):
        delta = at + 8 + 8 * entry
        if data[delta : delta + 4] == b"\0\0\0\1":
            data[delta + 3] = 0


# Headers that lie.


def put(mark: bytes, offset: int, form: str, value: float) -> Callable[[bytearray], None]:
    """Write a number so many bytes after the first place of some bytes."""

    def change(data: bytearray) -> None:
        struct.pack_into(form, data, data.index(mark) + offset, value)

    return change


LIES = {
    "avi microseconds per frame": ("avi", put(b"avih", 8, "<I", 1)),
    "avi total frames, more": ("avi", put(b"avih", 24, "<I", 10**6)),
    "avi total frames, none": ("avi", put(b"avih", 24, "<I", 0)),
    "avi stream length, more": ("avi", put(b"strh", 40, "<I", 10**6)),
    "avi stream length, less": ("avi", put(b"strh", 40, "<I", 5)),
    "avi stream length, none": ("avi", put(b"strh", 40, "<I", 0)),
    "mkv length, more": ("mkv", put(b"\x44\x89\x88", 3, ">d", 9e6)),
    "mkv length, less": ("mkv", put(b"\x44\x89\x88", 3, ">d", 90.0)),
    "mkv length, none": ("mkv", put(b"\x44\x89\x88", 3, ">d", 0.0)),
    "mkv length, negative": ("mkv", put(b"\x44\x89\x88", 3, ">d", -1e300)),
    "mkv length, not a number": ("mkv", put(b"\x44\x89\x88", 3, ">d", float("nan"))),
    "mkv length, endless": ("mkv", put(b"\x44\x89\x88", 3, ">d", float("inf"))),
    "mkv frame duration, short": ("mkv", put(b"\x23\xe3\x83", 4, ">I", 1000)),
    "mkv frame duration, long": ("mkv", put(b"\x23\xe3\x83", 4, ">I", 4 * 10**9)),
    "mp4 movie length, more": ("mp4", put(b"mvhd", 20, ">I", 10**9)),
    "mp4 movie length, none": ("mp4", put(b"mvhd", 20, ">I", 0)),
    "mp4 media length, more": ("mp4", put(b"mdhd", 20, ">I", 2**31)),
    "mp4 media length, less": ("mp4", put(b"mdhd", 20, ">I", 1000)),
    "mp4 media length, none": ("mp4", put(b"mdhd", 20, ">I", 0)),
    "mp4 track length, more": ("mp4", put(b"tkhd", 24, ">I", 10**9)),
    "mp4 frame count, more": ("mp4", put(b"stsz", 12, ">I", 60)),
    "flv length, more": ("flv", put(b"duration", 9, ">d", 1e6)),
    "flv length, none": ("flv", put(b"duration", 9, ">d", 0.0)),
    "flv rate": ("flv", put(b"framerate", 10, ">d", 1000.0)),
}


REFUSED = {
    "avi stream length, more": Reason.TRUNCATED,
    "flv length, more": Reason.OVER_LIMIT,
}

LAST_FRAME_STAYS = {"mkv frame duration, long": Fraction(4) - Fraction(1, 25)}
"""Nothing but that header says for how long."""


@pytest.mark.parametrize("lie", LIES)
def test_where_headers_lie_clips_follow_the_frames_or_the_video_is_refused(tmp_path: Path, lie: str) -> None:
    suffix, change = LIES[lie]
    whole = write_video(tmp_path / f"whole.{suffix}", Recipe(codec="mpeg4" if suffix == "avi" else "libx264"))
    path = patched(tmp_path / f"lie.{suffix}", whole, change)
    refused = REFUSED.get(lie)
    if refused is not None:
        assert rejection(path).reason is refused
    else:
        shown, end = steady()
        assert_follows(path, shown, end + LAST_FRAME_STAYS.get(lie, 0))


def test_the_rate_of_an_avi_is_its_clock(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.avi", Recipe(codec="mpeg4"))
    path = patched(tmp_path / "v.avi", whole, lambda data: [put(b"strh", at, "<I", n)(data) for at, n in CLOCK])
    assert_follows(path, [(Fraction(n, 10), n) for n in range(50)], Fraction(5))


CLOCK = ((28, 1), (32, 10))
"""dwScale and dwRate."""


# A property, and exactness.


@settings(max_examples=40, deadline=None)
@given(
    gaps=st.lists(st.integers(0, 400), min_size=1, max_size=12),
    fps=st.fractions(Fraction(1), Fraction(60), max_denominator=1001),
    start_ms=st.integers(0, 5000),
)
def test_each_sampled_frame_is_the_last_one_presented_at_or_before_its_time(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[int], fps: Fraction, start_ms: int
) -> None:
    times = [Fraction(ms, 1000) for ms in accumulate(gaps, initial=start_ms)]
    recipe = replace(SMALL, codec="ffv1", times=times, gop=1)
    folder = tmp_path_factory.mktemp("property")
    path = write_video(folder / "v.mkv", recipe)
    clips = decode(path, replace(SPEC, fps=fps))
    grid = [times[0] + n / fps for n in range(len(numbers(clips)))]
    said = [time for clip in clips for time in clip.frame_pts_seconds[: clip.num_valid_frames]]
    for number, time, at in zip(numbers(clips), said, grid, strict=True):
        assert times[number] <= at, "early"
        assert number + 1 == len(times) or times[number + 1] > at, "stale"
        assert time == float(times[number])
    assert_same(decode(path, replace(SPEC, fps=fps), clips_per_span=1), clips)


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(24000, 1001)])
def test_at_its_own_rate_a_long_video_gives_each_frame_once(tmp_path: Path, rate: Fraction) -> None:
    path = write_video(tmp_path / "v.mp4", replace(SMALL, codec="libx264", rate=rate, num_frames=1500))
    spec = replace(SPEC, fps=rate, num_frames=17)
    clips = decode(path, spec)
    assert numbers(clips) == list(range(1500))
    said = [time for clip in clips for time in clip.frame_pts_seconds[: clip.num_valid_frames]]
    assert said == [float(n / rate) for n in range(1500)]
    assert_same(decode(path, spec, clips_per_span=20), clips)


COARSE = [
    ("mkv", Fraction(30000, 1001)),
    ("mkv", Fraction(24000, 1001)),
    ("mkv", Fraction(60000, 1001)),
    ("mkv", Fraction(30)),
    ("webm", Fraction(60)),
    ("flv", Fraction(30000, 1001)),
    ("asf", Fraction(24)),
    ("mp4", Fraction(30000, 1001)),
    ("ts", Fraction(60000, 1001)),
    ("ts", Fraction(24000, 1001)),
]


@pytest.mark.parametrize(("suffix", "rate"), COARSE)
def test_at_its_own_rate_each_frame_comes_once_though_the_container_rounds_its_time(
    tmp_path: Path, suffix: str, rate: Fraction
) -> None:
    codec = {"webm": "libvpx", "asf": "mpeg4"}.get(suffix, "libx264")
    b_frames = 2 if suffix in ("mkv", "ts") else 0
    recipe = replace(SMALL, codec=codec, rate=rate, num_frames=600, b_frames=b_frames)
    if suffix == "mp4":  # which as a rule has a finer clock
        times = [Fraction(round(n / rate * 600), 600) for n in range(600)]
        recipe = replace(recipe, times=times, container_options=(("video_track_timescale", "600"),))
    path = write_video(tmp_path / f"v.{suffix}", recipe)
    shown = shown_by_ffmpeg(path)
    start = shown[0][0]
    off = max(abs(time - start - n / rate) for n, (time, _) in enumerate(shown))
    tick = {"ts": Fraction(1, 90000), "mp4": Fraction(1, 600)}.get(suffix, Fraction(1, 1000))
    assert 0 < off <= tick, "it does round"
    spec = replace(SPEC, fps=rate, num_frames=17)
    clips = decode(path, spec)
    assert numbers(clips) == list(range(600))
    said = [time for clip in clips for time in clip.frame_pts_seconds[: clip.num_valid_frames]]
    assert said == [float(start + n / rate) for n in range(600)]
    assert_same(decode(path, spec, clips_per_span=7), clips)


@settings(max_examples=30, deadline=None)
@given(
    gaps=st.lists(st.sampled_from([0, 1, 17, 33, 34, 34, 33, 50, 67, 120]), min_size=1, max_size=20),
    rate=st.sampled_from([Fraction(30000, 1001), Fraction(24000, 1001), Fraction(30)]),
    fps=st.sampled_from(["30000/1001", "24000/1001", "30", "10", "7/3"]),
)
def test_where_a_clock_rounds_times_are_those_said_and_a_tick_at_most_from_the_containers(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[int], rate: Fraction, fps: str
) -> None:
    times = [Fraction(ms, 1000) for ms in accumulate(gaps, initial=40)]
    recipe = replace(SMALL, codec="ffv1", rate=rate, times=times, gop=1)
    path = write_video(tmp_path_factory.mktemp("coarse") / "v.mkv", recipe)
    spec = replace(SPEC, fps=Fraction(fps))
    clips = decode(path, spec)
    said = [time for clip in clips for time in clip.frame_pts_seconds[: clip.num_valid_frames]]
    grid = [times[0] + n / spec.fps for n in range(len(said))]
    tick = Fraction(1, 1000)
    for number, time, at in zip(numbers(clips), said, grid, strict=True):
        assert time <= float(at), "early"
        assert abs(time - times[number]) <= float(tick) + 1e-9
        assert number + 1 == len(times) or times[number + 1] + tick > at, "stale"
    assert_same(decode(path, spec, clips_per_span=1), clips)


@given(
    raw=st.lists(st.integers(-(10**6), 10**6), min_size=2),
    parts=st.integers(1, 50),
    interval=st.integers(0, 5000),
    start=st.integers(-1000, 1000),
)
def test_a_clock_keeps_the_order_of_times_and_moves_none_by_more_than_a_tick(
    raw: list[int], parts: int, interval: int, start: int
) -> None:
    read = TickConverter(parts=parts, interval=interval if interval >= 8 * parts > 8 else 0, start_pts=start * parts)
    times = [read(ticks) for ticks in sorted(raw)]
    assert times == sorted(times)
    assert all(abs(time - ticks * parts) <= parts for time, ticks in zip(times, sorted(raw), strict=True))
    assert read(start) == start * parts
    assert all(read(ticks) > time for ticks, time in ((read.to_container(time) + 1, time) for time in times))


@pytest.mark.parametrize(
    ("codec", "suffix"), [("h263", "asf"), ("h261", "asf"), ("libx264", "mkv"), ("libx264", "flv")]
)
def test_a_stated_rate_that_the_times_contradict_moves_none_of_them(tmp_path: Path, codec: str, suffix: str) -> None:
    """Frames of 25 per second under a header of 29.97, the default of several codecs where a container states none."""
    path = tmp_path / f"v.{suffix}"
    with av.open(str(path), "w") as output:
        stream = cast(VideoStream, output.add_stream(codec, rate=Fraction(30000, 1001)))
        stream.width, stream.height, stream.pix_fmt = 176, 144, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 25) if codec.startswith("h26") else Fraction(1, 1000)
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, 176, 144), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    spec = ClipSpec(fps=Fraction(25), num_frames=5, height=72, width=72)
    clips = decode(path, spec)
    assert numbers(clips) == list(range(30))
    times = np.concatenate([clip.frame_pts_seconds for clip in clips])
    assert np.allclose(times - times[0], np.arange(30) / 25, atol=1e-9)
