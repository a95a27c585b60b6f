"""Builds the clips of one span from frames given in presentation order.

``SpanTimeline`` computes which frames a span needs, ``ClipBuilder`` fills its clips with them, and ``DamageLog``
remembers damage where the undamaged clips of a span are kept. No file is opened here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vidshard.pipeline.video.frame_order import TimedFrame
from vidshard.pipeline.video.input_file import Gap
from vidshard.pipeline.video.packet_schedule import FOREVER
from vidshard.pipeline.video.render import Renderer
from vidshard.pipeline.video.sampling import ClipTimeline, Grid
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.text import counted
from vidshard.schemas.video import Clip, ClipSpec, Geometry, Span, SpanClips

_MAX_DAMAGED_PLACES = 100
"""After this many a span counts as ended: a file that is noise from some point on costs a pass for each keyframe."""


class SpanTimeline:
    """The times of all frames in the clips of one span, its halo included. Pure arithmetic."""

    def __init__(self, span: Span, spec: ClipSpec) -> None:
        self.span, self.spec = span, spec
        self.clips = ClipTimeline.of(span, span.part, spec)
        self.first_clip = span.first_clip - spec.halo_of(span.first_clip)
        """First clip of the halo, or of the span where it has none."""
        ends = (span.end_clip, None if self.clips.last_clip is None else self.clips.last_clip + 1)
        self.end_clip = min((end for end in ends if end is not None), default=FOREVER)
        """Clips from this one on do not belong to the span; FOREVER where only the video's end says so."""
        self._times: dict[int, tuple[Grid, int]] = {}  # kept, as they are needed for each packet

    def times(self, index: int) -> tuple[Grid, int]:
        """The grid of a clip, and how many frames it has if the video lasts long enough."""
        found = self._times.get(index)
        if found is None:
            found = self._times[index] = self.clips.grid(index), self.clips.num_frames(index)
        return found

    def needs(self, pts: int, until_pts: int) -> bool:
        """Whether a frame on screen from ``pts`` to ``until_pts`` (exclusive) is in one of the clips."""
        if self.clips.is_between_grid_times(pts, until_pts):  # as most frames of a reduced rate are
            return False
        for index in self.clips.around(pts, until_pts, self.first_clip, self.end_clip):
            grid, num_frames = self._times.get(index) or self.times(index)
            at = grid.first_index_at(pts)
            if at < num_frames and at < grid.first_index_at(until_pts):
                return True
        return False

    def stretch(self, clip: int, frame: int, gap_seconds: float) -> tuple[int, int | None]:
        """Ticks from a frame of a clip to the next gap between clips (exclusive); None for the end of the video."""
        start = self.times(clip)[0].pts_at(frame)
        last = self._last_before_gap(clip, gap_seconds)
        if last is None:
            return start, None
        grid, num_frames = self.times(last)
        return start, max(start, grid.pts_at(max(0, num_frames - 1))) + 1

    def _last_before_gap(self, first: int, gap_seconds: float) -> int | None:
        """The last clip that follows without a gap; None where only the end of the video ends them."""
        placed = self.clips.placed
        if placed is None:
            if self.spec.stride - self.spec.clip_seconds > gap_seconds:
                return first
            return self.clips.last_clip if self.span.end_clip is None else self.span.end_clip - 1
        num_clips = len(placed) if self.span.end_clip is None else self.span.end_clip
        last = first
        while last + 1 < min(num_clips, len(placed)):
            gap = self.clips.start_seconds(last + 1) - self.clips.start_seconds(last) - self.spec.clip_seconds
            if gap > gap_seconds:
                break
            last += 1
        return last

    def lead_frames(self, index: int) -> int:
        """Copies of the video's first frame that stand before a clip: only the first clip has any."""
        return 0 if index else self.spec.lead_frames

    def min_frames(self, index: int) -> int:
        """A clip with fewer frames is left out; the copies before it count."""
        return min(self.spec.num_frames, self.spec.min_valid_frames + self.lead_frames(index))


@dataclass(kw_only=True, slots=True)
class DamageLog:
    """The damage met while decoding a span whose undamaged clips are kept."""

    span: Span
    errors: list[VideoError] = field(default_factory=list)
    last_pts: int | None = None
    """Tick of the last damage; decoding goes on at the first keyframe after it. None while there was none."""

    def add(self, error: VideoError, seen_pts: int) -> bool:
        """Record damage met after the frame at ``seen_pts``.

        Returns:
            Whether the span counts as ended: no keyframe can follow, or there was too much damage.
        """
        self.errors.append(error)
        if self.last_pts is None:
            self.last_pts = seen_pts
        else:  # where no frame came since, the next keyframe is damaged too
            self.last_pts = max(seen_pts, self.last_pts + int(1 / self.span.time_base))
        passed = (self.last_pts - self.span.grid_start_pts) * self.span.time_base
        past_end = 0 < self.span.duration_seconds_from_header < passed
        return past_end or error.reason is Reason.TRUNCATED or len(self.errors) >= _MAX_DAMAGED_PLACES

    def is_between(self, seen_pts: int, pts: int) -> bool:
        """Whether the last damage lies between two successive frames."""
        return self.last_pts is not None and seen_pts <= self.last_pts < pts

    def summary(self, num_clips: int) -> VideoError:
        """One error for all damage, which says how many clips were kept."""
        first = self.errors[0]
        if not num_clips:
            return VideoError(first.reason, first.detail)
        places = "one damaged place" if len(self.errors) == 1 else f"{len(self.errors)} damaged places, the first"
        return VideoError(first.reason, f"{counted(num_clips, 'clip')} beside {places}: {first.detail}")


