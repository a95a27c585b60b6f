"""Reads from a packet whether it is a random access point, and whether other pictures may reference it.

Containers mark keyframes, but some marks are wrong or mean less than a random access point, so the headers of a
packet's own pictures are read. A picture that is not understood counts as referenced by others.

Section numbers are those of ITU-T H.264, H.265, H.262, ISO 14496-2 and the VP8, VP9 and AV1 bitstream specifications.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from av.video.stream import VideoStream

from vidshard.pipeline.video.bit_reader import Bits, payload, units
from vidshard.pipeline.video.h264 import SequenceParameters, parameter_sets

ALL_SLOTS = 255
"""All eight reference slots, as bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PacketFacts:
    """Dependencies between a packet and others."""

    random_access: bool = False
    """Whether this and all later pictures, but those shown before it, need nothing earlier."""
    needs_flush: bool = False
    """Whether it is a random access point only for a decoder that was flushed."""
    skippable: bool = False
    """Whether the decoder knows if no other picture references it, and then skips it when asked to."""
    reads: int = ALL_SLOTS
    """Reference slots of the decoder that it may read, as bits."""
    writes: int | None = None
    """Reference slots that hold a picture of this packet afterwards; None where unknown, so that it has to be sent."""


Inspector = Callable[[bytes], PacketFacts | None]
"""Gives the facts of a packet of at least one byte; None where it is not one whole picture: all must be decoded."""

UNKNOWN = PacketFacts()
_RANDOM_ACCESS = PacketFacts(random_access=True)
_SKIPPABLE = PacketFacts(skippable=True)
_RANDOM_ACCESS_AFTER_FLUSH = PacketFacts(random_access=True, needs_flush=True)

# Each picture stands alone, tables included.
_INTRA_ONLY = frozenset({"prores", "dnxhd", "png", "utvideo", "v210"})


def inspector_of(stream: VideoStream) -> Inspector:
    """The function that reads the packets of a stream, by its codec."""
    codec = stream.codec_context.codec.canonical_name
    extradata = bytes(stream.codec_context.extradata or b"")
    if codec == "h264":
        return _H264(extradata)
    if codec == "hevc":
        return _Hevc(extradata)
    if codec == "av1":
        return _Av1(extradata)
    if codec in _INTRA_ONLY:
        return lambda _: _RANDOM_ACCESS
    if codec == "mpeg4" and has_interlaced_b_frames(extradata):
        return lambda _: UNKNOWN
    return {"mjpeg": _mjpeg, "mpeg4": _mpeg4, "mpeg2video": _mpeg2, "vp8": _vp8, "vp9": _vp9}.get(
        codec, lambda _: UNKNOWN
    )


class _H264:
    def __init__(self, extradata: bytes) -> None:
        self._frames_only: bool | None = None
        self._length_bytes, found = parameter_sets(extradata)
        for data, at in found:
            if data[at] & 31 == 7:
                self._read_parameters(data, at)

    def __call__(self, data: bytes) -> PacketFacts | None:
        for at in units(data, self._length_bytes):
            kind = data[at] & 31
            if kind == 7:
                self._read_parameters(data, at)
            elif kind in (1, 5):
                if not self._frames_only:
                    return None
                return _RANDOM_ACCESS if kind == 5 else _SKIPPABLE
        return None

    def _read_parameters(self, data: bytes, at: int) -> None:
        frames_only = False
        with suppress(EOFError):
            frames_only = SequenceParameters.read(payload(data, at + 1)).frames_only
        self._frames_only = frames_only and self._frames_only is not False


class _Hevc:
    def __init__(self, extradata: bytes) -> None:
        self._length_bytes = 0
        self._top_layer: int | None = None
        """Highest temporal layer: only its pictures are known to be referenced by none when they say so."""
        if extradata[:1] == b"\1" and len(extradata) > 22:  # 8.3.3.1 of ISO 14496-15
            self._length_bytes = (extradata[21] & 3) + 1
            at = 23
            for _ in range(extradata[22]):
                if at + 3 > len(extradata):
                    break
                num_units = int.from_bytes(extradata[at + 1 : at + 3], "big")
                at += 3
                for _ in range(num_units):
                    self._read_parameters(extradata, at + 2)
                    at += 2 + int.from_bytes(extradata[at : at + 2], "big")
        else:
            for at in units(extradata, 0):
                self._read_parameters(extradata, at)

    def _read_parameters(self, data: bytes, at: int) -> None:
        if at + 3 <= len(data) and data[at] >> 1 & 63 == 33:  # sps_max_sub_layers_minus1, 7.3.2.2
            self._top_layer = max(self._top_layer or 0, data[at + 2] >> 1 & 7)

    def __call__(self, data: bytes) -> PacketFacts | None:
        for at in units(data, self._length_bytes):
            kind = data[at] >> 1 & 63
            if kind == 33:
                self._read_parameters(data, at)
            elif kind < 32 and at + 2 < len(data):
                if kind in (19, 20):
                    return _RANDOM_ACCESS
                if kind == 21:  # an open GOP: its order count goes on, unless decoding starts here
                    return _RANDOM_ACCESS_AFTER_FLUSH
                if self._top_layer is None:
                    return UNKNOWN
                return _SKIPPABLE if (data[at + 1] & 7) - 1 >= self._top_layer else UNKNOWN
        return None


