"""Finished spans: what the shards of an output say is in them.

The metadata at the end of each shard lists its spans, so that reading which spans are finished reads no tokens. Spans
are taken out of a shard by replacing the file.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import SPAN_CLIPS_KEY, SPAN_SECONDS_KEY, SPANS_KEY, shard_paths
from vidshard.pipeline.output.parquet import FileRows, named_if_damaged
from vidshard.pipeline.output.quality import without_figures
from vidshard.pipeline.output.shard_reader import open_shard
from vidshard.pipeline.output.shard_writer import parquet_bytes
from vidshard.pipeline.rows import row_part
from vidshard.schemas.tokens import parse_json

COMMITTED_SCHEMA = pa.schema([("span_id", pa.string()), ("num_clips", pa.int64()), ("seconds", pa.float64())])
"""A span of a shard, its number of clips, and the seconds of video in them. The last two are null for shards written
before they were recorded."""


@dataclass(frozen=True, slots=True)
class ShardSpans:
    """The spans that the metadata of a shard lists."""

    path: str
    spans: list[str]
    num_clips: list[int | None]
    """Clips of each span; None in shards written before this was recorded."""
    seconds: list[float | None]
    """Seconds of video in them; None likewise."""

    def to_table(self) -> pa.Table:
        """The spans as rows of ``COMMITTED_SCHEMA``."""
        return pa.table([self.spans, self.num_clips, self.seconds], schema=COMMITTED_SCHEMA)


def shard_spans(path: str) -> ShardSpans:
    """Read the spans of a shard from its end.

    Raises:
        ShardError: the shard is damaged.
        storage.StorageError: it could not be read.
    """
    with named_if_damaged(path), storage.open_binary(path) as file:
        metadata: dict[bytes, bytes] = pq.read_metadata(file).metadata or {}
        return _listed_spans(path, metadata)


_SPAN_ID = re.compile(r"[0-9A-Za-z_.-]{1,200}-[0-9]{1,12}-(?:[0-9]{1,12}|end)", re.ASCII)
"""Form of a span's id: video, perhaps a digest of the part, first clip, and the clip after the last or ``end``."""


def _listed_spans(path: str, metadata: Mapping[bytes, bytes]) -> ShardSpans:
    """The spans that metadata lists.

    Raises:
        ValueError: they are not lists of span ids, numbers of clips and seconds, of one length.
    """

    def read(key: str, kinds: tuple[type, ...], missing: list[Any]) -> list[Any]:
        values = parse_json(metadata[key.encode()], key) if key.encode() in metadata else missing
        if not isinstance(values, list) or not all(value is None or type(value) in kinds for value in values):
            raise ValueError(f"its metadata '{key}' is not a list of {kinds[0].__name__}")
        return values

    spans = read(SPANS_KEY, (str,), [])
    none = [None] * len(spans)
    num_clips = read(SPAN_CLIPS_KEY, (int,), none)
    seconds = read(SPAN_SECONDS_KEY, (float, int), none)
    wrong = [span for span in spans if span is None or not _SPAN_ID.fullmatch(span)]
    if wrong or len(set(spans)) < len(spans):
        raise ValueError(f"it lists the span {wrong[0]!r:.80}" if wrong else "it lists a span twice")
    if not len(spans) == len(num_clips) == len(seconds):
        raise ValueError(f"it lists {len(spans)} spans, {len(num_clips)} numbers of clips and {len(seconds)} lengths")
    if any(n is not None and not 0 <= n < 1 << 31 for n in num_clips):
        raise ValueError("it lists an impossible number of clips")
    if any(s is not None and not 0 <= s < 1e12 for s in seconds):
        raise ValueError("it lists an impossible number of seconds")
    return ShardSpans(path=path, spans=spans, num_clips=num_clips, seconds=seconds)


def read_committed(out: str) -> FileRows:
    """Read the ends of an output's shards: a column ``span_id``, one row for each span of each shard.

    Raises:
        ShardError: a shard is damaged.
        storage.StorageError: the output could not be read.
    """
    schema = pa.schema([COMMITTED_SCHEMA.field("span_id")])
    return FileRows.read(schema, shard_paths(out), lambda path: pa.table([shard_spans(path).spans], schema=schema))


def committed_spans(out: str) -> pa.Array:
    """Ids of the finished spans of an output, each once.

    Raises:
        ShardError, storage.StorageError: as :func:`read_committed`.
    """
    return read_committed(out).table["span_id"].unique()


def drop_repeated_spans(paths: Sequence[str], before_write: Callable[[], object] = lambda: None) -> int:
    """Leave each span in the first of the shards that hold it; returns how many were taken out of others.

    Args:
        paths: the shards, in order.
        before_write: called before each shard is changed; an exception stops the work.

    Raises:
        ShardError: a shard is damaged.
        storage.StorageError: a shard could not be read or replaced.
    """
    seen: set[str] = set()
    dropped = 0
    for path in paths:
        spans = shard_spans(path).spans
        repeated = seen.intersection(spans)
        if repeated:
            before_write()
            drop_spans(path, repeated)
            dropped += len(repeated)
        seen.update(spans)
    return dropped


def drop_spans(path: str, unwanted: Collection[str]) -> None:
    """Take spans and their rows out of a shard: the file is replaced, or removed if nothing is left in it.

    Raises:
        ShardError: the shard is damaged.
        storage.StorageError: it could not be read or replaced.
    """
    listed = shard_spans(path)
    kept = [at for at, span in enumerate(listed.spans) if span not in unwanted]
    if len(kept) == len(listed.spans):
        return
    if not kept:
        storage.remove(path)
        return
    with open_shard(path) as (parquet, provenance):
        table = parquet.whole()
    wanted = {listed.spans[at] for at in kept}
    table = table.filter(pa.array([span in wanted for span in spans_of_rows(table, listed.spans)], pa.bool_()))
    lists = {
        SPANS_KEY: [listed.spans[at] for at in kept],
        SPAN_CLIPS_KEY: [listed.num_clips[at] for at in kept],
        SPAN_SECONDS_KEY: [listed.seconds[at] for at in kept],
    }
    metadata = without_figures(table.schema.metadata)
    metadata |= {name.encode(): json.dumps(values).encode() for name, values in lists.items()}
    storage.write_atomic(path, parquet_bytes(table.replace_schema_metadata(metadata), provenance.payload))


def spans_of_rows(table: pa.Table, spans: Sequence[str]) -> list[str | None]:
    """For each row of a shard the span that it belongs to, None if it belongs to none of these."""
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
