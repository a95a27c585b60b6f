"""Frames of a video as it is presented: the frames of its media, cut as an mp4's edit list says.

FFmpeg applies an edit list of one cut exactly, if no gap follows and no picture is held. With several cuts and
reordered pictures it gives frames times that are one or two frames off, so that two have the same time, or times run
backwards. Here such a file is opened without its edit list. Each cut is sought and decoded by itself, and its frames
are moved to the cut's place in the presentation.

A cut shows the frames whose time lies in it, as FFmpeg does. Writers round its length to ticks of the movie, often
milliseconds: a frame that would be on screen for less than such a tick is none of it, and a cut that ends less than a
tick from the end of a frame ends with that frame.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt

import vidshard.pipeline.video.frames as media
from vidshard.pipeline.video.container import ThreadType, open_video
from vidshard.pipeline.video.frame_order import TimedFrame
from vidshard.pipeline.video.input_file import WatchedFile, position_kept
from vidshard.pipeline.video.mp4 import Edit, Track, read_edits, read_frame_times, read_tracks, second_recording
from vidshard.pipeline.video.packet_schedule import FOREVER, Needed
from vidshard.pipeline.video.packets import SeekPoint
from vidshard.pipeline.video.timestamps import Clock, TickConverter, time_base_of
from vidshard.schemas.rejections import VideoError


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A stretch of the media, and its place in the presentation; all in ticks of the media."""

    start: int
    """When its first frame is presented."""
    end: int
    """When the next one starts, or the presentation ends."""
    first: int
    """Time of its first frame in the media."""
    until: int
    """Frames of the media from this time on do not belong to it."""

    def shown(self, ticks: int) -> int:
        """The presentation time of a frame of the media."""
        return self.start + ticks - self.first


@dataclass(frozen=True, kw_only=True, slots=True)
class _CutVideo:
    """A video of several cuts."""

    watched: WatchedFile
    thread_type: ThreadType
    cuts: Sequence[Cut]
    """In the order of the presentation; each has a frame."""
    clock: Clock
    """The container's ticks."""
    convert: TickConverter
    """The container's ticks to those of all times that callers give and get."""

    def frames(
        self, cut: Cut, needed: Needed, *, from_pts: int | None = None, after_pts: int | None = None
    ) -> Generator[TimedFrame, None, None]:
        """The frames of a cut, at their times of the presentation.

        Args:
            cut: which one.
            needed: as everywhere, by times of the presentation.
            from_pts: the first frame is the last one not after it; None for the start of the cut.
            after_pts: begin at the first keyframe after it, which need not exist.
        """

        def needed_here(pts: int, until_pts: int) -> bool:
            begin, end = max(pts, cut.first), min(until_pts, cut.until)
            if begin >= end:
                return False
            return needed(self.convert(cut.shown(begin)), self._end(cut, end))

        if after_pts is not None:
            at = self._media_ticks(cut, after_pts)
            frames = media.frames_after(self.watched, at, self.clock, self.thread_type, needed_here, with_edits=False)
        else:
            at = cut.first if from_pts is None else self._media_ticks(cut, from_pts)
            frames = media.frames_covering(
                self.watched, at, self.clock, self.thread_type, needed_here, with_edits=False
            )
        with closing(frames):
            for frame in frames:
                if frame.pts >= cut.until:
                    return
                if frame.pts >= cut.first:
                    end_pts = self._end(cut, min(frame.end_pts, cut.until))
                    yield replace(frame, pts=self.convert(cut.shown(frame.pts)), end_pts=end_pts)

    def _end(self, cut: Cut, ticks: int) -> int:
        """When a frame that ends at a tick of the media leaves the screen."""
        if ticks == FOREVER:
            return FOREVER
        return self.convert(cut.end if ticks >= cut.until else min(cut.end, cut.shown(ticks)))

    def _media_ticks(self, cut: Cut, pts: int) -> int:
        """The tick of the media that is presented at a time, or the nearest one of the cut."""
        ticks = self.convert.to_container(pts) - cut.start + cut.first
        return min(max(ticks, cut.first), cut.until - 1)


def frames_covering(
    watched: WatchedFile, needed_pts: int | None, clock: Clock, thread_type: ThreadType, needed: Needed
) -> Generator[TimedFrame, None, None]:
    """Frames in presentation order, the first one not after a tick; see ``frames.frames_covering``."""
    video = _cut_video(watched, thread_type, clock)
    if video is None:
        yield from media.frames_covering(watched, needed_pts, clock, thread_type, needed)
        return
    number = 0
    if needed_pts is not None:
        number = max((n for n, cut in enumerate(video.cuts) if video.convert(cut.start) <= needed_pts), default=0)
    for cut in video.cuts[number:]:
        if not needed(video.convert(cut.start), FOREVER):
            return
        yield from video.frames(cut, needed, from_pts=needed_pts)
        needed_pts = None
    with position_kept(watched):
        watched.next_recording = second_recording(watched)


