"""Recordings in transport streams that can be joined."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from tests.support.videos import numbered_frame


def recording(path: Path, codec: str, first: int, count: int = 30, *, b_frames: int = 0, m2ts: bool = False) -> Path:
    """Numbered frames whose times go on from those of the frames before."""
    options = {"mpegts_m2ts_mode": "1"} if m2ts else {}
    with av.open(str(path), "w", format="mpegts", container_options=options) as output:
        stream = cast(VideoStream, output.add_stream(codec, rate=25))
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 96, 64, "yuv420p", 15
        stream.max_b_frames = b_frames
        if codec == "libx265":
            stream.codec_context.options = {"x265-params": f"log-level=none:keyint=15:bframes={b_frames}"}
        noise = np.random.default_rng(first)
        for number in range(first, first + count):
            picture = numbered_frame(number, 96, 64).astype(np.int16) + noise.integers(-20, 20, (64, 96, 3))
            frame = VideoFrame.from_ndarray(np.clip(picture, 0, 255).astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path
