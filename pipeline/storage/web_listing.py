"""Folders of web servers, listed by the links of their pages, within bounds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urljoin, urlsplit

from vidshard.pipeline.storage.errors import StorageError
from vidshard.pipeline.storage.files import read_bytes
from vidshard.schemas.uris import shown_uri

MAX_PAGE_BYTES = 8 << 20
"""Largest page that is read."""
MAX_PAGES = 1000
"""Largest number of folders below an input."""
MAX_LINKS = 1_000_000
"""Largest number of files below an input."""
MAX_DEPTH = 16
"""Deepest folder below an input."""

_LINK = re.compile(r"""\bhref\s{0,8}=\s{0,8}["']([^"'<>\s]{1,2000})["']""", re.IGNORECASE)


def list_web_folder(url: str) -> Iterator[str]:
    """List the files below a folder of a web server, by the links of its pages that lead further down.

    Args:
        url: the folder; its path ends in ``/``.

    Raises:
        StorageError: a page cannot be read, or the folder is beyond the bounds.
    """
    root = urljoin(url, urlsplit(url).path)
    pages: list[tuple[str, int]] = [(url, 0)]
    seen = {root}
    num_pages = 0
    while pages:
        page, depth = pages.pop(0)
        num_pages += 1
        text = read_bytes(page, max_bytes=MAX_PAGE_BYTES).decode(errors="replace")
        base = urljoin(page, urlsplit(page).path)
        for link in _LINK.findall(text):
            try:
                found = urljoin(base, link.split("#", 1)[0].split("?", 1)[0])
            except ValueError:
                continue
            if found in seen or not found.startswith(base):
                continue
            seen.add(found)
            if not found.endswith("/"):
                yield found
            elif depth < MAX_DEPTH:
                pages.append((found, depth + 1))
            if (
                len(seen) > MAX_LINKS
                or num_pages + len(pages) > MAX_PAGES
                or (found.endswith("/") and depth >= MAX_DEPTH)
            ):
                raise StorageError(
                    f"cannot list {shown_uri(url)}: it has more than {MAX_PAGES} folders, {MAX_LINKS:,} files or "
                    f"{MAX_DEPTH} levels; name the files in a manifest"
                )
