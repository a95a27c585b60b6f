"""Makes tiny videos whose frames carry their own number, and broken ones.

The number stands as 4x4 black and white blocks in the middle square of the frame, twelve bits and a checksum, so
that it survives compression, resizing and centre-cropping, and a turned or torn picture does not pass for another
frame. Left and right of it the frame is red and blue, above and below it red.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import numpy.typing as npt
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

os.environ.setdefault("SVT_LOG", "0")  # the AV1 encoder writes to standard error otherwise

Pixels = npt.NDArray[np.uint8]

RED, BLUE = (200, 40, 40), (40, 40, 200)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Recipe of a video to encode. Frame ``n`` carries the number ``n``."""

    codec: str = "libx264"
    num_frames: int = 50
    rate: Fraction = Fraction(25)
    times: Sequence[Fraction] | None = None
    """Presentation time of each frame in seconds, for a variable rate; None is one every ``1 / rate``."""
    start_seconds: Fraction = Fraction(0)
    """Added to all times."""
    width: int = 96
    height: int = 64
    pixel_format: str = "yuv420p"
    gop: int = 12
    b_frames: int = 0
    rotation_degrees: int = 0
    """Clockwise turn that a player shall apply; the stored picture is turned the other way, so it looks upright."""
    mirrored: bool = False
    """Stored mirrored left and right, with a display matrix that mirrors it back."""
    pixel_aspect: Fraction | None = None
    with_audio: bool = False
    options: tuple[tuple[str, str], ...] = ()
    """For the encoder."""
    container_options: tuple[tuple[str, str], ...] = ()


