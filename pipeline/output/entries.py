"""How a video is known again: its entry and its location key.

The *entry* is a digest of the video's URI, of its size and time stamp as the storage states them, and of the part that
is asked for. A file that was replaced has another entry. The *location key* is a digest of the URI alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vidshard.pipeline.output.plan_store import ENTRY_TYPE, PLAN_SCHEMA
from vidshard.schemas.video import Part


def entry_ids(
    uris: Sequence[str],
    fingerprints: Sequence[str | None],
    starts: Sequence[float | None],
    ends: Sequence[float | None],
    default: Part,
) -> pa.Array:
    """``ENTRY_TYPE``, one for each video or part of one: the same when nothing about it has changed.

    Args:
        uris: where they are. Of a URL with credentials or a query only a digest goes into the entry.
        fingerprints: what the storage says of their state; None where it was not asked.
        starts: seconds after the first frame at which the part starts.
        ends: and at which it ends.
        default: the part of those that name none.
    """
    whole = _part_text(
        float(default.start_seconds), None if default.end_seconds is None else float(default.end_seconds)
    )
    digests = bytearray()
    for uri, fingerprint, start, end in zip(uris, fingerprints, starts, ends, strict=True):
        part = whole if not start and end is None else _part_text(start or 0.0, end)
        digests += hashlib.blake2b(f"{uri}\n{fingerprint}\n{part}".encode(), digest_size=16).digest()
    return pa.FixedSizeBinaryArray.from_buffers(ENTRY_TYPE, len(uris), [None, pa.py_buffer(bytes(digests))])


def _part_text(start: float, end: float | None) -> str:
    return f"{float(start)!r}..{None if end is None else float(end)!r}"


def with_entries(videos: pa.Table, default: Part) -> tuple[pa.Table, list[str]]:
    """The videos of ``pipeline.discover`` with a column ``entry``, and the URIs of rows that repeat an earlier one."""
    names = ("uri", "fingerprint", "part_start_seconds", "part_end_seconds")
    parts = []
    for batch in videos.select([n for n in names if n in videos.column_names]).to_batches(max_chunksize=1 << 16):
        none = pa.nulls(batch.num_rows)
        there = batch.schema.names
        uris, fingerprints, starts, ends = ((batch[n] if n in there else none).to_pylist() for n in names)
        parts.append(entry_ids(uris, fingerprints, starts, ends, default))
    videos = videos.append_column(PLAN_SCHEMA.field("entry"), pa.chunked_array(parts, ENTRY_TYPE))
    if pc.count_distinct(videos["entry"]).as_py() == videos.num_rows:
        return videos, []
    numbered = pa.table({"entry": videos["entry"], "number": pa.array(range(videos.num_rows), pa.int32())})
    first = numbered.group_by("entry").aggregate([("number", "min")])["number_min"].to_numpy()
    is_first = pa.array(_flags(first, videos.num_rows))
    return videos.filter(is_first), videos["uri"].filter(pc.invert(is_first)).to_pylist()


def location_keys(uris: Sequence[str]) -> pa.Array:
    """``ENTRY_TYPE``, one for each URI: the same for nothing but the same text."""
    digests = b"".join(hashlib.blake2b(uri.encode(), digest_size=16).digest() for uri in uris)
    return pa.FixedSizeBinaryArray.from_buffers(ENTRY_TYPE, len(uris), [None, pa.py_buffer(digests)])


def _flags(numbers: npt.NDArray[np.int32], length: int) -> npt.NDArray[np.bool_]:
    found = np.zeros(length, np.bool_)
    found[numbers] = True
    return found
