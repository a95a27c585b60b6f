"""Videos and pictures of a report as data URIs: small, and in formats that every browser plays (VP9 in WebM, PNG)."""

from __future__ import annotations

import base64
import io
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Colorspace

from vidshard.jobs.report.page import Media

MAX_SIDE = 288
"""Longer side in pixels to which frames are scaled."""
MAX_FRAMES = 64
"""Frames of a clip that are shown; later ones are left out."""
DIFFERENCE_GAIN = 4
"""Factor of differences between a clip and its reconstruction."""
_BT709, _LIMITED = 1, 1

Frames = npt.NDArray[np.uint8]
"""Frames (T, H, W, 3), RGB in [0, 255]."""


def video_of(title: str, frames_THWC: Frames, rate: Fraction) -> Media:
    """Encode frames as VP9 in WebM, about 20 ms a second of video.

    Args:
        title: what the video shows.
        frames_THWC: at least one frame.
        rate: frames per second.
    """
    frames = frames_THWC[:MAX_FRAMES]
    height, width = _scaled(*frames.shape[1:3])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm") as container:
        options = {"crf": "34", "b": "0", "deadline": "realtime", "cpu-used": "7", "row-mt": "1"}
        stream = container.add_stream("libvpx-vp9", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = _LIMITED
        for array in frames:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame = rgb.reformat(
                width=width,
                height=height,
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Media(title=title, uri=_uri("video/webm", buffer.getvalue()), width=width, height=height)


def picture_of(title: str, png: bytes, *, width: int, height: int) -> Media:
    """A PNG file as it is."""
    return Media(title=title, uri=_uri("image/png", png), width=width, height=height)


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _scaled(height: int, width: int) -> tuple[int, int]:
    """Height and width, even, with the longer side at most `MAX_SIDE`."""
    scale = min(1.0, MAX_SIDE / max(height, width))
    return max(2, 2 * round(height * scale / 2)), max(2, 2 * round(width * scale / 2))


def amplified_difference(real_THWC: Frames, fake_THWC: Frames) -> Frames:
    """Absolute differences of two clips, times `DIFFERENCE_GAIN`, on black."""
    difference = np.abs(real_THWC.astype(np.int16) - fake_THWC)
    amplified: Frames = np.minimum(DIFFERENCE_GAIN * difference, 255).astype(np.uint8)
    return amplified


def psnr_of(real_THWC: Frames, fake_THWC: Frames) -> float:
    """Mean over the frames of their PSNR in dB, as `models.metrics.psnr`, of frames of 8 bits."""
    errors = np.square((real_THWC.astype(np.float32) - fake_THWC) / 255).mean(axis=(1, 2, 3))
    return float(np.mean(-10 * np.log10(errors + 1e-8)))
