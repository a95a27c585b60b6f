"""Continuity of a video in a transport stream: whether packets were lost, or recordings were joined.

Every packet of 188 bytes has a counter of four bits. FFmpeg marks the picture before a jump of it as damaged, which it
is not where two recordings were joined, and notices no jump between two pictures that were complete. So the counters
are read here. A jump is harmless if nothing can be missing at it:

- the picture before it is complete, and the one after it is decoded exactly one step later; or
- another muxer began, without a gap in time: the tables stand in between, they and the stream count from the same
  number, and a keyframe follows.

A jump of the tables' counter alone is damage where time is missing: a multiple of 16 packets of the stream may be lost.
Everything else is damage too. Layouts: ISO/IEC 13818-1, 2.4.3 and 2.4.4.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt
from av.packet import Packet
from av.video.stream import VideoStream

from vidshard.pipeline.video.input_file import WatchedFile, position_kept, read_exactly

_SYNC = 0x47
_TABLES = 0
"""PID of the program association table."""
_SIZES = (188, 192, 204)
_PACKETS_IN_STEP = 5
"""Packets in a row that have to begin with the sync byte."""

_BLOCK_PACKETS = 1400
"""About 256 KiB are read at once."""

_MAX_PACKETS_BACK = 20_000
"""Packets before a jump among which the last one of the stream is looked for."""

_MAX_FIRST_COUNTER = 1
"""Muxers begin to count at 0 or 1."""


def packet_layout(head: bytes) -> tuple[int, int] | None:
    """Offset of the first packet and bytes from one to the next, 188, 192 or 204; None for no transport stream."""
    for size in _SIZES:
        for start in range(min(size, max(0, len(head) - (_PACKETS_IN_STEP - 1) * size))):
            if all(head[start + n * size] == _SYNC for n in range(_PACKETS_IN_STEP)):
                return start, size
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Jump:
    """A place at which the counter of the stream jumps, or packets are marked as damaged."""

    offset: int
    """Position of the first packet behind it."""
    words: str
    """Damage there, in words."""
    may_be_harmless: bool
    """Whether it is a jump of the counter, in front of a new picture that states its time."""
    of_tables: bool = False
    """Whether it is one of the tables' counter."""


