"""A decoded frame to RGB as displayed: orientation, pixel shape, colour and scale in one pass."""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from pipeline.container import ffmpeg_failures_as
from pipeline.frames import Shown
from pipeline.geometry import Orientation, display_size, plan_geometry
from schemas.video import ClipSpec, Geometry, Reason, VideoError

# Bilinear with the triangle widened on downscaling, which is what "antialiased bilinear" means elsewhere. Against a
# floating-point conversion and resize, three real clips to 256 and 128 lines: 43 to 58 dB with full chroma and
# accurate rounding, 28 to 44 dB without, for up to 0.4 ms more a frame (one size of odd width: 37 dB both ways).
# Bit-exact costs nothing measurable and makes the pixels independent of the CPU's vector instructions.
_SCALE_FLAGS = (
    Interpolation.BILINEAR
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)


def render(shown: Shown, spec: ClipSpec, reformatter: VideoReformatter) -> tuple[npt.NDArray[np.uint8], Geometry]:
    """A frame as displayed, scaled but not yet cut: uint8 (scaled_height, scaled_width, 3).

    Colour conversion and scaling are one pass. A frame that needs no scaling has exactly the pixels of PyAV's
    ``to_ndarray(format="rgb24")``.
    """
    frame = shown.frame
    assert frame is not None, "a frame that is needed is never left out"
    orientation = orientation_of(frame)
    try:
        width, height = display_size(frame.width, frame.height, shown.stream.sample_aspect_ratio, orientation)
        geometry = plan_geometry(width, height, spec)
    except ValueError as error:
        raise VideoError(Reason.UNSUPPORTED, str(error)) from error
    width, height = orientation.size(geometry.scaled_width, geometry.scaled_height)
    unscaled = (width, height) == (frame.width, frame.height)
    with ffmpeg_failures_as(Reason.UNSUPPORTED, f"cannot convert {frame.width}x{frame.height} {frame.format.name}"):
        rgb = reformatter.reformat(
            frame, width, height, "rgb24", interpolation=None if unscaled else _SCALE_FLAGS, threads=1
        )
    return orientation.apply(np.asarray(rgb.to_ndarray(), np.uint8)), geometry


def orientation_of(frame: VideoFrame) -> Orientation:
    side_data = cast(SideDataContainer, frame.side_data)  # the stubs call it a dictionary of strings
    matrix = next((data for data in side_data if data.type is SideDataType.DISPLAYMATRIX), None)
    return Orientation.from_display_matrix(bytes(matrix)) if matrix is not None else Orientation()
