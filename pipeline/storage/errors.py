"""Exceptions of storages, local and remote."""

from __future__ import annotations

from vidshard.schemas.errors import OutageError, VidshardError


class StorageError(VidshardError):
    """A path could not be reached, read or written; the message names it and says what to check."""


class ReadError(StorageError, OSError):
    """An open file could not be read any further; also an OSError, as readers of files expect one."""


class StorageOutageError(ReadError, OutageError):
    """A storage was asked again until the time was over, and does not answer."""


class ShortBodyError(OSError):
    """Fewer bytes arrived than were asked for."""