@dataclass(kw_only=True, slots=True)
class Continuity:
    """The jumps of one stream of a file, found block by block as they are asked for. The file's position is kept."""

    watched: WatchedFile
    pid: int
    at: int
    """Offset of the next packet to look at."""
    size: int
    lead: int
    """Bytes in front of each packet's sync byte: 4 of a time code in packets of 192."""
    jumps: list[Jump] = field(default_factory=list)
    """All before ``at``, by offset."""
    tables: list[int] = field(default_factory=list)
    """Offsets of all tables before ``at``."""
    _counters: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, watched: WatchedFile, pid: int, offset: int) -> Continuity | None:
        """Begin at a packet of the stream; None where there is none."""
        with position_kept(watched):
            watched.seek(offset)
            head = read_exactly(watched, 4 * _SIZES[-1])
        for size in _SIZES:
            lead = 4 if size == 192 and head[4:5] == bytes([_SYNC]) else 0
            row = head[lead::size][:3]
            if row and all(byte == _SYNC for byte in row):
                return cls(watched=watched, pid=pid, at=offset, size=size, lead=lead)
        return None

    def between(self, start: int, end: int | None) -> list[Jump]:
        """The jumps with ``start`` < offset <= ``end``; None for the end of the file."""
        self._read_until(self.watched.num_bytes if end is None else end + self.size)
        first = bisect_left(self.jumps, start + 1, key=lambda jump: jump.offset)
        return [jump for jump in self.jumps[first:] if end is None or jump.offset <= end]

    def table_after(self, offset: int) -> int | None:
        """Offset of the first table behind an offset, among what was read; None where there is none yet."""
        at = bisect_left(self.tables, offset + 1)
        return self.tables[at] if at < len(self.tables) else None

    def _read_until(self, offset: int) -> None:
        if self.at < offset:
            with position_kept(self.watched):
                while self.at < offset and self._read_block():
                    pass

    def _read_block(self) -> bool:
        """Look at one block; whether there was a packet."""
        self.watched.seek(self.at)
        data = read_exactly(self.watched, _BLOCK_PACKETS * self.size)
        count = (len(data) - self.lead + self.size - 188) // self.size
        if count <= 0:
            self.at = self.watched.num_bytes
            return False
        data = data.ljust(count * self.size + self.lead, b"\0")
        packets = np.frombuffer(data, np.uint8, count * self.size, self.lead).reshape(count, self.size)
        in_step = packets[:, 0] == _SYNC
        count = count if in_step.all() else int(in_step.argmin())
        self._look_at(packets[:count])
        self.at += count * self.size
        if not in_step.all():
            self._find_step(data[count * self.size :])
        return True

    def _find_step(self, data: bytes) -> None:
        """Go on at the next place where packets stand in a row."""
        found = packet_layout(data)
        self.jumps.append(Jump(offset=self.at, words="packets do not stand in a row", may_be_harmless=False))
        self._counters = {}
        if found is not None and found[1] == self.size and found[0] > self.lead:
            self.at += found[0] - self.lead
        else:
            self.at += max(self.size, len(data) - _PACKETS_IN_STEP * self.size)

    def _look_at(self, packets: npt.NDArray[np.uint8]) -> None:
        """Note the jumps among packets, uint8 (N, size) from their sync bytes on, that stand in a row."""
        heads = packets[:, :8].astype(np.int64)
        pids = (heads[:, 1] & 31) << 8 | heads[:, 2]
        found = self._jumps_of(self.pid, packets, heads, pids) + self._jumps_of(_TABLES, packets, heads, pids)
        self.jumps += sorted(found, key=lambda jump: jump.offset)
        self.tables += (self.at + np.flatnonzero(pids == _TABLES) * self.size).tolist()

    def _jumps_of(
        self, pid: int, packets: npt.NDArray[np.uint8], heads: npt.NDArray[np.int64], pids: npt.NDArray[np.int64]
    ) -> list[Jump]:
        own = np.flatnonzero(pids == pid)
        if not len(own):
            return []
        head = heads[own]
        counters, has_payload = head[:, 3] & 15, head[:, 3] >> 4 & 1
        before = np.concatenate([[self._counters.get(pid, counters[0] - has_payload[0])], counters])
        states_jump = (head[:, 3] & 0x20 != 0) & (head[:, 4] > 0) & (head[:, 5] & 0x80 != 0)
        jumps = ((before[:-1] + has_payload - counters) % 16 != 0) & ~states_jump
        damaged = head[:, 1] & 0x80 != 0
        self._counters[pid] = int(counters[-1])
        found = []
        for n in np.flatnonzero(jumps | damaged):
            words = f"the continuity counter jumps from {before[n] % 16} to {counters[n]}: packets are missing"
            if damaged[n]:
                words = "a packet is marked as damaged"
            found.append(
                Jump(
                    offset=self.at + int(own[n]) * self.size,
                    words=words,
                    may_be_harmless=not damaged[n] and _begins_picture(bytes(packets[own[n]][:188])),
                    of_tables=pid == _TABLES,
                )
            )
        return found


def _payload_at(packet: bytes) -> int:
    return 5 + packet[4] if packet[3] & 0x20 else 4


def _begins_picture(packet: bytes) -> bool:
    """Whether a packet begins a PES packet that states a time, 2.4.3.6."""
    if not packet[1] & 0x40 or not packet[3] & 0x10:
        return False
    at = _payload_at(packet)
    return packet[at : at + 3] == b"\0\0\1" and len(packet) > at + 7 and bool(packet[at + 7] & 0x80)


