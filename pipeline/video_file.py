"""Video files that decoding writes: H.264 in the rate and the colors of the clips."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from vidshard.schemas.errors import UserError

_BT709 = 1
"""Code of BT.709 for primaries, transfer and matrix (ISO/IEC 23091-2)."""
_LIMITED = 1
"""Code of the limited range in FFmpeg (AVCOL_RANGE_MPEG)."""


def write_video(target: Path, frames: Iterable[np.ndarray], rate: Fraction) -> int:
    """Write frames as an H.264 video, atomically; returns their number.

    The frames of clips are R'G'B' of BT.709. The file has that matrix, in limited range, and says so: without tags a
    player guesses by the height, and colors are off.

    Args:
        target: path of the file; its extension selects the container.
        frames: at least one frame, each uint8 (H, W, 3) RGB with even height and width.
        rate: frames per second.

    Raises:
        UserError: the file cannot be written, or its extension names no video format.
    """
    unfinished = target.with_name(f".unfinished-{target.name}")
    number = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(unfinished), "w") as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "12", "preset": "veryfast"})
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.color_primaries = context.color_trc = context.colorspace = _BT709
            context.color_range = _LIMITED
            for array in frames:
                if number == 0:
                    stream.height, stream.width = array.shape[:2]
                rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
                frame = rgb.reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                container.mux(stream.encode(frame))
                number += 1
            container.mux(stream.encode())
        unfinished.replace(target)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise UserError(f"cannot write {target}: {error}; name a file such as clip.mp4") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return number
