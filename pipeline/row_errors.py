"""Row boundary: any exception that one row's bytes or address cause becomes a value of that row.

A foreseen one is a VideoError already. An unforeseen one is a defect of this program or of a library; the row names it,
the log has its traceback, and the run goes on. Only an outage passes: a storage that does not answer is no row's fault.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Collection
from pathlib import PurePath

from vidshard.pipeline.storage import is_of_one_site
from vidshard.schemas.errors import OutageError, UserError, VidshardError, one_line
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.text import readable_lines
from vidshard.schemas.uris import shown_uri, without_secrets

_log = logging.getLogger("vidshard.pipeline.rows")

_FRAME = re.compile(r'File "(?P<file>[^"\n]+)", line (?P<line>\d+), in (?P<function>\S+)')


def row_error(error: Exception, uri: str, storage_hosts: Collection[str] = ()) -> VideoError:
    """The error of the row that an exception arose from.

    Args:
        error: anything that handling the row raised.
        uri: address of the row's video, or of its signal.
        storage_hosts: the web servers that the run depends on.

    Returns:
        VideoErrors as they are, refusals of a storage as UNREADABLE, and anything else as INTERNAL_ERROR. Its detail
        names the exception's type and place, and not its words, which may hold parts of the file or of the address.

    Raises:
        OutageError: ``error`` is one, and not of a single web server among many.
    """
    if isinstance(error, UserError) or (isinstance(error, OutageError) and not is_of_one_site(uri, storage_hosts)):
        raise error
    if isinstance(error, VideoError):
        return error
    if isinstance(error, VidshardError):
        return VideoError(Reason.UNREADABLE, one_line(error))
    log_unforeseen(error, uri)
    return VideoError(Reason.INTERNAL_ERROR, f"{type(error).__name__} {_place(error)}")


def log_unforeseen(error: Exception, uri: str) -> None:
    """Write the traceback of an exception that no check foresaw to the log, without credentials.

    Args:
        error: the exception.
        uri: what it arose from.
    """
    text = "".join(traceback.format_exception(error))
    text = readable_lines(without_secrets(text.replace(uri, "URI"), uri))
    _log.error("%s: unforeseen %s\n%s", shown_uri(uri), type(error).__name__, text)


def _place(error: Exception) -> str:
    """The innermost line that the exception passed, in the decoding process if it came from there."""
    noted = [frame for note in getattr(error, "__notes__", ()) for frame in _FRAME.finditer(str(note))]
    frames = noted or list(_FRAME.finditer("".join(traceback.format_tb(error.__traceback__))))
    if not frames:
        return "at an unknown place"
    last = frames[-1]
    return f"at {'/'.join(PurePath(last['file']).parts[-3:])}:{last['line']} in {last['function']}"
