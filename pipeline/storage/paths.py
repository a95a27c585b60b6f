"""Paths as text: local paths, ``file://`` URIs and remote URLs. Nothing here opens a file."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urlsplit, urlunsplit


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
    return os.path.abspath(os.path.expanduser(path.removeprefix("local://")))


def join(root: str, *parts: str) -> str:
    """Path of something below a local or remote folder."""
    return "/".join([root.rstrip("/") or "/", *parts]) if root != "/" else "/" + "/".join(parts)


def public_uri(uri: str) -> str:
    """The URI without user, password, query and fragment, for logs, shards and rejects.

    Signed URLs carry their secret in the query. Plain object-store and local paths are returned unchanged.
    """
    if "://" not in uri:
        return uri
    scheme = uri.split("://", 1)[0]
    parts = urlsplit(uri)
    host = parts.netloc.rsplit("@", 1)[-1]
    if scheme in ("http", "https", "ftp", "sftp"):
        return urlunsplit((parts.scheme, host, parts.path, "", ""))
    return uri if host == parts.netloc else uri.replace(parts.netloc, host, 1)
