"""Renders a decoded frame to RGB as displayed: deinterlacing, orientation, pixel aspect ratio, color and scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, cast

import av
import numpy as np
import numpy.typing as npt
from av.filter import Graph
from av.filter.context import FilterContext
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideDataType
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from vidshard.pipeline.video.color import Color, Transfer, color_of, rgb_from_ycbcr, to_bt709
from vidshard.pipeline.video.container import codec_name, ffmpeg_failures_as
from vidshard.pipeline.video.cropping import Crop
from vidshard.pipeline.video.frame_order import TimedFrame
from vidshard.pipeline.video.geometry import Orientation, display_size, paste, plan_geometry
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import ClipSpec, Geometry

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


# Color of a picture that is already RGB for a display.
_DISPLAYED = Color(matrix=Colorspace.ITU709, full_range=True, transfer=Transfer.SDR, primaries=ColorPrimaries.BT709)


@dataclass(slots=True)
class Renderer:
    """Renders frames for clips. Keeps swscale's contexts, so that similar frames share them."""

    spec: ClipSpec
    _reformatters: dict[str, VideoReformatter] = field(default_factory=dict)
    """One for each target format: a context that changes its formats is built anew."""
    _planned: tuple[tuple[int, int], Geometry] | None = None
    """The last displayed size, and its geometry."""

    def cut(self, shown: TimedFrame, out: Pixels) -> Geometry:
        """Scale a frame and cut it to the clip's size.

        Args:
            shown: the frame.
            out: uint8 (H, W, 3), overwritten by its picture.

        Raises:
            VideoError: as :meth:`render`.
        """
        channels, geometry = self._channels(shown)
        for number, channel in enumerate(channels):  # interleave after cutting: half the time
            paste(channel[..., None], geometry, out[..., number : number + 1])
        return geometry

    def render(self, shown: TimedFrame) -> tuple[Pixels, Geometry]:
        """A frame as displayed, scaled but not yet cut: uint8 (scaled_height, scaled_width, 3), R'G'B' of BT.709.

        It depends on nothing but the frame and its stream's header, so that spans equal one pass.

        Raises:
            VideoError: UNSUPPORTED: a color system, pixel format or aspect ratio that cannot be shown.
        """
        channels, geometry = self._channels(shown)
        return np.stack(channels, axis=-1), geometry

    def _channels(self, shown: TimedFrame) -> tuple[Sequence[Pixels], Geometry]:
        """Red, green and blue, each uint8 (scaled_height, scaled_width)."""
        frame = shown.frame
        assert frame is not None, "a frame that is needed is never left out"
        try:
            orientation = orientation_of(frame)
            width, height = display_size(*shown.shown_size, shown.pixel_aspect, orientation)
            geometry = self._geometry(width, height)
            if _has_stale_format(shown):
                frame = _of_limited_range(frame)
            color = color_of(frame)
        except ValueError as error:
            raise VideoError(Reason.UNSUPPORTED, str(error)) from error
        width, height = orientation.size(geometry.scaled_width, geometry.scaled_height)
        with ffmpeg_failures_as(Reason.UNSUPPORTED, f"cannot convert {frame.width}x{frame.height} {frame.format.name}"):
            if frame.interlaced_frame:
                frame = self._deinterlaced(frame)
            if shown.crop is not None and shown.shown_size != (frame.width, frame.height):
                frame = _cropped(frame, shown.crop)
            if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
                frame, color = self._on_black(frame, color)
            channels = self._rgb(frame, color, width, height)
        return [orientation.apply(channel[..., None])[..., 0] for channel in channels], geometry

    def _geometry(self, width: int, height: int) -> Geometry:
        if self._planned is None or self._planned[0] != (width, height):
            self._planned = (width, height), plan_geometry(width, height, self.spec)
        return self._planned[1]

    def _rgb(self, frame: VideoFrame, color: Color, width: int, height: int) -> Sequence[Pixels]:
        if not color.is_plain:
            rgb = to_bt709(self._wide_rgb(frame, color, width, height), color)
            return [rgb[..., number] for number in range(3)]
        # in planes: swscale writes those by vector instructions, and packed RGB three times as slowly
        planes = self._reformatted(frame, color, width, height, "gbrp").planes
        green, blue, red = _in_full_range(frame, [_rows(plane, "u1")[:, :width] for plane in planes])
        return red, green, blue

    def _wide_rgb(self, frame: VideoFrame, color: Color, width: int, height: int) -> npt.NDArray[np.float32]:
        """R'G'B' in [0, 1] at full precision, float32 (H, W, 3): swscale only scales, as it converts to 8 bits."""
        if frame.format.is_rgb or _is_gray(frame.format):
            rgb = self._reformatted(frame, color, width, height, "gbrp16le").to_ndarray()
            return rgb.astype(np.float32) / np.float32(65535)
        ycbcr = self._reformatted(frame, color, width, height, "yuv444p16le").to_ndarray()
        return rgb_from_ycbcr(ycbcr.astype(np.uint16, copy=False), color, frame.format.components[0].bits)

    def _on_black(self, frame: VideoFrame, color: Color) -> tuple[VideoFrame, Color]:
        """Composite a frame with alpha over black; an opaque frame is returned unchanged.

        Alpha counts as straight (not premultiplied). This happens before scaling, or hidden color would bleed into
        view.
        """
        width, height = frame.width, frame.height
        gbra = self._reformatted(frame, color, width, height, "gbrap")
        green, blue, red, alpha = (_rows(plane, "u1")[:, :width] for plane in gbra.planes)
        if alpha.min() == 255:
            return frame, color
        shades = _in_full_range(frame, [green, blue, red])
        if not color.is_plain:
            red, green, blue = self._rgb(frame, color, width, height)
            shades = [green, blue, red]
        shown = VideoFrame(width, height, "gbrp")
        for plane, shade in zip(shown.planes, shades, strict=True):
            product = np.multiply(shade, alpha, dtype=np.uint16)
            product += 128
            product += product >> 8  # with the shift below: a division by 255, rounded
            _rows(plane, "u1")[:, :width] = product >> 8
        return shown, _DISPLAYED

    def _reformatted(self, frame: VideoFrame, color: Color, width: int, height: int, pixel_format: str) -> VideoFrame:
        reformatter = self._reformatters.setdefault(pixel_format, VideoReformatter())
        return reformatter.reformat(
            frame,
            width,
            height,
            pixel_format,
            src_colorspace=color.matrix,
            dst_colorspace=color.matrix,
            interpolation=_SCALE_FLAGS,
            threads=1,
        )

    def _deinterlaced(self, frame: VideoFrame) -> VideoFrame:
        """Deinterlace a frame to its first field: that field's rows, and their means in between.

        A picture whose rows show no comb keeps all of them: it is progressive in spite of its flag, or nothing moves.

        The filter is purely spatial, as the frames before and after are not available at the start of a span. Of
        FFmpeg's filters only estdif is purely spatial too: against the true picture, moving and still, this one is
        1.5 dB worse to 2 dB better, for 1 ms a 1080-line frame instead of 80 (python -m benchmarks.picture). Averaging
        works on any samples that fill bytes; others are widened first.
        """
        frame, first = _as_progressive(frame)
        sample = _sample_type(frame)
        if sample is None:
            wide = "gbrap16le" if frame.format.is_rgb else "yuva444p16le"
            frame = frame.reformat(format=wide, interpolation=_SCALE_FLAGS, threads=1)
            sample = "<u2"
        if not _is_combed(frame, sample):
            return frame
        frame.make_writable()
        for plane in frame.planes:
            rows = _rows(plane, sample)
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


