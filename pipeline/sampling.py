"""Which frames make which clip.

Pure arithmetic over presentation times: no video is opened here and nothing knows of Ray. Clips lie on a
regular grid of seconds; each grid time takes the frame then on screen, so a source slower than the grid
repeats frames and a faster one drops some. Variable frame rate needs no special case. All comparisons are
between integers: a grid time that falls exactly on a frame takes that frame, whatever the rates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from schemas.video import ClipSpec, Span, VideoProbe

FEWEST_BYTES_PER_SECOND = 8
"""A header that claims a longer video for the size of its file says nothing: a hostile one of a few kilobytes could
ask for millions of spans. One frame a second costs more than this in any container."""

_MIN_CLIPS_IN_LAST_SPAN = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The regular times at which a video is sampled: ``start_pts`` ticks plus ``index / fps`` seconds."""

    start_pts: int
    """Presentation time of the video's first frame, in ticks."""
    time_base: Fraction
    """Seconds per tick, positive."""
    fps: Fraction
    """Grid times per second, positive."""

    def __post_init__(self) -> None:
        if self.time_base <= 0 or self.fps <= 0:
            raise ValueError(f"time base and fps must be positive, got {self.time_base} and {self.fps}")

    @classmethod
    def of(cls, span: Span, spec: ClipSpec) -> Grid:
        """The grid on which a span's clips lie: the same for every span of a video."""
        return cls(start_pts=span.grid_start_pts, time_base=span.time_base, fps=spec.fps)

    def first_index_at(self, pts: int) -> int:
        """Index of the first grid time not before ``pts``; 0 for a time before the grid.

        A frame shown from ``a`` to ``b`` ticks, exclusive, covers the indices ``first_index_at(a)`` to
        ``first_index_at(b)``, exclusive; a video that ends at ``b`` has ``first_index_at(b)`` grid times.
        """
        step = self.fps * self.time_base  # grid times per tick
        return max(0, -((self.start_pts - pts) * step.numerator // step.denominator))

    def pts_at(self, index: int) -> int:
        """The last tick not after the grid time."""
        step = self.fps * self.time_base
        return self.start_pts + index * step.denominator // step.numerator

    def seconds_at(self, index: int) -> Fraction:
        """The grid time in the source's presentation time."""
        return self.start_pts * self.time_base + index / self.fps


def frame_indices(pts: npt.NDArray[np.int64], end_pts: int, grid: Grid) -> npt.NDArray[np.int64]:
    """Which frame each grid time shows: the one with the largest presentation time not after it.

    Of frames with the same time the last one counts: it is the one that stays on screen.

    Args:
        pts: int64 (N,), ticks, non-decreasing; the first not after the grid's start.
        end_pts: when the last frame leaves the screen, exclusive.
        grid: the sampling times.

    Returns:
        int64 (M,), non-decreasing, an index into ``pts`` for each grid time before ``end_pts``.

    Raises:
        ValueError: no frames, times that run backwards, or a grid that starts before the first frame.
    """
    if pts.ndim != 1 or len(pts) == 0:
        raise ValueError(f"pts must be int64 (N,) with at least one frame, got shape {pts.shape}")
    if np.any(pts[1:] < pts[:-1]):
        raise ValueError("pts must be non-decreasing: sort frames by presentation time first")
    if pts[0] > grid.start_pts:
        raise ValueError(f"the grid starts at {grid.start_pts}, before the first frame at {pts[0]}")
    # Python's integers: a 90 kHz clock times a rate such as 30000/1001 leaves int64 within a day
    first = np.array([grid.first_index_at(int(p)) for p in pts], dtype=np.int64)
    num_times = grid.first_index_at(end_pts)
    return np.searchsorted(first, np.arange(num_times, dtype=np.int64), side="right") - 1


def plan_spans(probe: VideoProbe, spec: ClipSpec, clips_per_span: int) -> list[Span]:
    """Cut a video into spans that independent tasks decode.

    The header's duration decides only where to cut. The last span is open-ended, so a video longer than its
    header loses nothing; it is planned to hold at least two clips, so that a header a little too optimistic
    leaves no span empty. It may hold up to ``clips_per_span + 2`` clips by the header, more if that lies. A
    video of unknown (0) duration, or of one that its file is too small for, is one span.

    Args:
        probe: what the header says.
        spec: the time grid and the length of a clip.
        clips_per_span: clips in every span but the last, at least 1.

    Returns:
        Spans in order, at least one; together they cover clip 0 to the end, each clip once.
    """
    if clips_per_span < 1:
        raise ValueError(f"clips_per_span must be at least 1, got {clips_per_span}")
    seconds = probe.duration_seconds_from_header
    believable = math.isfinite(seconds) and 0 < seconds * FEWEST_BYTES_PER_SECOND <= probe.num_bytes
    num_clips = Fraction(seconds) / spec.clip_seconds if believable else Fraction(0)
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
        )
        for first_clip, end_clip in pairwise(bounds)
        if first_clip is not None
    ]
