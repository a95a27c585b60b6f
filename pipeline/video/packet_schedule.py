"""Selects the packets that the decoder has to see for the frames that are wanted.

Two kinds of work are left out. A picture that is not wanted, and that no wanted one references, is skipped: by the
decoder itself where that is exact (``skip_frame``, for pictures that none references), or by not sending its packet.
And from the last wanted picture on, nothing is sent until the next random access point before a wanted one.

The pixels and times of wanted frames stay those of decoding everything. A packet that does not show that it can be
left out is decoded. ``frames`` checks that every wanted frame came out, and decodes everything if one did not.

A picture stays on screen until the next time among the packets read so far. A packet read later can only make that
time shorter, so a picture found unwanted stays unwanted, whatever the order of the packets.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from av.packet import Packet
from av.video.stream import VideoStream

from vidshard.pipeline.video.packet_info import ALL_SLOTS, UNKNOWN, PacketFacts, inspector_of
from vidshard.pipeline.video.transport_stream import Damage

Needed = Callable[[int, int], bool]
"""Whether a frame on screen from one tick to another (exclusive) is wanted."""

FOREVER = 1 << 62
"""A tick after all others: reading ends where nothing from some tick until here is wanted."""

# Limits of the read-ahead for the next wanted picture; a picture further ahead counts as wanted.
_MAX_PACKETS_AHEAD = 600
_MAX_BYTES_AHEAD = 32 << 20

# Interval of the check whether anything later is wanted.
_PACKETS_PER_CHECK = 8

# Every codec here holds back 16 pictures at most.
_MAX_REORDERED = 32


@dataclass(kw_only=True, slots=True)  # a frozen one takes twice as long to make
class Step:
    """A packet for the decoder."""

    packet: Packet[VideoStream]
    skip: bool = False
    """The picture is not wanted: the decoder may skip it if no other one references it."""
    expected_pts: int | None = None
    """The time of the frame that has to come of it; None where none is wanted."""
    next_pts: int | None = None
    """The time of the next frame; None where that is not known."""
    restart: bool = False
    """Packets before this one are missing, and the decoder has to be flushed."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Waiting:
    """A packet that was read and not yet sent."""

    packet: Packet[VideoStream]
    serial: int
    pts: int | None
    facts: PacketFacts = UNKNOWN
    next_pts: int | None = None
    """The next time among the packets read so far."""
    wanted: bool | None = None
    """None while a packet yet to be read may decide."""
    needed: bool = False
    """Whether it is wanted if ``next_pts`` is right."""
    judged: bool = False
    """Whether ``referenced`` is known."""
    referenced: bool = True
    """Whether a wanted picture may reference it, by the packets that were read when it was judged."""


