"""Continuation: one pass over a file that can only be decoded from far before, though its spans are asked for singly.

Some files have one keyframe, or none that can be trusted: each span then decodes all that lies before it, and the spans
together decode the file many times over. So the decoding process keeps the decoder of the last such file after a span.
The next span, or a later one, goes on from there. All frames are those of decoding the span by itself.

Memory: one open decoder, and the frames of a halo (256 MiB at most), until another video is decoded.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from vidshard.pipeline.video.clip_builder import ClipBuilder
from vidshard.pipeline.video.container import ThreadType
from vidshard.pipeline.video.frame_order import TimedFrame
from vidshard.pipeline.video.input_file import WatchedFile
from vidshard.pipeline.video.packet_schedule import FOREVER
from vidshard.pipeline.video.presentation import frames_covering
from vidshard.pipeline.video.timestamps import Clock
from vidshard.schemas.video import Limits

FAR_SECONDS = 10
"""A span that decodes more than this before its first frame is continued."""

_MAX_BYTES_KEPT = 256 << 20


class FarEntryError(Exception):
    """Decoding of a span starts far before it."""


@dataclass(slots=True)
class _Wanted:
    """The frames that are wanted: those of the present spans, and all behind them."""

    builders: Sequence[ClipBuilder] = ()
    end: int = 0

    def __call__(self, pts: int, until_pts: int) -> bool:
        return until_pts > self.end or any(builder.times.needs(pts, until_pts) for builder in self.builders)


class _Rebound(io.RawIOBase):
    """A file that is another object for each span, with a position of its own."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.file: BinaryIO | None = None
        self._num_bytes, self._at = num_bytes, 0

    def read(self, num_bytes: int | None = -1, /) -> bytes:
        assert self.file is not None
        self.file.seek(self._at)
        data = self.file.read(-1 if num_bytes is None else num_bytes)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        position = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._num_bytes}[whence] + offset
        if position < 0:
            raise ValueError(f"negative position {position}")
        self._at = position
        return position

    def tell(self) -> int:
        return self._at


@dataclass(kw_only=True)
class Continuation:
    """The frames of one file from some place on, of which spans take what they need."""

    key: Hashable
    """Properties of file, times and rules that a later span must share."""
    watched: WatchedFile
    _wanted: _Wanted
    _frames: Generator[TimedFrame, None, None]
    _recent: deque[TimedFrame] = field(default_factory=deque)
    """The last frames given."""
    _keep_from: int = FOREVER
    """Frames on screen from this tick on are kept in any case, as the next span begins there."""

    @classmethod
    def start(
        cls, key: Hashable, file: BinaryIO, limits: Limits, start_pts: int, clock: Clock, thread_type: ThreadType
    ) -> Continuation:
        """Begin to decode a file so that a tick is reached; nothing is read yet."""
        num_bytes = file.seek(0, os.SEEK_END)
        watched = WatchedFile(cast(BinaryIO, _Rebound(num_bytes)), num_bytes=num_bytes, limits=limits)
        wanted = _Wanted()
        frames = frames_covering(watched, start_pts, clock, thread_type, wanted)
        return cls(key=key, watched=watched, _wanted=wanted, _frames=frames)

    def bind(self, file: BinaryIO | None) -> None:
        """Read from this file object from now on, which has the same content; None lets go of it."""
        cast(_Rebound, self.watched.file).file = file

    def reaches(self, pts: int) -> bool:
        """Whether the frame at a tick is still to come, or kept."""
        return not self._recent or self._recent[0].pts <= pts

    def frames(self, builders: Sequence[ClipBuilder], end: int | None) -> Generator[TimedFrame, None, None]:
        """Frames in presentation order, from a frame not after the first one needed.

        Args:
            builders: of the spans that need frames now.
            end: tick after all frames that they need; None for the end of the video.
        """
        self._wanted.builders = builders
        self._wanted.end = FOREVER if end is None else end
        self._keep_from = _start_of_next(builders)
        yield from list(self._recent)
        while (frame := next(self._frames, None)) is not None:
            self._recent.append(frame)
            self._forget_old(frame)
            yield frame

    def _forget_old(self, last: TimedFrame) -> None:
        most = max(2, _MAX_BYTES_KEPT // max(1, 3 * last.frame.width * last.frame.height))
        while len(self._recent) > 2 and (self._recent[1].pts <= self._keep_from or len(self._recent) > most):
            self._recent.popleft()

    def close(self) -> None:
        """Let go of the decoder."""
        self._frames.close()


def _start_of_next(builders: Sequence[ClipBuilder]) -> int:
    """Tick at which the halo of the span after these begins; FOREVER where there is no halo."""
    last = builders[-1]
    if last.span.end_clip is None or not last.times.spec.halo_clips:
        return FOREVER
    first_clip = max(0, last.span.end_clip - last.times.spec.halo_clips)
    return last.times.times(first_clip)[0].pts_at(0)
