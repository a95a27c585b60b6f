"""Detects packets that are missing from a stream, for codecs whose decoders continue from the picture before.

Most decoders show wrong pictures, and say nothing, if a picture that others reference is missing. What tells of it
depends on the codec:

- h264 numbers its reference pictures (``h264.PictureNumbers``).
- mpeg1 and mpeg2 number all pictures of a group in display order.
- mpeg4 states the time of each picture, which must go on as the container's times do.

An AVI with an index lists its chunks, whatever the codec (``avi.ChunkOrder``).

Sections are those of ITU-T H.262 and ISO 14496-2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Generic, TypeVar

from av.packet import Packet
from av.video.stream import VideoStream

from vidshard.pipeline.video.bit_reader import Bits
from vidshard.pipeline.video.h264 import PictureNumbers
from vidshard.pipeline.video.timestamps import is_clockless, time_base_of

MISSING_REFERENCE = "a picture that this one refers to is missing"

Following = Callable[[int], "Packet[VideoStream] | None"]
"""The packet after so many others; None at the end."""

LossCheck = Callable[["Packet[VideoStream]", Following], str | None]
"""Looks at the packets of a stream in decoding order, from an entry point on, each with those that follow.

Returns what is missing before or in a packet, in words; None where nothing is known to be missing.
"""

_MOST_BETWEEN = 32
"""Packets that are looked at for B-pictures; mpeg allows any number, encoders write at most 16."""


def loss_check(stream: VideoStream) -> LossCheck | None:
    """The check for the codec of a stream; None where nothing in its packets tells."""
    codec = stream.codec_context.codec.canonical_name
    extradata = bytes(stream.codec_context.extradata or b"")
    if codec == "h264":
        numbers = PictureNumbers(extradata)
        return lambda packet, _: (
            MISSING_REFERENCE if numbers.is_one_missing(bytes(packet), packet.is_keyframe) else None
        )
    if codec in ("mpeg1video", "mpeg2video"):
        return _Mpeg2()
    if codec == "mpeg4":
        return _Mpeg4(stream, extradata)
    return None


Header = TypeVar("Header")


class _Headers(Generic[Header]):
    """Headers of packets, each parsed once although packets ahead are asked for again and again."""

    def __init__(self, parse: Callable[[bytes], Header]) -> None:
        """Parse nothing yet."""
        self._parse = parse
        self._ahead: dict[int, tuple[Packet[VideoStream], Header]] = {}

    def ahead(self, packet: Packet[VideoStream]) -> Header:
        """The header of a packet whose turn will come."""
        found = self._ahead.get(id(packet))
        if found is None:
            found = self._ahead[id(packet)] = packet, self._parse(bytes(packet))
        return found[1]

    def next(self, packet: Packet[VideoStream], data: bytes) -> Header:
        """The header of the packet whose turn it is."""
        found = self._ahead.pop(id(packet), None)
        return self._parse(data) if found is None else found[1]

    def forget(self) -> None:
        """Parse what is ahead again."""
        self._ahead.clear()


# MPEG-1 and MPEG-2.


@dataclass(kw_only=True, slots=True)  # frozen ones take thrice as long to make
class _Mpeg2Picture:
    """A picture header, 6.2.3."""

    number: int
    """temporal_reference: number in display order, modulo 1024."""
    kind: int
    """picture_coding_type: 1 is I, 2 is P, 3 is B."""

    @classmethod
    def of(cls, data: bytes) -> _Mpeg2Picture | None:
        at = data.find(b"\0\0\1\0")
        if not 0 <= at < len(data) - 5:
            return None
        return cls(number=data[at + 4] << 2 | data[at + 5] >> 6, kind=data[at + 5] >> 3 & 7)


def _is_mpeg2_field(data: bytes) -> bool:
    """Whether a picture may be one of two fields, which have the same number; picture_structure, 6.3.10."""
    extension = data.find(b"\0\0\1\xb5", data.find(b"\0\0\1\0") + 4)
    while 0 <= extension < len(data) - 8 and data[extension + 4] >> 4 != 8:
        extension = data.find(b"\0\0\1\xb5", extension + 4)
    return 0 <= extension < len(data) - 8 and data[extension + 6] & 3 != 3


class _Mpeg2:
    """Numbers of pictures in display order, 6.3.9: between two reference pictures lie as many B-pictures as numbers.

    A missing B-picture does no harm. An I-picture references nothing, so nothing is said at it.
    """

    def __init__(self) -> None:
        self._last: int | None = None  # number of the last reference picture
        self._counts = False  # whether any number was not 0: some encoders do not count
        self._pictures = _Headers(_Mpeg2Picture.of)

    def __call__(self, packet: Packet[VideoStream], following: Following) -> str | None:
        data = bytes(packet)
        picture = self._pictures.next(packet, data)
        if picture is None:
            return None if b"\0\0\1" in data else "the packet has no picture and no header"
        if picture.kind == 3:
            is_ahead = self._last is not None and 0 < (picture.number - self._last) % 1024 < 512
            return MISSING_REFERENCE if is_ahead else None
        last, self._last = self._last, picture.number
        self._counts = self._counts or picture.number > 0
        if picture.kind != 2 or last is None or not self._counts:
            return None
        step = (picture.number - last) % 1024
        if step == 1 or (step == 0 and _is_mpeg2_field(data)):
            return None
        is_back = step == 0 or step >= 512  # numbers begin again with a group, whose I-picture is missing
        return MISSING_REFERENCE if is_back or not self._num_between(picture.number, following) else None

    def _num_between(self, number: int, following: Following) -> int:
        """Number of B-pictures that follow a reference picture and are shown before it."""
        count = 0
        for at in range(_MOST_BETWEEN):
            packet = following(at)
            picture = None if packet is None else self._pictures.ahead(packet)
            if picture is None or picture.kind != 3:
                break
            count += (number - picture.number) % 1024 < 512
        return count


# MPEG-4.


@dataclass(slots=True)
class _Vop:
    """The header of a video object plane, 6.2.5: a picture."""

    is_b: bool
    modulo: int
    """Seconds since the time base, modulo_time_base."""
    increment: int
    """vop_time_increment, in ticks."""
    after_group: bool
    """Whether a header of a group, which states a new time base, comes before it."""


class _Mpeg4:
    """Compares the times in the pictures with those of the container, from each reference picture to the next.

    Writers may have changed the rate of the container, so it is the usual ratio of both that counts, and it is learned
    from the packets that follow. Nothing is said if their ratios differ: the times are then of no use.
    """

    _ASKED = 24
    """Packets from which the ratio is learned."""
    _FEWEST = 3

    def __init__(self, stream: VideoStream, extradata: bytes) -> None:
        self._tick_seconds = float(time_base_of(stream))
        self._has_shown_times = "avi" not in stream.container.format.name.split(",")
        self._counts = is_clockless(stream)
        self._resolution = _ticks_per_second(extradata)
        self._base = self._base_before = 0  # seconds that modulo_time_base counts from, and those of B-pictures
        self._last: tuple[int, Packet[VideoStream]] | None = None  # the last reference picture and its time
        self._usual: tuple[float, float] | None = None  # as learned
        self._first: list[Packet[VideoStream]] | None = []  # packets before anything was learned; None afterwards
        self._vops = _Headers(lambda data: _vop(data, self._resolution or 1))

    def __call__(self, packet: Packet[VideoStream], following: Following) -> str | None:
        data = bytes(packet)
        resolution = (None if data.startswith(b"\0\0\1\xb6") else _ticks_per_second(data)) or self._resolution
        if resolution != self._resolution:
            self._resolution = resolution
            self._vops.forget()
        if not resolution:
            return None
        vop = self._vops.next(packet, data)
        if self._first is not None and len(self._first) <= self._ASKED:
            self._first.append(packet)
        if vop is None:
            self._last = None
            return None
        if vop.is_b:
            time = (self._base_before + vop.modulo) * resolution + vop.increment
            return MISSING_REFERENCE if self._last is not None and time > self._last[0] else None
        if self._first is not None and self._last is not None:  # whoever wants one picture has nothing to learn
            self._usual = self._learned([*self._first, *self._ahead(following)][: self._ASKED + 1])
            self._first = None
        if vop.after_group:
            self._base, self._last = 0, None
        self._base_before, self._base = self._base, self._base + vop.modulo
        time = self._base * resolution + vop.increment
        if self._last is not None and time < self._last[0]:  # the one that began a new second is missing or unmarked
            self._base, time = self._base + 1, time + resolution
        last, self._last = self._last, (time, packet)
        if last is None or self._usual is None:
            return None
        shown = self._container_step(last[1], packet, following)
        stated = (time - last[0]) / resolution
        ratio, picture = self._usual
        if shown is None or stated * ratio - shown < 0.6 * picture:
            return None
        return "its own time is later than the container says: a picture before it is missing"

    def _ahead(self, following: Following) -> list[Packet[VideoStream]]:
        ahead: list[Packet[VideoStream]] = []
        while len(ahead) < self._ASKED and (packet := following(len(ahead))) is not None:
            ahead.append(packet)
        return ahead

    def _container_step(
        self, before: Packet[VideoStream], packet: Packet[VideoStream], following: Following
    ) -> float | None:
        """Seconds of the container from one reference picture to the next; None where it does not tell."""
        if self._has_shown_times and before.pts is not None and packet.pts is not None:
            return (packet.pts - before.pts) * self._tick_seconds
        # without times of presentation: as long as this picture and the B-pictures behind it take to be decoded
        for at in range(_MOST_BETWEEN):
            other = following(at)
            vop = None if other is None else self._vops.ahead(other)
            if other is None or vop is None:
                return None
            if not vop.is_b:
                if self._counts:
                    return (at + 1) * self._tick_seconds
                if other.dts is None or packet.dts is None:
                    return None
                return (other.dts - packet.dts) * self._tick_seconds
        return None

    def _learned(self, packets: Sequence[Packet[VideoStream]]) -> tuple[float, float] | None:
        """The container's seconds in one of the stream's, and in one picture; None where its steps do not agree."""
        assert self._resolution is not None
        base = base_before = 0
        references: list[tuple[int, int, bool]] = []
        times: list[int] = []
        for at, packet in enumerate(packets):
            vop = self._vops.ahead(packet)
            if vop is None:
                break
            if vop.is_b and references:
                before = packets[references[-1][1]].pts
                if packet.pts is not None and before is not None and packet.pts > before:
                    self._has_shown_times = False  # the container's times are those of decoding
            if not vop.is_b:
                base_before, base = base, base + vop.modulo
                references.append((base * self._resolution + vop.increment, at, vop.after_group))
            times.append(
                ((base_before if vop.is_b else base - vop.modulo) + vop.modulo) * self._resolution + vop.increment
            )
        ratios = []
        for (time, at, _), (next_time, next_at, is_new) in pairwise(references):
            behind = packets[next_at + 1 :]
            shown = self._container_step(packets[at], packets[next_at], dict(enumerate(behind)).get)
            if shown is not None and shown > 0 and next_time > time and not is_new:
                ratios.append(shown * self._resolution / (next_time - time))
        steps = [after - before for before, after in pairwise(sorted(times)) if after > before]
        if len(ratios) < self._FEWEST or not steps:
            return None
        usual = median(ratios)
        if 4 * sum(abs(ratio - usual) <= usual / 20 for ratio in ratios) < 3 * len(ratios):
            return None
        return usual, usual * median(steps) / self._resolution


def _vop(data: bytes, resolution: int) -> _Vop | None:
    """The header of a packet's picture; None where it has none or several, or is cut off."""
    at = data.find(b"\0\0\1\xb6")
    if at < 0 or data.rfind(b"\0\0\1\xb6") != at:  # from the back, which is faster
        return None
    bits = data[at + 4 : at + 40]
    head = int.from_bytes(bits, "big")  # read without `Bits`, which takes twice as long
    left = 8 * len(bits) - 2
    kind, modulo = head >> left if left > 0 else 0, 0
    while left > 0 and head >> left - 1 & 1:
        modulo, left = modulo + 1, left - 1
    num_bits = (resolution - 1).bit_length() or 1
    left -= 2 + num_bits
    if left < 0:
        return None
    after_group = at > 0 and data.find(b"\0\0\1\xb3", 0, at) >= 0
    return _Vop(kind == 2, modulo, head >> left & (1 << num_bits) - 1, after_group)


def _ticks_per_second(data: bytes) -> int | None:
    """vop_time_increment_resolution of a video object layer, 6.2.3; None where there is none."""
    at = data.find(b"\0\0\1")
    while 0 <= at < len(data) - 3 and data[at + 3] >> 4 != 2:
        if data[at + 3] == 0xB6:
            return None
        at = data.find(b"\0\0\1", at + 3)
    if not 0 <= at < len(data) - 3:
        return None
    bits = Bits(data[at + 4 : at + 64])
    try:
        bits.take(9)
        version = 1
        if bits.take(1):
            version = bits.take(4)
            bits.take(3)
        if bits.take(4) == 15:
            bits.take(16)
        if bits.take(1):
            bits.take(3)
            if bits.take(1):
                bits.take(79)
        if bits.take(2) == 3 and version != 1:
            bits.take(4)
        bits.take(1)
        return bits.take(16) or None
    except EOFError:
        return None
