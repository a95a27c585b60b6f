"""Shard writer: gathers encoded rows and commits them as shards and rejections.

Shards are written atomically. A shard's name is a digest of its span ids, and its metadata lists them, so
``pipeline.output.committed`` reads the finished spans from the files alone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import SHARDS, SPAN_CLIPS_KEY, SPAN_SECONDS_KEY, SPANS_KEY
from vidshard.pipeline.output.quality import audit_metadata
from vidshard.pipeline.output.rejects import write_rejects
from vidshard.pipeline.rows import QUALITY, explode, frame_sizes, row_part, row_rejection
from vidshard.schemas.rejections import Rejection
from vidshard.schemas.tokens import Payload, Provenance, payload_bytes, shard_schema
from vidshard.schemas.video import ClipSpec

ROW_GROUP_BYTES = 1 << 20
"""Payload bytes per row group: a reader of one clip fetches and decompresses a whole row group."""


@dataclass(kw_only=True, slots=True)
class WriteStats:
    """Counts of what was committed."""

    num_shards: int = 0
    num_spans: int = 0
    """Spans in shards."""
    num_rejected_spans: int = 0
    """Spans that were rejected whole."""
    num_damaged_spans: int = 0
    """Spans in shards with some clips missing, a subset of ``num_spans``."""
    num_clips: int = 0
    num_values: int = 0
    """Tokens, or latent values."""
    payload_bytes: int = 0
    """Compressed payload of all shards, in bytes."""
    file_bytes: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    rejected_uris: set[str] = field(default_factory=set)
    last_clip_id: str | None = None
    """Id of the last clip of the latest shard; None before the first."""

    def add(self, other: WriteStats) -> None:
        """Add the counts of a later write to these, in place."""
        self.last_clip_id = other.last_clip_id or self.last_clip_id
        for counts in fields(self):
            if counts.name == "rejected_uris":
                self.rejected_uris |= other.rejected_uris
            elif counts.name != "last_clip_id":
                setattr(self, counts.name, getattr(self, counts.name) + getattr(other, counts.name))


@dataclass(kw_only=True, slots=True)
class _Bucket:
    """Shard settings of one bucket, and its rows that wait to be committed."""

    spec: ClipSpec
    payload: Payload
    schema: pa.Schema
    signals: Sequence[str]
    """Names of the signal columns."""
    prefix: str
    """Prefix of its shards' names, so that a glob can select one payload shape."""
    clips_per_shard: int
    rows: list[pa.Table] = field(default_factory=list)
    num_clips: int = 0