def _has_stuffing(packet: bytes) -> bool:
    """Whether a packet is filled up behind its adaptation field, as is the last one of a picture, 2.4.3.5."""
    if not packet[3] & 0x20:
        return False
    length = packet[4]
    if length < 2:
        return length == 0 or packet[5] == 0
    flags, used = packet[5], 1
    used += 6 * bool(flags & 0x10) + 6 * bool(flags & 0x08) + bool(flags & 0x04)
    if flags & 0x03:  # private data and extensions have lengths of their own
        return packet[4 + length] == 0xFF and packet[3 + length] == 0xFF
    return length > used


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """The packets around a jump, as far as they tell whether something is missing."""

    is_complete: bool
    """Whether the picture before it is complete, as its last packet is filled up."""
    begins_anew: bool
    """Whether another muxer began: tables in between, which count from the same number as the stream."""

    @classmethod
    def of(cls, continuity: Continuity, jump: Jump) -> Surroundings:
        """Look around a jump of a stream. The file's position is kept."""
        watched, size = continuity.watched, continuity.size
        with position_kept(watched):
            first = max(0, jump.offset - _MAX_PACKETS_BACK * size)
            first += (jump.offset - first) % size
            watched.seek(first + continuity.lead)
            data = read_exactly(watched, jump.offset - first + 188)
        packets = [data[at : at + 188] for at in range(0, len(data), size)]
        last = next((n for n in range(len(packets) - 2, -1, -1) if _pid(packets[n]) == continuity.pid), None)
        if last is None or any(packet[0] != _SYNC for packet in packets[last:]):
            return cls(is_complete=False, begins_anew=False)
        between = packets[last + 1 : -1]
        table = next((packet for packet in between if _pid(packet) == 0), None)
        first_of_each: dict[int, int] = {}
        for packet in packets[last + 1 :]:
            if packet[3] & 0x10:
                first_of_each.setdefault(_pid(packet), packet[3] & 15)
        maps = () if table is None else _program_maps(table)
        starts = set(first_of_each.values())
        return cls(
            is_complete=_has_stuffing(packets[last]),
            begins_anew=any(pid in first_of_each for pid in maps)
            and len(starts) == 1
            and max(starts) <= _MAX_FIRST_COUNTER,
        )


def _pid(packet: bytes) -> int:
    return (packet[1] & 31) << 8 | packet[2]


def _program_maps(packet: bytes) -> tuple[int, ...]:
    """PIDs of the program map tables that a program association table names, 2.4.4.3."""
    at = _payload_at(packet)
    at += 1 + packet[at] if at < len(packet) else 0
    if at + 8 > len(packet) or packet[at] != 0:
        return ()
    end = min(len(packet), at + 3 + ((packet[at + 1] & 15) << 8 | packet[at + 2]) - 4)
    entries = range(at + 8, end - 3, 4)
    return tuple((packet[n + 2] & 31) << 8 | packet[n + 3] for n in entries if packet[n] or packet[n + 1])


# Packets as FFmpeg gives them.


class Damage:
    """Attached to a packet, as its ``opaque`` value, that is damaged, or before which others are missing.

    Each packet gets an object of its own. PyAV keeps these values by their ``id`` and forgets one when the first packet
    that has it is freed. With one object for all, a packet lost its mark when the garbage collector freed another.
    """

    def __init__(self, words: str) -> None:
        self.words = words


class Whole:
    """Attached to a packet that FFmpeg marks as damaged, and that is none of the damaged ones."""

    def __init__(self, *, must_decode_clean: bool) -> None:
        self.must_decode_clean = must_decode_clean
        """Whether only the decoder can tell if it is complete: any of its messages counts as damage."""


@dataclass(kw_only=True, slots=True)
class _Pictures:
    """The packets of FFmpeg that begin in one PES packet."""

    pos: int
    packets: list[Packet[VideoStream]]
    damage: str | None = None
    is_before_joint: bool = False
    must_decode_clean: bool = False
    gap_end: int | None = None
    """Offset of the next picture, which is not decoded one step later, while the next tables may tell more."""


_MARKED_EARLY = 2
"""FFmpeg marks the picture before a jump, or one of the two before that."""

_MAX_WAITING = 100
"""Pictures that wait for tables; those of a good stream come every half second or more often."""

_FIND_THEIR_END = frozenset({"h264", "mpeg1video", "mpeg2video", "mpeg4"})
"""Codecs whose decoders complain of a picture that ends too early."""


def checked(
    packets: Iterator[Packet[VideoStream]], watched: WatchedFile, stream: VideoStream
) -> Iterator[Packet[VideoStream]]:
    """Packets of a transport stream, each marked with :class:`Damage` or :class:`Whole` where that is to be said."""
    check = _Check(watched, stream)
    try:
        for packet in packets:
            yield from check.take(packet)
    except Exception:
        yield from check.rest()
        raise
    yield from check.rest()