@dataclass(kw_only=True, slots=True)
class _PartialClip:
    """A clip that is being filled."""

    index: int
    grid: Grid
    num_frames: int
    """Frames it has if the video lasts long enough."""
    frames: npt.NDArray[np.uint8]
    """uint8 (T, H, W, 3)."""
    geometry: Geometry | None = None
    """Geometry of its first frame; None before it."""
    pts: list[int] = field(default_factory=list)
    """Ticks of the frames so far."""

    @property
    def is_full(self) -> bool:
        return len(self.pts) == self.num_frames

    def finish(self, times: SpanTimeline) -> Clip:
        """The clip, with its last frame repeated to the end."""
        span, spec = times.span, times.spec
        assert self.geometry is not None, "a clip without frames is left out"
        num_valid = len(self.pts)
        self.frames[num_valid:] = self.frames[num_valid - 1]
        ticks = self.pts + self.pts[-1:] * (spec.num_frames - num_valid)
        lead = times.lead_frames(self.index)
        start = times.clips.start_seconds(self.index) + lead / spec.fps
        ticks_up, ticks_down = span.time_base.as_integer_ratio()  # faster than a fraction, and rounded alike
        return Clip(
            video_id=span.video_id,
            clip_index=self.index,
            frames=self.frames,
            start_seconds=float(span.grid_start_pts * span.time_base + start),
            frame_pts_seconds=np.array([tick * ticks_up / ticks_down for tick in ticks[lead:]], np.float64),
            num_valid_frames=num_valid - lead,
            lead_frames=lead,
            geometry=self.geometry,
        )


