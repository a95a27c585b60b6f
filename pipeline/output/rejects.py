"""The rejections of an output: spans, and whole videos, that gave no clips or not all, in ``rejects/*.parquet``.

``retry.json`` lists what ``--retry-rejected`` is to try again, until a run has done so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import REJECTS, RETRY_FILE, reject_paths
from vidshard.pipeline.output.parquet import BoundedParquet, FileRows, Mask, named_if_damaged, write_table
from vidshard.pipeline.rows import rejections_table
from vidshard.schemas.rejections import Reason, Rejection
from vidshard.schemas.tokens import REJECT_SCHEMA


def read_rejects(out: str) -> pa.Table:
    """Read all rejections of an output, ``REJECT_SCHEMA``.

    Raises:
        ShardError: a file of them is damaged.
        storage.StorageError: the output could not be read.
    """
    return read_reject_files(out).table


def read_reject_files(out: str) -> FileRows:
    """Read all rejections of an output, and which file each is in.

    Raises:
        ShardError, storage.StorageError: as :func:`read_rejects`.
    """
    return FileRows.read(REJECT_SCHEMA, reject_paths(out), read_reject_file)


def read_reject_file(path: str) -> pa.Table:
    """Read one file of rejections, ``REJECT_SCHEMA``; columns that it lacks are null.

    Raises:
        ShardError, storage.StorageError: as :func:`read_rejects`.
    """
    with named_if_damaged(path):
        table = BoundedParquet(pa.BufferReader(storage.read_bytes(path))).whole()
        columns = [  # outputs of before a column was added lack it
            table[field.name] if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
            for field in REJECT_SCHEMA
        ]
        return pa.Table.from_arrays(columns, schema=REJECT_SCHEMA)


def write_rejects(out: str, rejections: Sequence[Rejection]) -> None:
    """Write rejections as one file, sorted by URI and named by a digest of its rows.

    The order in which workers found them does not matter: the same rejections give the same file.

    Raises:
        storage.StorageError: it could not be written.
    """
    table = rejections_table(sorted(rejections, key=lambda one: (one.uri, repr(one))))
    name = hashlib.sha256(json.dumps(table.to_pylist(), sort_keys=True).encode()).hexdigest()[:16]
    write_table(storage.join(out, REJECTS, f"{name}.parquet"), table)


def update_rejects(rejects: FileRows, kept: Mask) -> None:
    """Take rejections out of their files; a file without rows left is removed.

    Args:
        rejects: as they stand in the files now.
        kept: which of them stay.

    Raises:
        storage.StorageError: a file could not be replaced.
    """
    for path, rows in rejects.touched(~kept):
        if kept[rows].any():
            write_table(path, rejects.table.slice(rows.start, rows.stop - rows.start).filter(pa.array(kept[rows])))
        else:
            storage.remove(path)


def is_partial(reject: Mapping[str, Any]) -> bool:
    """Whether a rejection says what is missing beside clips that were kept; its span then counts as finished."""
    return bool(reject["kept_clips"])


def rejected_spans(rejects: pa.Table) -> pa.Array:
    """Ids of spans that gave nothing. Spans whose file had changed are left out: they are always tried again."""
    rows = rejects.filter(
        pc.and_(
            pc.and_(pc.is_valid(rejects["span_id"]), pc.equal(pc.fill_null(rejects["kept_clips"], 0), 0)),
            pc.not_equal(rejects["reason"], str(Reason.CHANGED)),
        )
    )
    return rows["span_id"].combine_chunks()


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrySet:
    """Rejected spans and videos that a run tries again, and does nothing else."""

    spans: frozenset[str] = frozenset()
    uris: frozenset[str] = frozenset()
    """Whole videos that could not be opened, by their URI without credentials."""

    def with_rejects(self, rejects: Collection[Mapping[str, Any]]) -> RetrySet:
        """Add what these rejections are about."""
        return RetrySet(
            spans=self.spans | {row["span_id"] for row in rejects if row["span_id"] is not None},
            uris=self.uris | {row["uri"] for row in rejects if row["span_id"] is None},
        )


def read_retry_set(out: str) -> RetrySet:
    """Read what an earlier run was to try again and did not finish; empty if there is nothing.

    Raises:
        ShardError: the file is damaged.
        storage.StorageError: the output could not be read.
    """
    path = storage.join(out, RETRY_FILE)
    if not storage.exists(path):
        return RetrySet()
    with named_if_damaged(path):
        listed = json.loads(storage.read_bytes(path))
        texts = [*listed["spans"], *listed["uris"]]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("it lists something else than spans and URIs")
        return RetrySet(spans=frozenset(listed["spans"]), uris=frozenset(listed["uris"]))


def write_retry_set(out: str, retry: RetrySet) -> None:
    """Write what a run is to try again.

    Raises:
        storage.StorageError: it could not be written.
    """
    listed = {"spans": sorted(retry.spans), "uris": sorted(retry.uris)}
    storage.write_atomic(storage.join(out, RETRY_FILE), json.dumps(listed, indent=1).encode())


def forget_retry_set(out: str) -> None:
    """Remove the list of what is to be tried again: all of it was."""
    storage.remove(storage.join(out, RETRY_FILE))
