"""Every container and video codec that PyAV can write here, and one small video of each combination."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import cast

import av
import av.logging
from av.codec import Codec
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from tests.support.videos import numbered_frame
from vidshard.pipeline.video.container import ALLOWED_FORMATS

RATE = Fraction(25)
NUM_FRAMES = 20

# Encoders of hardware, and one that is an interface of a system.
_NOT_HERE = ("_vaapi", "_nvenc", "_qsv", "_amf", "_v4l2m2m", "_vulkan", "_videotoolbox", "_mf", "_mediacodec", "_omx")

# Sizes to try: several codecs take only those of their standard.
_SIZES = ((96, 64), (176, 144), (720, 576), (720, 480), (1920, 1080))


@cache
def encoders() -> tuple[str, ...]:
    """Names of the video encoders."""
    found = []
    for name in sorted(av.codecs_available):
        with suppress(ValueError):
            if not name.endswith(_NOT_HERE) and Codec(name, "w").type == "video":
                found.append(name)
    return tuple(found)


@cache
def formats() -> tuple[str, ...]:
    """Names of the containers that can be written, and that the decoder would open."""
    allowed = set(ALLOWED_FORMATS.split(","))
    found = []
    for name in sorted(av.formats_available):
        with suppress(ValueError):
            made = av.ContainerFormat(name, "w")
            if name != "asf_stream" and allowed & ({name} | set(_READ_AS.get(name, (name,)))) and not made.no_file:
                found.append(name)
    return tuple(found)


# Containers that are read by another name than they are written.
_READ_AS = {
    "3g2": ("mov",),
    "3gp": ("mov",),
    "adts": ("aac",),
    "asf_stream": ("asf",),
    "f4v": ("mov",),
    "ipod": ("mov",),
    "ismv": ("mov",),
    "mp4": ("mov",),
    "psp": ("mov",),
    "m4v": ("m4v",),
    "mpeg1video": ("mpegvideo",),
    "mpeg2video": ("mpegvideo",),
    "svcd": ("mpeg",),
    "vcd": ("mpeg",),
    "vob": ("mpeg",),
    "dvd": ("mpeg",),
    "ogv": ("ogg",),
    "mxf_d10": ("mxf",),
    "mxf_opatom": ("mxf",),
    "avif": ("mov",),
}


@cache
def _recipe(codec: str) -> tuple[int, int, int] | None:
    """Width, height and B-frames with which an encoder works; None for none of those tried."""
    for width, height in _SIZES:
        for b_frames in (2, 0):
            with suppress(*_REFUSALS), tempfile.TemporaryDirectory() as folder:
                _write(Path(folder) / "video", codec, "nut", width, height, b_frames)
                return width, height, b_frames
    return None


def write_combination(codec: str, container_format: str, folder: Path) -> Path | None:
    """A video of moving numbers; None where this encoder does not go into this container."""
    path = folder / f"{codec}.{container_format}"
    recipe = _recipe(codec) if Codec(codec, "w").canonical_name in _supported(container_format) else None
    if recipe is not None:
        with suppress(*_REFUSALS):
            _write(path, codec, container_format, *recipe)
            return path if path.exists() else None
    return None


@cache
def _supported(container_format: str) -> frozenset[str]:
    """Names of the codecs that a container claims to take."""
    with tempfile.TemporaryDirectory() as folder:
        output = av.open(f"{folder}/video", "w", format=container_format)
        return frozenset(output.supported_codecs)


_REFUSALS = (av.FFmpegError, ValueError, NotImplementedError, OSError, RuntimeError)


def _write(path: Path, codec: str, container_format: str, width: int, height: int, b_frames: int) -> None:
    with av.open(str(path), "w", format=container_format) as output:
        stream = cast(VideoStream, output.add_stream(codec, rate=RATE))
        formats_of_codec = [each.name for each in Codec(codec, "w").video_formats or ()]
        preferred = [each for each in ("yuv420p", "rgb24", "gray") if each in formats_of_codec]
        stream.width, stream.height = width, height
        stream.pix_fmt = (preferred or formats_of_codec or ["yuv420p"])[0]
        stream.gop_size = 6
        if b_frames:
            stream.max_b_frames = b_frames
        options = {"libx265": {"x265-params": "log-level=none:keyint=6"}, "libsvtav1": {"preset": "10"}}.get(codec, {})
        stream.codec_context.options = {"strict": "experimental", **options}
        for number in range(NUM_FRAMES):
            frame = VideoFrame.from_ndarray(numbered_frame(number, width, height), format="rgb24")
            frame.pts, frame.time_base = number, 1 / RATE
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def combinations() -> Iterator[tuple[str, str]]:
    """All pairs of encoder and container, in an order that does not favor the first of either."""
    pairs = [(codec, each) for codec in encoders() for each in formats()]
    yield from sorted(pairs, key=lambda pair: hashlib.sha256("|".join(pair).encode()).digest())
