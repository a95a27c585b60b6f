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
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import (
    SPAN_CLIPS_KEY,
    SPAN_SECONDS_KEY,
    SPANS_KEY,
    shard_paths,
)
from vidshard.pipeline.output.parquet import named_if_damaged
from vidshard.pipeline.output.shard_reader import open_shard
from vidshard.pipeline.output.shard_writer import parquet_bytes
from vidshard.pipeline.rows import row_part

_READERS = 16
"""Files whose ends are read at once: on an object store each is a request or two."""


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