class TokenShardSink:
    """Gathers encoded rows and commits them as shards, and rejections as files of ``rejects/``.

    A shard is committed when it is full. Everything is committed when the oldest row has waited ``commit_seconds``,
    and at :meth:`close`. Compression and upload run on threads of their own. At most one
    shard more than there are threads waits for them.
    """

    def __init__(
        self,
        out: str,
        *,
        buckets: Sequence[tuple[ClipSpec, Payload]],
        provenance: Provenance,
        manifest_fields: Sequence[pa.Field],
        signal_fields: Sequence[pa.Field] = (),
        shard_bytes: int,
        commit_seconds: float,
        before_commit: Callable[[], None] = lambda: None,
        num_threads: int = 1,
    ) -> None:
        """Create an empty sink; nothing is written yet.

        Args:
            out: output folder.
            buckets: clip settings and payload of each bucket. A shard holds one bucket.
            provenance: provenance of all shards; each bucket's payload replaces its own.
            manifest_fields: manifest columns.
            signal_fields: signal columns.
            shard_bytes: payload of a full shard in bytes, before compression.
            commit_seconds: longest time that an encoded clip waits for its commit.
            before_commit: called on a writer's thread before each file is written; an exception stops the writing.
            num_threads: threads that compress and write, each a shard.
        """
        self._out = out
        self._buckets = {
            (spec.height, spec.width): _Bucket(
                spec=spec,
                payload=payload,
                schema=shard_schema([*manifest_fields, *signal_fields], replace(provenance, payload=payload)),
                signals=[field.name for field in signal_fields],
                prefix=f"{spec.bucket}-" if len(buckets) > 1 else "",
                clips_per_shard=max(1, shard_bytes // payload_bytes(payload)),
            )
            for spec, payload in buckets
        }
        self._commit_seconds = commit_seconds
        self._before_commit = before_commit
        self._rejections: list[Rejection] = []
        self._oldest: float | None = None
        self._writer = ThreadPoolExecutor(num_threads, thread_name_prefix="shard-writer")
        self._most_pending = 1 + num_threads
        self._pending: deque[Future[WriteStats]] = deque()
        self.committed = WriteStats()
        """Counts of what is committed so far."""

    def add(self, rows: pa.Table) -> None:
        """Take encoded rows, and commit what is full or due.

        Raises:
            storage.StorageError: an earlier shard could not be written.
        """
        refused = pc.and_(rows["rejection"].is_valid(), pc.equal(pc.list_value_length(rows["clips"]), 0))
        good = rows
        if pc.any(refused).as_py():  # a filter copies the payload, also where it keeps every row
            self._rejections += _rejections_of(rows.filter(refused))
            good = rows.filter(pc.invert(refused))
        self._oldest = time.monotonic() if self._oldest is None else self._oldest
        for at, size in enumerate(frame_sizes(good)):
            row = good.slice(at, 1)
            clips = row["clips"].combine_chunks().value_lengths()[0].as_py()
            bucket = self._buckets[size]
            if bucket.num_clips and bucket.num_clips + clips > bucket.clips_per_shard:
                self._submit(bucket)
            bucket.rows.append(row)
            bucket.num_clips += clips
        self.commit_if_due()

    def commit_if_due(self) -> None:
        """Commit everything if the oldest row has waited ``commit_seconds``.

        Raises:
            storage.StorageError: as :meth:`add`.
        """
        while self._pending and self._pending[0].done():
            self.committed.add(self._pending.popleft().result())
        if self._oldest is not None and time.monotonic() - self._oldest > self._commit_seconds:
            self.commit()

    def commit(self) -> None:
        """Submit all held rows and rejections to the writer's thread."""
        for bucket in self._buckets.values():
            if bucket.rows:
                self._submit(bucket)
        if self._rejections:
            self._submit(None)
        self._oldest = None

    def _submit(self, bucket: _Bucket | None) -> None:
        """Submit the rows of one bucket, and all rejections, to the writer's thread."""
        rejections, self._rejections = self._rejections, []
        rows: list[pa.Table] = []
        if bucket is not None:
            rows, bucket.rows, bucket.num_clips = bucket.rows, [], 0
        if not any(bucket.rows for bucket in self._buckets.values()):
            self._oldest = None
        self._pending.append(
            self._writer.submit(write_rows, self._out, rows, rejections, bucket, before_commit=self._before_commit)
        )
        while self._pending and (len(self._pending) > self._most_pending or self._pending[0].done()):
            self.committed.add(self._pending.popleft().result())

    def close(self) -> None:
        """Commit the rest and wait until everything is written.

        Raises:
            storage.StorageError: a shard could not be written; earlier shards are whole.
        """
        try:
            self.commit()
            while self._pending:
                self.committed.add(self._pending.popleft().result())
        finally:
            self._writer.shutdown()


def write_rows(
    out: str,
    rows: Sequence[pa.Table],
    rejections: Sequence[Rejection],
    bucket: _Bucket | None,
    *,
    before_commit: Callable[[], None],
) -> WriteStats:
    """Write rejections, including those of damaged rows, then encoded rows of one bucket as a shard.

    Rejections are written first, so that an incomplete span is never committed without its rejection.

    Args:
        rows: encoded rows; empty without a bucket.
        rejections: rejections of whole spans.
        before_commit: called before each file is written; an exception stops the writing.
    """
    started = time.monotonic()
    stats = WriteStats(num_rejected_spans=len(rejections))
    table = pa.concat_tables(sorted(rows, key=lambda row: str(row["span_id"][0]))) if rows else None
    if table is not None:
        partly = _partial_rejections(table)
        stats.num_damaged_spans = len(partly)
        rejections = [*rejections, *partly]
    if rejections:
        before_commit()
        write_rejects(out, rejections)
        stats.reasons.update(str(r.reason) for r in rejections)
        stats.rejected_uris.update(r.uri for r in rejections)
    if bucket is not None and table is not None:
        before_commit()
        stats.add(_write_shard(out, bucket, table))
    stats.seconds = time.monotonic() - started
    return stats


def _partial_rejections(rows: pa.Table) -> list[Rejection]:
    """Rejections of rows that still have some clips."""
    counts = pc.list_value_length(rows["clips"]).to_pylist()
    return [
        replace(row_rejection(rejection), kept_clips=clips)
        for rejection, clips in zip(rows["rejection"].to_pylist(), counts, strict=True)
        if rejection is not None
    ]


def _write_shard(out: str, bucket: _Bucket, rows: pa.Table) -> WriteStats:
    table = shard_table(bucket, rows)
    data = parquet_bytes(table, bucket.payload)
    name = hashlib.sha256("\n".join(rows["span_id"].to_pylist()).encode()).hexdigest()[:16]
    storage.write_atomic(storage.join(out, SHARDS, f"{bucket.prefix}{name}.parquet"), data)
    return WriteStats(
        num_shards=1,
        num_spans=rows.num_rows,
        num_clips=table.num_rows,
        num_values=table.num_rows * sum(column.num_values for column in bucket.payload),
        payload_bytes=compressed_bytes(data, [column.name for column in bucket.payload]),
        file_bytes=data.size,
        last_clip_id=table["clip_id"][-1].as_py() if table.num_rows else None,
    )


def shard_table(bucket: _Bucket, rows: pa.Table) -> pa.Table:
    """Convert encoded rows (one per span) to shard rows (one per clip, sorted by id) whose metadata lists the spans."""
    spec = bucket.spec
    clip_ids = [
        spec.clip_id(row["video_id"], clip["clip_index"], row_part(row))
        for row in rows.select(["video_id", "part_start_seconds", "part_end_seconds", "clips"]).to_pylist()
        for clip in row["clips"]
    ]
    uris = pa.array([storage.public_uri(uri) for uri in rows["uri"].to_pylist()], pa.string())
    rows = rows.set_column(rows.schema.get_field_index("uri"), "uri", uris)
    valid = [sum(clip["num_valid_frames"] for clip in clips) for clips in rows["clips"].to_pylist()]
    listed = {
        SPANS_KEY: json.dumps(rows["span_id"].to_pylist()),
        SPAN_CLIPS_KEY: json.dumps(pc.list_value_length(rows["clips"]).to_pylist()),
        SPAN_SECONDS_KEY: json.dumps([round(frames / float(spec.fps), 6) for frames in valid]),
    }
    schema = bucket.schema.with_metadata({**bucket.schema.metadata, **listed})
    table = explode(rows, schema, bucket.payload, clip_ids=clip_ids, fps=float(spec.fps), signals=bucket.signals)
    metadata = dict(schema.metadata)
    if QUALITY.name in rows.schema.names:
        metadata |= {k.encode(): v.encode() for k, v in audit_metadata(rows, clip_ids, table, bucket.payload).items()}
    return table.sort_by("clip_id").replace_schema_metadata(metadata)


def _rejections_of(rows: pa.Table) -> list[Rejection]:
    return [row_rejection(r) for r in rows["rejection"].to_pylist() if r is not None]


def parquet_bytes(table: pa.Table, payload: Payload) -> pa.Buffer:
    """Serialize a shard as Parquet.

    Tokens are byte-stream-split with zstd. Measured by benchmarks/storage.py on uniform tokens: 15.1 bits for 15-bit
    ids (dictionary 16.3, plain 19.6), 18.7 for 18-bit ones (28.1, 23.0), 12.2 for 12-bit ones (12.2, 17.2).
    On skewed tokens it is the best encoding or within 3 % of it. Normal float16 latents would take 13.6 bits this
    way, but DuckDB (2.0) cannot read that for float16. They are stored plain, at 14.7 bits.
    """
    sink = pa.BufferOutputStream()
    encodings = {
        f"{column.name}.list.element": "PLAIN" if column.codebook_size is None else "BYTE_STREAM_SPLIT"
        for column in payload
    }
    payload_names = {column.name for column in payload}
    others = [f.name for f in table.schema if f.name not in payload_names]
    pq.write_table(
        table,
        sink,
        row_group_size=max(1, ROW_GROUP_BYTES // payload_bytes(payload)),
        compression="zstd",
        use_dictionary=[name for name in others if pa.types.is_string(table.schema.field(name).type)],
        column_encoding=encodings,
        write_page_index=True,
        write_page_checksum=True,
        store_schema=True,
    )
    return sink.getvalue()


def compressed_bytes(data: pa.Buffer, columns: Sequence[str]) -> int:
    """Compressed size of some columns of a Parquet file, in bytes."""
    metadata = pq.read_metadata(pa.BufferReader(data))
    groups = (metadata.row_group(g) for g in range(metadata.num_row_groups))
    chunks = (group.column(c) for group in groups for c in range(metadata.num_columns))
    return sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
