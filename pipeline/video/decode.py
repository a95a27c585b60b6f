"""From a file to clips: probe the header, then decode one span at a time.

Plain functions over PyAV; nothing knows of Ray. How a file is opened safely is decided in ``container``, which
frames come out of it, and when, in ``frames``, what a picture looks like in ``picture`` and ``geometry``, and
which frame belongs to which grid time in ``sampling``.

A span decoded alone has the same pixels and times as one pass over the whole video. Damage refuses the whole span.
Running out of memory while decoding is a MemoryError, to which ``sandbox`` gives its reason.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from vidshard.pipeline.video.container import (
    Clock,
    ThreadType,
    WatchedFile,
    codec_name,
    one_line,
    opened,
    opening_errors,
    refuse_large,
    refuse_long,
    seconds_from_header,
    storage_failures_named,
    time_base_of,
)
from vidshard.pipeline.video.frames import (
    SeekPoint,
    TimedFrame,
    decode_from,
    frames_after,
    frames_covering,
    seconds_from_packets,
)
from vidshard.pipeline.video.geometry import display_size
from vidshard.pipeline.video.image_archive import ImageArchive
from vidshard.pipeline.video.packet_schedule import FOREVER
from vidshard.pipeline.video.render import Renderer, orientation_of
from vidshard.pipeline.video.sampling import ClipTimeline, Grid
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Clip, ClipSpec, Geometry, Limits, Span, SpanClips, VideoProbe, VideoRef, VideoSource

_CHUNK_BYTES = 1 << 16


def probe_video(ref: VideoRef, open_input: Callable[[str], BinaryIO], limits: Limits | None = None) -> VideoProbe:
    """What the header says of a video, and the time of its first frame.

    Reads the header, some 300 KiB for the content's fingerprint and the first frame; the whole file only where no
    duration is stated anywhere.

    Args:
        ref: the file.
        open_input: gives a seekable binary file for ``ref.uri``; it is closed here.
        limits: what the video may cost.

    Raises:
        VideoError: OVER_LIMIT, UNREADABLE, EMPTY_FILE, NOT_A_VIDEO, NO_VIDEO_STREAM, NO_FRAMES, UNSUPPORTED,
            TRUNCATED (an mp4 without its index) or DECODE_ERROR (a container whose header is damaged).
    """
    try:
        file = open_input(ref.uri)
    except opening_errors() as error:
        raise VideoError(Reason.UNREADABLE, one_line(error)) from error
    with file, storage_failures_named(file, limits) as watched:
        video_id = fingerprint(watched)
        with closing(decode_from(watched, SeekPoint(), keep_going=True)) as frames:
            first = next(frames)  # or it raises NO_FRAMES
            stream = first.stream
            orientation = orientation_of(first.frame)
            width, height = display_size(first.frame.width, first.frame.height, first.pixel_aspect, orientation)
            duration_seconds: Fraction | None
            if isinstance(stream, ImageArchive):
                codec, fps, clock = stream.codec, stream.rate, Clock(time_base=1 / stream.rate, start_pts=first.pts)
                duration_seconds = (len(stream) - first.pts) / stream.rate
                # their times are the run's: at another rate they are another video
                video_id = hashlib.blake2b(f"{video_id} {fps}".encode(), digest_size=12).hexdigest()
            else:
                codec, fps, clock = codec_name(stream), stream.average_rate or Fraction(0), Clock.of(stream, first.pts)
                duration_seconds = seconds_from_header(stream, first.pts * time_base_of(stream))
                refuse_long(watched.limits, seconds=duration_seconds or 0, num_frames=stream.frames)
            source = VideoSource(
                width=width,
                height=height,
                codec=codec,
                fps=float(fps),
                rotation_degrees=orientation.rotation_degrees,
            )
        if duration_seconds is None:
            duration_seconds = seconds_from_packets(watched, first.pts)
            refuse_long(watched.limits, seconds=duration_seconds)
        return VideoProbe(
            video_id=video_id,
            uri=ref.uri,
            num_bytes=watched.num_bytes,
            time_base=clock.time_base,
            grid_start_pts=clock.start_pts,
            duration_seconds_from_header=float(duration_seconds),
            source=source,
        )


def fingerprint(file: WatchedFile) -> str:
    """24 hex digits of a file's content: its size and five 64 KiB samples, or all of a small one.

    The same for copies anywhere, whatever their name. Two files of equal size that differ only between the samples
    share it; video files made by a program differ in their index and timestamps, which lie at the ends.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    digest = hashlib.blake2b(num_bytes.to_bytes(8, "little"), digest_size=12)
    last = num_bytes - _CHUNK_BYTES
    offsets = (0, last // 4, last // 2, last * 3 // 4, last) if num_bytes > 5 * _CHUNK_BYTES else (0,)
    for sample in file.samples(offsets, _CHUNK_BYTES if len(offsets) > 1 else num_bytes):
        digest.update(sample)
    file.seek(0)
    return digest.hexdigest()


def decode_span(
    span: Span,
    spec: ClipSpec,
    source: str | BinaryIO,
    *,
    max_clips: int,
    thread_type: ThreadType = "NONE",
    limits: Limits | None = None,
) -> list[Clip]:
    """Decode one span of a video; see :func:`decode_spans`.

    Raises:
        VideoError: the span was refused.
    """
    [result] = decode_spans([span], spec, source, max_clips=max_clips, thread_type=thread_type, limits=limits)
    if result.error is not None:
        raise result.error
    return result.clips


def decode_spans(
    spans: Sequence[Span],
    spec: ClipSpec,
    source: str | BinaryIO,
    *,
    max_clips: int,
    keep_undamaged: bool = False,
    thread_type: ThreadType = "NONE",
    limits: Limits | None = None,
) -> list[SpanClips]:
    """Decode spans of one video, in one pass where they lie close together.

    Each has the same clips as decoded by itself: where one fails, those that are not finished are decoded alone.

    Args:
        spans: which clips; from ``plan_spans``, all of one video.
        spec: the grid and the geometry; the same that the spans were planned with.
        source: a local path, or a seekable binary file that stays open.
        max_clips: an open-ended last span may hold this many clips, not more: the limit on memory, as
            ``max_clips * spec.clip_bytes`` bytes of frames are held at once.
        keep_undamaged: of a damaged span give the clips that lie before, between and after the damage, each as if
            there were none; its error says what is missing. Otherwise damage refuses the whole span.
        thread_type: how the decoder uses threads; one thread unless asked, as many tasks run side by side.
        limits: what the video may cost.

    Returns:
        For each span its clips in order. Fewer than planned, or none, where the video ended before the header said
        so; a span after the first of its part may be empty. Or why it was refused: OVER_LIMIT, DECODE_ERROR,
        TRUNCATED, LONGER_THAN_HEADER, TOO_SHORT, NO_FRAMES, UNSUPPORTED, UNREADABLE, and whatever ``probe_video``
        refuses, should the file have changed since.

    Raises:
        VideoError: UNREADABLE: the file cannot be opened.
    """
    makers = [_ClipsInTheMaking(span=span, spec=spec, max_clips=max_clips) for span in spans]
    with opened(source) as file:
        if len(makers) > 1:
            with suppress(VideoError):  # then nobody knows yet whose error it is
                _fill(file, makers, thread_type, limits)
        for number, maker in enumerate(makers):
            if not maker.is_done:
                makers[number] = maker = _ClipsInTheMaking(span=maker.span, spec=spec, max_clips=max_clips)
                try:
                    _fill(file, [maker], thread_type, limits, keep_undamaged=keep_undamaged)
                except VideoError as error:
                    maker.error = error
    return [maker.result() for maker in makers]


SEEK_GAP_SECONDS = 10
"""How long a stretch of video must be to be leapt over by seeking: a new start costs some milliseconds."""


def _fill(
    file: BinaryIO,
    makers: Sequence[_ClipsInTheMaking],
    thread_type: ThreadType,
    limits: Limits | None,
    *,
    keep_undamaged: bool = False,
) -> None:
    """Show frames to the makers until all have theirs, in as few passes as it takes.

    Args:
        keep_undamaged: a single maker goes on after damage.
    """
    waiting = list(makers)
    while waiting:
        try:
            with storage_failures_named(file, limits) as watched:
                _one_pass(watched, waiting, thread_type)
        except VideoError as error:
            if not keep_undamaged or error.reason not in _DAMAGE:
                raise
            for maker in waiting:
                maker.note_damage(error)
        waiting = [maker for maker in waiting if not maker.is_done]


_DAMAGE = frozenset({Reason.DECODE_ERROR, Reason.TRUNCATED})

_MAX_DAMAGED_PLACES = 100
"""After so many a span is taken to end: a file that is noise from some point on costs a pass for each keyframe."""


def _one_pass(watched: WatchedFile, waiting: Sequence[_ClipsInTheMaking], thread_type: ThreadType) -> None:
    """Show frames for the next stretch of video that somebody wants, up to a leap or to the end."""
    span = waiting[0].span
    start, end = _next_stretch(waiting)
    limit_pts = span.grid_start_pts + int(watched.limits.max_seconds / span.time_base)

    def needed(pts: int, until_pts: int) -> bool:
        if end is not None and pts >= end:
            return False
        for maker in waiting:  # noqa: SIM110  asked for each packet, more than once
            if maker.needs(pts, until_pts):
                return True
        return False

    clock = Clock(time_base=span.time_base, start_pts=span.grid_start_pts)
    damaged_pts = waiting[0].damaged_pts
    if damaged_pts is None:
        first_pts = start if start > span.grid_start_pts else None
        source = frames_covering(watched, first_pts, clock, thread_type, needed)
    else:
        source = frames_after(watched, damaged_pts, clock, thread_type, needed)
    with closing(source) as frames:
        shown: TimedFrame | None = None
        for following in frames:
            if following.pts > limit_pts:
                refuse_long(watched.limits, seconds=(following.pts - span.grid_start_pts) * span.time_base)
            refuse_large(watched.limits, following.frame.width, following.frame.height)
            for maker in waiting:
                maker.see(following.pts)
                if shown is not None:
                    maker.show(shown, until_pts=following.pts)
            waiting = [maker for maker in waiting if not maker.is_done]
            if not waiting or (end is not None and following.pts >= end):
                return
            shown = following
    if shown is not None:  # else there is no keyframe after the damage
        for maker in waiting:
            maker.show(shown, until_pts=shown.end_pts)
        if end is not None and shown.end_pts >= end:
            return
    for maker in waiting:
        maker.end(maker.seen_pts if shown is None else shown.end_pts)


def _next_stretch(makers: Sequence[_ClipsInTheMaking]) -> tuple[int, int | None]:
    """From which tick to which (exclusive; None for the end of the video) frames are wanted without a long gap."""
    leap = int(SEEK_GAP_SECONDS / makers[0].span.time_base)
    stretches = sorted((maker.next_stretch(SEEK_GAP_SECONDS) for maker in makers), key=lambda stretch: stretch[0])
    start, end = stretches[0]
    for begin, stop in stretches[1:]:
        if end is None or begin > end + leap:
            break
        end = None if stop is None else max(end, stop)
    return start, end


# Clips out of frames.


@dataclass(kw_only=True, slots=True)
class _ClipInTheMaking:
    index: int
    grid: Grid
    num_frames: int
    """How many it gets if the video lasts."""
    frames: npt.NDArray[np.uint8]
    """uint8 (T, H, W, 3)."""
    geometry: Geometry
    """That of its first frame."""
    pts: list[int] = field(default_factory=list)
    """Ticks of the frames so far."""

    @property
    def is_full(self) -> bool:
        return len(self.pts) == self.num_frames


@dataclass(kw_only=True, slots=True)
class _ClipsInTheMaking:
    """The clips of one span, filled grid time by grid time as frames are shown in order."""

    span: Span
    spec: ClipSpec
    max_clips: int
    layout: ClipTimeline = field(init=False)
    next_clip: int = field(init=False)
    """The first clip not begun yet; at first, that of the halo."""
    begun: list[_ClipInTheMaking] = field(default_factory=list)
    """In order, the full ones too."""
    open_clips: list[_ClipInTheMaking] = field(default_factory=list)
    """Those of them that are not full."""
    end_pts: int | None = None
    """Where the video ended, once that is known."""
    error: VideoError | None = None
    damage: list[VideoError] = field(default_factory=list)
    """What was met so far, where undamaged clips are kept."""
    damaged_pts: int | None = None
    """Where the last of it was met."""
    seen_pts: int = field(init=False)
    """When the last frame began that was decoded."""
    renderer: Renderer = field(init=False)
    _first_clip: int = field(init=False)
    """That of the halo."""
    _stop_clip: int = field(init=False)
    """The one after the last that there can be."""
    times: dict[int, tuple[Grid, int]] = field(default_factory=dict)
    """Of each clip asked for so far, its grid and how many frames it gets if the video lasts."""

    def __post_init__(self) -> None:
        self.layout = ClipTimeline.of(self.span, self.span.part, self.spec)
        self.next_clip = self._first_clip = self.span.first_clip - self.spec.halo_of(self.span.first_clip)
        ends = (self.span.end_clip, None if self.layout.last_clip is None else self.layout.last_clip + 1)
        self._stop_clip = min((end for end in ends if end is not None), default=FOREVER)
        self.seen_pts = self.span.grid_start_pts
        self.renderer = Renderer(self.spec)

    @property
    def is_done(self) -> bool:
        """Whether no further frame is wanted; of an open-ended span not before the end of the part or video."""
        if self.error is not None or self.end_pts is not None:
            return True
        return not self.open_clips and not self._has_more

    @property
    def _has_more(self) -> bool:
        past_end = self.span.end_clip is not None and self.next_clip >= self.span.end_clip
        return not past_end and not self.layout.is_beyond(self.next_clip)

    def next_stretch(self, leap_seconds: float) -> tuple[int, int | None]:
        """From which tick to which (exclusive; None for the end of the video) clips follow one another closely."""
        first = self.open_clips[0].index if self.open_clips else self.next_clip
        last = self._last_before_leap(first, leap_seconds)
        wanted = len(self.open_clips[0].pts) if self.open_clips else 0
        start = self._times_of(first)[0].pts_at(wanted)
        if last is None:
            return start, None
        grid, num_frames = self._times_of(last)
        return start, max(start, grid.pts_at(max(0, num_frames - 1))) + 1

    def _last_before_leap(self, first: int, leap_seconds: float) -> int | None:
        """The last clip that follows without a long gap; None where only the end of the video ends them."""
        if self.layout.placed is None:
            if self.spec.stride - self.spec.clip_seconds > leap_seconds:
                return first
            return self.layout.last_clip if self.span.end_clip is None else self.span.end_clip - 1
        num_clips = len(self.layout.placed) if self.span.end_clip is None else self.span.end_clip
        last = first
        while last + 1 < min(num_clips, len(self.layout.placed)):
            gap = self.layout.start_seconds(last + 1) - self.layout.start_seconds(last) - self.spec.clip_seconds
            if gap > leap_seconds:
                break
            last += 1
        return last

    def needs(self, pts: int, until_pts: int) -> bool:
        """Whether a frame on screen between these ticks, the second exclusive, is in one of the span's clips."""
        clips = self.layout.around(pts, until_pts)
        for index in range(max(self._first_clip, clips.start), min(clips.stop, self._stop_clip)):
            grid, num_frames = self._times_of(index)
            at = grid.first_index_at(pts)
            if at < num_frames and at < grid.first_index_at(until_pts):
                return True
        return False

    def _times_of(self, index: int) -> tuple[Grid, int]:
        found = self.times.get(index)
        if found is None:
            found = self.times[index] = self.layout.grid(index), self.layout.num_frames(index)
        return found

    def show(self, shown: TimedFrame, *, until_pts: int) -> None:
        """Fill the frames that this one is on screen for, as far as the span goes."""
        if self.error is not None:
            return
        try:
            self._fill_with(shown, until_pts)
        except VideoError as error:
            self.error = error

    def _fill_with(self, shown: TimedFrame, until_pts: int) -> None:
        rendered: tuple[npt.NDArray[np.uint8], Geometry] | None = None
        while self._has_more and self._times_of(self.next_clip)[0].first_index_at(until_pts) > 0:
            rendered = rendered or self.renderer.cut(shown)
            self._begin_clip(rendered[1])
        for clip in self.open_clips:
            until = min(clip.grid.first_index_at(until_pts), clip.num_frames)
            if until > len(clip.pts):
                rendered = rendered or self.renderer.cut(shown)
                for slot in range(len(clip.pts), until):
                    clip.frames[slot] = rendered[0]
                    clip.pts.append(shown.pts)
        self.open_clips = [clip for clip in self.open_clips if not clip.is_full]

    def _begin_clip(self, geometry: Geometry) -> None:
        if self.span.end_clip is None and len(self.begun) >= self.max_clips + self.spec.halo_clips:
            claimed = self.span.duration_seconds_from_header
            raise VideoError(
                Reason.LONGER_THAN_HEADER,
                f"more than {self.max_clips} clips after clip {self.span.first_clip}; the header says {claimed:.2f} s",
            )
        grid, num_frames = self._times_of(self.next_clip)
        clip = _ClipInTheMaking(
            index=self.next_clip,
            grid=grid,
            num_frames=num_frames,
            frames=np.empty((self.spec.num_frames, self.spec.height, self.spec.width, 3), np.uint8),
            geometry=geometry,
        )
        self.next_clip += 1
        if clip.num_frames:
            self.begun.append(clip)
            self.open_clips.append(clip)

    def see(self, pts: int) -> None:
        """Take note that a frame begins here; the first one after damage says where whole clips can begin again."""
        if self.damaged_pts is not None and self.seen_pts <= self.damaged_pts < pts:
            while self._has_more and self._times_of(self.next_clip)[0].pts_at(0) < pts:
                self.next_clip += 1
        self.seen_pts = max(self.seen_pts, pts)

    def note_damage(self, error: VideoError) -> None:
        """Give up the clips that are not full, to go on after the damage; at the end if there is nothing after it."""
        self.damage.append(error)
        self.begun = [clip for clip in self.begun if clip.is_full]
        self.open_clips = []
        if self.damaged_pts is None:
            self.damaged_pts = self.seen_pts
        else:  # where nothing was seen since, the next keyframe is damaged too
            self.damaged_pts = max(self.seen_pts, self.damaged_pts + int(1 / self.span.time_base))
        passed = (self.damaged_pts - self.span.grid_start_pts) * self.span.time_base
        past_end = 0 < self.span.duration_seconds_from_header < passed
        if past_end or error.reason is Reason.TRUNCATED or len(self.damage) >= _MAX_DAMAGED_PLACES:
            self.end(self.seen_pts)

    def end(self, end_pts: int) -> None:
        """Take note that the video ends here."""
        self.end_pts = end_pts

    def result(self) -> SpanClips:
        """The clips, the tail policy applied; or the error, TOO_SHORT where the part has no clip at all."""
        if self.error is not None:
            return SpanClips(clips=[], error=self.error)
        begun = self.begun
        if self.end_pts is not None:
            end_seconds = (self.end_pts - self.span.grid_start_pts) * self.span.time_base
            begun = [clip for clip in begun if clip.index < self.layout.num_clips(end_seconds)]
        clips = [clip for clip in begun if len(clip.pts) >= self._fewest_frames(clip.index)]
        if self.damage and not self._is_whole(clips):
            return SpanClips(
                clips=[self._finished(clip) for clip in clips],
                error=VideoError(self.damage[0].reason, self._what_is_damaged(len(clips))),
                num_errors=len(self.damage),
            )
        if not clips and self.span.first_clip == 0:
            return SpanClips(clips=[], error=VideoError(Reason.TOO_SHORT, self._what_is_short(begun)))
        return SpanClips(clips=[self._finished(clip) for clip in clips], num_errors=len(self.damage))

    def _is_whole(self, clips: Sequence[_ClipInTheMaking]) -> bool:
        """Whether damage was met on the way to clips of which none is missing."""
        if self.span.end_clip is None:
            return False
        return sum(clip.index >= self.span.first_clip for clip in clips) == self.span.end_clip - self.span.first_clip

    def _what_is_damaged(self, num_clips: int) -> str:
        first = self.damage[0].detail
        if not num_clips:
            return first
        places = "one damaged place" if len(self.damage) == 1 else f"{len(self.damage)} damaged places, the first"
        return f"{num_clips} clips beside {places}: {first}"

    def _lead(self, index: int) -> int:
        return 0 if index else self.spec.lead_frames

    def _fewest_frames(self, index: int) -> int:
        return min(self.spec.num_frames, self.spec.min_valid_frames + self._lead(index))

    def _what_is_short(self, begun: Sequence[_ClipInTheMaking]) -> str:
        if not begun:
            return f"no frame of the video lies in {self.span.part}"
        lead = self._lead(begun[0].index)
        needed = self._fewest_frames(begun[0].index) - lead
        return f"{len(begun[0].pts) - lead} of the {needed} frames that a clip must have"

    def _finished(self, clip: _ClipInTheMaking) -> Clip:
        num_valid = len(clip.pts)
        clip.frames[num_valid:] = clip.frames[num_valid - 1]
        ticks = clip.pts + clip.pts[-1:] * (self.spec.num_frames - num_valid)
        lead = self._lead(clip.index)
        start = self.layout.start_seconds(clip.index) + lead / self.spec.fps
        return Clip(
            video_id=self.span.video_id,
            clip_index=clip.index,
            frames=clip.frames,
            start_seconds=float(self.span.grid_start_pts * self.span.time_base + start),
            frame_pts_seconds=np.array([float(tick * self.span.time_base) for tick in ticks[lead:]], np.float64),
            num_valid_frames=num_valid - lead,
            lead_frames=lead,
            geometry=clip.geometry,
        )