_COMB_LEVELS = 8
"""Rows of two fields that differ by less, of 255, make no comb that counts."""
_COMB_BLOCK = 16
_HIGH_BITS = ("p010", "p012", "p016", "p210", "p212", "p216", "p410", "p412", "p416")
"""Formats whose samples fill the high bits of 16."""
_COMB_SHARE = 0.1
"""Share of the pixels of a block that stand out from both neighboring rows, in turn, from which on it is a comb. Of 29
real videos, progressive pictures have less than 0.06 in 26 and up to 0.16 in three; woven from pans of one column a
field they have 0.12 and more, of three columns 0.25 and more."""


def _is_combed(frame: VideoFrame, sample: str) -> bool:
    """Whether two fields of different times are woven in a picture, by the samples of its first plane."""
    rows = _rows(frame.planes[0], sample)
    pixel_format = frame.format
    used = frame.width if pixel_format.is_planar else frame.width * pixel_format.padded_bits_per_pixel // 8
    # a comb is wider than a pixel; packed formats mix brightness and color
    rows = rows[:, : used : 2 if pixel_format.is_planar and used > 2 * _COMB_BLOCK else 1]
    if len(rows) < 4 or not rows.shape[1]:
        return True
    values: npt.NDArray[np.signedinteger[Any]] = rows.astype(np.int16 if sample == "u1" else np.int32)
    step = values[1:] - values[:-1]
    bits = 16 if pixel_format.name.startswith(_HIGH_BITS) else pixel_format.components[0].bits
    least = _COMB_LEVELS << max(0, bits - 8)
    up, down = step > least, step < -least
    in_turn = (up[:-2] & down[1:-1] & up[2:]) | (down[:-2] & up[1:-1] & down[2:])
    height, width = in_turn.shape
    block = min(_COMB_BLOCK, height), min(_COMB_BLOCK, width)
    counts = in_turn.view(np.uint8)[: height // block[0] * block[0], : width // block[1] * block[1]]
    counts = counts.reshape(height // block[0], block[0], -1).sum(axis=1, dtype=np.uint8)
    counts = counts.reshape(len(counts), -1, block[1]).sum(axis=2, dtype=np.uint16)
    return bool(counts.max() > _COMB_SHARE * block[0] * block[1])


def _cropped(frame: VideoFrame, crop: Crop) -> VideoFrame:
    """The part of a frame that its container shows, without a copy. Chroma is cut at whole samples of its own."""
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
    )
    width, height = crop.size(frame.width, frame.height)
    cut, sink = graph.add("crop", f"{width}:{height}:{crop.left}:{crop.top}:exact=1"), graph.add("buffersink")
    source.link_to(cut)
    cut.link_to(sink)
    graph.configure()
    graph.push(frame)
    return cast(VideoFrame, sink.pull())


def _has_stale_format(shown: TimedFrame) -> bool:
    """Whether a picture of h264 has a format of full range from those before it, and says that its own is limited."""
    frame = shown.frame
    return (
        frame is not None
        and frame.format.name.startswith("yuvj")
        and frame.color_range == ColorRange.MPEG
        and isinstance(shown.stream, VideoStream)
        and codec_name(shown.stream) == "h264"
    )


def _of_limited_range(frame: VideoFrame) -> VideoFrame:
    """The same samples in a format that swscale does not take for full range, whatever the frame says.

    The decoder of h264 keeps such a format when the range changes in mid-stream.
    """
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
    )
    planes = "map0p=0:map1p=1:map2p=2:" if len(frame.planes) == 3 else ""
    renamed = graph.add("mergeplanes", f"{planes}format={frame.format.name.replace('yuvj', 'yuv', 1)}")
    # the merge forgets where chroma lies: at the left, unless a stream of h264 says otherwise
    placed, sink = graph.add("setparams", "chroma_location=left"), graph.add("buffersink")
    source.link_to(renamed)
    renamed.link_to(placed)
    placed.link_to(sink)
    graph.configure()
    graph.push(frame)
    graph.push(None)
    limited = cast(VideoFrame, sink.pull())
    limited.color_range, limited.colorspace = ColorRange.MPEG, frame.colorspace  # the graph made them of the format
    return limited


