"""Containers that state times of decoding alone: each picture has the time of its place, or the file is refused."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import pytest
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream

from tests.support.decoding import SPEC, assert_same, decode, numbers
from tests.support.videos import Recipe, numbered_frame, write_video
from vidshard.pipeline.video.frame_order import PacketPlaces
from vidshard.schemas.rejections import VideoError

EACH = replace(SPEC, fps=Fraction(25), num_frames=5)


def without_composition_times(source: Path, path: Path) -> Path:
    """The same packets, each presented when it is decoded."""
    with av.open(str(source)) as video, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(video.streams.video[0])
        first: int | None = None
        for packet in video.demux(video=0):
            if packet.dts is not None:
                first = packet.dts if first is None else first
                packet.pts = packet.dts = packet.dts - first
                packet.stream = stream
                output.mux(packet)
    return path


KINDS = [
    ("libx264", "mp4"),
    ("libx264", "mkv"),
    ("libx264", "ts"),
    ("libx264", "flv"),
    ("libx265", "mp4"),
    ("libx265", "mkv"),
    ("mpeg4", "mov"),
    ("mpeg2video", "mp4"),
    ("mpeg2video", "ts"),
]


@pytest.mark.parametrize(("codec", "suffix"), KINDS)
def test_frames_have_the_times_of_their_places(tmp_path: Path, codec: str, suffix: str) -> None:
    source = write_video(tmp_path / "source.mp4", Recipe(codec=codec, num_frames=40, b_frames=2, gop=12))
    path = without_composition_times(source, tmp_path / f"v.{suffix}")
    whole = decode(path, EACH)
    assert numbers(whole) == list(range(40))
    for clips_per_span in (1, 3):
        assert_same(decode(path, EACH, clips_per_span), whole)
    seldom = replace(EACH, fps=Fraction(5))  # then most pictures could be left out
    assert numbers(decode(path, seldom)) == list(range(0, 40, 5))
    assert numbers(decode(path, seldom, 1)) == list(range(0, 40, 5))


def test_pictures_may_begin_to_be_reordered_late(tmp_path: Path) -> None:
    source = tmp_path / "source.mp4"
    with av.open(str(source), "w") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.max_b_frames = 96, 64, "yuv420p", 3
        stream.codec_context.options = {"x264-params": "keyint=100:min-keyint=100:scenecut=0:b-adapt=0"}
        for number in range(100):
            frame = VideoFrame.from_ndarray(numbered_frame(number, 96, 64), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            frame.pict_type = PictureType.P if number < 75 else PictureType.NONE
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    path = without_composition_times(source, tmp_path / "v.mp4")
    whole = decode(path, EACH)
    assert numbers(whole) == list(range(100))
    assert_same(decode(path, EACH, 2), whole)
    assert numbers(decode(path, replace(EACH, fps=Fraction(5)), 1)) == list(range(0, 100, 5))


def sent(places: PacketPlaces, pts: int) -> None:
    packet = av.Packet(1)
    packet.pts = packet.dts = pts
    places.sent(cast("Packet[VideoStream]", packet))


def test_the_nth_picture_has_the_nth_time() -> None:
    places = PacketPlaces()
    for pts in (0, 3, 7, 8):
        sent(places, pts)
    assert [places.place(pts) for pts in (0, 7, 3)] == [0, 3, 7]
    assert places.place(8) == 8
    places.end()


def test_times_that_places_do_not_tell_are_refused_by_name() -> None:
    words = "states times of decoding and none of presentation"
    places = PacketPlaces()
    sent(places, 0)
    for pts in range(1, 18):
        sent(places, pts)
        places.place(pts)
    with pytest.raises(VideoError, match=f"{words}.* without a picture"):
        sent(places, 18)
    with pytest.raises(VideoError, match=f"{words}.* without a picture"):
        places.end()
    with pytest.raises(VideoError, match=f"{words}.* several pictures"):
        places.place(7)
    with pytest.raises(VideoError, match=f"{words}.* do not rise"):
        sent(places, 7)


def test_streams_that_could_reorder_and_do_not_keep_their_times(tmp_path: Path) -> None:
    recipe = Recipe(codec="libx265", num_frames=60, options=(("x265-params", "bframes=2:b-adapt=0"),))
    path = write_video(tmp_path / "v.mp4", recipe)
    assert numbers(decode(path, EACH, 1)) == list(range(60))
