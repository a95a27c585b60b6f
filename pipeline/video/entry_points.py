"""Entry points: the packets with which decoding of a stream may start.

A container marks keyframes, but some writers mark every picture, and a missing table of keyframes (``stss`` in mp4)
says the same. So a mark counts only where the picture agrees. Codecs whose first bits tell the kind of a picture are
asked; pictures of an intra-only codec need no others. All other codecs, and streams without times, are decoded from
the start of the file.

Some demuxers hand out a part of the decoder's state once, with the first packet after it changed: palettes, and new
parameter sets in FLV. Seeking would lose it, so such files are read from their start, and decoded from an entry point.

Bit layouts: ITU-T H.263 5.1, ISO 14496-2 6.2.5, SMPTE 421M 7.1, and the decoders of FFmpeg for codecs without a
published specification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from av.packet import Packet
from av.video.stream import VideoStream

from vidshard.pipeline.video.bit_reader import Bits, payload, unit_length_bytes, units
from vidshard.pipeline.video.container import codec_name
from vidshard.pipeline.video.packet_info import has_interlaced_b_frames, inspector_of
from vidshard.pipeline.video.timestamps import is_clockless

STATE_HANDED_OUT_ONCE: tuple[Literal["palette", "new_extradata"], ...] = ("palette", "new_extradata")
"""Side data of packets that a demuxer gives only once, and that a decoder keeps."""

Check = Callable[[bytes], bool | None]
"""Whether the picture of a packet needs no other one; None where only the container's mark tells."""

_OWN_PALETTE = frozenset({"png", "tiff", "bmp", "targa", "pcx", "sgi", "sunrast", "webp", "zmbv"})
"""Codecs whose pictures hold the palette they use."""

_NOT_INTRA = frozenset({"mss2", "mscc", "srgc", "rl2"})
"""Codecs that FFmpeg lists as intra-only, though their pictures may keep a part of the one before."""


_TIMED_IN_PROGRAM_STREAMS = frozenset({"mpeg1video", "mpeg2video", "h264"})
"""Codecs that have the same times in an MPEG program stream wherever reading begins.

One time may stand there for a dozen small pictures. For other codecs FFmpeg's parsers give it to another picture behind
a seek.
"""


class EntryPoints:
    """Tells with which packets of a stream decoding may start."""

    def __init__(self, stream: VideoStream) -> None:
        """Look at the header of an opened stream."""
        codec = codec_name(stream)
        formats = set(stream.container.format.name.split(","))
        has_palette = stream.codec_context.pix_fmt == "pal8" and codec not in _OWN_PALETTE
        check = _check_of(stream, codec)
        is_untimed = "mpeg" in formats and codec not in _TIMED_IN_PROGRAM_STREAMS
        has_lasting_palette = has_palette and not is_intra_only(stream, codec)
        self.only_start = check is None or is_clockless(stream) or is_untimed or has_lasting_palette
        """Whether decoding can start nowhere but at the start of the file."""
        self.must_read_all = has_palette or "flv" in formats
        """Whether the packets before an entry point have to be read, though not decoded, for their side data."""
        self._check: Check = check or (lambda _: False)

    def is_entry(self, packet: Packet[VideoStream], following: Callable[[], Packet[VideoStream] | None]) -> bool:
        """Whether decoding may start with a packet: it is marked as a keyframe, and its picture agrees.

        Args:
            packet: a packet of at least one byte.
            following: gives the next one. Where the picture leaves it to the mark, a wrong mark on that one counts.
        """
        if not packet.is_keyframe:
            return False
        own = self._check(bytes(packet))
        if own is None and (other := following()) is not None and other.is_keyframe:
            return self._check(bytes(other)) is not False
        return own is not False


def is_intra_only(stream: VideoStream, codec: str) -> bool:
    """Whether no picture of a stream needs another one; ``codec`` is FFmpeg's name."""
    return codec == "png" or (stream.codec_context.codec.intra_only and codec not in _NOT_INTRA)


