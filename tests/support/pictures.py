"""Small videos of textured and of plain pictures, in the codecs of the default list that can be written here."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.codec import Codec
from av.video.stream import VideoStream

NUM_FRAMES, WIDTH, HEIGHT = 6, 192, 128

CODECS = {
    "libx264": ("mp4", "matroska", "h264"),
    "libx265": ("mp4", "matroska", "hevc"),
    "libvpx": ("webm",),
    "libvpx-vp9": ("webm", "mp4"),
    "libsvtav1": ("mp4",),
    "mjpeg": ("mov", "avi"),
    "ffv1": ("matroska", "avi"),
    "huffyuv": ("avi",),
    "ffvhuff": ("avi",),
    "utvideo": ("avi",),
    "magicyuv": ("avi",),
    "gif": ("gif",),
    "msmpeg4": ("avi",),
    "msmpeg4v2": ("asf",),
    "wmv1": ("asf",),
    "mpeg2video": ("mpegts",),
    "mpeg4": ("mp4",),
}
"""Codecs of the default list that can be written here, and containers they go into."""

OPTIONS = {
    "libx264": {"preset": "ultrafast"},
    "libx265": {"x265-params": "log-level=none:keyint=3", "preset": "ultrafast"},
    "libsvtav1": {"preset": "10"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
}


def textured(number: int) -> np.ndarray:
    """uint8 (H, W, 3): slopes that move, and noise."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    noise = np.random.default_rng(0).integers(0, 40, (HEIGHT, WIDTH))
    return np.stack([x * 2 + 7 * number, y * 3 + 5 * number + noise, x + y + 11 * number], -1).astype(np.uint8)


PLAIN: dict[str, Callable[[int], np.ndarray]] = {
    "black": lambda _: np.zeros((HEIGHT, WIDTH, 3), np.uint8),
    "white": lambda _: np.full((HEIGHT, WIDTH, 3), 255, np.uint8),
    "blinking": lambda number: np.full((HEIGHT, WIDTH, 3), 255 * (number % 2), np.uint8),
    "noise": lambda number: np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8),
    "half": lambda _: np.repeat(np.arange(WIDTH)[None, :, None] // (WIDTH // 2) * 255, HEIGHT, 0).repeat(3, 2),
    "textured": textured,
}


def write_pictures(
    path: Path,
    codec: str,
    container_format: str,
    picture: Callable[[int], np.ndarray] = textured,
    bit_rate: int | None = None,
) -> Path:
    """Encode six pictures, at a rate of bits or as the encoder likes."""
    known = [each.name for each in Codec(codec, "w").video_formats or ()]
    preferred = [each for each in ("yuv420p", "rgb24", "gray") if each in known]
    with av.open(str(path), "w", format=container_format) as output:
        stream = cast(VideoStream, output.add_stream(codec, rate=25))
        stream.width, stream.height, stream.gop_size = WIDTH, HEIGHT, 3
        stream.pix_fmt = (preferred or known or ["yuv420p"])[0]
        if bit_rate is not None:
            stream.bit_rate = bit_rate
        stream.codec_context.options = {"strict": "experimental", **OPTIONS.get(codec, {})}
        for number in range(NUM_FRAMES):
            frame = av.VideoFrame.from_ndarray(picture(number).astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def places(path: Path) -> list[tuple[int, int]]:
    """Offset and size of each packet."""
    with av.open(str(path)) as reader:
        return [(packet.pos or 0, packet.size) for packet in reader.demux(video=0) if packet.size]
