"""Which packets the decoder must be given, so that the frames somebody wants to see come out as if it were given all.

Times of packets are known before they are decoded. A frame is wanted when somebody looks at it between its own time
and that of the next one. Packets whose frame nobody wants are left out in two ways:

- One that no other frame refers to is skipped by the decoder itself, which knows (``skip_frame``).
- From the last wanted frame of a group of pictures to the next keyframe, and groups without any, nothing is decoded.
  The decoder is emptied and starts anew at the keyframe, as after seeking.

An interval that is taken too long only costs a frame decoded in vain, so packets not read yet do no harm. Where times
are missing, or the first frame after a new start is not its keyframe, :class:`CannotSkipError` asks for decoding
everything instead: pixels and times never depend on what is left out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from itertools import chain

from av.packet import Packet
from av.video.stream import VideoStream

from schemas.video import VideoError

Needed = Callable[[int, int], bool]
"""Whether a frame that is on screen from one tick to another, exclusive, is wanted."""

SKIPPABLE_CODECS = frozenset(
    {"h264", "hevc", "mpeg4", "mpeg2video", "mpeg1video", "vp8", "vp9", "av1", "mjpeg", "prores", "dnxhd"}
)
"""Those whose keyframes begin anew and whose packets hold one picture each. Others are decoded whole."""

_KNOWS_UNREFERENCED = frozenset({"h264", "hevc", "mpeg4", "mpeg2video", "mpeg1video"})
# of the others vp8 too, but its packets that show nothing have times, which end the frame before them too early

_MAX_BLOCK_PACKETS = 600
_MAX_BLOCK_BYTES = 32 << 20


class CannotSkipError(Exception):
    """This stream must be decoded whole."""


class Action(Enum):
    """What to do with a packet."""

    DECODE = auto()
    DECODE_IF_REFERENCED = auto()
    """Nobody wants its frame: decode it only if others refer to it."""
    SKIP = auto()
    """Empty the decoder: packets are left out from here on."""
    RESTART = auto()
    """Decode this keyframe, the first packet after some were left out; its frame must come out first."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do."""

    action: Action
    packet: Packet[VideoStream] | None
    """None for SKIP."""
    pts: int
    """Of the packet, or from where on something is on screen that nobody wants."""


@dataclass(slots=True)
class _Block:
    """Packets in the order of decoding: a group of pictures, or a piece of a very long one."""

    packets: list[Packet[VideoStream]]
    begins: bool
    """With a keyframe."""
    times: list[int]
    """Presentation times of those that are shown, sorted."""


def steps(packets: Iterator[Packet[VideoStream]], needed: Needed, *, codec: str, frame_ticks: int) -> Iterator[Step]:
    """What to do with the packets of a stream, in order.

    Args:
        packets: in the order of decoding.
        needed: which frames are wanted.
        codec: FFmpeg's name of it, one of ``SKIPPABLE_CODECS``.
        frame_ticks: how long the last frame stays if it does not say so.

    Raises:
        CannotSkipError: a packet without a time.
    """
    unwanted = Action.DECODE_IF_REFERENCED if codec in _KNOWS_UNREFERENCED else Action.DECODE
    left_out = False  # whether packets before this block were
    reading = _Reading(packets)
    blocks = chain(_blocks(iter(reading)), [None])
    block = next(blocks)
    while block is not None:
        following = next(blocks)
        ends = _wanted_until(block, following, needed, frame_ticks)
        num_decoded = _num_to_decode(block, following, ends, needed, frame_ticks)
        first_pts = _pts(block.packets[0])
        for number, (packet, end) in enumerate(zip(block.packets[:num_decoded], ends, strict=False)):
            if left_out and _pts(packet) < first_pts:
                continue  # leans on pictures that were left out; were it wanted, they would have been decoded
            if number == 0:
                yield Step(Action.RESTART if left_out else Action.DECODE, packet, first_pts)
            else:
                yield Step(unwanted if end is None else Action.DECODE, packet, _pts(packet))
        left_out = left_out and not num_decoded
        if num_decoded < len(block.packets):
            left_out = True
            yield Step(Action.SKIP, None, max((end for end in ends if end is not None), default=first_pts))
        block = following
    if reading.error is not None:
        raise reading.error


class _Reading:
    """Packets up to the first that cannot be read, whose error has to wait until those before it are decoded."""

    def __init__(self, packets: Iterator[Packet[VideoStream]]) -> None:
        self._packets = packets
        self.error: VideoError | None = None

    def __iter__(self) -> Iterator[Packet[VideoStream]]:
        try:
            yield from self._packets
        except VideoError as error:
            self.error = error


def _pts(packet: Packet[VideoStream]) -> int:
    assert packet.pts is not None
    return packet.pts


def _blocks(packets: Iterator[Packet[VideoStream]]) -> Iterator[_Block]:
    held: list[Packet[VideoStream]] = []
    num_bytes = 0
    begins = True
    for packet in packets:
        if packet.pts is None:
            raise CannotSkipError
        too_long = len(held) >= _MAX_BLOCK_PACKETS or num_bytes >= _MAX_BLOCK_BYTES
        if held and (packet.is_keyframe or too_long):
            yield _block(held, begins)
            held, num_bytes, begins = [], 0, packet.is_keyframe
        held.append(packet)
        num_bytes += packet.size
    if held:
        yield _block(held, begins)


def _block(packets: list[Packet[VideoStream]], begins: bool) -> _Block:
    return _Block(packets, begins, sorted(_pts(packet) for packet in packets if not packet.is_discard))


def _wanted_until(block: _Block, following: _Block | None, needed: Needed, frame_ticks: int) -> list[int | None]:
    """Of each packet until when its frame is on screen, as far as these two blocks tell; None if nobody wants it."""
    times = block.times if following is None else sorted(block.times + following.times)
    ends: list[int | None] = []
    for packet in block.packets:
        pts = _pts(packet)
        at = bisect_right(times, pts)
        end = times[at] if at < len(times) else pts + max(packet.duration or 0, frame_ticks)
        ends.append(end if not packet.is_discard and needed(pts, end) else None)
    return ends


def _num_to_decode(
    block: _Block, following: _Block | None, ends: list[int | None], needed: Needed, frame_ticks: int
) -> int:
    """How many of a block's packets, from the first on, wanted frames may refer to."""
    if following is not None:
        if not following.begins:
            return len(block.packets)
        # pictures that come after a keyframe but are shown before it lean on those before it
        key_pts = _pts(following.packets[0])
        if any(_pts(packet) < key_pts for packet in following.packets):
            later = zip(following.packets, _wanted_until(following, None, needed, frame_ticks), strict=True)
            if any(end is not None and _pts(packet) < key_pts for packet, end in later):
                return len(block.packets)
    return max((number for number, end in enumerate(ends, start=1) if end is not None), default=0)