# The others.


def has_interlaced_b_frames(headers: bytes) -> bool:
    """Whether a video object layer (ISO 14496-2, 6.2.3) is interlaced and may have B-frames; True if it is not known.

    FFmpeg's decoder measures the times of such B-frames by the first one that it met. Where decoding starts at another
    picture, it drops them without a word.
    """
    at = headers.find(b"\0\0\1")
    while 0 <= at < len(headers) - 3:
        if headers[at + 3] >> 4 == 2:
            try:
                return _is_interlaced_with_b_frames(Bits(headers[at + 4 : at + 64]))
            except EOFError:
                return True
        at = headers.find(b"\0\0\1", at + 3)
    return False


def _is_interlaced_with_b_frames(bits: Bits) -> bool:
    bits.take(9)
    if bits.take(1):
        bits.take(7)
    if bits.take(4) == 15:  # the pixel's shape in numbers
        bits.take(16)
    if bits.take(1):
        bits.take(2)
        if bits.take(1):  # low delay: no B-frames
            return False
        if bits.take(1):
            bits.take(79)
    if bits.take(2):  # not rectangular
        return True
    bits.take(1)
    resolution = bits.take(16)
    bits.take(1)
    if bits.take(1):
        bits.take(max(1, (resolution - 1).bit_length()) if resolution else 1)
    bits.take(29)  # width and height, between markers
    return bits.take(1) == 1


def _mpeg4(data: bytes) -> PacketFacts | None:
    at = data.find(b"\0\0\1\xb6")
    if at < 0 or at + 4 >= len(data) or data.rfind(b"\0\0\1\xb6") != at:  # none, or several packed into one
        return None
    return _RANDOM_ACCESS if data[at + 4] >> 6 == 0 else _SKIPPABLE


def _mpeg2(data: bytes) -> PacketFacts | None:
    at = data.find(b"\0\0\1\0")
    extension = data.find(b"\0\0\1\xb5", at + 4)
    while 0 <= extension < len(data) - 8 and data[extension + 4] >> 4 != 8:
        extension = data.find(b"\0\0\1\xb5", extension + 4)
    if at < 0 or not 0 <= extension < len(data) - 8 or data[extension + 6] & 3 != 3:  # a field, 6.3.10
        return None
    if data[at + 5] >> 3 & 7 == 1:
        return _RANDOM_ACCESS if data.find(b"\0\0\1\xb3", 0, at) >= 0 else UNKNOWN
    return _SKIPPABLE


def _mjpeg(data: bytes) -> PacketFacts | None:
    head = data[:4096]
    scan = head.find(b"\xff\xda")
    # a picture that lacks tables of its own takes those of the picture before it
    whole = 0 <= head.find(b"\xff\xdb") < scan and 0 <= head.find(b"\xff\xc4") < scan
    return _RANDOM_ACCESS if whole else UNKNOWN


def _vp8(data: bytes) -> PacketFacts | None:
    first = data[0]
    if not first & 0x10:  # not shown
        return None
    return _RANDOM_ACCESS if not first & 1 else UNKNOWN


def _vp9(data: bytes) -> PacketFacts | None:
    if data[0] & 0x30 == 0x30:  # profile 3 has a bit more here
        return UNKNOWN
    shown = data[0] & 0x0A
    if not shown and data[-1] & 0xE0 != 0xC0:  # not shown, and no others beside it
        return None
    return _RANDOM_ACCESS if data[0] & 0xCE == 0x82 else UNKNOWN


