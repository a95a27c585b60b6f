"""Names of files that are made from ids of a shard: none leaves its folder, whatever text a shard has as an id."""

from __future__ import annotations

import hashlib
import re

_OWN_ID = re.compile(r"[0-9a-z]{1,64}(?:-[0-9a-z]{1,64}){0,2}(?:-[0-9]{6,12})?", re.ASCII)
"""Form of the ids that vidshard makes of clips and videos."""


def safe_name(identifier: str, kind: str = "clip") -> str:
    """Name for the file of a clip or a video: ASCII letters, digits and ``-``, at most 208 characters.

    It is the id itself where it has the form of vidshard's own, else ``kind`` and a digest of the id. Different ids
    have different names.
    """
    if _OWN_ID.fullmatch(identifier) and not identifier.startswith(f"{kind}-"):
        return identifier
    return f"{kind}-{hashlib.sha256(identifier.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"
