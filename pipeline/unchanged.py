"""Reading a video that must not change: its state and its content are compared with the plan before and after.

A copy that is still being written, a synchronisation with equal sizes and time stamps (``rsync -t``), or an attacker
may replace a file between planning and decoding, or in the middle of it. Its frames must not be stored under the id of
what was there before.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import BinaryIO, TypeVar

from vidshard.pipeline import storage
from vidshard.pipeline.video.content_id import has_content
from vidshard.pipeline.video.input_file import storage_failures_named
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Limits

Result = TypeVar("Result")

_ATTEMPTS = 2


def refuse_changed(uri: str, fingerprint: str) -> None:
    """Refuse a file that its storage states to be another one than when it was planned.

    Args:
        uri: an absolute local path or a URL.
        fingerprint: size and time stamp, or tag, of the file when it was planned.

    Raises:
        VideoError: CHANGED.
    """
    now = storage.fingerprint(uri)
    if now is not None and now != fingerprint:
        raise VideoError(
            Reason.CHANGED, f"its size and time stamp are {now} now; when it was opened they were {fingerprint}"
        )


def read_unchanged(file: BinaryIO, video_id: str, limits: Limits, read: Callable[[BinaryIO], Result]) -> Result:
    """Read a planned video from an open file so that all that is read is the planned content.

    Args:
        file: open and seekable; it stays open.
        video_id: the id of the planned content, which is compared once.
        limits: the run's, for the frame rate of archives.
        read: reads the file; called again when only the file's attributes were changed meanwhile.

    Raises:
        VideoError: UNREADABLE: the storage refused. CHANGED: the content is another one, or changes while it is read.
        OutageError: the storage does not answer.
    """
    for attempt in range(_ATTEMPTS):
        before = _state(file)
        with storage_failures_named(file, limits) as watched:
            if not has_content(watched, video_id):
                raise VideoError(
                    Reason.CHANGED,
                    "its content is not what was planned, though size and time stamp are: give it a new time stamp "
                    "(touch) before the next run",
                )
        result = read(file)
        after = _state(file)
        if before == after:
            break
        # links, owners and permissions change the last of the three alone, and so does who hides a change
        if before is None or after is None or before[:2] != after[:2] or attempt == _ATTEMPTS - 1:
            raise VideoError(Reason.CHANGED, "it was written to while it was decoded")
    return result


def _state(file: BinaryIO) -> tuple[int, int, int] | None:
    """Size, time of the last write and of the last change of attributes, in nanoseconds; None in memory or remote."""
    try:
        found = os.fstat(file.fileno())
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