def orientation_of(frame: VideoFrame) -> Orientation:
    """Orientation by the frame's display matrix; FFmpeg makes one of an EXIF orientation too."""
    if frame.format.is_rgb or frame.format.has_palette or _is_gray(frame.format):  # as all of png
        frame = _without_profiles(frame)
    try:
        side_data = cast(SideDataContainer, frame.side_data)  # the stubs call it a dictionary of strings
    except ValueError:
        side_data = cast(SideDataContainer, _without_profiles(frame).side_data)
    matrix = next((data for data in side_data if data.type is SideDataType.DISPLAYMATRIX), None)
    return Orientation.from_display_matrix(bytes(matrix)) if matrix is not None else Orientation()


def _without_profiles(frame: VideoFrame) -> VideoFrame:
    """The same picture without the side data that PyAV cannot handle. Costs 0.1 ms.

    PyAV frees the name of a png's color profile twice, and fails on kinds that it does not know, such as EXIF.
    """
    graph = Graph()
    graph.threads = 1
    at: FilterContext = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
    )
    for kind in _UNUSABLE_SIDE_DATA:
        following = graph.add("sidedata", f"mode=delete:type={kind}")
        at.link_to(following)
        at = following
    sink = graph.add("buffersink")
    at.link_to(sink)
    graph.configure()
    graph.push(frame)
    return cast(VideoFrame, sink.pull())