class _Av1:
    """Reads AV1 packets. All that a frame leaves for later ones is in the slots it refreshes, 7.20 and 7.21.

    That includes probabilities and motion. The slots it may read stand in its header.
    """

    def __init__(self, extradata: bytes) -> None:
        self._sequence: _Av1Sequence | None = None
        self._known = 0
        """Slots, as bits, with a picture known to be no keyframe: showing one of those changes nothing."""
        if extradata[:1] == b"\x81":
            self(extradata[4:])

    def __call__(self, data: bytes) -> PacketFacts | None:
        reads, writes, understood = 0, 0, True
        random_access: bool | None = None
        for kind, layer, at, end in _av1_units(data):
            if kind == 1:
                self._sequence = _Av1Sequence.read(data[at:end])
            elif kind in (3, 6):
                random_access = data[at] >> 4 == 1 if random_access is None else random_access  # a keyframe, shown
                header = None
                if self._sequence is not None and not layer:
                    header = self._sequence.header(data[at : min(end, at + 64)])
                if header is None or (header.shows is not None and not self._known >> header.shows & 1):
                    understood = False
                    self._known = 0
                    continue
                reads |= header.reads & ~writes
                writes |= header.writes
                self._known = self._known & ~header.writes | (0 if header.is_key else header.writes)
        if random_access:
            return _RANDOM_ACCESS
        if random_access is None or not understood:
            return UNKNOWN
        return PacketFacts(reads=reads, writes=writes)


def _av1_units(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Type, spatial layer, start and end of each open bitstream unit (OBU) that is not empty, 5.3."""
    at = 0
    while at < len(data):
        kind, has_extension, has_size = data[at] >> 3 & 15, data[at] & 4, data[at] & 2
        layer = data[at + 1] >> 3 & 3 if has_extension and at + 1 < len(data) else 0
        at += 2 if has_extension else 1
        num_bytes = len(data) - at
        if has_size:
            num_bytes = shift = 0
            while at < len(data):
                num_bytes |= (data[at] & 127) << shift
                at, shift = at + 1, shift + 7
                if not data[at - 1] & 128:
                    break
        if num_bytes and at < len(data):
            yield kind, layer, at, at + num_bytes
        at += num_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Av1Header:
    """The use of reference slots that a frame header states."""

    reads: int = 0
    writes: int = 0
    is_key: bool = False
    shows: int | None = None
    """The slot that it shows (show_existing_frame); it does nothing else unless that holds a keyframe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Av1Sequence:
    """The fields of a sequence header that the first part of its frame headers depends on."""

    screen_content: int
    integer_mv: int
    order_bits: int

    @classmethod
    def read(cls, data: bytes) -> _Av1Sequence | None:
        """Parse a sequence header, 5.5; None for still pictures, decoder models and frame numbers, not read here."""
        bits = Bits(data)
        try:
            bits.take(3)
            if bits.take(2) or bits.take(1):
                return None
            with_delay = bits.take(1)
            for _ in range(bits.take(5) + 1):
                bits.take(12)
                if bits.take(5) > 7:
                    bits.take(1)
                if with_delay and bits.take(1):
                    bits.take(4)
            width_bits, height_bits = bits.take(4) + 1, bits.take(4) + 1
            bits.take(width_bits + height_bits)
            if bits.take(1):  # frames are numbered
                return None
            bits.take(7)
            with_order = bits.take(1)
            if with_order:
                bits.take(2)
            screen_content = 2 if bits.take(1) else bits.take(1)
            integer_mv = 2
            if screen_content:
                integer_mv = 2 if bits.take(1) else bits.take(1)
            return cls(
                screen_content=screen_content,
                integer_mv=integer_mv,
                order_bits=bits.take(3) + 1 if with_order else 0,
            )
        except EOFError:
            return None

    def header(self, data: bytes) -> _Av1Header | None:
        """Parse a frame header, 5.9.2; None where it is cut off."""
        try:
            return self._header(Bits(data))
        except EOFError:
            return None

    def _header(self, bits: Bits) -> _Av1Header:
        if bits.take(1):
            slot = bits.take(3)
            return _Av1Header(reads=1 << slot, shows=slot)
        frame_type, shown = bits.take(2), bits.take(1)
        if not shown:
            bits.take(1)
        refreshes_all = frame_type == 3 or (frame_type == 0 and shown)  # a switch frame, or a keyframe
        error_resilient = bool(refreshes_all or bits.take(1))
        bits.take(1)
        screen_content = bits.take(1) if self.screen_content == 2 else self.screen_content
        if screen_content and self.integer_mv == 2:
            bits.take(1)
        if frame_type != 3:
            bits.take(1)
        bits.take(self.order_bits)
        intra = frame_type in (0, 2)
        if not intra and not error_resilient:
            bits.take(3)
        writes = ALL_SLOTS if refreshes_all else bits.take(8)
        if intra:
            return _Av1Header(writes=writes, is_key=frame_type == 0)
        if error_resilient or (self.order_bits and bits.take(1)):  # the order of pictures in all slots counts
            return _Av1Header(reads=ALL_SLOTS, writes=writes)
        reads = 0
        for _ in range(7):
            reads |= 1 << bits.take(3)
        return _Av1Header(reads=reads, writes=writes)
