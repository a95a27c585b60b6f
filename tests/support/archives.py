"""Archives of pictures whose frames carry numbers."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
from av.video.codeccontext import VideoCodecContext

from tests.support.videos import Pixels, numbered_frame

WIDTH, HEIGHT = 96, 64
ENCODERS = {
    "png": ("png", "rgb24"),
    "jpg": ("mjpeg", "yuvj444p"),
    "webp": ("libwebp", "yuv420p"),
    "bmp": ("bmp", "bgr24"),
    "tif": ("tiff", "rgb24"),
    "ppm": ("ppm", "rgb24"),
}
"""FFmpeg's encoder and pixel format by the suffix of a file."""


def image(number: int, suffix: str = "png", picture: Pixels | None = None) -> bytes:
    """A picture file, of the numbered frame or of uint8 (H, W, 3)."""
    picture = numbered_frame(number, WIDTH, HEIGHT) if picture is None else picture
    codec, pixel_format = ENCODERS[suffix]
    context = cast(VideoCodecContext, av.CodecContext.create(codec, "w"))
    context.height, context.width = picture.shape[:2]
    context.pix_fmt, context.time_base = pixel_format, Fraction(1, 24)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixel_format)
    frame.pts = 0
    return b"".join(map(bytes, [*context.encode(frame), *context.encode(None)]))


def write_archive(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A .tar, or else a .zip, with these names and contents."""
    if path.suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members:
                archive.writestr(name, data)
    return path


def sequence(count: int, suffix: str = "png") -> list[tuple[str, bytes]]:
    """Members of an archive: numbered frames."""
    return [(f"shot/frame{number}.{suffix}", image(number, suffix)) for number in range(count)]
