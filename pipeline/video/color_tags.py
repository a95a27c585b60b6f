"""Color descriptions in mid-stream: a sequence header that states none must not get those of the pictures before it.

FFmpeg's decoders of h264 and mpeg2 keep matrix, primaries, transfer and range until a header states others. A picture
behind a header without them would then be shown by those of whatever was decoded before, in each span another. It
gets those of the opened stream here, in each span the same.
"""

from __future__ import annotations

from av.video.stream import VideoStream

from vidshard.pipeline.video.bit_reader import payload, units
from vidshard.pipeline.video.h264 import SequenceParameters, parameter_sets

_TAGS = ("color_primaries", "color_trc", "colorspace", "color_range")


class ColorTags:
    """Color tags of a decoder, as they were when its stream was opened."""

    def __init__(self, stream: VideoStream) -> None:
        """Remember them; the stream has decoded nothing yet."""
        self._context = stream.codec_context
        self._codec = self._context.codec.canonical_name
        self._opened = {name: getattr(self._context, name) for name in _TAGS}
        self._length_bytes = parameter_sets(bytes(self._context.extradata or b""))[0] if self._codec == "h264" else 0

    def restore_before(self, data: bytes) -> None:
        """Take back what earlier headers stated, if this packet has a sequence header that states no colors."""
        if self._codec == "h264":
            is_silent = _is_silent_h264(data, self._length_bytes)
        elif self._codec == "mpeg2video":
            is_silent = _is_silent_mpeg2(data)
        else:
            return
        if is_silent:
            for name, value in self._opened.items():
                if getattr(self._context, name) != value:
                    setattr(self._context, name, value)

    @property
    def is_needed(self) -> bool:
        """Whether the codec's decoder keeps the tags of earlier headers."""
        return self._codec in ("h264", "mpeg2video")


def _is_silent_h264(data: bytes, length_bytes: int) -> bool:
    """Whether a packet has an SPS without colour_description_present_flag, 7.3.2.1.1 and E.1.1 of H.264."""
    for at in units(data, length_bytes):
        if at < len(data) and data[at] & 31 == 7:
            bits = payload(data, at + 1)
            try:
                if not SequenceParameters.read(bits).frames_only:
                    bits.take(1)
                bits.take(1)
                if bits.take(1):
                    for _ in range(4):
                        bits.take_unsigned()
                if not bits.take(1):
                    return True
                if bits.take(1) and bits.take(8) == 255:
                    bits.take(32)
                if bits.take(1):
                    bits.take(1)
                return not bits.take(1) or not bits.take(5) & 1
            except EOFError:
                return False
    return False


def _is_silent_mpeg2(data: bytes) -> bool:
    """Whether a packet has a sequence header, and no sequence display extension with colour_description: 6.2.2.4."""
    header = data.find(b"\0\0\1\xb3")
    if header < 0:
        return False
    at = data.find(b"\0\0\1\xb5", header)
    while 0 <= at < len(data) - 4:
        if data[at + 4] >> 4 == 2:
            return not data[at + 4] & 1
        at = data.find(b"\0\0\1\xb5", at + 4)
    return True