def _check_of(stream: VideoStream, codec: str) -> Check | None:
    """The check for a codec; None where nothing tells which of its pictures stand alone."""
    extradata = bytes(stream.codec_context.extradata or b"")
    if codec == "h264":
        return _H264(extradata)
    if codec in ("hevc", "vvc"):
        return _nal_check(extradata, codec)
    if codec == "av1":
        inspect = inspector_of(stream)
        return lambda data: (facts := inspect(data)) is not None and facts.random_access
    if codec == "mpeg4":
        return lambda data: _mpeg4(data, extradata)
    if codec in ("mpeg1video", "mpeg2video"):
        return lambda data: _mpeg2(data, extradata)
    if codec == "wmv3":
        return _wmv3(extradata)
    if codec in _CHECKS:
        check = _CHECKS[codec]
        return lambda data: _within(check, data)
    return (lambda _: True) if is_intra_only(stream, codec) else None


def _within(check: Check, data: bytes) -> bool | None:
    """The check's answer; False where the packet ends before it."""
    try:
        return check(data)
    except (EOFError, IndexError):
        return False


class _H264:
    """An IDR picture or one with a recovery point message (D.1.8); for an intra picture the container's mark tells."""

    def __init__(self, extradata: bytes) -> None:
        self._length_bytes = unit_length_bytes("h264", extradata)

    def __call__(self, data: bytes) -> bool | None:
        for at in units(data, self._length_bytes):
            kind = data[at] & 31
            if kind == 5 or (kind == 6 and _has_recovery_point(data, at + 1)):
                return True
            if kind == 1:
                return _within(_intra_slice, data[at + 1 : at + 17])
        return None


def _intra_slice(data: bytes) -> bool | None:
    """None for an intra slice, as the pictures after it may reference those before it; otherwise False."""
    bits = payload(data, 0)
    bits.take_unsigned()
    return None if bits.take_unsigned() % 5 in (2, 4) else False


def _has_recovery_point(data: bytes, at: int) -> bool:
    """Whether the messages of a unit (7.3.2.3.1) include a recovery point; ``at`` is behind the unit's header."""
    messages = data[at : at + 4096].replace(b"\0\0\3", b"\0\0")
    end = messages.find(b"\0\0\1")
    messages = messages if end < 0 else messages[:end]
    at = 0
    while at + 2 < len(messages):
        kind = size = 0
        while at < len(messages) and messages[at] == 255:
            kind, at = kind + 255, at + 1
        kind, at = kind + (messages[at] if at < len(messages) else 0), at + 1
        while at < len(messages) and messages[at] == 255:
            size, at = size + 255, at + 1
        size, at = size + (messages[at] if at < len(messages) else 0), at + 1
        if kind == 6:
            return True
        at += size
    return False


def _nal_check(extradata: bytes, codec: str) -> Check:
    """Check for H.265 (7.4.2.2) and H.266: the first picture's unit is one of a random access point."""
    length_bytes = unit_length_bytes(codec, extradata)

    def check(data: bytes) -> bool | None:
        for at in units(data, length_bytes):
            if codec == "hevc":
                if (kind := data[at] >> 1 & 63) < 32:
                    return 16 <= kind <= 21
            elif at + 1 < len(data) and (kind := data[at + 1] >> 3) < 12:
                return 7 <= kind <= 10
        return None

    return check


def _mpeg4(data: bytes, extradata: bytes) -> bool | None:
    at = data.find(b"\0\0\1\xb6")
    if not 0 <= at < len(data) - 4:
        return None
    if data[at + 4] >> 6 or has_interlaced_b_frames(data[:at]) or has_interlaced_b_frames(extradata):
        return False
    return _has_layer(data[:at]) or _has_layer(extradata)


def _has_layer(data: bytes) -> bool:
    """Whether there is a video object layer, 6.2.3: the start codes 0x20 to 0x2f."""
    at = data.find(b"\0\0\1")
    while 0 <= at < len(data) - 3:
        if data[at + 3] >> 4 == 2:
            return True
        at = data.find(b"\0\0\1", at + 3)
    return False


def _mpeg2(data: bytes, extradata: bytes) -> bool | None:
    at = data.find(b"\0\0\1\0")
    if not 0 <= at < len(data) - 5:
        return None
    return data[at + 5] >> 3 & 7 == 1 and b"\0\0\1\xb3" in (data[:at] + b" " + extradata)


