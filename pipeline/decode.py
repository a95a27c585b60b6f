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
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from pipeline.container import (
    ThreadType,
    WatchedFile,
    codec_name,
    one_line,
    opened,
    opening_errors,
    read_exactly,
    seconds_from_header,
    storage_failures_named,
    time_base_of,
)
from pipeline.frames import Shown, Start, decode_from, frames_covering, seconds_from_packets
from pipeline.geometry import display_size, place
from pipeline.picture import orientation_of, render
from pipeline.sampling import Grid
from schemas.video import Clip, ClipSpec, Geometry, Reason, Span, VideoError, VideoProbe, VideoRef, VideoSource

_CHUNK_BYTES = 1 << 16


def probe_video(ref: VideoRef, open_input: Callable[[str], BinaryIO]) -> VideoProbe:
    """What the header says of a video, and the time of its first frame.

    Reads the header, some 300 KiB for the content's fingerprint and the first frame; the whole file only where no
    duration is stated anywhere.

    Args:
        ref: the file.
        open_input: gives a seekable binary file for ``ref.uri``; it is closed here.

    Raises:
        VideoError: UNREADABLE, EMPTY_FILE, NOT_A_VIDEO, NO_VIDEO_STREAM, NO_FRAMES, UNSUPPORTED, TRUNCATED (an mp4
            without its index) or DECODE_ERROR (a container whose header is damaged).
    """
    try:
        file = open_input(ref.uri)
    except opening_errors() as error:
        raise VideoError(Reason.UNREADABLE, one_line(error)) from error
    with file, storage_failures_named(file) as watched:
        video_id = fingerprint(watched)
        with closing(decode_from(watched, Start(), keep_going=True)) as frames:
            first = next(frames)  # or it raises NO_FRAMES
            stream = first.stream
            orientation = orientation_of(first.frame)
            width, height = display_size(first.frame.width, first.frame.height, stream.sample_aspect_ratio, orientation)
            source = VideoSource(
                width=width,
                height=height,
                codec=codec_name(stream),
                fps=float(stream.average_rate or 0),
                rotation_degrees=orientation.rotation_degrees,
            )
            time_base = time_base_of(stream)
            duration_seconds = seconds_from_header(stream, first.pts * time_base)
        if duration_seconds is None:
            duration_seconds = seconds_from_packets(watched, first.pts)
        return VideoProbe(
            video_id=video_id,
            uri=ref.uri,
            num_bytes=watched.num_bytes,
            time_base=time_base,
            grid_start_pts=first.pts,
            duration_seconds_from_header=float(duration_seconds),
            source=source,
        )


