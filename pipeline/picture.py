"""A decoded frame to RGB as displayed: fields, orientation, pixel shape, colour and scale."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import cast

import av
import numpy as np
import numpy.typing as npt
from av.filter import Graph
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideDataType
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from pipeline.colour import Colour, Transfer, colour_of, rgb_from_ycbcr, to_bt709
from pipeline.container import ffmpeg_failures_as
from pipeline.frames import Shown
from pipeline.geometry import Orientation, display_size, plan_geometry
from schemas.video import ClipSpec, Geometry, Reason, VideoError

Pixels = npt.NDArray[np.uint8]

# Bilinear with the triangle widened on downscaling, which is what "antialiased bilinear" means elsewhere. Against a
# floating-point conversion and resize, three real clips to 256 and 128 lines: 43 to 58 dB with full chroma and
# accurate rounding, 28 to 44 dB without, for up to 0.4 ms more a frame (one size of odd width: 37 dB both ways).
# Bit-exact costs nothing measurable and makes the pixels independent of the CPU's vector instructions. Without these
# flags an unscaled 4:2:0 frame takes another path through swscale, 1.2 levels too dark and with blocky chroma.
_SCALE_FLAGS = (
    Interpolation.BILINEAR
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)

# swscale reads all gray as full range.
_GRAY_TO_FULL: Pixels = np.round(np.clip((np.arange(256) - 16) * (255 / 219), 0, 255)).astype(np.uint8)


# What has been made ready for a display.
_DISPLAYED = Colour(matrix=Colorspace.ITU709, full_range=True, transfer=Transfer.SDR, primaries=ColorPrimaries.BT709)


@dataclass(slots=True)
class Renderer:
    """Turns frames into pictures for clips. Holds swscale's tables, so that frames alike share them."""

    spec: ClipSpec
    _reformatters: dict[str, VideoReformatter] = field(default_factory=dict)
    """One for each kind of conversion: a context that changes its formats is built anew."""

    def render(self, shown: Shown) -> tuple[Pixels, Geometry]:
        """A frame as displayed, scaled but not yet cut: uint8 (scaled_height, scaled_width, 3), R'G'B' of BT.709.

        It depends on nothing but the frame and what its stream says, so that spans equal the whole.

        Raises:
            VideoError: UNSUPPORTED: a colour system, pixel format or aspect ratio that cannot be shown.
        """
        frame = shown.frame
        try:
            orientation = orientation_of(frame)
            width, height = display_size(frame.width, frame.height, pixel_aspect(shown.stream), orientation)
            geometry = plan_geometry(width, height, self.spec)
            colour = colour_of(frame)
        except ValueError as error:
            raise VideoError(Reason.UNSUPPORTED, str(error)) from error
        width, height = orientation.size(geometry.scaled_width, geometry.scaled_height)
        with ffmpeg_failures_as(Reason.UNSUPPORTED, f"cannot convert {frame.width}x{frame.height} {frame.format.name}"):
            if frame.interlaced_frame:
                frame = self._first_field(frame)
            if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
                frame, colour = self._on_black(frame, colour), _DISPLAYED
            rgb = self._rgb(frame, colour, width, height)
        return orientation.apply(rgb), geometry

    def _rgb(self, frame: VideoFrame, colour: Colour, width: int, height: int) -> Pixels:
        if not colour.is_plain:
            return to_bt709(self._wide_rgb(frame, colour, width, height), colour)
        return _gray_to_full(frame, self._reformatted(frame, colour, width, height, "rgb24"))

    def _wide_rgb(self, frame: VideoFrame, colour: Colour, width: int, height: int) -> npt.NDArray[np.float32]:
        """R'G'B' from 0 to 1 with all its bits: swscale only scales, as its own conversion is to 8 bits."""
        if frame.format.is_rgb or _is_gray(frame.format):
            return self._reformatted(frame, colour, width, height, "gbrp16le").astype(np.float32) / np.float32(65535)
        ycbcr = self._reformatted(frame, colour, width, height, "yuv444p16le")
        return rgb_from_ycbcr(ycbcr.astype(np.uint16, copy=False), colour, frame.format.components[0].bits)

    def _on_black(self, frame: VideoFrame, colour: Colour) -> VideoFrame:
        """A frame with alpha, not premultiplied, before a black ground; before scaling, or hidden colour would show."""
        rgba = self._reformatted(frame, colour, frame.width, frame.height, "rgba")
        if colour.is_plain:
            rgb = _gray_to_full(frame, rgba[..., :3])
        else:
            rgb = self._rgb(frame, colour, frame.width, frame.height)
        product = rgb.astype(np.uint16) * rgba[..., 3:] + 128
        return VideoFrame.from_ndarray(((product + (product >> 8)) >> 8).astype(np.uint8), format="rgb24")

    def _reformatted(
        self, frame: VideoFrame, colour: Colour, width: int, height: int, pixel_format: str
    ) -> npt.NDArray[np.uint8 | np.uint16]:
        """(height, width, components)."""
        reformatter = self._reformatters.setdefault(pixel_format, VideoReformatter())
        converted = reformatter.reformat(
            frame,
            width,
            height,
            pixel_format,
            src_colorspace=colour.matrix,
            dst_colorspace=colour.matrix,
            interpolation=_SCALE_FLAGS,
            threads=1,
        )
        return cast("npt.NDArray[np.uint8 | np.uint16]", converted.to_ndarray())

    def _first_field(self, frame: VideoFrame) -> VideoFrame:
        """An interlaced frame at the time of its first field: that field's rows, and between them their means.

        Purely spatial, as the frames before and after are not at hand where a span begins. Against the true picture,
        moving and still, four clips: within 1.2 dB of FFmpeg's estdif (26 to 51 dB), and 1 ms a 1080-line frame
        against 80 (see docs/decoding.md). Averaging works on any samples that fill bytes; others are widened first.
        """
        first = 1 if _bottom_field_first(frame) else 0
        sample = _sample_type(frame)
        if sample is None:
            wide = "gbrap16le" if frame.format.is_rgb else "yuva444p16le"
            frame = frame.reformat(format=wide, interpolation=_SCALE_FLAGS, threads=1)
            sample = "<u2"
        frame.make_writable()
        for plane in frame.planes:
            rows: npt.NDArray[np.uint8 | np.uint16] = np.frombuffer(cast(memoryview, plane), sample).reshape(
                plane.height, -1
            )
            kept = rows[first::2]
            if len(kept) == 0:
                continue
            between = (kept[:-1] >> 1) + (kept[1:] >> 1) + (kept[:-1] & kept[1:] & 1)
            rows[first + 1 : first + 1 + 2 * len(between) : 2] = between
            if first:
                rows[0] = kept[0]
            if (plane.height - first) % 2 == 0:
                rows[-1] = kept[-1]
        return frame


