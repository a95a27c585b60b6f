"""Chooses the video stream of a file that has several: the film, and not its poster, thumbnails or trailer.

The rule is that of the ffmpeg program (``-map`` left out): the largest picture, where the default stream counts as five
megapixels larger. Before it applies, streams that are no moving pictures of about the whole length are set aside, as
long as another one is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from vidshard.pipeline.video.decoders import may_decode
from vidshard.pipeline.video.timestamps import stream_seconds, time_base_of
from vidshard.schemas.video import Limits

_DEFAULT_PIXELS = 5_000_000
"""The default stream counts as so many pixels larger, as in the ffmpeg program."""

_MIN_SHARE_OF_FRAMES = Fraction(1, 50)
"""A stream with a smaller share of the frames of another one is a still, or a sheet of thumbnails."""

_MIN_SHARE_OF_SECONDS = Fraction(1, 2)
"""A stream that lasts a smaller share of the time of another one is a poster, or a trailer."""

_MAX_PACKETS_READ = 1000
_MAX_BYTES_READ = 32 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class _Extent:
    """Number of frames of a stream, and where its last one ends."""

    num_frames: int
    seconds: Fraction


def has_decoder(stream: VideoStream) -> bool:
    """Whether FFmpeg has a decoder for a stream."""
    # PyAV's stubs promise a codec context, but a stream without a decoder has None
    return getattr(stream, "codec_context", None) is not None


def choose_stream(
    container: InputContainer, streams: Sequence[VideoStream], limits: Limits
) -> tuple[VideoStream, bool]:
    """Choose among the video streams of a file.

    A stream without a decoder, or with one that the limits do not allow, is chosen only where the others are set
    aside: the poster of a film that cannot be decoded does not stand for it.

    Args:
        container: at its beginning.
        streams: at least one; cover pictures are none.
        limits: the run's, for its decoders.

    Returns:
        The stream, and whether packets were read to decide: then the container is no longer at its beginning.
    """
    if len(streams) == 1:
        return streams[0], False
    streams = [stream for stream in streams if not stream.disposition & Disposition.still_image] or streams
    stated = [_stated_extent(stream) for stream in streams]
    extents = [extent for extent in stated if extent is not None]
    must_read = len(extents) < len(streams)
    if must_read:
        extents = _read_extents(container, streams)
    most_frames = max(extent.num_frames for extent in extents)
    moving = [n for n, extent in enumerate(extents) if _is_moving(extent, most_frames)]
    longest = max(extents[n].seconds for n in moving)
    lasting = [n for n in moving if extents[n].seconds >= longest * _MIN_SHARE_OF_SECONDS]
    return max((streams[n] for n in lasting), key=lambda stream: _score(stream, limits)), must_read


def _is_moving(extent: _Extent, most_frames: int) -> bool:
    return extent.num_frames >= min(2, most_frames) and extent.num_frames >= most_frames * _MIN_SHARE_OF_FRAMES


def _score(stream: VideoStream, limits: Limits) -> tuple[int, int]:
    if not has_decoder(stream) or not may_decode(stream, limits):
        return -1, -stream.index
    is_default = bool(stream.disposition & Disposition.default)
    return stream.width * stream.height + _DEFAULT_PIXELS * is_default, -stream.index


def _stated_extent(stream: VideoStream) -> _Extent | None:
    """Extent by the stream's own header; None where it states only one of the two, or the container's."""
    num_frames = stream.frames
    for key, value in stream.metadata.items():
        if key.upper().startswith("NUMBER_OF_FRAMES") and value.isascii() and value.isdigit():
            num_frames = num_frames or int(value[:18])
    seconds = stream_seconds(stream)
    return _Extent(num_frames=num_frames, seconds=seconds) if num_frames and seconds else None


def _read_extents(container: InputContainer, streams: Sequence[VideoStream]) -> list[_Extent]:
    """Extents of the streams within the first packets of the file."""
    units = {stream.index: time_base_of(stream) for stream in streams}
    num_frames = dict.fromkeys(units, 0)
    start: dict[int, Fraction] = {}
    end: dict[int, Fraction] = {}
    num_packets = num_bytes = 0
    with suppress(av.FFmpegError):  # damage is met again by whoever decodes
        for packet in container.demux(list(streams)):
            num_packets += 1
            num_bytes += packet.size
            ticks = packet.pts if packet.pts is not None else packet.dts
            if packet.size:
                index = packet.stream_index
                num_frames[index] += 1
                if ticks is not None:
                    at = ticks * units[index]
                    start.setdefault(index, at)
                    end[index] = max(end.get(index, at), at + (packet.duration or 0) * units[index])
            if num_packets >= _MAX_PACKETS_READ or num_bytes >= _MAX_BYTES_READ:
                break
    return [
        _Extent(num_frames=num_frames[index], seconds=end.get(index, Fraction(0)) - start.get(index, Fraction(0)))
        for index in num_frames
    ]
