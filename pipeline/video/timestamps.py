"""Presentation times: the ticks in which they are counted, the frame interval, and the length a header states."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from vidshard.schemas.rejections import Reason, VideoError

# Formats without times or length of their own: FFmpeg invents times, and guesses a duration from the bit rate.
_RAW_FORMATS = frozenset({"h264", "hevc", "vvc", "av1", "obu", "m4v", "mpegvideo", "mjpeg", "vc1"})

_RATES_AGREE = Fraction(1, 5000)
"""Relative difference up to which two stated rates agree.

24 and 23.976 differ by five times as much; FLV's average over a few seconds is off by a fifth of it.
"""

_MIN_INTERVAL_TICKS = 8
"""A frame interval shorter than this is not refined: rounding to a tick would move frames too far."""

_MIN_SHARE_OF_TIMES = Fraction(3, 4)
"""Share of the first times that must fit a stated rate. At 25 frames per second a fifth of them fit 29.97."""

_MAX_SUBDIVISION = 1 << 16
"""Largest number of parts into which one tick of a container is divided."""


_DEFAULT_RATE = Fraction(25)
"""Rate of a stream that states none: the one that FFmpeg takes."""

_MAX_RATE = 1000
"""A higher stated rate is no frame rate; encoders without one write that of a clock, such as 90,000."""


def is_clockless(stream: VideoStream) -> bool:
    """Whether the format has no times: FFmpeg's are then invented, and frames are counted instead."""
    return bool(_RAW_FORMATS & set(stream.container.format.name.split(",")))


def frame_rate(stream: VideoStream) -> Fraction:
    """Frames per second for information; where they are counted, the rate that gives them their times. 0 if unknown."""
    if not is_clockless(stream):
        return stream.average_rate or Fraction(0)
    # MPEG-4 states the unit of its times, not a rate: there FFmpeg's guess rests on the times of the pictures
    mpeg4 = stream.codec_context.codec.canonical_name == "mpeg4"
    rate = stream.guessed_rate if mpeg4 else stream.codec_context.framerate
    return rate if rate and 0 < rate <= _MAX_RATE else _DEFAULT_RATE


