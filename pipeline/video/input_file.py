"""The file object a video is read from: opening it, reading ranges, and naming the storage's errors.

Files report trouble of the storage as OSError, or as a VidshardError when they are opened. These become a VideoError
UNREADABLE, whatever FFmpeg or a decoder made of them.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, Protocol, runtime_checkable

from vidshard.schemas.errors import OutageError, VidshardError, one_line
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Limits

if TYPE_CHECKING:  # the process that fetches remote bytes must not load FFmpeg
    from vidshard.pipeline.video.ffmpeg_log import Message


class ReadOnlyFile(io.RawIOBase):
    """Base of read-only files of a known size: their position. A subclass sets both attributes and reads."""

    num_bytes: int
    """Size of the file."""
    _at: int

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """The new position.

        Raises:
            ValueError: it would be negative.
        """
        position = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.num_bytes}[whence] + offset
        if position < 0:
            raise ValueError(f"negative position {position}")
        self._at = position
        return position

    def tell(self) -> int:
        """The position."""
        return self._at

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True


@runtime_checkable
class RangeReader(Protocol):
    """A file that reads several ranges side by side, as a remote one can."""

    def samples(self, offsets: Sequence[int], num_bytes: int) -> list[bytes]:
        """``num_bytes`` bytes from each offset, fewer at the end of the file; raises OSError."""
        ...


@dataclass(slots=True)
class Gap:
    """A gap, and the frames that are wrong if a picture is missing in it; ticks of the clock."""

    start_pts: int
    """Frames presented from here on."""
    end_pts: int | None = None
    """Up to here, the next keyframe; None for the end of the video."""

    def holds(self, pts: int) -> bool:
        """Whether a frame is one of them."""
        return self.start_pts <= pts and (self.end_pts is None or pts < self.end_pts)


@dataclass(slots=True)
class WatchedFile:
    """The file object FFmpeg reads from; it records storage errors, as FFmpeg mistakes some for the end of the file."""

    file: BinaryIO
    error: BaseException | None = None
    """The first storage error; None while there was none."""
    num_bytes: int = 0
    limits: Limits = field(default_factory=Limits)
    opening: list[Message] = field(default_factory=list)
    """Complaints of FFmpeg about packets that it passed over while it opened the file."""
    gaps: dict[int, Gap] = field(default_factory=dict)
    """Gaps in the times of the packets that were read, by their start."""
    next_recording: int | None = None
    """Offset of another recording, once everything before it was read; None if there is none."""

    def read(self, num_bytes: int = -1) -> bytes:
        """At most this many bytes."""
        try:
            return self.file.read(num_bytes)
        except OSError as error:
            self.error = self.error or error
            raise

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """The new position; a negative number, as FFmpeg wants it, where the position is outside of the file."""
        try:
            return self.file.seek(offset, whence)
        except (OSError, ValueError) as error:  # files in memory refuse negative positions with a ValueError
            if self._is_outside(offset, whence):
                return -errno.EINVAL
            if not isinstance(error, ValueError):
                self.error = self.error or error
            raise

    def _is_outside(self, offset: int, whence: int) -> bool:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.file.tell(), os.SEEK_END: self.num_bytes}[whence]
        return not 0 <= base + offset <= self.num_bytes

    def tell(self) -> int:
        """The position."""
        return self.file.tell()

    def samples(self, offsets: Sequence[int], num_bytes: int) -> list[bytes]:
        """``num_bytes`` bytes from each offset, fewer only at the end of the file. The position is lost."""
        if isinstance(self.file, RangeReader):
            try:
                return self.file.samples(offsets, num_bytes)
            except OSError as error:
                self.error = self.error or error
                raise
        parts = []
        for offset in offsets:
            self.seek(offset)
            parts.append(read_exactly(self, num_bytes))
        return parts


def open_file(uri: str, open_input: Callable[[str], BinaryIO]) -> BinaryIO:
    """Open a file with the caller's function.

    Raises:
        VideoError: UNREADABLE: the storage refused.
        OutageError: the storage does not answer.
    """
    try:
        return open_input(uri)
    except (OutageError, VideoError):  # of a member of an archive
        raise
    except (OSError, VidshardError) as error:
        raise VideoError(Reason.UNREADABLE, one_line(error)) from error


@contextmanager
def opened(source: str | BinaryIO) -> Iterator[BinaryIO]:
    """A local path opened, and closed at the end; an open file is passed through.

    Raises:
        VideoError: UNREADABLE: the file cannot be opened.
    """
    if not isinstance(source, str):
        yield source
        return
    with open_file(source, lambda path: open(path, "rb")) as file:
        yield file


@contextmanager
def storage_failures_named(file: BinaryIO, limits: Limits | None = None) -> Iterator[WatchedFile]:
    """Watch a file while it is decoded, and blame the storage for whatever fails after the storage did.

    Raises:
        VideoError: UNREADABLE: reading failed, whatever FFmpeg or a decoder made of it.
        OutageError: the storage does not answer any more.
    """
    watched = WatchedFile(file, limits=limits or Limits())
    try:
        watched.num_bytes = watched.seek(0, os.SEEK_END)
        yield watched
    except (VideoError, OSError) as error:
        if watched.error is None:
            raise
        raise _failure_of(watched.error) from error
    if watched.error is not None:
        raise _failure_of(watched.error) from watched.error


def _failure_of(error: BaseException) -> Exception:
    return error if isinstance(error, OutageError) else VideoError(Reason.UNREADABLE, one_line(error))


def read_exactly(file: BinaryIO | WatchedFile, num_bytes: int) -> bytes:
    """``num_bytes`` bytes, fewer only at the end of the file."""
    parts = []
    while num_bytes > 0 and (part := file.read(num_bytes)):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


@contextmanager
def position_kept(watched: WatchedFile) -> Iterator[None]:
    """Return to the position at which FFmpeg goes on reading."""
    position = watched.tell()
    try:
        yield
    finally:
        watched.seek(position)
