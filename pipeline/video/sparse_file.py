"""Sparse files: those of which next to nothing is stored are refused before a decoder looks for frames in their holes.

A hole reads as zeros. FFmpeg searches a hole of 20 GiB in a file without an index until its time is over, at the cost
of a CPU and of no byte on the attacker's disk. Downloads that reserve their space first leave such files as well.
"""

from __future__ import annotations

import errno
import os
import stat

from vidshard.schemas.rejections import Reason, VideoError

_LEAST_SHARE = 64
"""At least one byte in so many must be stored."""

_SMALL_BYTES = 64 << 20
"""Files up to this size may have holes: reading them through takes no time worth saving."""

_MAX_EXTENTS = 4096


def refuse_sparse(path: str) -> None:
    """Refuse a local file that consists of holes.

    File systems that do not tell where their holes are count as without any.

    Raises:
        VideoError: EMPTY_FILE: nothing of it is stored. TRUNCATED: less than one byte in 64.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return  # opening it again says why
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size <= _SMALL_BYTES:
            return
        stored = _stored_bytes(handle, found.st_size)
    except OSError:
        return
    finally:
        os.close(handle)
    if stored == 0:
        raise VideoError(Reason.EMPTY_FILE, f"a sparse file: nothing of its {found.st_size:,} bytes is stored")
    if stored * _LEAST_SHARE < found.st_size:
        raise VideoError(
            Reason.TRUNCATED, f"a sparse file: {stored:,} of its {found.st_size:,} bytes are stored, the rest are holes"
        )


def _stored_bytes(handle: int, num_bytes: int) -> int:
    """Bytes outside of holes; all of them where there are too many pieces to count."""
    stored, at = 0, 0
    for _ in range(_MAX_EXTENTS):
        try:
            start = os.lseek(handle, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return stored
            raise
        at = os.lseek(handle, start, os.SEEK_HOLE)
        stored += at - start
        if at >= num_bytes:
            return stored
    return num_bytes
