"""Sampling: the rule for which source frame each frame of a clip takes, and the cutting of videos into spans.

Pure arithmetic over presentation times: no video is opened here and nothing knows of Ray. Clips lie on a regular grid
of seconds. Each grid time takes the frame on screen at that time, so a source slower than the grid repeats frames and
a faster one drops some. Variable frame rate needs no special case. All comparisons are between integers: a grid time
that falls exactly on a frame takes that frame, whatever the rates.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

from vidshard.schemas.video import ClipSpec, Part, Span, VideoProbe

MIN_BYTES_PER_SECOND = 8
"""A header's duration is ignored if the file has fewer bytes per second: a hostile file of a few kilobytes could ask
for millions of spans. One frame a second costs more than this in any container."""

_MIN_CLIPS_IN_LAST_SPAN = 2

CUT_TOLERANCE_SECONDS = Fraction(1, 1000)
"""Tolerance at both ends of a part, whose times are written rounded, often to milliseconds.

A frame that starts this soon after a part's start counts as its first one, and the last moment before the part's end
does not belong to it. Otherwise clips would start, or end, with a frame of the neighboring shot.
"""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The regular times at which a video is sampled: ``start_pts`` ticks, ``offset_seconds``, ``index / fps``."""

    start_pts: int
    """Presentation time of the video's first frame, in ticks."""
    time_base: Fraction
    """Seconds per tick, positive."""
    fps: Fraction
    """Grid times per second, positive."""
    offset_seconds: Fraction = Fraction(0)
    """Seconds from the first frame to grid time 0."""

    def __post_init__(self) -> None:
        if self.time_base <= 0 or self.fps <= 0:
            raise ValueError(f"time base and fps must be positive, got {self.time_base} and {self.fps}")

    def first_index_at(self, pts: int) -> int:
        """Index of the first grid time not before ``pts``; 0 for a time before the grid.

        A frame shown from ``a`` to ``b`` ticks, exclusive, covers the indices ``first_index_at(a)`` to
        ``first_index_at(b)``, exclusive; a video that ends at ``b`` has ``first_index_at(b)`` grid times.
        """
        per_tick, offset, unit = self._whole_steps
        index = -((offset - (pts - self.start_pts) * per_tick) // unit)
        return index if index > 0 else 0

    @cached_property
    def _whole_steps(self) -> tuple[int, ...]:
        """Grid times per tick, in the offset, and one grid time, in whole units; kept, as each packet asks for it."""
        return _in_whole_units(self.time_base * self.fps, self.offset_seconds * self.fps, Fraction(1))

    def pts_at(self, index: int) -> int:
        """The last tick not after the grid time."""
        return self.start_pts + math.floor((self.offset_seconds + index / self.fps) / self.time_base)

    def seconds_at(self, index: int) -> Fraction:
        """The grid time in the source's presentation time, in seconds."""
        return self.start_pts * self.time_base + self.offset_seconds + index / self.fps


@dataclass(frozen=True, kw_only=True)
class ClipTimeline:
    """The times of the clips of one video, or of one part of it; shared by all its spans."""

    spec: ClipSpec
    part: Part
    start_pts: int
    """Presentation time of the video's first frame, in ticks."""
    time_base: Fraction
    placed: tuple[Fraction, ...] | None
    """Starts placed one by one, in seconds after the part's start; None for a clip every stride."""

    @classmethod
    def of(cls, video: Span | VideoProbe, part: Part, spec: ClipSpec) -> ClipTimeline:
        """The timeline of a video by its header alone, so that it is the same for each of its spans.

        Where clips are placed one by one, a video of unknown length has a single one, at its start.
        """
        placed = None
        if spec.clips_per_video is not None:
            placed = _placed_starts(video.video_id, part, spec, Fraction(video.duration_seconds_from_header))
        return cls(spec=spec, part=part, start_pts=video.grid_start_pts, time_base=video.time_base, placed=placed)

    def start_seconds(self, clip_index: int) -> Fraction:
        """Grid time of a clip's first frame, in seconds after the video's first; negative where lead frames precede."""
        if self.placed is not None:
            return self.part.start_seconds + self.placed[clip_index]
        return self.part.start_seconds + clip_index * self.spec.stride - self.spec.lead_frames / self.spec.fps

    def grid(self, clip_index: int) -> Grid:
        """The grid of a clip's frames."""
        early = CUT_TOLERANCE_SECONDS if self.part.start_seconds > 0 else 0
        return Grid(
            start_pts=self.start_pts,
            time_base=self.time_base,
            fps=self.spec.fps,
            offset_seconds=self.start_seconds(clip_index) + early,
        )

    def num_frames(self, clip_index: int) -> int:
        """Number of a clip's frames that lie before the end of the part."""
        if self.part.end_seconds is None:
            return self.spec.num_frames
        seconds = self.part.end_seconds - CUT_TOLERANCE_SECONDS - self.start_seconds(clip_index)
        return min(self.spec.num_frames, max(0, math.ceil(seconds * self.spec.fps)))

    def num_clips(self, end_seconds: Fraction) -> int:
        """Number of clips of a video that ends ``end_seconds`` after its first frame.

        The first of overlapping clips that reaches the end is the last: those after it would show nothing new.
        """
        if self.part.end_seconds is not None:
            end_seconds = min(end_seconds, self.part.end_seconds - CUT_TOLERANCE_SECONDS)
        return max(0, math.ceil(self.clips_before(end_seconds)))

    def clips_before(self, end_seconds: Fraction) -> Fraction:
        """Number of clips without regard to the part's end, with fractions: 2.5 when the third is half full."""
        seconds = end_seconds - self.part.start_seconds + self.spec.lead_frames / self.spec.fps
        if self.placed is not None:
            return Fraction(sum(start < seconds for start in self.placed))
        if seconds <= 0:
            return Fraction(0)
        overlap = max(Fraction(0), self.spec.clip_seconds - self.spec.stride)
        return max(Fraction(1) if overlap else Fraction(0), (seconds - overlap) / self.spec.stride)

    @cached_property
    def last_clip(self) -> int | None:
        """The last clip there can be, -1 for none; None where only the video's end decides."""
        if self.placed is not None:
            return len(self.placed) - 1
        end = self.part.end_seconds
        return None if end is None else self.num_clips(end) - 1

    def is_beyond(self, clip_index: int) -> bool:
        """Whether a clip cannot exist wherever the video ends."""
        return self.last_clip is not None and clip_index > self.last_clip

    def is_between_grid_times(self, pts: int, until_pts: int) -> bool:
        """Whether a stretch of time, in ticks and without its end, has no grid time of any clip; False if unknown."""
        if self._common_grid is None:
            return False
        tick, first, step = self._common_grid
        return (first - (pts - self.start_pts) * tick) // step == (first - (until_pts - self.start_pts) * tick) // step

    @cached_property
    def _common_grid(self) -> tuple[int, ...] | None:
        """A tick, the start of clip 0 and the time between frames, in one whole unit; None where clips lie unevenly."""
        if self.placed is None and (self.spec.stride * self.spec.fps).denominator != 1:
            return None
        return _in_whole_units(self.time_base, self.grid(0).offset_seconds, 1 / self.spec.fps)

    def around(self, pts: int, until_pts: int, first_clip: int, end_clip: int) -> range:
        """Indices of clips from ``first_clip`` on, before ``end_clip``, that may have a grid time in a stretch of time.

        Args:
            pts: start of the stretch, in ticks.
            until_pts: its end, exclusive.
            first_clip: at least 0.
            end_clip: exclusive.
        """
        if self.placed is not None:
            return range(first_clip, min(end_clip, len(self.placed)))
        tick, begin, clip, stride = self._whole_times
        first = ((pts - self.start_pts) * tick - begin - clip) // stride
        end = ((until_pts - self.start_pts) * tick - begin) // stride + 1
        return range(first if first > first_clip else first_clip, end if end < end_clip else end_clip)

    @cached_property
    def _whole_times(self) -> tuple[int, ...]:
        """A tick, the start of clip 0 after the video's first frame, a clip and a stride, in one whole unit."""
        zero = self.part.start_seconds - self.spec.lead_frames / self.spec.fps
        return _in_whole_units(self.time_base, zero, self.spec.clip_seconds, self.spec.stride)


def _in_whole_units(*seconds: Fraction) -> tuple[int, ...]:
    """Times as multiples of the longest unit that divides them all; arithmetic on big fractions is slow."""
    denominator = math.lcm(*(value.denominator for value in seconds))
    return tuple(value.numerator * (denominator // value.denominator) for value in seconds)


def _placed_starts(video_id: str, part: Part, spec: ClipSpec, seconds: Fraction) -> tuple[Fraction, ...]:
    """Different starts of a limited number of clips, in seconds after the part's start, on its time grid.

    The grid times at which a clip can start are divided into equal stretches; each has one start, in its middle or at
    random.
    """
    assert spec.clips_per_video is not None
    end = seconds if part.end_seconds is None else min(seconds, part.end_seconds)
    room = max(0, math.floor((end - part.start_seconds - spec.clip_seconds) * spec.fps)) + 1  # grid times to start at
    count = min(spec.clips_per_video, room)
    starts = []
    for number in range(count):
        low, high = number * room // count, (number + 1) * room // count
        at = (low + high - 1) // 2
        if spec.placement == "random":
            text = f"{spec.placement_seed}|{video_id}|{part}|{number}"
            at = low + int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big") % (high - low)
        starts.append(at / spec.fps)
    return tuple(starts)


def clips_of_last_span(clips_per_span: int) -> int:
    """Largest number of clips of an open-ended last span: a header may claim less than a fourth of what there is."""
    return 4 * clips_per_span + 16


def plan_spans(probe: VideoProbe, spec: ClipSpec, clips_per_span: int, part: Part | None = None) -> list[Span]:
    """Cut a video, or a part of it, into spans that independent tasks decode.

    The header's duration decides only where to cut. The last span is open-ended, so a video longer than its header
    loses nothing. It is planned to hold at least two clips, so that a header a little too optimistic leaves no span
    empty, and up to ``clips_per_span + 2``; it holds more if the header is wrong. A video of unknown (0) duration, or
    whose file is too small for its duration, is one span.

    Args:
        probe: the video's header.
        spec: the time grid and the length of a clip.
        clips_per_span: clips in every span but the last, at least 1.
        part: part of the video; None for the whole.

    Returns:
        Spans in order, at least one; together they cover clip 0 to the end, each clip once.

    Raises:
        ValueError: ``clips_per_span`` is less than 1.
    """
    if clips_per_span < 1:
        raise ValueError(f"clips_per_span must be at least 1, got {clips_per_span}")
    part = part or Part()
    seconds = _believed_seconds(probe)
    end = Fraction(seconds) if part.end_seconds is None else min(Fraction(seconds), part.end_seconds)
    layout = ClipTimeline.of(replace(probe, duration_seconds_from_header=seconds), part, spec)
    num_clips = layout.clips_before(end)
    num_cuts = max(0, math.floor((num_clips - _MIN_CLIPS_IN_LAST_SPAN) / clips_per_span))
    bounds: list[int | None] = [*range(0, (num_cuts + 1) * clips_per_span, clips_per_span), None]
    return [
        Span(
            video_id=probe.video_id,
            uri=probe.uri,
            time_base=probe.time_base,
            grid_start_pts=probe.grid_start_pts,
            first_clip=first_clip,
            end_clip=end_clip,
            duration_seconds_from_header=seconds,
            source=probe.source,
            part=part,
        )
        for first_clip, end_clip in pairwise(bounds)
        if first_clip is not None
    ]


def expected_clips(span: Span, spec: ClipSpec) -> int:
    """Number of clips in a span if the header is right."""
    end_clip = span.end_clip
    if end_clip is None:
        end_clip = ClipTimeline.of(span, span.part, spec).num_clips(Fraction(span.duration_seconds_from_header))
    return max(0, end_clip - span.first_clip)


def _believed_seconds(probe: VideoProbe) -> float:
    """The header's duration; 0.0 where it is impossible."""
    seconds = probe.duration_seconds_from_header
    believable = math.isfinite(seconds) and 0 < seconds * MIN_BYTES_PER_SECOND <= probe.num_bytes
    return seconds if believable else 0.0