def time_base_of(stream: VideoStream) -> Fraction:
    """Seconds per tick of the container; per frame where frames are counted."""
    if is_clockless(stream):
        return 1 / frame_rate(stream)
    return stream.time_base or Fraction(1, 1_000_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """The ticks in which a video's times are counted: the container's, or finer ones.

    A container rounds times to its ticks; Matroska rounds to milliseconds. Where the stream states its frame rate,
    frames lie a whole number of intervals after the first one. A time at most one tick away from such a multiple is
    that multiple rounded (half a tick for its own rounding, half for the first frame's), and counts as the multiple
    itself. Ticks are divided so that every multiple falls on a tick. Other times, and the order of all, are unchanged.
    """

    time_base: Fraction
    """Seconds per tick."""
    start_pts: int
    """Presentation time of the first frame, in these ticks."""

    @classmethod
    def of(cls, stream: VideoStream, first_pts: int, times: Sequence[int] = ()) -> Clock:
        """The clock of a stream.

        Args:
            stream: the video stream.
            first_pts: time of its first frame, in the container's ticks.
            times: of packets after the first frame, in the container's ticks. A rate that they contradict is not
                believed: several containers state none, and FFmpeg then takes a default of the codec.
        """
        time_base = time_base_of(stream)
        interval = None if is_clockless(stream) else _interval(stream, time_base)
        if interval is None or interval < _MIN_INTERVAL_TICKS or interval.denominator > _MAX_SUBDIVISION:
            return cls(time_base=time_base, start_pts=first_pts)
        if interval.denominator > 1 and not _is_rate_of(interval, first_pts, times):
            return cls(time_base=time_base, start_pts=first_pts)
        parts = interval.denominator if abs(first_pts) * interval.denominator < 1 << 62 else 1
        return cls(time_base=time_base / parts, start_pts=first_pts * parts)

    def converter(self, stream: VideoStream) -> TickConverter:
        """The conversion from the container's ticks to this clock's.

        Raises:
            VideoError: DECODE_ERROR: the stream is not the one this clock was made for.
        """
        parts = time_base_of(stream) / self.time_base
        if parts.denominator != 1:
            raise VideoError(Reason.DECODE_ERROR, "its clock is not the one that it had when it was probed")
        if is_clockless(stream):
            return TickConverter(parts=parts.numerator, first_pts=self.start_pts)
        interval = _interval(stream, self.time_base)
        whole = interval.numerator if parts > 1 and interval is not None and interval.denominator == 1 else 0
        return TickConverter(parts=parts.numerator, interval=whole, start_pts=self.start_pts)


@dataclass(frozen=True, kw_only=True, slots=True)
class TickConverter:
    """Converts a container's ticks to those of a :class:`Clock`."""

    parts: int = 1
    """Ticks of the clock in one of the container's."""
    interval: int = 0
    """Ticks of the clock from one frame to the next; 0 leaves all times as they are."""
    start_pts: int = 0
    """Presentation time of the first frame, in the clock's ticks."""
    first_pts: int = 0
    """The clock's time at the container's tick 0, where frames are counted from there."""

    def __call__(self, ticks: int) -> int:
        """The time in the clock's ticks; the conversion never reverses the order of two times."""
        if not self.interval:
            return ticks * self.parts + self.first_pts
        offset = ticks * self.parts - self.start_pts
        multiple = (2 * offset + self.interval) // (2 * self.interval) * self.interval
        return self.start_pts + (multiple if abs(offset - multiple) <= self.parts else offset)

    def to_container(self, pts: int) -> int:
        """The last of the container's ticks that may convert to ``pts``."""
        return pts if self.parts == 1 else pts // self.parts + 1


def _interval(stream: VideoStream, time_base: Fraction) -> Fraction | None:
    """Ticks from one frame to the next; None where the stream states no rate, or contradicts itself."""
    lowest = stream.base_rate
    average = stream.average_rate or lowest
    if not average or not lowest:
        return None
    if "mov" in stream.container.format.name.split(","):  # its average is that of the index, over all frames
        rate = _standard_rate(average, _RATES_AGREE)
    elif abs(average - lowest) > lowest * _RATES_AGREE:
        rate = None
    else:  # Matroska's nanoseconds come back as 19001/317 for 60000/1001, a millisecond in six hours
        rate = _standard_rate(lowest, Fraction(1, 1_000_000)) or lowest
    return 1 / (rate * time_base) if rate else None


def _is_rate_of(interval: Fraction, first_pts: int, times: Sequence[int]) -> bool:
    """Whether most times lie at most one tick away from a whole number of intervals after the first frame."""
    fitting = sum(abs(offset - round(offset / interval) * interval) <= 1 for offset in (t - first_pts for t in times))
    return fitting >= _MIN_SHARE_OF_TIMES * len(times)


def _standard_rate(rate: Fraction, tolerance: Fraction) -> Fraction | None:
    """The nearest whole number, or whole number divided by 1.001, within a relative tolerance; None for neither."""
    for standard in (Fraction(round(rate)), Fraction(round(rate * 1001 / 1000) * 1000, 1001)):
        if abs(standard - rate) <= rate * tolerance:
            return standard
    return None


def usual_ticks(stream: VideoStream) -> int:
    """Display time of a frame that states none, in the container's ticks: by the average rate, at least one."""
    rate = frame_rate(stream) or stream.guessed_rate
    return max(1, round(1 / (rate * time_base_of(stream)))) if rate else 1


_CLOCK_TIME = re.compile(r"([0-9]{1,6}):([0-9]{1,2}):([0-9]{1,2}(?:\.[0-9]{1,12})?)")
"""Hours, minutes and seconds, as Matroska writers state a length. More digits are no length, and cost time."""


def stream_seconds(stream: VideoStream) -> Fraction | None:
    """Length that the header states for the video stream itself; None where it is the container's or a guess."""
    formats = stream.container.format.name.split(",")
    if stream.duration and ("mov" in formats or "avi" in formats):
        return stream.duration * time_base_of(stream)
    if "matroska" in formats:
        for key, value in stream.metadata.items():
            if key.upper().startswith("DURATION") and (match := _CLOCK_TIME.fullmatch(value)):
                hours, minutes, seconds = match.groups()
                return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
    return None


def seconds_from_header(stream: VideoStream, first_seconds: Fraction) -> Fraction | None:
    """Seconds from the first frame to the end, as the header states them; None where it states nothing usable.

    Args:
        stream: the video stream.
        first_seconds: presentation time of its first frame.
    """
    if is_clockless(stream):
        return None
    container = stream.container
    assert isinstance(container, InputContainer)
    formats = set(container.format.name.split(","))
    seconds = stream_seconds(stream)
    if seconds is None and container.duration:
        seconds = Fraction(container.duration, av.time_base)
    if seconds is not None and "matroska" in formats:
        seconds -= max(first_seconds, Fraction(0))  # Matroska counts from zero rather than from the first frame
    return seconds if seconds is not None and seconds > 0 else None
