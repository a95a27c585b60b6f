"""URIs in the form that may be shown: in logs, errors, shards and rejects."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit


def public_uri(uri: str) -> str:
    """The URI without user, password, query and fragment.

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
