"""Paths as text: local paths, ``file://`` URIs and remote URLs. Nothing here opens a file."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

from vidshard.pipeline.storage.errors import StorageError


def is_local(path: str) -> bool:
    """Whether the path is on this machine's file system."""
    return "://" not in path or path.startswith(("file://", "local://"))


def absolute(path: str) -> str:
    """The path as every worker understands it: absolute when local (``~`` expanded), unchanged when remote.

    Percent escapes of a ``file://`` URI are decoded (RFC 8089), as ``Path.as_uri()`` writes them. A file that has
    exactly the escaped name wins, because many people put ``file://`` before a path without escaping it.
    """
    if not is_local(path):
        return path
    if path.startswith("file://"):
        path = re.sub("^file://(localhost(?=/))?", "", path)
        if "%" in path and not os.path.exists(path):
            path = unquote(path)
    path = path.removeprefix("local://")
    return os.path.abspath(path if "\0" in path else os.path.expanduser(path))  # which refuses a zero byte


def join(root: str, *parts: str) -> str:
    """Path of something below a local or remote folder.

    Raises:
        StorageError: the folder is a scheme alone, such as ``s3://``; without its slashes it would be a local one.
    """
    if re.fullmatch(r"\w[\w+.-]*://+", root):
        raise StorageError(
            f"{root} names no bucket or folder: write one behind it, such as {root.rstrip('/')}//NAME/tokens"
        )
    return "/".join([root.rstrip("/") or "/", *parts]) if root != "/" else "/" + "/".join(parts)
