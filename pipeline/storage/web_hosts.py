"""Web servers as storages: which of them a run depends on.

An object store holds all files of its kind, so that a failure of it is an outage. A web server may be one of thousands,
and gone for good. It counts as a storage of the run if many rows are there, and as one site otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from vidshard.schemas.uris import is_web

FEWEST_ROWS, SMALLEST_SHARE = 10, 0.1
"""Number and share of the rows of a run from which on their web server is a storage of the run."""


def host_of(url: str) -> str:
    """Host and port of a web server's URL, in lower case."""
    return url.partition("://")[2].replace("\\", "/").split("/", 1)[0].split("?", 1)[0].rpartition("@")[2].lower()


def storage_hosts(columns: Sequence[pa.ChunkedArray], num_rows: int) -> tuple[str, ...]:
    """The web servers that a run depends on: more than half of its rows are there, or a tenth and at least ten.

    Args:
        columns: URLs and paths of the rows, such as those of videos and of signals.
        num_rows: all rows of the run.
    """
    found: set[str] = set()
    for column in columns:
        urls = column.filter(pc.match_substring_regex(column, r"^(?i:https?)://"))
        hosts = pc.extract_regex(urls, r"^[^:]*://(?:[^/?#@]*@)?(?P<host>[^/?#]*)")
        if not len(urls):
            continue
        for counted in pc.value_counts(pc.utf8_lower(pc.struct_field(hosts, "host"))).to_pylist():
            count = counted["counts"]
            if count > num_rows / 2 or (count >= FEWEST_ROWS and count >= SMALLEST_SHARE * num_rows):
                found.add(counted["values"])
    return tuple(sorted(found))


def is_of_one_site(uri: str, hosts: Collection[str]) -> bool:
    """Whether an address is of a web server that the run does not depend on.

    Args:
        hosts: those that it does.
    """
    return is_web(uri) and host_of(uri) not in hosts