def fingerprint(file: BinaryIO | WatchedFile) -> str:
    """24 hex digits of a file's content: its size and five 64 KiB samples, or all of a small one.

    The same for copies anywhere, whatever their name. Two files of equal size that differ only between the samples
    share it; video files made by a program differ in their index and timestamps, which lie at the ends.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    digest = hashlib.blake2b(num_bytes.to_bytes(8, "little"), digest_size=12)
    last = num_bytes - _CHUNK_BYTES
    offsets = (0, last // 4, last // 2, last * 3 // 4, last) if num_bytes > 5 * _CHUNK_BYTES else (0,)
    for offset in offsets:
        file.seek(offset)
        digest.update(read_exactly(file, _CHUNK_BYTES if len(offsets) > 1 else num_bytes))
    file.seek(0)
    return digest.hexdigest()


def decode_span(
    span: Span, spec: ClipSpec, source: str | BinaryIO, *, max_clips: int, thread_type: ThreadType = "NONE"
) -> list[Clip]:
    """Decode one span of a video.

    Args:
        span: which clips; from ``plan_spans``.
        spec: the grid and the geometry; the same that the span was planned with.
        source: a local path, or a seekable binary file that stays open.
        max_clips: the open-ended last span may hold this many clips, not more: the limit on memory, as
            ``max_clips * spec.clip_bytes`` bytes of frames are held at once.
        thread_type: how the decoder uses threads; one thread unless asked, as many tasks run side by side.

    Returns:
        The span's clips in order. Fewer than planned, or none, where the video ended before the header said so; a
        span after the first may be empty.

    Raises:
        VideoError: DECODE_ERROR, TRUNCATED, LONGER_THAN_HEADER, TOO_SHORT, NO_FRAMES, UNSUPPORTED, UNREADABLE, and
            whatever ``probe_video`` refuses, should the file have changed since.
    """
    grid = Grid.of(span, spec)
    clips = _ClipsInTheMaking(span=span, spec=spec, grid=grid, max_clips=max_clips)
    with opened(source) as file, storage_failures_named(file) as watched:
        needed_pts = grid.pts_at(clips.position - spec.lead_frames) if clips.position else None
        needed = clips.needed
        with closing(frames_covering(watched, needed_pts, span.time_base, thread_type, needed)) as frames:
            shown: Shown | None = None
            for following in frames:
                if shown is not None:
                    clips.show(shown, until=grid.first_index_at(following.pts) + spec.lead_frames)
                if clips.full:
                    return clips.finished()
                shown = following
        assert shown is not None, "a video without frames is refused where it is decoded"
        clips.show(shown, until=grid.first_index_at(shown.end_pts) + spec.lead_frames)
        return clips.finished()


# Clips out of frames.


@dataclass(kw_only=True, slots=True)
class _ClipsInTheMaking:
    """The clips of one span, filled grid time by grid time."""

    span: Span
    spec: ClipSpec
    grid: Grid
    max_clips: int
    first_clip: int = field(init=False)
    """Index of the first clip that is made; those before the span's own are its halo."""
    position: int = field(init=False)
    """The next frame to fill, counted from the first one of clip 0."""
    frames: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    """Per clip, uint8 (T, H, W, 3)."""
    pts: list[list[int]] = field(default_factory=list)
    """Per clip, the ticks of the frames so far."""
    geometries: list[Geometry] = field(default_factory=list)
    """Per clip, that of its first frame."""
    reformatter: VideoReformatter = field(default_factory=VideoReformatter)

    def __post_init__(self) -> None:
        self.first_clip = self.span.first_clip - self.spec.halo_of(self.span.first_clip)
        self.position = self.first_clip * self.spec.num_frames

    @property
    def needed(self) -> Callable[[int, int], bool]:
        """Whether a frame that is on screen from one tick to another, exclusive, is one of the span's."""
        first = max(0, self.position - self.spec.lead_frames)
        end = None if self.span.end_clip is None else self.spec.first_frame(self.span.end_clip)
        first_index_at = lru_cache(maxsize=64)(self.grid.first_index_at)  # the same few ticks are asked for again

        def is_needed(pts: int, next_pts: int) -> bool:
            begin = max(first, first_index_at(pts))
            return begin < first_index_at(next_pts) and (end is None or begin < end)

        return is_needed

    @property
    def full(self) -> bool:
        """Whether every grid time of the span has its frame; never true of an open-ended one."""
        return self.span.end_clip is not None and self.position >= self.span.end_clip * self.spec.num_frames

    def show(self, shown: Shown, *, until: int) -> None:
        """Fill the frames before ``until`` with this one, as far as the span goes."""
        if self.span.end_clip is not None:
            until = min(until, self.span.end_clip * self.spec.num_frames)
        if until <= self.position:
            return
        rgb, geometry = render(shown, self.spec, self.reformatter)
        for index in range(self.position, until):
            slot = index % self.spec.num_frames
            if slot == 0:
                self._begin_clip(geometry)
            place(rgb, geometry, self.frames[-1][slot])
            self.pts[-1].append(shown.pts)
        self.position = until

    def _begin_clip(self, geometry: Geometry) -> None:
        if self.span.end_clip is None and len(self.frames) >= self.max_clips + self.spec.halo_clips:
            claimed = self.span.duration_seconds_from_header
            raise VideoError(
                Reason.LONGER_THAN_HEADER,
                f"more than {self.max_clips} clips after clip {self.span.first_clip}; the header says {claimed:.2f} s",
            )
        self.frames.append(np.empty((self.spec.num_frames, self.spec.height, self.spec.width, 3), np.uint8))
        self.pts.append([])
        self.geometries.append(geometry)

    def finished(self) -> list[Clip]:
        """The clips, the tail policy applied.

        Raises:
            VideoError: TOO_SHORT: under ``drop``, a video without one whole clip.
        """
        num_frames = self.spec.num_frames
        if self.spec.tail == "drop" and self.pts and len(self.pts[-1]) < num_frames:
            if len(self.pts) == 1 and self.first_clip == 0:
                num_times, needed = (n - self.spec.lead_frames for n in (len(self.pts[0]), num_frames))
                raise VideoError(Reason.TOO_SHORT, f"{num_times} of the {needed} frames of one clip")
            del self.frames[-1], self.pts[-1], self.geometries[-1]
        clips = []
        for number, (frames, pts, geometry) in enumerate(zip(self.frames, self.pts, self.geometries, strict=True)):
            clip_index = self.first_clip + number
            lead = 0 if clip_index else self.spec.lead_frames
            num_valid = len(pts)
            frames[num_valid:] = frames[num_valid - 1]
            ticks = pts + pts[-1:] * (num_frames - num_valid)
            clips.append(
                Clip(
                    video_id=self.span.video_id,
                    clip_index=clip_index,
                    frames=frames,
                    start_seconds=float(self.grid.seconds_at(self.spec.first_frame(clip_index) + lead)),
                    frame_pts_seconds=np.array(
                        [float(tick * self.span.time_base) for tick in ticks[lead:]], np.float64
                    ),
                    num_valid_frames=num_valid - lead,
                    lead_frames=lead,
                    geometry=geometry,
                )
            )
        return clips
