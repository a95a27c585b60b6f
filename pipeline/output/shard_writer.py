"""Shard writer: gathers encoded rows and stages them as shards, which ``pipeline.output.commit`` publishes.

A shard's name is a digest of its span ids, and its metadata lists them, so ``pipeline.output.committed`` reads the
finished spans from the files alone. The digest also spreads the names over the prefixes of an object store.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import SHARDS, SPAN_CLIPS_KEY, SPAN_SECONDS_KEY, SPANS_KEY, STAGED
from vidshard.pipeline.output.quality import audit_metadata
from vidshard.pipeline.rows import QUALITY, WORK_NUMBER, explode, frame_sizes, row_part, row_rejection
from vidshard.schemas.rejections import Reason, Rejection
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSettings:
    """Settings of the shards of one run, small enough to send to every writer."""

    out: str
    """Output folder."""
    run_number: int = 0
    """Number of the run's lease; what is staged for it lies in an area of this number."""
    buckets: tuple[tuple[ClipSpec, Payload], ...]
    """Clip settings and payload of each bucket. A shard holds one bucket."""
    provenance: Provenance
    """Provenance of all shards; each bucket's payload replaces its own."""
    manifest_fields: tuple[pa.Field, ...] = ()
    signal_fields: tuple[pa.Field, ...] = ()
    shard_bytes: int
    """Payload of a full shard in bytes, before compression."""
    commit_seconds: float
    """Longest time that an encoded clip waits for its commit."""

    @property
    def area(self) -> str:
        """Folder of the shards of this run that are staged."""
        return storage.join(self.out, STAGED, f"{self.run_number:06d}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardReport:
    """Report of a writer on one shard: what is to be known to commit it, without its rows."""

    writer: str
    """Name of the writer."""
    number: int
    """Number of the shard among those of the writer."""
    spans: tuple[int, ...]
    """Numbers of its spans in the work list; empty for rows without numbers."""
    staged: storage.StagedFile | None = None
    """The shard, written and not visible; None if that failed."""
    rejections: tuple[Rejection, ...] = ()
    """Rejections of those of its spans that are damaged; they are written before the shard is published."""
    stats: WriteStats = field(default_factory=WriteStats)
    error: BaseException | None = None
    """Error that kept the shard from being written."""


@dataclass(kw_only=True, slots=True)
class _Bucket:
    """Shard settings of one bucket, and its rows that wait to be written."""

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


@dataclass(kw_only=True, slots=True)
class _Shard:
    """A shard that is being written, or is written and not settled."""

    bucket: _Bucket
    rows: list[pa.Table]
    """Rows, one span each. They are kept until the shard is settled, as some may have to go into another one."""
    spans: tuple[int, ...]
    staged: storage.StagedFile | None = None


MOST_SHARDS = 4
"""Shards of one writer that may be unsettled at once; more rows wait."""
WRITER_THREADS = 2
"""Threads of a writer. Compression leaves Python's lock to the others, and two threads write about 1,000 clips of KL-16
latents a second, more than eight GPUs make."""


class ShardWriter:
    """Gathers encoded rows, writes them as shards on threads of its own, and reports each shard once it is staged.

    A shard is written when it is full. Everything is written when the oldest row has waited ``commit_seconds``, and by
    :meth:`flush`. No shard is visible before the owner of the account publishes it (``pipeline.output.commit``), which
    then settles it here. A row that is held already is dropped: a retried call brings it twice.

    Safe for use by several threads.
    """

    def __init__(
        self,
        settings: ShardSettings,
        report: Callable[[ShardReport], object],
        *,
        name: str = "",
        num_threads: int = WRITER_THREADS,
    ) -> None:
        """Create an empty writer; nothing is written yet.

        Args:
            settings: settings of the shards.
            report: called on a thread of the writer for each shard.
            name: name of the writer in its reports.
            num_threads: threads that compress and write.
        """
        self._settings = settings
        self._report = report
        self._name = name
        names = [field.name for field in settings.signal_fields]
        fields_ = [*settings.manifest_fields, *settings.signal_fields]
        self._buckets = {
            (spec.height, spec.width): _Bucket(
                spec=spec,
                payload=payload,
                schema=shard_schema(fields_, replace(settings.provenance, payload=payload)),
                signals=names,
                prefix=f"{spec.bucket}-" if len(settings.buckets) > 1 else "",
                clips_per_shard=max(1, settings.shard_bytes // payload_bytes(payload)),
            )
            for spec, payload in settings.buckets
        }
        self._oldest: float | None = None
        self._held: set[int] = set()
        self._shards: dict[int, _Shard] = {}
        self._num_shards = 0
        self._num_writing = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="shard-writer")

    @property
    def is_full(self) -> bool:
        """Whether so many shards are unsettled that more rows should wait."""
        return len(self._shards) >= MOST_SHARDS and not self._is_closed

    def wait_for_room(self, seconds: float | None = None) -> None:
        """Return once the writer is not full, or after so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self.is_full, timeout=seconds)

    def add(self, rows: pa.Table) -> None:
        """Take encoded rows without those that were rejected whole, and write what is full or due."""
        numbers: list[int | None] = (
            rows[WORK_NUMBER.name].to_pylist() if WORK_NUMBER.name in rows.column_names else [None] * rows.num_rows
        )
        with self._changed:
            if self._is_closed:
                return
            for at, size in enumerate(frame_sizes(rows)):
                number = numbers[at]
                if number in self._held:
                    continue
                if number is not None:
                    self._held.add(number)
                self._hold(self._buckets[size], rows.slice(at, 1))
            self._write_if_due()

    def _hold(self, bucket: _Bucket, row: pa.Table) -> None:
        clips = row["clips"].combine_chunks().value_lengths()[0].as_py()
        if bucket.num_clips and bucket.num_clips + clips > bucket.clips_per_shard:
            self._begin(bucket)
        self._oldest = time.monotonic() if self._oldest is None else self._oldest
        bucket.rows.append(row)
        bucket.num_clips += clips

    def write_if_due(self) -> None:
        """Begin to write everything if the oldest row has waited ``commit_seconds``."""
        with self._changed:
            self._write_if_due()

    def _write_if_due(self) -> None:
        if self._oldest is not None and time.monotonic() - self._oldest > self._settings.commit_seconds:
            self._begin_all()

    def begin_all(self) -> None:
        """Begin to write everything that is held."""
        with self._changed:
            self._begin_all()

    def _begin_all(self) -> None:
        for bucket in self._buckets.values():
            if bucket.rows:
                self._begin(bucket)
        self._oldest = None

    def flush(self, seconds: float | None = None) -> None:
        """Write everything that is held, and return when each shard is reported, or after so many seconds."""
        with self._changed:
            self._begin_all()
            self._changed.wait_for(lambda: self._num_writing == 0, timeout=seconds)

    def _begin(self, bucket: _Bucket) -> None:
        rows, bucket.rows, bucket.num_clips = bucket.rows, [], 0
        if not any(bucket.rows for bucket in self._buckets.values()):
            self._oldest = None
        spans = tuple(row[WORK_NUMBER.name][0].as_py() for row in rows if WORK_NUMBER.name in row.column_names)
        shard = _Shard(bucket=bucket, rows=rows, spans=spans)
        self._num_shards += 1
        self._num_writing += 1
        self._shards[self._num_shards] = shard
        self._threads.submit(self._write, self._num_shards, shard)

    def _write(self, number: int, shard: _Shard) -> None:
        """Write one shard and report it, on a thread of the writer."""
        report = ShardReport(writer=self._name, number=number, spans=shard.spans)
        try:
            report = stage_shard(self._settings, shard, report)
            shard.staged = report.staged
        except BaseException as error:  # noqa: BLE001  whoever commits raises it
            report = replace(report, error=error)
        try:
            self._report(report)
        finally:
            with self._changed:
                self._num_writing -= 1
                self._changed.notify_all()

    def settle(self, number: int, unwanted: Collection[int] = ()) -> None:
        """Forget a shard that was reported.

        Args:
            number: number of the shard.
            unwanted: spans of it that must not be committed. If there are any, the staged file is discarded, and the
                other rows go into a later shard.
        """
        with self._changed:
            shard = self._shards.pop(number, None)
            if shard is None:
                return
            self._held.difference_update(unwanted or shard.spans)
            if unwanted and not self._is_closed:
                for row, span in zip(shard.rows, shard.spans, strict=True):
                    if span not in unwanted:
                        self._hold(shard.bucket, row)
            self._changed.notify_all()
        if unwanted and shard.staged is not None:
            storage.discard(shard.staged)

    def close(self) -> None:
        """End the threads, after what they are writing; rows that are held are dropped."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._threads.shutdown()


def stage_shard(settings: ShardSettings, shard: _Shard, report: ShardReport) -> ShardReport:
    """Write the rows of one bucket as a staged shard; returns the report on it.

    Raises:
        storage.StorageError: it could not be written.
    """
    started = time.monotonic()
    bucket = shard.bucket
    rows = pa.concat_tables(sorted(shard.rows, key=lambda row: str(row["span_id"][0])))
    partly = _partial_rejections(rows)
    table = shard_table(bucket, rows)
    data = parquet_bytes(table, bucket.payload)
    name = hashlib.sha256("\n".join(rows["span_id"].to_pylist()).encode()).hexdigest()[:16]
    path = storage.join(settings.out, SHARDS, f"{bucket.prefix}{name}.parquet")
    staged = storage.stage(path, data, area=settings.area)
    stats = WriteStats(
        num_shards=1,
        num_spans=rows.num_rows,
        num_damaged_spans=sum(rejection.reason is not Reason.POSSIBLE_LOSS for rejection in partly),
        num_clips=table.num_rows,
        num_values=table.num_rows * sum(column.num_values for column in bucket.payload),
        payload_bytes=compressed_bytes(data, [column.name for column in bucket.payload]),
        file_bytes=data.size,
        seconds=time.monotonic() - started,
        last_clip_id=table["clip_id"][-1].as_py() if table.num_rows else None,
    )
    return replace(report, staged=staged, rejections=tuple(partly), stats=stats)


def _partial_rejections(rows: pa.Table) -> list[Rejection]:
    """Rejections of rows that still have some clips."""
    counts = pc.list_value_length(rows["clips"]).to_pylist()
    return [
        replace(row_rejection(rejection), kept_clips=clips)
        for rejection, clips in zip(rows["rejection"].to_pylist(), counts, strict=True)
        if rejection is not None
    ]


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