class ClipBuilder:
    """Fills the clips of one span, grid time by grid time, with frames given in presentation order."""

    def __init__(self, span: Span, spec: ClipSpec, max_clips: int) -> None:
        """Start with no frame.

        Args:
            span: which clips.
            spec: the grid and the geometry.
            max_clips: clips that an open-ended span may hold, its halo not counted.
        """
        self.span = span
        self.times = SpanTimeline(span, spec)
        self.damage = DamageLog(span=span)
        self.seen_pts = span.grid_start_pts - 1
        """Tick of the last frame that was decoded, whether a clip needs it or not; before the first one, one less than
        its tick."""
        self._spec, self._max_clips = spec, max_clips
        self._renderer = Renderer(spec)
        self._next_clip = self.times.first_clip
        self._clips: list[_PartialClip] = []  # in order, the full ones too
        self._open: list[_PartialClip] = []  # those of them that are not full
        self._num_taken = 0
        self._end_pts: int | None = None  # the end of the video, once that is known
        self._error: VideoError | None = None
        self._gaps: Collection[Gap] = ()

    @property
    def is_done(self) -> bool:
        """Whether no further frame is needed; an open-ended span needs all up to the end of its part or video."""
        if self._error is not None or self._end_pts is not None:
            return True
        return not self._open and not self._has_next

    @property
    def _has_next(self) -> bool:
        return self._next_clip < self.times.end_clip

    def next_stretch(self, gap_seconds: float) -> tuple[int, int | None]:
        """Ticks from the next frame needed to the next gap between clips (exclusive); None for the end of the video."""
        if self._open:
            return self.times.stretch(self._open[0].index, len(self._open[0].pts), gap_seconds)
        return self.times.stretch(self._next_clip, 0, gap_seconds)

    def note_frame(self, pts: int) -> None:
        """Take note that a frame starts at ``pts``; the first after damage decides which whole clip comes next."""
        if self.damage.is_between(self.seen_pts, pts):
            while self._has_next and self.times.times(self._next_clip)[0].pts_at(0) < pts:
                self._next_clip += 1
        self.seen_pts = max(self.seen_pts, pts)

    def add(self, frame: TimedFrame, *, until_pts: int) -> None:
        """Put a frame, on screen until ``until_pts`` (exclusive), into every clip that needs it.

        A frame that cannot be rendered, or a clip too many, refuses the span.
        """
        if self._error is not None:
            return
        try:
            self._add(frame, until_pts)
        except VideoError as error:
            self._error = error

    def _add(self, frame: TimedFrame, until_pts: int) -> None:
        while self._has_next and self.times.times(self._next_clip)[0].first_index_at(until_pts) > 0:
            self._start_clip()
        picture: npt.NDArray[np.uint8] | None = None
        geometry: Geometry | None = None
        for clip in self._open:
            for slot in range(len(clip.pts), min(clip.grid.first_index_at(until_pts), clip.num_frames)):
                if picture is None:
                    picture = clip.frames[slot]
                    geometry = self._renderer.cut(frame, picture)
                else:
                    clip.frames[slot] = picture
                clip.geometry = clip.geometry or geometry
                clip.pts.append(frame.pts)
        self._open = [clip for clip in self._open if not clip.is_full]

    def _start_clip(self) -> None:
        if self.span.end_clip is None and len(self._clips) >= self._max_clips + self._spec.halo_clips:
            claimed = self.span.duration_seconds_from_header
            raise VideoError(
                Reason.LONGER_THAN_HEADER,
                f"more than {self._max_clips} clips after clip {self.span.first_clip}; the header says {claimed:.2f} s",
            )
        grid, num_frames = self.times.times(self._next_clip)
        clip = _PartialClip(
            index=self._next_clip,
            grid=grid,
            num_frames=num_frames,
            frames=np.empty((self._spec.num_frames, self._spec.height, self._spec.width, 3), np.uint8),
        )
        self._next_clip += 1
        if clip.num_frames:
            self._clips.append(clip)
            self._open.append(clip)

    def note_damage(self, error: VideoError) -> None:
        """Drop the clips that are not full; the span goes on after the damage, or ends here."""
        self._clips = [clip for clip in self._clips if clip.is_full]
        self._open = []
        if self.damage.add(error, self.seen_pts):
            self.end(self.seen_pts)

    def end(self, end_pts: int) -> None:
        """Take note that the video ends at ``end_pts``."""
        self._end_pts = end_pts

    def note_gaps(self, gaps: Collection[Gap]) -> None:
        """Take note of the gaps in time that were found in what was read so far."""
        self._gaps = gaps

    def refuse(self, error: VideoError) -> None:
        """Give no clips but this error."""
        self._error = error

    def take_complete(self) -> list[Clip]:
        """Remove and give the clips at the front that are full and that no later end of the video leaves out."""
        taken: list[Clip] = []
        while self._clips and self._clips[0].is_full:
            clip = self._clips[0]
            if clip.index >= self._num_clips(self.seen_pts):
                break
            del self._clips[0]
            if len(clip.pts) >= self.times.min_frames(clip.index):
                taken.append(clip.finish(self.times))
        self._num_taken += len(taken)
        return taken

    def _num_clips(self, end_pts: int) -> int:
        """Clips there are if the video ends at ``end_pts``."""
        return self.times.clips.num_clips((end_pts - self.span.grid_start_pts) * self.span.time_base)

    def result(self) -> SpanClips:
        """The clips not taken yet, after the tail policy; or the error, TOO_SHORT where the part has no clip at all."""
        if self._error is not None:
            return SpanClips(clips=[], error=self._error)
        started = self._clips
        if self._end_pts is not None:
            num_clips = self._num_clips(self._end_pts)
            started = [clip for clip in started if clip.index < num_clips]
        kept = [clip for clip in started if len(clip.pts) >= self.times.min_frames(clip.index)]
        error: VideoError | None = None
        if self.damage.errors and not self._is_complete(kept):
            error = self.damage.summary(len(kept))
        elif not kept and not self._num_taken and self.span.first_clip == 0:
            return SpanClips(clips=[], error=VideoError(Reason.TOO_SHORT, self._shortage(started)))
        clips = [clip.finish(self.times) for clip in kept]
        own = [clip for clip in kept if clip.index >= self.span.first_clip]
        gaps = [gap for gap in self._gaps if any(gap.holds(pts) for clip in own for pts in clip.pts)]
        doubt = self._doubt(gaps) if gaps else None
        return SpanClips(clips=clips, error=error, num_errors=len(self.damage.errors) + len(gaps), doubt=doubt)

    def _doubt(self, gaps: Sequence[Gap]) -> VideoError:
        first = float(min(gap.start_pts for gap in gaps) * self.span.time_base)
        places = "one gap" if len(gaps) == 1 else f"{len(gaps)} gaps, the first"
        words = f"{places} in its times before {first:.2f} s: a picture is missing, or the encoder left one out"
        return VideoError(Reason.POSSIBLE_LOSS, words)

    def _is_complete(self, clips: Sequence[_PartialClip]) -> bool:
        """Whether no clip of the span is missing; unknown, so False, for an open-ended span."""
        if self.span.end_clip is None:
            return False
        return sum(clip.index >= self.span.first_clip for clip in clips) == self.span.end_clip - self.span.first_clip

    def _shortage(self, started: Sequence[_PartialClip]) -> str:
        if not started:
            return f"no frame of the video lies in {self.span.part}"
        first = started[0]
        lead = self.times.lead_frames(first.index)
        needed = self.times.min_frames(first.index) - lead
        return f"{len(first.pts) - lead} of the {needed} frames that a clip must have"
