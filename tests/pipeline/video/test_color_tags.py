"""Color descriptions that change in mid-stream, and headers that state none after ones that did."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.stream import VideoStream

from tests.support.decoding import SPEC
from tests.support.law import breaches, clips_of

Tags = tuple[int, int] | None
"""Matrix and range by the numbers of FFmpeg; None states nothing."""
HD, FULL = (1, 1), (6, 2)


def _segment(codec: str, tags: Tags, first: int) -> list[tuple[bytes, bool]]:
    buffer = io.BytesIO()
    y, x = np.mgrid[:64, :96]
    with av.open(buffer, "w", format="mpegts") as container:
        stream = container.add_stream(codec, rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.gop_size = 6
        stream.codec_context.options = {"bf": "0"}
        if tags is not None:
            stream.codec_context.colorspace, stream.codec_context.color_range = tags
            stream.codec_context.color_primaries = stream.codec_context.color_trc = tags[0]
        for number in range(12):
            i = first + number
            picture = np.stack([(x * 2 + 7 * i) % 256, (y * 3 + 5 * i) % 256, (x + y + 11 * i) % 256], -1)
            frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    buffer.seek(0)
    with av.open(buffer, "r") as source:
        return [(bytes(packet), packet.is_keyframe) for packet in source.demux(video=0) if packet.size]


def write_segments(path: Path, codec: str, segments: Sequence[Tags]) -> Path:
    """Join segments of 12 frames, each with headers of its own, to one stream."""
    with av.open(str(path), "w", format="mpegts" if path.suffix == ".ts" else None) as container:
        stream = container.add_stream(codec, rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        number = 0
        for tags in segments:
            for data, is_keyframe in _segment(codec, tags, number):
                packet = av.Packet(data)
                packet.stream, packet.time_base = stream, Fraction(1, 25)
                packet.pts = packet.dts = number
                packet.duration, packet.is_keyframe = 1, is_keyframe
                container.mux(packet)
                number += 1
    return path


@pytest.mark.parametrize(("codec", "suffix"), [("libx264", "mkv"), ("libx264", "ts"), ("mpeg2video", "mkv")])
def test_pictures_do_not_get_the_colors_of_those_before_them(tmp_path: Path, codec: str, suffix: str) -> None:
    path = write_segments(tmp_path / f"v.{suffix}", codec, [HD, FULL, None, FULL, HD])
    found, refused = breaches(path, Fraction(25), compare_plain=False)
    assert not found
    assert refused is None


def test_a_range_that_ends_in_mid_stream_ends_in_the_pictures_too(tmp_path: Path) -> None:
    mixed, _ = clips_of(write_segments(tmp_path / "a.mkv", "libx264", [HD, FULL, None]), SPEC, 1000)
    plain, _ = clips_of(write_segments(tmp_path / "b.mkv", "libx264", [HD, HD, None]), SPEC, 1000)
    difference = np.abs(mixed[-1].frames.astype(int) - plain[-1].frames.astype(int))
    assert difference.max() <= 2, "the decoder keeps a format that swscale takes for full range"