# The last ones are LCEVC, view ids, reference displays and EXIF, by their numbers in FFmpeg 8 (libavutil/frame.h).
_UNUSABLE_SIDE_DATA = (SideDataType.ICC_PROFILE.value, 28, 29, 30, 31)


def _is_gray(pixel_format: VideoFormat) -> bool:
    return not pixel_format.is_rgb and len([c for c in pixel_format.components if not c.is_alpha]) == 1


def _in_full_range(frame: VideoFrame, planes: list[Pixels]) -> list[Pixels]:
    """Planes from swscale, stretched to full range if the frame was gray of limited range."""
    if frame.color_range == ColorRange.MPEG and _is_gray(frame.format):
        return [_GRAY_TO_FULL[shades] for shades in planes]
    return planes


def _rows(plane: VideoPlane, sample: str) -> npt.NDArray[Any]:
    """A plane's memory as unsigned integers, (height, samples per row including padding)."""
    return np.frombuffer(cast(memoryview, plane), sample).reshape(plane.height, -1)


def _sample_type(frame: VideoFrame) -> str | None:
    """NumPy type of the samples in all planes; None for packed bits, palettes, floats and rows stored upwards."""
    pixel_format = frame.format
    bits = {component.bits for component in pixel_format.components}
    if pixel_format.has_palette or pixel_format.is_bit_stream or any(plane.line_size < 0 for plane in frame.planes):
        return None
    if bits == {8}:
        return "u1"
    if pixel_format.is_planar and min(bits) > 8 and max(bits) <= 16:
        return ">u2" if pixel_format.is_big_endian else "<u2"
    return None


def _as_progressive(frame: VideoFrame) -> tuple[VideoFrame, bool]:
    """The same samples without the interlaced flag, and whether the bottom field is the first.

    PyAV neither tells the order nor clears the flag, but FFmpeg's filters do. With the flag, swscale would scale each
    field for itself.
    """
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
    )
    split = graph.add("split")
    select, bottom_first = graph.add("select", "eq(interlace_type,BOTTOMFIRST)"), graph.add("buffersink")
    progressive = graph.add("setfield", "prog"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(select, 0)
    select.link_to(bottom_first)
    split.link_to(progressive[0], 1)
    progressive[0].link_to(progressive[1])
    graph.configure()
    source.push(frame)
    unflagged = cast(VideoFrame, progressive[1].pull())
    try:
        bottom_first.pull()
    except (av.error.BlockingIOError, av.error.EOFError):
        return unflagged, False
    return unflagged, True
