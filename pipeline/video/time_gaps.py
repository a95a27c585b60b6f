"""Gaps in the times of a video of constant rate, where its codec does not tell whether pictures are missing in them.

Most codecs number nothing. If a packet is left out together with its time, nothing tells a lost picture from one that
the encoder left out. After a lost one all pictures up to the next keyframe are wrong. So the clips are kept, and the
gap is reported. In a video of varying rate, gaps are usual and say nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import median

from av.packet import Packet
from av.video.stream import VideoStream

from vidshard.pipeline.video.container import codec_name
from vidshard.pipeline.video.entry_points import EntryPoints, is_intra_only
from vidshard.pipeline.video.h264 import ParameterSets
from vidshard.pipeline.video.input_file import Gap
from vidshard.pipeline.video.timestamps import TickConverter, is_clockless, usual_ticks

_TELL = frozenset({"hevc", "vvc", "mpeg1video", "mpeg2video"})
"""Codecs whose decoders or numbers tell of a missing reference picture."""

_STEPS = 8
"""Steps before and behind a gap that are looked at."""
_FEWEST_STEPS = 6
_SHARE = 0.75
"""Share of them that have to be equal."""


class GapWatch:
    """Finds the gaps of a stream, packet by packet in decoding order."""

    def __init__(self, stream: VideoStream, convert: TickConverter, found: dict[int, Gap]) -> None:
        """Begin at an entry point.

        Args:
            stream: the packets' stream.
            convert: the container's ticks to those of gaps.
            found: gets the gaps, by their start.
        """
        codec = codec_name(stream)
        self.is_needed = not (_tells(stream, codec) or is_clockless(stream) or is_intra_only(stream, codec))
        """Whether the codec leaves it open if pictures are missing."""
        self._entries = EntryPoints(stream)
        self._convert, self._found = convert, found
        self._usual = usual_ticks(stream)
        self._steps: deque[int] = deque(maxlen=_STEPS)
        self._last: int | None = None
        self._open: Gap | None = None

    def note(self, packet: Packet[VideoStream], following: Callable[[int], Packet[VideoStream] | None]) -> None:
        """Take note of the next packet; ``following`` gives the one after so many others, None at the end."""
        time = _time(packet)
        if time is None:
            return
        last, self._last = self._last, time
        if last is None or time <= last:
            return
        step = time - last
        if step <= self._usual and self._open is None:  # as nearly all; whether it is an entry point changes nothing
            self._steps.append(step)
            return
        if not self._entries.only_start and self._entries.is_entry(packet, lambda: following(0)):
            if self._open is not None:
                self._open.end_pts = self._convert(time if packet.pts is None else packet.pts)
            self._open = None
            step = min(step, self._usual)  # nothing in front of it does harm
        if 2 * step > 3 * self._usual and self._is_gap(step, time, following) and self._open is None:
            start = self._convert(time)
            self._open = self._found.setdefault(start, Gap(start))
        else:
            self._steps.append(step)

    def _is_gap(self, step: int, time: int, following: Callable[[int], Packet[VideoStream] | None]) -> bool:
        """Whether the steps around one have an equal length, and it is longer."""
        steps = list(self._steps)
        for at in range(_STEPS):
            packet = following(at)
            other = None if packet is None else _time(packet)
            if other is None:
                break
            if other > time:
                steps.append(other - time)
                time = other
        if len(steps) < _FEWEST_STEPS:
            return False
        self._usual = usual = round(median(steps))
        equal = sum(abs(other - usual) <= max(1, usual // 50) for other in steps)
        return equal >= _SHARE * len(steps) and 2 * step > 3 * usual


def _tells(stream: VideoStream, codec: str) -> bool:
    """Whether decoders or numbers tell of a missing reference picture; h264 may allow gaps between its numbers."""
    if codec == "h264":
        sets = ParameterSets(bytes(stream.codec_context.extradata or b""))
        return not any(sequence.allows_gaps for sequence in sets.sequences.values())
    return codec in _TELL


def _time(packet: Packet[VideoStream]) -> int | None:
    return packet.pts if packet.dts is None else packet.dts
