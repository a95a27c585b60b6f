"""The rejections of an output: spans, and whole videos, that gave no clips."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import REJECTS, RETRY_FILE
from vidshard.pipeline.output.parquet import named_if_damaged, write_table
from vidshard.pipeline.rows import rejections_table
from vidshard.schemas.rejections import Reason, Rejection

_READERS = 16
"""Files read at once: on an object store each is a request or two."""


def read_rejects(out: str) -> pa.Table:
    """All rejections of an output, ``REJECT_SCHEMA``."""
    paths = storage.list_files(storage.join(out, REJECTS), ".parquet")
    with ThreadPoolExecutor(_READERS) as pool:
        return pa.concat_tables([rejections_table([]), *pool.map(_read_rejects_file, paths)])


def _read_rejects_file(path: str) -> pa.Table:
    with named_if_damaged(path):
        table = pq.read_table(pa.BufferReader(storage.read_bytes(path)))
        schema = rejections_table([]).schema
        columns = [table[f.name] if f.name in table.column_names else pa.nulls(table.num_rows, f.type) for f in schema]
        return pa.Table.from_arrays(columns, schema=schema)


def drop_rejects(out: str, is_wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Take the rejections that are not wanted out of their files; gives them."""
    dropped: list[dict[str, Any]] = []
    for path in storage.list_files(storage.join(out, REJECTS), ".parquet"):
        table = _read_rejects_file(path)
        rows = table.to_pylist()
        keeps = [is_wanted(row) for row in rows]
        dropped += [row for row, keep in zip(rows, keeps, strict=True) if not keep]
        if not any(keeps):
            storage.remove(path)
        elif not all(keeps):
            write_table(path, table.filter(pa.array(keeps)))
    return dropped


def is_partial(reject: Mapping[str, Any]) -> bool:
    """Whether a rejection says what is missing beside clips that were kept: these make its span a finished one."""
    return bool(reject["kept_clips"])


def read_retried(out: str) -> RetrySet:
    """What an earlier run was to try again, and did not come to the end of."""
    path = storage.join(out, RETRY_FILE)
    if not storage.exists(path):
        return RetrySet(spans=frozenset(), uris=frozenset())
    with named_if_damaged(path):
        listed = json.loads(storage.read_bytes(path))
        return RetrySet(spans=frozenset(listed["spans"]), uris=frozenset(listed["uris"]))


def forget_retried(out: str) -> None:
    """Nothing is left of what was to be tried again."""
    storage.remove(storage.join(out, RETRY_FILE))


@dataclass(frozen=True, kw_only=True)
class RetrySet:
    """What is to be tried again, and nothing else."""

    spans: frozenset[str]
    uris: frozenset[str]
    """Of whole videos that could not be opened."""


def rejected_spans(rejects: pa.Table) -> pa.Array:
    """Ids of the spans that gave nothing, but for those that are tried again in any case."""
    rows = rejects.filter(
        pc.and_(
            pc.and_(pc.is_valid(rejects["span_id"]), pc.equal(pc.fill_null(rejects["kept_clips"], 0), 0)),
            pc.not_equal(rejects["reason"], str(Reason.CHANGED)),
        )
    )
    return rows["span_id"].combine_chunks()


def write_rejects(out: str, rejections: Sequence[Rejection]) -> None:
    """Write rejections as one file, named after its rows."""
    table = rejections_table(rejections)
    name = hashlib.sha256(json.dumps(table.to_pylist(), sort_keys=True).encode()).hexdigest()[:16]
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    storage.write_atomic(storage.join(out, REJECTS, f"{name}.parquet"), sink.getvalue())