def _mjpeg(data: bytes) -> bool | None:
    """Whether a picture defines its quantization tables (ITU-T T.81, B.2.4); others take those of an earlier one.

    One without Huffman tables takes the usual ones, as cameras mean it. A decoder notices if others were meant.
    """
    at = data.find(b"\xff\xd8") + 2
    while at + 4 <= len(data) and data[at] == 255:
        marker = data[at + 1]
        if marker in (0xDB, 0xDA):
            return marker == 0xDB
        at += 1 if marker == 255 else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _h263(data: bytes) -> bool:
    bits = Bits(data[:16])
    if bits.take(22) != 32:
        return False
    bits.take(13)
    if (source := bits.take(3)) != 7:
        return source != 0 and bits.take(1) == 0
    if bits.take(3) == 1:
        bits.take(18)
    return bits.take(3) == 0


def _flv1(data: bytes) -> bool:
    bits = Bits(data[:16])
    if bits.take(17) != 1:
        return False
    bits.take(13)
    bits.take({0: 16, 1: 32}.get(bits.take(3), 0))
    return bits.take(2) == 0


def _vp9(data: bytes) -> bool:
    """Whether the first frame is a keyframe; profile 3 has a reserved bit more, 6.2 of the VP9 specification."""
    return data[0] & 0xF6 == 0xB0 if data[0] & 0x30 == 0x30 else data[0] & 0xCC == 0x80


def _wmv3(extradata: bytes) -> Check | None:
    """Check for simple and main profile, by fields of the sequence header: RANGERED, MAXBFRAMES, FINTERPFLAG."""
    if len(extradata) < 4 or extradata[0] >> 6 == 3:
        return None
    sequence = int.from_bytes(extradata[:4], "big")
    ranges, max_b_frames, interpolates = sequence >> 7 & 1, sequence >> 4 & 7, sequence >> 1 & 1

    def check(data: bytes) -> bool:
        bits = Bits(data[:4])
        bits.take(interpolates + 2 + ranges)
        return bits.take(1) == 0 and (max_b_frames == 0 or bits.take(1) == 1)

    return lambda data: _within(check, data)


def _real(data: bytes) -> bytes:
    """The first slice of a RealVideo packet, behind the table of slices."""
    return data[1 + 8 * (data[0] + 1) :]


def _dirac(data: bytes) -> bool:
    """A sequence header, then a picture without references."""
    at, has_sequence = data.find(b"BBCD"), False
    while 0 <= at < len(data) - 4:
        code = data[at + 4]
        has_sequence = has_sequence or code == 0
        if code & 8:
            return has_sequence and code & 3 == 0
        at = data.find(b"BBCD", at + 4)
    return False


_CHECKS: dict[str, Check] = {
    "vp8": lambda data: data[0] & 1 == 0,
    "vp7": lambda data: data[0] & 1 == 0,
    "mjpeg": _mjpeg,
    "vp9": _vp9,
    "vp6": lambda data: data[0] & 0x80 == 0,
    "vp6f": lambda data: data[0] & 0x80 == 0,
    "vp6a": lambda data: data[3] & 0x80 == 0,
    "vp3": lambda data: data[0] & 0x80 == 0,
    "theora": lambda data: data[0] & 0xC0 == 0,
    "h263": _h263,
    "h263p": _h263,
    "h263i": _h263,
    "flv1": _flv1,
    "msmpeg4v1": lambda data: data[4] & 6 == 0,
    "msmpeg4v2": lambda data: data[0] & 0xC0 == 0,
    "msmpeg4v3": lambda data: data[0] & 0xC0 == 0,
    "wmv1": lambda data: data[0] & 0xC0 == 0,
    "wmv2": lambda data: data[0] & 0x80 == 0,
    "vc1": lambda data: b"\0\0\1\x0e" in data or b"\0\0\1\x0f" in data,
    "svq1": lambda data: data[3] & 3 == 0,
    "rv10": lambda data: _real(data)[0] & 0x40 == 0,
    "rv20": lambda data: _real(data)[0] & 0x80 == 0,
    "rv30": lambda data: _real(data)[0] & 0x10 == 0,
    "rv40": lambda data: _real(data)[0] & 0x40 == 0,
    "zmbv": lambda data: data[0] & 1 == 1,
    "cscd": lambda data: data[0] & 1 == 1,
    "ffv1": lambda data: int.from_bytes(data[:2], "big") >= 0x7F80,
    "dirac": _dirac,
}
