"""Which packets of a video the decoder has to see for the frames that are wanted.

Two kinds of work are left out. A picture that nobody wants and that no wanted one depends on is skipped: by the decoder
itself where that is exact (``skip_frame``, for pictures that none refers to), or by not sending its packet. And from
the last wanted picture on nothing is sent until the next one at which decoding can begin. The pixels and times of
wanted frames stay those of decoding everything. Where a packet does not show that this is so, it is decoded; ``frames``
checks that every wanted frame came out, and decodes everything if one did not.

A picture stays on screen until the next time among the packets read so far. One that is read later can only make that
shorter, so a picture found unwanted stays so, whatever the packets' order.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from av.packet import Packet
from av.video.stream import VideoStream

from vidshard.pipeline.video.packet_info import ALL_SLOTS, UNKNOWN, PacketFacts, inspector_of

Needed = Callable[[int, int], bool]
"""Whether a frame on screen from one tick to another (exclusive) is wanted."""

FOREVER = 1 << 62
"""A tick after all others: what is not wanted from some tick until here ends the reading."""

# How far ahead to look for the next wanted picture; what lies further counts as wanted.
_MOST_PACKETS = 600
_MOST_BYTES = 32 << 20

# How often to ask whether anything later is wanted.
_PACKETS_PER_LOOK = 8

# Every codec here holds back 16 pictures at most.
_MOST_REORDERED = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A packet for the decoder."""

    packet: Packet[VideoStream]
    skip: bool = False
    """The picture is not wanted: the decoder may skip it if no other one refers to it."""
    expected_pts: int | None = None
    """The time of the frame that has to come of it; None where none is wanted."""
    next_pts: int | None = None
    """When the next frame follows; None where that is not known."""
    restart: bool = False
    """Packets before this one are missing, and the decoder has to forget what it knows."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Waiting:
    packet: Packet[VideoStream]
    serial: int
    pts: int | None
    facts: PacketFacts
    next_pts: int | None = None
    wanted: bool | None = None
    """None while a packet yet to be read may decide."""
    needed: bool = False
    """Whether it is wanted if ``next_pts`` is right."""
    leant_on: bool = True
    """Whether a wanted picture may look at it, as far as the packets that were read by then told."""


class Schedule:
    """The packets to decode, in order."""

    def __init__(
        self, packets: Iterator[Packet[VideoStream] | None], stream: VideoStream, needed: Needed, first_pts: int | None
    ) -> None:
        """Plan over packets in decoding order, which begin with a keyframe.

        Args:
            packets: up to None, or to their end.
            stream: theirs.
            needed: which frames are wanted.
            first_pts: frames before it are never wanted.
        """
        self.stopped = False
        """Whether it ended before the packets did, as no later frame is wanted."""
        self.left_out = False
        """Whether a packet was not sent, or may be skipped."""
        self._packets = packets
        self._inspect = inspector_of(stream)
        self._needed = needed
        self._first_pts = first_pts
        self._window: deque[_Waiting] = deque()
        self._num_bytes = 0
        self._undecided: list[_Waiting] = []
        self._times: list[int] = []  # of the packets read, the last ones, in order
        self._last_dts: int | None = None
        self._num_read = 0
        self._all_wanted = False
        self._at_end = False
        self._error: Exception | None = None
        self._alive_before = 0  # packets with a lower serial lead to a wanted one
        self._dead_before = 0  # and these to none: the next place to begin is here
        self._judged_before = 0  # of packets with a lower serial it is known whether others lean on them
        self._gap = False  # whether the packets before the next place to begin were left out
        self._leading_until: int | None = None  # after a gap: pictures before this time lean on what was left out

    def __iter__(self) -> Iterator[Step | None]:
        """Each packet to decode, then None to drain the decoder."""
        while True:
            while not self._window and self._read():
                pass
            if not self._window:
                if self._error is not None:
                    raise self._error
                yield None
                return
            step = self._next_step()
            self.left_out = self.left_out or step is None or step.skip
            if step is not None:
                yield step

    def _next_step(self) -> Step | None:
        """What becomes of the first packet of the window; None for nothing."""
        head = self._window[0]
        wanted = self._is_wanted(head)
        sent = head.serial >= self._dead_before and (wanted or self._leads_somewhere(head))
        if sent and not wanted and head.facts.writes is not None and head.serial >= self._judged_before:
            self._find_leant_on()
        self._window.popleft()
        self._num_bytes -= head.packet.size
        if self._leading_until is not None:
            if head.pts is not None and head.pts < self._leading_until:
                return None
            self._leading_until = None
        if not sent:
            self._gap = True
            return None
        if not wanted and head.serial < self._judged_before and not head.leant_on:
            return None
        restart = False
        if self._gap and head.facts.begins:
            self._gap, restart = False, head.facts.flush
            self._leading_until = head.pts
        return Step(
            packet=head.packet,
            skip=not wanted and head.facts.skippable,
            expected_pts=head.pts if wanted and not self._all_wanted else None,
            next_pts=head.next_pts,
            restart=restart,
        )

    def _is_wanted(self, waiting: _Waiting) -> bool:
        while waiting.wanted is None and self._has_room():
            if not self._read():
                break
        return waiting.wanted is not False

    def _leads_somewhere(self, head: _Waiting) -> bool:
        """Whether a wanted picture comes before the next place to begin, or leans on pictures before that place."""
        if head.serial < self._alive_before:
            return True
        at, begun = 1, None
        while True:
            if at >= len(self._window):
                if self._has_room() and self._read():
                    continue
                if self._at_end and self._error is None:
                    self._dead_before = begun.serial if begun is not None else self._num_read
                    return False
                self._alive_before = self._num_read
                return True
            found = self._window[at]
            if begun is None:
                if found.facts.begins:
                    begun = found
            elif found.pts is None or begun.pts is None or found.pts > begun.pts:
                self._dead_before = begun.serial
                return False
            if found is not begun and self._is_wanted(found):
                self._alive_before = found.serial
                return True
            at += 1

    def _find_leant_on(self) -> None:
        """Which packets up to the next place to begin hold a picture that a wanted one may look at.

        Or that one may look at which is leant on itself. From the last one back: a packet that is sent needs what is
        in the slots that it reads, and what was in those that it writes is not needed before it.
        """
        while not self._window[-1].facts.begins and self._has_room() and self._read():
            pass
        group = list(self._window)
        for waiting in group:
            self._is_wanted(waiting)
        ended = self._at_end and self._error is None and group[-1] is self._window[-1]
        live = 0 if ended else ALL_SLOTS
        for waiting in reversed(group):
            facts = waiting.facts
            if facts.begins:
                live = 0
                continue
            waiting.leant_on = facts.writes is None or bool(facts.writes & live)
            if waiting.leant_on or waiting.wanted is not False:
                live = live & ~(facts.writes or 0) | facts.reads
        self._judged_before = group[-1].serial

    def _has_room(self) -> bool:
        return len(self._window) < _MOST_PACKETS and self._num_bytes < _MOST_BYTES

    def _read(self) -> bool:
        """Take one more packet into the window; whether there was one."""
        if self._at_end:
            return False
        try:
            packet = next(self._packets, None)
        except Exception as error:  # noqa: BLE001  raised when its turn comes, as the caller may stop before
            self._error, packet = error, None
        if packet is None:
            self._stop_if_done()
            self._end()
            return False
        waiting = _Waiting(packet=packet, serial=self._num_read, pts=packet.pts, facts=UNKNOWN)
        self._num_read += 1
        self._num_bytes += packet.size
        self._window.append(waiting)
        self._judge(waiting)
        return True

    def _judge(self, waiting: _Waiting) -> None:
        pts, dts = waiting.packet.pts, waiting.packet.dts
        if not self._all_wanted:
            facts = self._facts_of(waiting.packet)
            if facts is not None and pts is not None and self._in_order(pts, dts):
                waiting.facts = facts
                if dts is not None:
                    self._last_dts = dts
                insort(self._times, pts)
                if len(self._times) > 4 * _MOST_PACKETS:
                    del self._times[: -2 * _MOST_PACKETS]
                self._undecided.append(waiting)
                self._undecided = [other for other in self._undecided if not self._decide(other)]
                if waiting.serial % _PACKETS_PER_LOOK == 0:
                    self._stop_if_done()
                return
            self._all_wanted = True
            for other in self._window:
                if other.serial >= self._judged_before:  # others were left out since these were not wanted
                    other.wanted = True
        waiting.wanted = True

    def _stop_if_done(self) -> None:
        """End here if no later picture is wanted."""
        if self._error is not None or self._all_wanted or self._undecided or self._last_dts is None:
            return
        if not self._needed(self._last_dts, FOREVER):
            self.stopped = True
            self._end()

    def _facts_of(self, packet: Packet[VideoStream]) -> PacketFacts | None:
        if packet.is_corrupt or packet.has_sidedata("new_extradata"):
            return None
        return self._inspect(bytes(packet))

    def _in_order(self, pts: int, dts: int | None) -> bool:
        return dts is None or (dts <= pts and (self._last_dts is None or self._last_dts < dts))

    def _decide(self, waiting: _Waiting) -> bool:
        """Whether what is known by now decides if a picture is wanted."""
        pts = waiting.pts
        assert pts is not None
        at = bisect_right(self._times, pts)
        next_pts = self._times[at] if at < len(self._times) else None
        if next_pts != waiting.next_pts or not waiting.needed:
            waiting.next_pts = next_pts
            before = self._first_pts is not None and pts < self._first_pts
            waiting.needed = not before and self._needed(pts, FOREVER if next_pts is None else next_pts)
        if not waiting.needed:
            waiting.wanted = False
        elif self._num_read - waiting.serial > _MOST_REORDERED or (
            next_pts is not None and self._last_dts is not None and next_pts <= self._last_dts + 1
        ):
            waiting.wanted = True  # whatever is read from here on is shown after the one that follows it
        return waiting.wanted is not None

    def _end(self) -> None:
        self._at_end = True
        for other in self._undecided:  # the last one on screen, or one whose successor might still have come
            other.wanted = True