def frames_after(
    watched: WatchedFile, pts: int, clock: Clock, thread_type: ThreadType, needed: Needed
) -> Generator[TimedFrame, None, None]:
    """The first keyframe after a tick, then the wanted frames; see ``frames.frames_after``."""
    video = _cut_video(watched, thread_type, clock)
    if video is None:
        yield from media.frames_after(watched, pts, clock, thread_type, needed)
        return
    for cut in video.cuts:
        if video.convert(cut.start) > pts:
            yield from video.frames(cut, needed)
        elif video.convert(cut.end) > pts:
            yield from video.frames(cut, needed, after_pts=pts)


def first_frame(watched: WatchedFile) -> Generator[tuple[TimedFrame, Fraction | None], None, None]:
    """Yield the first frame that can be decoded, once; its stream is open until the generator is closed.

    Yields:
        The frame, in the container's ticks, and the seconds from it to the end of the presentation, where its edit list
        tells them.

    Raises:
        VideoError: as ``frames.decode_from``.
    """
    video = _cut_video(watched, "NONE", None)
    if video is not None:
        end = video.cuts[-1].end
        with suppress(VideoError), closing(video.frames(video.cuts[0], lambda *_: True)) as frames:
            for first in frames:
                yield first, (end - first.pts) * video.clock.time_base
                return
    with closing(media.decode_from(watched, SeekPoint(), keep_going=True)) as whole:
        yield next(whole), None  # or it raises NO_FRAMES


def has_several_cuts(watched: WatchedFile) -> bool:
    """Whether an edit list presents several cuts of the video."""
    return _cut_video(watched, "NONE", None) is not None


def _cut_video(watched: WatchedFile, thread_type: ThreadType, clock: Clock | None) -> _CutVideo | None:
    """The video with its cuts; None where FFmpeg presents its edit list."""
    tracks = {track.track_id: track for track in read_tracks(watched)}
    edits = {key: read_edits(watched, track) for key, track in tracks.items()}
    if not any(map(_needs_cutting, edits.values())):
        return None
    with open_video(watched, with_edits=False) as (_, stream):
        track = tracks.get(stream.id)
        if track is None or time_base_of(stream) != Fraction(1, track.timescale):
            return None
        if not _needs_cutting(edits[stream.id]):
            return None
        convert = clock.converter(stream) if clock is not None else TickConverter()
        same = Clock(time_base=time_base_of(stream), start_pts=0)
    cuts = _cuts(watched, track, edits[track.track_id])
    return _CutVideo(watched=watched, thread_type=thread_type, cuts=cuts, clock=same, convert=convert) if cuts else None


def _needs_cutting(edits: Sequence[Edit]) -> bool:
    """Whether FFmpeg does not present an edit list: it has several cuts, holds a picture, or has a gap behind its cut.

    FFmpeg plays the media from its start in such a gap, and plays on where a picture is to be held.
    """
    lasting = [edit for edit in edits if edit.seconds > 0]
    cuts = [number for number, edit in enumerate(lasting) if edit.media_time >= 0]
    return len(cuts) > 1 or (len(cuts) == 1 and (lasting[cuts[0]].dwells or cuts[0] + 1 < len(lasting)))


def _cuts(watched: WatchedFile, track: Track, edits: Sequence[Edit]) -> list[Cut]:
    """The cuts that show a frame; none where the index does not tell the times of the frames."""
    times = read_frame_times(watched, track)
    if times is None:
        return []
    tick = Fraction(track.timescale, track.movie_timescale)  # of the movie, in ticks of the media
    cuts: list[Cut] = []
    start = Fraction(0)
    for edit in edits:
        length = edit.seconds * track.timescale
        at = bisect_left(times, max(0, edit.media_time))
        if edit.media_time >= 0 and at < len(times) - 1 and (edit.dwells or times[at] < edit.media_time + length):
            if edit.dwells:
                at = max(0, bisect_right(times, edit.media_time, hi=len(times) - 1) - 1)
                until = at + 1
            else:
                until = _end_of_cut(times, at, edit.media_time + length, tick)
                end_seen = int(times[until]) - edit.media_time
                if abs(length - end_seen) <= tick:
                    length = Fraction(end_seen)
            lead = 0 if edit.dwells else int(times[at]) - edit.media_time
            cuts.append(
                Cut(
                    start=round(start) + lead,
                    end=round(start + length),
                    first=int(times[at]),
                    until=int(times[until]),
                )
            )
        start += length
    # a gap shows the last frame before it
    return [replace(cut, end=following.start) for cut, following in pairwise(cuts)] + cuts[-1:]


def _end_of_cut(times: npt.NDArray[np.int64], first: int, end: Fraction, tick: Fraction) -> int:
    """Index of the first frame after a cut, which may be the end of the last frame.

    Args:
        times: of all frames, and the end of the last one.
        first: index of the first frame of the cut.
        end: of the cut, exclusive, as rounded.
        tick: how far it may be off.
    """
    until = min(bisect_left(times, math.ceil(end)), len(times) - 1)
    shown = end - int(times[until - 1])
    if until - 1 > first and shown <= tick and 2 * shown < int(times[until] - times[until - 1]):
        until -= 1
    return max(until, first + 1)