def numbered_frame(number: int, width: int, height: int) -> Pixels:
    """uint8 (height, width, 3) with the number in its middle."""
    frame = np.empty((height, width, 3), np.uint8)
    frame[:, : width // 2] = RED
    frame[:, width // 2 :] = BLUE
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    code = number << 4 | _checksum(number)
    for bit in range(16):
        row, column = divmod(bit, 4)
        value = 235 if code >> bit & 1 else 16
        y0, y1 = (top + side * r // 4 for r in (row, row + 1))
        x0, x1 = (left + side * c // 4 for c in (column, column + 1))
        frame[y0:y1, x0:x1] = value
    return frame


def read_frame_number(frame: Pixels) -> int:
    """The number in the middle square of uint8 (H, W, 3).

    Raises:
        ValueError: there is none: torn, turned, mirrored or not one of our frames.
    """
    height, width = frame.shape[:2]
    side = min(width, height)
    top, left = (height - side) / 2, (width - side) / 2
    code = 0
    for bit in range(16):
        row, column = divmod(bit, 4)
        y, x = top + side * (row + 0.25) / 4, left + side * (column + 0.25) / 4
        reach = max(1, side // 8)
        block = frame[int(y) : int(y) + reach, int(x) : int(x) + reach]
        code |= int(block.mean() > 128) << bit
    number = code >> 4
    if code & 15 != _checksum(number):
        raise ValueError(f"no frame number here: {code:016b}")
    return number


def _checksum(number: int) -> int:
    return (number ^ number >> 4 ^ number >> 8 ^ 0b0110) * 7 & 15


def write_video(path: Path, recipe: Recipe | None = None) -> Path:
    """Encode a video; the container follows from the suffix."""
    recipe = recipe or Recipe()
    times = recipe.times or [n / recipe.rate for n in range(recipe.num_frames)]
    time_base = 1 / recipe.rate if recipe.times is None and not recipe.start_seconds else Fraction(1, 90000)
    with av.open(str(path), "w", container_options=dict(recipe.container_options)) as container:
        stored_turned = recipe.rotation_degrees % 180 == 90
        stream = cast(VideoStream, container.add_stream(recipe.codec, rate=recipe.rate))
        stream.width, stream.height = (recipe.height, recipe.width) if stored_turned else (recipe.width, recipe.height)
        stream.pix_fmt = recipe.pixel_format
        stream.gop_size = recipe.gop
        stream.max_b_frames = recipe.b_frames
        stream.codec_context.time_base = time_base
        options = dict(_OPTIONS.get(recipe.codec, ())) | dict(recipe.options)
        if recipe.codec.startswith("libx26"):
            name = recipe.codec.removeprefix("lib")
            params = f"keyint={recipe.gop}:min-keyint={recipe.gop}:scenecut=0:bframes={recipe.b_frames}"
            own = options.get(f"{name}-params")  # behind ours: the last word counts
            options |= {
                f"{name}-params": params + (":log-level=none" if name == "x265" else "") + f":{own}" * bool(own)
            }
        stream.codec_context.options = options
        if recipe.pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = recipe.pixel_aspect
        if recipe.rotation_degrees or recipe.mirrored:
            stream.set_display_rotation(-recipe.rotation_degrees, hflip=recipe.mirrored)
        sound = add_sound(container.add_stream("aac", rate=16000)) if recipe.with_audio else None
        for number, time in enumerate(times):
            picture = numbered_frame(number, recipe.width, recipe.height)
            if recipe.mirrored:
                picture = picture[:, ::-1]
            picture = np.ascontiguousarray(np.rot90(picture, recipe.rotation_degrees // 90))
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = round((time + recipe.start_seconds) / time_base)
            frame.time_base = time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            write_sound(container, sound, float(times[-1]))
    return path


_OPTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "libx264": (("preset", "ultrafast"), ("crf", "18")),
    "libx265": (("preset", "ultrafast"), ("crf", "18")),
    "libvpx-vp9": (("deadline", "realtime"), ("cpu-used", "8"), ("crf", "20")),
    "libvpx": (("deadline", "realtime"), ("cpu-used", "8"), ("crf", "10")),
    "libsvtav1": (("preset", "8"), ("crf", "15")),
    "mpeg4": (("qscale", "3"),),
    "mjpeg": (("qscale", "3"),),
}


def add_sound(stream: AudioStream) -> AudioStream:
    """Mono."""
    stream.layout = "mono"
    return stream


def write_sound(container: OutputContainer, stream: AudioStream, seconds: float) -> None:
    """A quiet tone."""
    for block in range(int(seconds * 16000 / 1024) + 1):
        tone = np.sin(np.arange(1024 * block, 1024 * (block + 1)) / 8).astype(np.float32)[None] / 10
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate = 16000
        frame.pts = 1024 * block
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_audio_only(path: Path) -> Path:
    """Two seconds of sound."""
    with av.open(str(path), "w") as container:
        stream = add_sound(container.add_stream("aac", rate=16000))
        write_sound(container, stream, 2.0)
    return path


def write_sound_with_cover(path: Path) -> Path:
    """Sound with a cover picture, as music files have: its video stream is one attached picture. For .mp3."""
    with av.open(str(path), "w") as container:
        sound = add_sound(container.add_stream("libmp3lame", rate=16000))
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
        cover.disposition = Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(numbered_frame(1, 64, 64), format="rgb24")))
        container.mux(cover.encode(None))
        write_sound(container, sound, 1.0)
    return path


def write_without_frames(path: Path) -> Path:
    """A header that announces a video stream, and nothing after it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        container.start_encoding()
    return path


def write_truncated(path: Path, whole: Path, share: float) -> Path:
    """The first ``share`` of a file's bytes."""
    data = whole.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def write_undecodable(path: Path, whole: Path) -> Path:
    """An mp4 whose index is whole and whose pictures are all zeros."""
    data = bytearray(whole.read_bytes())
    at = data.index(b"mdat")
    num_bytes = int.from_bytes(data[at - 4 : at], "big") - 8
    data[at + 4 : at + 4 + num_bytes] = bytes(num_bytes)
    path.write_bytes(data)
    return path


def write_damaged(path: Path, whole: Path, *, share: float = 0.5, num_bytes: int = 400) -> Path:
    """A copy with bytes overwritten by noise in the middle."""
    data = bytearray(whole.read_bytes())
    at = int(len(data) * share)
    data[at : at + num_bytes] = np.random.default_rng(0).bytes(num_bytes)
    path.write_bytes(data)
    return path
