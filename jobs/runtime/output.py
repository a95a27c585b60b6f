"""Standard output and standard error that cannot fail a job.

Characters that a console cannot show are replaced. Once a pipe is closed, a terminal lost or a disk full, what is
printed is dropped, and the job goes on.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import TextIO

_PLAIN = {"·": "-", "×": "x", "–": "-", "—": "-", "…": "...", "→": "->", "±": "+-", "µ": "u"}
_PLAIN_ERRORS = "vidshard.plain"

_lost: list[OSError] = []


def lost_report() -> str | None:
    """Why standard output was lost though somebody was to read it, such as a full disk; None if it was not.

    A reader that goes away, and a terminal that is lost, took what they wanted.
    """
    errors = (error for error in _lost if error.errno not in (errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET))
    return next((error.strerror for error in errors), None)


def make_output_safe() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` by streams that never raise; descriptors that are closed are opened."""
    codecs.register_error(_PLAIN_ERRORS, _in_plain_characters)
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # or the next file or socket that is opened would get this number, and the output
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    sys.stdout, sys.stderr = _safe(sys.stdout, 1), _safe(sys.stderr, 2)


def _safe(stream: TextIO | None, number: int) -> TextIO:
    with suppress(OSError, ValueError):
        if stream is not None:
            stream.flush()
    return io.TextIOWrapper(
        _UnfailingFile(number),  # type: ignore[type-var]
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors=_PLAIN_ERRORS,
        write_through=True,
    )


def _in_plain_characters(error: UnicodeError) -> tuple[str | bytes, int]:
    """Error handler of codecs: the nearest plain characters, or escapes."""
    if not isinstance(error, UnicodeEncodeError):
        return codecs.backslashreplace_errors(error)
    plain = "".join(
        _PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode()
        for character in error.object[error.start : error.end]
    )
    return plain, error.end


class _UnfailingFile(io.RawIOBase):
    """Raw output to a descriptor, which is pointed to ``/dev/null`` after the first error."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def writable(self) -> bool:
        """Whether it can be written: yes."""
        return True

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._number

    def isatty(self) -> bool:
        """Whether the descriptor is a terminal."""
        return os.isatty(self._number)

    def write(self, data: object) -> int:
        """Write all bytes, or drop them after an error; returns their number."""
        left = memoryview(data).cast("B")  # type: ignore[arg-type]
        size = len(left)
        while left:
            try:
                left = left[os.write(self._number, left) :]
            except BlockingIOError:  # another process made the terminal non-blocking
                select.select([], [self._number], [], 1.0)
            except OSError as error:
                if self._number == 1:
                    _lost.append(error)
                _point_to_nothing(self._number)  # also for what is not Python, and for children
                break
        return size


def _point_to_nothing(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
