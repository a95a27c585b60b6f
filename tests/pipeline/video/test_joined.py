"""Recordings joined into one file: read whole where they are one stream, else the first is read and the rest named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.support.decoding import SPEC, assert_same, numbers, probe
from tests.support.law import EVERY_DECODER
from tests.support.videos import Recipe, write_video
from vidshard.pipeline.video.decode import decode_spans
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Clip

SPEC_25 = replace(SPEC, fps=Fraction(25), height=32, width=48)
RECIPE = Recipe(num_frames=20, gop=10)

FIRST_ALONE = {
    "mkv": replace(RECIPE, b_frames=2),
    "webm": replace(RECIPE, codec="libvpx"),
    "flv": RECIPE,
    "mp4": replace(RECIPE, b_frames=2),
    "mov": replace(RECIPE, codec="mjpeg", pixel_format="yuvj420p"),
    "asf": replace(RECIPE, codec="msmpeg4"),
    "apng": replace(RECIPE, codec="apng", pixel_format="rgb24"),
    "wtv": replace(RECIPE, codec="mpeg2video"),
    "ogg": replace(RECIPE, codec="libvpx"),
    "rm": replace(RECIPE, codec="rv20", width=176, height=144),
}
"""Containers in which FFmpeg stops at a second recording, or reads it by the headers of the first."""

ONE_STREAM = {
    "h264": RECIPE,
    "m2v": replace(RECIPE, codec="mpeg2video"),
    "mjpeg": replace(RECIPE, codec="mjpeg", pixel_format="yuvj420p"),
    "avi": replace(RECIPE, codec="mpeg4"),
    "gif": replace(RECIPE, codec="gif", pixel_format="rgb8"),
}

HARMLESS = {
    "zeros": bytes(100_000),
    "one byte": b"\0",
    "an ID3 tag": b"TAG" + b"title".ljust(125, b"\0"),
    "text": b"<?xpacket begin=''?><x:xmpmeta/>" * 20,
    "a free box": (1000).to_bytes(4, "big") + b"free" + bytes(992),
    "a box of a vendor": (1000).to_bytes(4, "big") + b"uuid" + bytes(range(248)) * 4,
    "a picture": b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(range(256)) * 8 + b"\xff\xd9",
}


REFUSED_ALREADY = {
    ("ogg", "zeros"),
    *(("flv", name) for name in ("zeros", "a free box", "a box of a vendor")),
}
"""Bytes in which FFmpeg's demuxers see lost packets."""


def results(path: Path, clips_per_span: int, *, keep: bool = False) -> tuple[list[Clip], list[VideoError]]:
    clips, errors = [], []
    for span in plan_spans(probe(path, EVERY_DECODER), SPEC_25, clips_per_span):
        [result] = decode_spans([span], SPEC_25, str(path), max_clips=1000, keep_undamaged=keep, limits=EVERY_DECODER)
        clips += result.clips
        errors += [result.error] if result.error is not None else []
    return clips, errors


def joined(path: Path, parts: Sequence[Path]) -> Path:
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


@pytest.mark.parametrize("num_parts", [2, 3])
@pytest.mark.parametrize("suffix", FIRST_ALONE)
def test_recordings_behind_the_first_are_named(suffix: str, num_parts: int, tmp_path: Path) -> None:
    first = write_video(tmp_path / f"first.{suffix}", FIRST_ALONE[suffix])
    start = Fraction(0) if suffix in ("wtv", "rm") else Fraction(4, 5)  # their encoders take only times of the rate
    later = write_video(tmp_path / f"later.{suffix}", replace(FIRST_ALONE[suffix], start_seconds=start))
    path = joined(tmp_path / f"joined.{suffix}", [first] + [later] * (num_parts - 1))
    alone, none = results(first, 1000)
    assert not none
    clips, [error] = results(path, 1000, keep=True)
    assert_same(clips, alone)
    assert f"another recording begins at byte {first.stat().st_size} of {path.stat().st_size}" in error.detail
    clips, [error] = results(path, 2)
    assert error.reason is Reason.DECODE_ERROR
    assert "another recording begins" in error.detail
    assert_same(clips, alone[: len(clips)])
    assert clips or suffix == "ogg"  # its length is not known, so it is one span