class _Check:
    """Compares the packets of FFmpeg with the counters of the transport stream they came from."""

    def __init__(self, watched: WatchedFile, stream: VideoStream) -> None:
        self._watched, self._pid = watched, stream.id
        self._finds_end = stream.codec_context.codec.canonical_name in _FIND_THEIR_END
        self._continuity: Continuity | None = None
        self._waiting: deque[_Pictures] = deque()
        self._last_dts: list[int] = []  # of the last two packets

    def take(self, packet: Packet[VideoStream]) -> Iterator[Packet[VideoStream]]:
        """Take the next packet, and give those about which all is known."""
        last = self._waiting[-1] if self._waiting else None
        if last is None or (packet.pos is not None and packet.pos > last.pos):
            if packet.pos is not None and self._continuity is None:
                self._continuity = Continuity.of(self._watched, self._pid, packet.pos)
            if last is not None and packet.pos is not None:
                self._judge(last, packet.pos, packet)
            self._waiting.append(_Pictures(pos=packet.pos or 0, packets=[packet]))
        else:
            last.packets.append(packet)
        if packet.dts is not None:
            self._last_dts = [*self._last_dts[-1:], packet.dts]
        while len(self._waiting) > _MARKED_EARLY + 1:
            if not self._is_settled(self._waiting[0]) and len(self._waiting) < _MAX_WAITING:
                break
            yield from self._marked(self._waiting.popleft())

    def rest(self) -> Iterator[Packet[VideoStream]]:
        """The packets that are left, when no more come."""
        if self._waiting:
            self._judge(self._waiting[-1], None, None)
        while self._waiting:
            self._is_settled(self._waiting[0])
            yield from self._marked(self._waiting.popleft())

    def _judge(self, pictures: _Pictures, end: int | None, following: Packet[VideoStream] | None) -> None:
        """Look at the jumps from the start of some pictures to that of the next ones."""
        if self._continuity is None:
            return
        jumps = [jump for jump in self._continuity.between(pictures.pos, end) if not jump.of_tables]
        step, next_step = self._steps(following)
        is_next = step > 0 and abs(next_step - step) <= step // 8
        for jump in jumps:
            if jump.offset == end and following is not None and jump.may_be_harmless:
                around = Surroundings.of(self._continuity, jump)
                is_joint = around.begins_anew and following.is_keyframe and (around.is_complete or self._finds_end)
                if (around.is_complete and is_next) or (is_joint and (is_next or next_step < step)):
                    pictures.is_before_joint, pictures.must_decode_clean = True, not around.is_complete
                    continue
                if is_joint:
                    words = "two recordings are joined, and time is missing between them: pictures may be lost"
                    pictures.damage = pictures.damage or words
            pictures.damage = pictures.damage or jump.words
        if not is_next and not pictures.is_before_joint:
            pictures.gap_end = end

    def _steps(self, following: Packet[VideoStream] | None) -> tuple[int, int]:
        """Ticks between the last two packets in decoding order, and from the last one to the next; 0, 0 if unknown."""
        if len(self._last_dts) < 2 or following is None or following.dts is None:
            return 0, 0
        return self._last_dts[1] - self._last_dts[0], following.dts - self._last_dts[1]

    def _is_settled(self, pictures: _Pictures) -> bool:
        """Whether the tables behind a gap in time are known; if their counter jumps, pictures are missing in it."""
        if pictures.gap_end is None or self._continuity is None:
            return True
        table = self._continuity.table_after(pictures.gap_end)
        end = self._continuity.at if table is None else table
        jumps = self._continuity.between(pictures.pos, min(end, self._continuity.at - 1))
        jump = next((jump for jump in jumps if jump.of_tables), None)
        if jump is not None:
            pictures.damage = pictures.damage or f"time is missing, and in the tables {jump.words}"
        return table is not None

    def _marked(self, pictures: _Pictures) -> Iterator[Packet[VideoStream]]:
        near = [pictures, *islice(self._waiting, _MARKED_EARLY)]
        damage = next((other.damage for other in near if other.damage), None)
        is_by_joint = any(other.is_before_joint for other in near)
        for packet in pictures.packets:
            if pictures.damage is not None:
                packet.opaque = Damage(pictures.damage)
            elif packet.is_corrupt and damage is not None:
                packet.opaque = Damage(damage)
            elif packet.is_corrupt and is_by_joint:
                packet.opaque = Whole(must_decode_clean=any(other.must_decode_clean for other in near))
            yield packet
