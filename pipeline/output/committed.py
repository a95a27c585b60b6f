"""What an output folder holds, and what is left to do.

    plan/*.parquet      videos that were opened, and the spans they are cut into; a file for each commit of planning
    shards/*.parquet    spans that are finished; the metadata of each file lists its own
    rejects/*.parquet   spans, and whole videos, that gave no tokens

These files are all the state there is. What is left to do is what was planned, less what is finished or rejected;
whoever is killed between two of the writes below leaves a folder from which the next run reads the same. Nothing is
renamed or locked here: every write puts one whole object, and ``pipeline.output.lease`` sees to it that one process
writes.
``pipeline.output.resume`` lays the inputs against it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import (
    PLANNED,
    REJECTS,
    RETRY_FILE,
    SPAN_CLIPS_KEY,
    SPAN_SECONDS_KEY,
    SPANS_KEY,
    shard_paths,
)
from vidshard.pipeline.output.parquet import ShardError, named_if_damaged, write_table
from vidshard.pipeline.output.shard_reader import open_shard
from vidshard.pipeline.output.shard_writer import parquet_bytes
from vidshard.pipeline.rows import PLAN_FIELDS, rejections_table, row_part
from vidshard.schemas.rejections import Reason

ENTRY_TYPE = pa.binary(16)
PLAN_SCHEMA = pa.schema(
    [
        pa.field("entry", ENTRY_TYPE, nullable=False),
        pa.field("seen_entry", ENTRY_TYPE, nullable=False),
        pa.field("place", ENTRY_TYPE, nullable=False),
        *(field.with_nullable(True) for field in PLAN_FIELDS),
    ]
)
"""A row of ``plan/``: a span; or a video without any, which was rejected when it was opened. ``entry`` is made of what
the input says of the file, ``seen_entry`` of what whoever opened it found, ``place`` of where it is alone: URLs that
differ in a query, which ``uri`` does not show, are two places."""

_READERS = 16
"""Files whose ends are read at once: on an object store each is a request or two."""


# What was planned.


def write_planned(out: str, rows: pa.Table) -> None:
    """Add rows to the plan, ``PLAN_SCHEMA``, as a file of their own after those that are there."""
    paths = storage.list_files(storage.join(out, PLANNED), ".parquet")
    names = [path.rsplit("/", 1)[-1].removesuffix(".parquet") for path in paths]
    number = 1 + max((int(name) for name in names if name.isdigit()), default=0)
    table = rows.select(PLAN_SCHEMA.names).cast(PLAN_SCHEMA)
    write_table(storage.join(out, PLANNED, f"{number:06d}.parquet"), table)


def read_planned(out: str, columns: Sequence[str] = PLAN_SCHEMA.names) -> pa.Table:
    """The plan, oldest rows first.

    Raises:
        ShardError: a file of it is damaged.
    """
    schema = pa.schema([PLAN_SCHEMA.field(name) for name in columns])
    tables = [batch for _, batch in planned_groups(out, columns)]
    return pa.concat_tables([schema.empty_table(), *tables])


def planned_groups(
    out: str, columns: Sequence[str], wanted: Callable[[int, int], bool] = lambda _first, _end: True
) -> Iterator[tuple[int, pa.Table]]:
    """(number of the first row, rows) of the plan's row groups, oldest first, those whose range of rows is wanted.

    Raises:
        ShardError: a file of the plan is damaged.
    """
    first = 0
    for path in storage.list_files(storage.join(out, PLANNED), ".parquet"):
        with named_if_damaged(path), storage.open_binary(path) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            for group in range(parquet.num_row_groups):
                end = first + parquet.metadata.row_group(group).num_rows
                if wanted(first, end):
                    yield first, parquet.read_row_group(group, columns=list(columns)).select(list(columns))
                first = end


# What is finished.


@dataclass(frozen=True)
class ShardSpans:
    """What the metadata of a shard says of the spans in it."""

    path: str
    spans: list[str]
    num_clips: list[int | None]
    """Of each span; None in shards of before this was written down."""
    seconds: list[float | None]
    """Of video in them, likewise."""


def shard_spans(path: str) -> ShardSpans:
    """The spans of a shard, from its end alone.

    Raises:
        ShardError: damaged.
    """
    with named_if_damaged(path), storage.open_binary(path) as file:
        metadata: dict[bytes, Any] = pq.read_metadata(file).metadata or {}
        spans = json.loads(metadata.get(SPANS_KEY.encode(), b"[]"))
        unknown = json.dumps([None] * len(spans))
        return ShardSpans(
            path=path,
            spans=spans,
            num_clips=json.loads(metadata.get(SPAN_CLIPS_KEY.encode(), unknown)),
            seconds=json.loads(metadata.get(SPAN_SECONDS_KEY.encode(), unknown)),
        )


def committed_spans(out: str) -> pa.Array:
    """Ids of the spans that an output's shards hold, from the files' ends alone: no token is read.

    A span that stands in two shards, as two runs at once might have written it, is taken out of the second.

    Raises:
        ShardError: a shard is damaged.
    """
    paths = shard_paths(out)
    arrays = [pa.array([], pa.string())]
    with ThreadPoolExecutor(_READERS) as pool:
        arrays += pool.map(lambda path: pa.array(shard_spans(path).spans, pa.string()), paths)
    spans = pa.chunked_array(arrays)
    unique = spans.unique()
    if len(unique) < len(spans):
        drop_repeated_spans(paths)
    pa.default_memory_pool().release_unused()
    return unique


def drop_repeated_spans(paths: Sequence[str]) -> int:
    """Leave each span in the first of the shards that hold it; gives how many were taken out of others."""
    seen: set[str] = set()
    dropped = 0
    for path in paths:
        spans = shard_spans(path).spans
        repeated = seen.intersection(spans)
        if repeated:
            drop_spans(path, repeated)
            dropped += len(repeated)
        seen.update(spans)
    return dropped


def drop_spans(path: str, unwanted: Collection[str]) -> None:
    """Take spans and their rows out of a shard, which is replaced at once, or removed if nothing is left of it."""
    facts = shard_spans(path)
    kept = [at for at, span in enumerate(facts.spans) if span not in unwanted]
    if len(kept) == len(facts.spans):
        return
    if not kept:
        storage.remove(path)
        return
    with open_shard(path) as (parquet, provenance):
        table = parquet.read()
    wanted = {facts.spans[at] for at in kept}
    table = table.filter(pa.array([span in wanted for span in spans_of_rows(table, facts.spans)], pa.bool_()))
    listed = {
        SPANS_KEY: [facts.spans[at] for at in kept],
        SPAN_CLIPS_KEY: [facts.num_clips[at] for at in kept],
        SPAN_SECONDS_KEY: [facts.seconds[at] for at in kept],
    }
    metadata = table.schema.metadata | {name.encode(): json.dumps(values).encode() for name, values in listed.items()}
    storage.write_atomic(path, parquet_bytes(table.replace_schema_metadata(metadata), provenance.payload))


def spans_of_rows(table: pa.Table, spans: Sequence[str]) -> list[str | None]:
    """For each row of a shard the span that it belongs to, None if to none of these."""
    ranges: dict[str, list[tuple[int, float, str]]] = defaultdict(list)
    for span in spans:
        video, first, end = span.rsplit("-", 2)
        ranges[video].append((int(first), float("inf") if end == "end" else int(end), span))
    names = [n for n in ("video_id", "clip_index", "part_start_seconds", "part_end_seconds") if n in table.column_names]
    owners: list[str | None] = []
    for row in table.select(names).to_pylist():
        of_video = ranges.get(f"{row['video_id']}{row_part(row).suffix}", [])
        owners.append(next((span for first, end, span in of_video if first <= row["clip_index"] < end), None))
    return owners


# What was rejected.


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


def retry_rejected(out: str, reasons: Collection[Reason] | None, uris: Collection[str]) -> RetrySet:
    """Forget rejections, so that what they are about counts as not done yet.

    What is meant is written down first, for whoever is interrupted and says the same again. The clips that were kept of
    a damaged stretch are taken out before its rejection: killed between the two, the stretch is redone.

    Args:
        out: the output.
        reasons: which ones; None for all but copies of other videos.
        uris: of the inputs, without credentials: what cannot be tried now is left as it is.
    """

    def is_meant(row: Mapping[str, Any]) -> bool:
        is_asked_for = row["reason"] != Reason.DUPLICATE if reasons is None else row["reason"] in reasons
        return is_asked_for and row["uri"] in uris

    rejects = [row for row in read_rejects(out).to_pylist() if is_meant(row)]
    before = _read_retried(out)
    retried = RetrySet(
        spans=before.spans | {row["span_id"] for row in rejects if row["span_id"] is not None},
        uris=before.uris | {row["uri"] for row in rejects if row["span_id"] is None},
    )
    listed = {"spans": sorted(retried.spans), "uris": sorted(retried.uris)}
    storage.write_atomic(storage.join(out, RETRY_FILE), json.dumps(listed, indent=1).encode())
    partly = {row["span_id"] for row in rejects if row["span_id"] is not None and is_partial(row)}
    if partly:
        for path in shard_paths(out):
            if not partly.isdisjoint(shard_spans(path).spans):
                drop_spans(path, partly)
    drop_rejects(out, lambda row: not is_meant(row))
    return retried


def _read_retried(out: str) -> RetrySet:
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


def damaged_files(out: str) -> list[tuple[str, str]]:
    """(path, what is wrong) of the files of the plan and of the rejections that cannot be read."""
    damaged = []
    for folder, names in ((PLANNED, PLAN_SCHEMA.names), (REJECTS, [])):
        for path in storage.list_files(storage.join(out, folder), ".parquet"):
            try:
                with named_if_damaged(path):
                    data = pa.BufferReader(storage.read_bytes(path))
                    pq.read_table(data, page_checksum_verification=True).select(names)
            except ShardError as error:
                damaged.append((path, str(error)))
    return damaged


def rejected_spans(rejects: pa.Table) -> pa.Array:
    """Ids of the spans that gave nothing, but for those that are tried again in any case."""
    rows = rejects.filter(
        pc.and_(
            pc.and_(pc.is_valid(rejects["span_id"]), pc.equal(pc.fill_null(rejects["kept_clips"], 0), 0)),
            pc.not_equal(rejects["reason"], str(Reason.CHANGED)),
        )
    )
    return rows["span_id"].combine_chunks()