def orientation_of(frame: VideoFrame) -> Orientation:
    side_data = cast(SideDataContainer, frame.side_data)  # the stubs call it a dictionary of strings
    matrix = next((data for data in side_data if data.type is SideDataType.DISPLAYMATRIX), None)
    return Orientation.from_display_matrix(bytes(matrix)) if matrix is not None else Orientation()


# Containers in which only the pictures themselves state a pixel shape, which may change on the way.
_WITHOUT_ASPECT = frozenset({"mpegts", "mpeg", "mpegvideo", "h264", "hevc", "vvc", "m4v"})


def pixel_aspect(stream: VideoStream) -> Fraction | None:
    """Shape of a pixel: what the container says, as in players, otherwise what the decoder found last.

    The decoder may be a few frames ahead of the one shown, by as many as it holds back to reorder them.
    """
    if _WITHOUT_ASPECT & set(stream.container.format.name.split(",")):
        return stream.codec_context.sample_aspect_ratio or stream.sample_aspect_ratio
    return stream.sample_aspect_ratio


def _is_gray(pixel_format: VideoFormat) -> bool:
    return not pixel_format.is_rgb and len([c for c in pixel_format.components if not c.is_alpha]) == 1


def _gray_to_full(frame: VideoFrame, rgb: npt.NDArray[np.uint8 | np.uint16]) -> Pixels:
    """What swscale made of a frame, stretched if that was gray of limited range."""
    if _is_gray(frame.format) and frame.color_range == ColorRange.MPEG:
        stretched: Pixels = _GRAY_TO_FULL[rgb]
        return stretched
    return rgb.astype(np.uint8, copy=False)


def _sample_type(frame: VideoFrame) -> str | None:
    """Of which all planes consist; None for packed bits, palettes, floating point and rows stored upwards."""
    pixel_format = frame.format
    bits = {component.bits for component in pixel_format.components}
    if pixel_format.has_palette or pixel_format.is_bit_stream or any(plane.line_size < 0 for plane in frame.planes):
        return None
    if bits == {8}:
        return "u1"
    if pixel_format.is_planar and min(bits) > 8 and max(bits) <= 16:
        return ">u2" if pixel_format.is_big_endian else "<u2"
    return None


def _bottom_field_first(frame: VideoFrame) -> bool:
    """PyAV does not tell; FFmpeg's ``select`` lets exactly such frames pass."""
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
    )
    select = graph.add("select", "eq(interlace_type,BOTTOMFIRST)")
    graph.link_nodes(source, select, graph.add("buffersink")).configure()
    graph.vpush(frame)
    try:
        graph.vpull()
    except (av.error.BlockingIOError, av.error.EOFError):
        return False
    return True