LIVE = {
    "h264": ("mkv", RECIPE),
    "hevc": ("mkv", replace(RECIPE, codec="libx265", b_frames=2)),
    "mjpeg": ("mkv", replace(RECIPE, codec="mjpeg", pixel_format="yuvj420p")),
    "vp8": ("webm", replace(RECIPE, codec="libvpx")),
}
"""Recordings that state no sizes and have no index, as a recorder leaves them that was interrupted."""


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("name", LIVE)
def test_live_recordings_behind_the_first_are_named(name: str, cut: bool, tmp_path: Path) -> None:
    suffix, recipe = LIVE[name]
    recipe = replace(recipe, container_options=(("live", "1"),))
    first = write_video(tmp_path / f"first.{suffix}", recipe)
    alone, none = results(first, 1000)
    assert not none
    assert b"\x1c\x53\xbb\x6b" not in first.read_bytes()  # no index
    if cut:
        first.write_bytes(first.read_bytes()[: first.stat().st_size * 9 // 10])
    is_harmless = f"another recording begins at byte {first.stat().st_size} of"
    for later in (
        recipe,
        replace(recipe, start_seconds=Fraction(4, 5)),
        replace(recipe, start_seconds=Fraction(4, 5), width=128, height=96),
        replace(recipe, start_seconds=Fraction(10), container_options=()),
    ):
        path = joined(tmp_path / f"joined.{suffix}", [first, write_video(tmp_path / f"later.{suffix}", later)])
        for clips_per_span in (1000, 2):
            clips, errors = results(path, clips_per_span, keep=True)
            assert clips
            assert_same(clips, alone[: len(clips)])
            assert len(clips) == len(alone) or cut
            assert errors
            assert cut or is_harmless in errors[-1].detail


CUT = {
    "mkv": replace(RECIPE, codec="rawvideo"),
    "avi": replace(RECIPE, codec="rawvideo"),
    "asf": replace(RECIPE, codec="mjpeg", pixel_format="yuvj420p", num_frames=40),
    "nut": replace(RECIPE, codec="mjpeg", pixel_format="yuvj420p"),
}
"""Containers and codecs whose demuxers and decoders say nothing where a recording was cut off before another one."""


@pytest.mark.parametrize("suffix", CUT)
def test_a_recording_that_was_cut_off_shows_nothing_of_the_one_behind_it(suffix: str, tmp_path: Path) -> None:
    recipe = CUT[suffix]
    whole = write_video(tmp_path / f"whole.{suffix}", recipe)
    alone, none = results(whole, 1000)
    assert not none
    first = tmp_path / f"first.{suffix}"
    first.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    for later in (recipe, replace(recipe, width=128, height=96), replace(recipe, num_frames=60)):
        path = joined(tmp_path / f"joined.{suffix}", [first, write_video(tmp_path / f"later.{suffix}", later)])
        for clips_per_span in (1000, 2, 1):
            clips, errors = results(path, clips_per_span, keep=True)
            assert_same(clips, alone[: len(clips)])
            assert errors


@pytest.mark.parametrize("suffix", ONE_STREAM)
def test_recordings_that_are_one_stream_are_read_whole(suffix: str, tmp_path: Path) -> None:
    part = write_video(tmp_path / f"part.{suffix}", ONE_STREAM[suffix])
    path = joined(tmp_path / f"joined.{suffix}", [part] * 3)
    for clips_per_span in (1000, 3):
        clips, errors = results(path, clips_per_span)
        assert not errors
        assert numbers(clips) == [*range(20)] * 3


@pytest.mark.parametrize("what", ["size", "rate", "codec"])
def test_an_avi_whose_second_header_differs_ends_there(what: str, tmp_path: Path) -> None:
    recipe = replace(RECIPE, codec="rawvideo")
    other = {
        "size": replace(recipe, width=128, height=96),
        "rate": replace(recipe, rate=Fraction(50)),
        "codec": replace(recipe, codec="mjpeg", pixel_format="yuvj420p"),
    }[what]
    first = write_video(tmp_path / "first.avi", recipe)
    path = joined(tmp_path / "joined.avi", [first, first, write_video(tmp_path / "other.avi", other)])
    clips, [error] = results(path, 1000, keep=True)
    assert numbers(clips) == [*range(20)] * 2
    assert f"begins at byte {2 * first.stat().st_size}" in error.detail
    clips, [error] = results(path, 2)
    assert numbers(clips) == ([*range(20)] * 2)[: len(numbers(clips))]


def test_a_gif_whose_second_screen_differs_ends_there(tmp_path: Path) -> None:
    recipe = ONE_STREAM["gif"]
    first = write_video(tmp_path / "first.gif", recipe)
    other = write_video(tmp_path / "other.gif", replace(recipe, width=128, height=96))
    path = joined(tmp_path / "joined.gif", [first, other])
    clips, [error] = results(path, 1000, keep=True)
    assert numbers(clips) == [*range(20)]
    assert "another recording begins" in error.detail


def test_fragments_behind_another_header_are_read_if_they_go_on(tmp_path: Path) -> None:
    options = (("movflags", "frag_keyframe+empty_moov+default_base_moof"),)
    recipe = replace(RECIPE, container_options=options)
    first = write_video(tmp_path / "first.mp4", recipe)
    header = first.read_bytes()[: first.read_bytes().index(b"moof") - 4]
    later = tmp_path / "later.mp4"
    later.write_bytes(header + with_later_fragments(first.read_bytes()[len(header) :], 20 * 512))
    clips, errors = results(joined(tmp_path / "joined.mp4", [first, later]), 3)
    assert not errors
    assert numbers(clips) == [*range(20)] * 2
    other = write_video(tmp_path / "other.mp4", replace(recipe, width=128))
    for name, second in {"times that begin again": first, "another index": other}.items():
        with pytest.raises(VideoError, match=f"fragments of another recording.* byte {first.stat().st_size} of"):
            probe(joined(tmp_path / f"{name}.mp4", [first, second]))


def with_later_fragments(data: bytes, ticks: int) -> bytes:
    changed, at = bytearray(data), data.find(b"tfdt")
    while at >= 0:
        time = slice(at + 8, at + 16) if data[at + 4] else slice(at + 8, at + 12)
        changed[time] = (int.from_bytes(data[time], "big") + ticks).to_bytes(time.stop - time.start, "big")
        at = data.find(b"tfdt", at + 4)
    return bytes(changed)


def test_an_mp4_without_an_index_before_another_one_is_truncated(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", RECIPE)
    data = whole.read_bytes()
    lacking = tmp_path / "lacking.mp4"
    lacking.write_bytes(data[: data.rindex(b"moov") - 4])
    with pytest.raises(VideoError, match="without its index") as caught:
        probe(joined(tmp_path / "joined.mp4", [lacking, whole]))
    assert caught.value.reason is Reason.TRUNCATED


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv", "ogg", "asf", "avi", "apng"])
def test_bytes_behind_the_end_that_are_no_recording_do_no_harm(suffix: str, tmp_path: Path) -> None:
    whole = write_video(tmp_path / f"whole.{suffix}", {**ONE_STREAM, **FIRST_ALONE}[suffix])
    alone, _ = results(whole, 1000)
    refused = {}
    for name, data in HARMLESS.items():
        if (suffix, name) in REFUSED_ALREADY:
            continue
        path = tmp_path / f"longer.{suffix}"
        path.write_bytes(whole.read_bytes() + data)
        clips, errors = results(path, 1000)
        if errors:
            refused[name] = errors[0].detail
        else:
            assert np.array_equal([clip.frames for clip in clips], [clip.frames for clip in alone])
    assert not refused
