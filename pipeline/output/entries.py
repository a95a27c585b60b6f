"""The videos of the inputs, and how each is recognized again.

An *entry* is a digest of a video's URI, of its size and time stamp as the storage states them, and of the part that is
asked for: a file that was replaced has another entry. A *location key* is a digest of the URI alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vidshard.pipeline import storage
from vidshard.pipeline.output.plan_store import ENTRY_TYPE, PLAN_SCHEMA
from vidshard.schemas.rejections import Reason, Rejection, Stage
from vidshard.schemas.video import Part

_ROWS_AT_ONCE = 1 << 16
"""Rows that are Python objects at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The videos that the inputs of a run name."""

    videos: pa.Table
    """As ``pipeline.discover`` lists them, with a column ``entry``; each entry once."""
    repeated: tuple[str, ...] = ()
    """URIs of rows that repeat an earlier entry."""
    bad_rows: tuple[Rejection, ...] = ()
    """A rejection for each row of a manifest that names no video."""
    manifests: tuple[str, ...] = ()
    """The manifests that the rows are from, without credentials."""

    @classmethod
    def of(cls, videos: pa.Table, default_part: Part, manifests: Sequence[str] = ()) -> Inputs:
        """Add the entries to the videos of a discovery.

        Args:
            videos: as ``pipeline.discover`` lists them; rows with a ``fault`` are none.
            default_part: the part of those that name none.
            manifests: the manifests among the inputs, without credentials.
        """
        bad_rows: tuple[Rejection, ...] = ()
        if "fault" in videos.column_names:
            bad_rows = tuple(map(_bad_row, videos.filter(pc.is_valid(videos["fault"])).to_pylist()))
            videos = videos.filter(pc.is_null(videos["fault"])).drop_columns("fault")
        videos = videos.append_column(PLAN_SCHEMA.field("entry"), _entries(videos, default_part))
        if pc.count_distinct(videos["entry"]).as_py() == videos.num_rows:
            return cls(videos=videos, bad_rows=bad_rows, manifests=tuple(manifests))
        numbered = pa.table({"entry": videos["entry"], "number": pa.array(range(videos.num_rows), pa.int32())})
        is_first = np.zeros(videos.num_rows, np.bool_)
        is_first[numbered.group_by("entry").aggregate([("number", "min")])["number_min"].to_numpy()] = True
        return cls(
            videos=videos.filter(pa.array(is_first)),
            repeated=tuple(videos["uri"].filter(pa.array(~is_first)).to_pylist()),
            bad_rows=bad_rows,
            manifests=tuple(manifests),
        )

    @property
    def num_videos(self) -> int:
        """Rows of ``videos``."""
        return int(self.videos.num_rows)

    def uri(self, number: int) -> str:
        """The URI of one video."""
        return str(self.videos["uri"][number].as_py())

    def public_uris(self) -> Iterator[str]:
        """The URI of each video without credentials, as plan and rejections name it."""
        return public_uris(self.videos)

    def location_keys(self) -> Iterator[bytes]:
        """The location key of each video."""
        for chunk in self.videos.select(["uri"]).to_batches(max_chunksize=_ROWS_AT_ONCE):
            yield from location_keys(chunk["uri"].to_pylist()).to_pylist()


def row_fault(row: int, manifest: str, text: str) -> str:
    """Say what is wrong with a row of a manifest.

    Args:
        row: its number, from 1.
        manifest: without credentials.
        text: the fault.
    """
    return f"row {row} of manifest {manifest}: {text}"


def is_row_of(detail: str, manifest: str) -> bool:
    """Whether a fault, as :func:`row_fault` says it, is of a row of this manifest."""
    return detail.partition(" of manifest ")[2].startswith(f"{manifest}: ")


def _bad_row(row: Mapping[str, Any]) -> Rejection:
    return Rejection(
        uri=storage.public_uri(row["uri"]),
        video_id=None,
        span_id=None,
        start_seconds=None,
        stage=Stage.DISCOVER,
        reason=Reason.BAD_ROW,
        detail=row["fault"],
        place=location_keys([row["uri"]])[0].as_py().hex(),
    )


def public_uris(videos: pa.Table) -> Iterator[str]:
    """The URI of each row without credentials."""
    for chunk in videos.select(["uri"]).to_batches(max_chunksize=_ROWS_AT_ONCE):
        yield from map(storage.public_uri, chunk["uri"].to_pylist())


def _entries(videos: pa.Table, default_part: Part) -> pa.ChunkedArray:
    names = ("uri", "fingerprint", "part_start_seconds", "part_end_seconds")
    chunks = []
    for batch in videos.select([n for n in names if n in videos.column_names]).to_batches(max_chunksize=_ROWS_AT_ONCE):
        none = pa.nulls(batch.num_rows)
        there = batch.schema.names
        uris, fingerprints, starts, ends = ((batch[n] if n in there else none).to_pylist() for n in names)
        chunks.append(entry_ids(uris, fingerprints, starts, ends, default_part))
    return pa.chunked_array(chunks, ENTRY_TYPE)


def entry_ids(
    uris: Sequence[str],
    fingerprints: Sequence[str | None],
    starts: Sequence[float | None],
    ends: Sequence[float | None],
    default_part: Part,
) -> pa.Array:
    """Digest what is known about videos: binary(16) (videos,), equal where nothing has changed.

    Args:
        uris: complete, with their credentials and queries; the digest shows none of them.
        fingerprints: size and time stamp, or tag, as the storage states them; None where it was not asked.
        starts: start of the part in seconds after the first frame, None for the start of the video.
        ends: end of the part, None for the end of the video.
        default_part: the part of those that name none.
    """
    default = _part_text(
        float(default_part.start_seconds),
        None if default_part.end_seconds is None else float(default_part.end_seconds),
    )
    digests = bytearray()
    for uri, fingerprint, start, end in zip(uris, fingerprints, starts, ends, strict=True):
        part = default if not start and end is None else _part_text(start or 0.0, end)
        digests += hashlib.blake2b(f"{uri}\n{fingerprint}\n{part}".encode(), digest_size=16).digest()
    return pa.FixedSizeBinaryArray.from_buffers(ENTRY_TYPE, len(uris), [None, pa.py_buffer(bytes(digests))])


def _part_text(start: float, end: float | None) -> str:
    return f"{float(start)!r}..{None if end is None else float(end)!r}"


def location_keys(uris: Sequence[str]) -> pa.Array:
    """Digest URIs: binary(16) (uris,), equal for equal text alone."""
    digests = b"".join(hashlib.blake2b(uri.encode(), digest_size=16).digest() for uri in uris)
    return pa.FixedSizeBinaryArray.from_buffers(ENTRY_TYPE, len(uris), [None, pa.py_buffer(digests)])