class _Lookahead:
    """Reads packets ahead of the decoder, and decides which pictures are wanted."""

    def __init__(
        self, packets: Iterator[Packet[VideoStream] | None], stream: VideoStream, needed: Needed, first_pts: int | None
    ) -> None:
        self.window: deque[_Waiting] = deque()
        """The packets read and not yet taken, in decoding order."""
        self.num_read = 0
        self.at_end = False
        """Whether no further packet will be read."""
        self.stopped = False
        """Whether that is because no later frame is wanted."""
        self.all_wanted = False
        """Whether everything is wanted from here on, as a packet was not understood or times are out of order."""
        self.error: Exception | None = None
        """Raised by the packets; it ended the reading."""
        self._packets = packets
        self._inspect = inspector_of(stream)
        self._needed = needed
        self._first_pts = first_pts
        self._num_bytes = 0
        self._undecided: list[_Waiting] = []
        self._times: list[int] = []  # sorted times of the last packets read
        self._last_dts: int | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all that follows is in the window: the end was reached, and not by an error."""
        return self.at_end and self.error is None

    def take(self) -> _Waiting:
        """Remove the first packet of the window."""
        head = self.window.popleft()
        self._num_bytes -= head.packet.size
        return head

    def is_wanted(self, waiting: _Waiting) -> bool:
        """Whether a picture is wanted; reads on until that is decided, and counts it as wanted where room ends."""
        while waiting.wanted is None and self.read_within_room():
            pass
        return waiting.wanted is not False

    def read_within_room(self) -> bool:
        """Read one more packet unless the window is full or nothing is left; whether one was read."""
        return len(self.window) < _MAX_PACKETS_AHEAD and self._num_bytes < _MAX_BYTES_AHEAD and self.read()

    def read(self) -> bool:
        """Read one more packet into the window; whether there was one."""
        if self.at_end:
            return False
        try:
            packet = next(self._packets, None)
        except Exception as error:  # noqa: BLE001  raised when its turn comes, as the caller may stop before
            self.error, packet = error, None
        if packet is None:
            self._stop_if_done()
            self._end()
            return False
        waiting = _Waiting(packet=packet, serial=self.num_read, pts=packet.pts)
        self.num_read += 1
        self._num_bytes += packet.size
        self.window.append(waiting)
        self._judge(waiting)
        return True

    def _judge(self, waiting: _Waiting) -> None:
        """Decide, for this packet and those undecided before it, whether they are wanted."""
        pts, dts = waiting.packet.pts, waiting.packet.dts
        if not self.all_wanted:
            facts = self._facts_of(waiting.packet)
            if facts is not None and pts is not None and self._in_order(pts, dts):
                waiting.facts = facts
                if dts is not None:
                    self._last_dts = dts
                if waiting.packet.is_discard:  # by the edit list: no frame comes of it, and none ends by it
                    waiting.wanted = False
                    return
                insort(self._times, pts)
                if len(self._times) > 4 * _MAX_PACKETS_AHEAD:
                    del self._times[: -2 * _MAX_PACKETS_AHEAD]
                self._undecided.append(waiting)
                self._undecided = [other for other in self._undecided if not self._decide(other)]
                if waiting.serial % _PACKETS_PER_CHECK == 0:
                    self._stop_if_done()
                return
            self.all_wanted = True
            for other in self.window:
                if not other.judged:  # packets were left out because those that are judged are not wanted
                    other.wanted = True
        waiting.wanted = True

    def _facts_of(self, packet: Packet[VideoStream]) -> PacketFacts | None:
        if packet.is_corrupt or isinstance(packet.opaque, Damage) or _has_new_headers(packet):
            return None
        return self._inspect(bytes(packet))

    def _in_order(self, pts: int, dts: int | None) -> bool:
        return dts is None or (dts <= pts and (self._last_dts is None or self._last_dts < dts))

    def _decide(self, waiting: _Waiting) -> bool:
        """Whether the packets read so far decide if a picture is wanted."""
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
        elif self.num_read - waiting.serial > _MAX_REORDERED or (
            next_pts is not None and self._last_dts is not None and next_pts <= self._last_dts + 1
        ):
            waiting.wanted = True  # whatever is read from here on is shown after the one that follows it
        return waiting.wanted is not None

    def _stop_if_done(self) -> None:
        """End here if no later picture is wanted."""
        if self.error is not None or self.all_wanted or self._undecided or self._last_dts is None:
            return
        if not self._needed(self._last_dts, FOREVER):
            self.stopped = True
            self._end()

    def _end(self) -> None:
        self.at_end = True
        for other in self._undecided:  # the last one on screen, or one whose successor might still have come
            other.wanted = True


def _has_new_headers(packet: Packet[VideoStream]) -> bool:
    has_any = next(packet.iter_sidedata(), None) is not None  # few have; asking for a kind takes longer
    return has_any and packet.has_sidedata("new_extradata")


class Schedule:
    """The packets to decode, in decoding order."""

    def __init__(
        self, packets: Iterator[Packet[VideoStream] | None], stream: VideoStream, needed: Needed, first_pts: int | None
    ) -> None:
        """Plan over packets in decoding order, the first of which is a keyframe.

        Args:
            packets: up to None, or to their end.
            stream: the packets' stream.
            needed: which frames are wanted.
            first_pts: frames before it are never wanted.
        """
        self.left_out = False
        """Whether a packet was not sent, or may be skipped."""
        self._ahead = _Lookahead(packets, stream, needed, first_pts)
        self._used_before = 0  # packets with a lower serial lead to a wanted one
        self._unused_before = 0  # and these to none: the next random access point has this serial
        self._gap = False  # whether the packets before the next random access point were left out
        self._leading_until: int | None = None  # after a gap: pictures before this time reference what was left out

    @property
    def stopped(self) -> bool:
        """Whether it ended before the packets did, as no later frame is wanted."""
        return self._ahead.stopped

    def __iter__(self) -> Iterator[Step | None]:
        """Each packet to decode, then None to drain the decoder."""
        ahead = self._ahead
        while True:
            while not ahead.window and ahead.read():
                pass
            if not ahead.window:
                if ahead.error is not None:
                    raise ahead.error
                yield None
                return
            step = self._next_step()
            self.left_out = self.left_out or step is None or step.skip
            if step is not None:
                yield step

    def _next_step(self) -> Step | None:
        """Take the first packet of the window; None where it is left out."""
        head = self._ahead.window[0]
        wanted = self._ahead.is_wanted(head)
        sent = head.serial >= self._unused_before and (wanted or self._leads_to_wanted(head))
        if sent and not wanted and head.facts.writes is not None and not head.judged:
            self._judge_references()
        self._ahead.take()
        if self._leading_until is not None:
            if head.pts is not None and head.pts < self._leading_until:
                return None
            self._leading_until = None
        if not sent:
            self._gap = True
            return None
        if not wanted and head.judged and not head.referenced:
            return None
        restart = False
        if self._gap and head.facts.random_access:
            self._gap, restart = False, head.facts.needs_flush
            self._leading_until = head.pts
        return Step(
            packet=head.packet,
            skip=not wanted and head.facts.skippable,
            expected_pts=head.pts if wanted and not self._ahead.all_wanted else None,
            next_pts=head.next_pts,
            restart=restart,
        )

    def _leads_to_wanted(self, head: _Waiting) -> bool:
        """Whether a wanted picture comes before the next random access point, or references pictures before it."""
        if head.serial < self._used_before:
            return True
        ahead = self._ahead
        at, next_access = 1, None
        while True:
            if at >= len(ahead.window):
                if ahead.read_within_room():
                    continue
                if ahead.is_complete:
                    self._unused_before = next_access.serial if next_access is not None else ahead.num_read
                    return False
                self._used_before = ahead.num_read
                return True
            found = ahead.window[at]
            if next_access is None:
                if found.facts.random_access:
                    next_access = found
            elif found.pts is None or next_access.pts is None or found.pts > next_access.pts:
                self._unused_before = next_access.serial
                return False
            if found is not next_access and ahead.is_wanted(found):
                self._used_before = found.serial
                return True
            at += 1

    def _judge_references(self) -> None:
        """Find out which packets, up to the next random access point, hold a picture that a wanted one may reference.

        Directly, or through other pictures. Liveness analysis, from the last packet back: a packet that is sent needs
        the slots it reads, and what was in the slots it writes is not needed before it.
        """
        ahead = self._ahead
        while not ahead.window[-1].facts.random_access and ahead.read_within_room():
            pass
        group = list(ahead.window)
        for waiting in group:
            ahead.is_wanted(waiting)
        ended = ahead.is_complete and group[-1] is ahead.window[-1]
        live = 0 if ended else ALL_SLOTS
        for waiting in reversed(group):
            facts = waiting.facts
            if facts.random_access:
                live = 0
                continue
            waiting.referenced = facts.writes is None or bool(facts.writes & live)
            if waiting.referenced or waiting.wanted is not False:
                live = live & ~(facts.writes or 0) | facts.reads
        for waiting in group[:-1]:
            waiting.judged = True
