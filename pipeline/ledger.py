"""What an output folder holds, and what is left to do.

    plan/*.parquet      videos that were opened, and the spans they are cut into; a file for each commit of planning
    shards/*.parquet    spans that are finished; the metadata of each file lists its own
    rejects/*.parquet   spans, and whole videos, that gave no tokens

These files are all the state there is. What is left to do is what was planned, less what is finished or rejected;
whoever is killed between two of the writes below leaves a folder from which the next run reads the same. Nothing is
renamed or locked here: every write puts one whole object, and ``pipeline.lease`` sees to it that one process writes.

A video is known again by its *entry*: a digest of where it is, of its size and time stamp as the storage states
them, and of the part that is asked for. One that was replaced has another entry and is opened again; if its content
is another one, the rows of the former are superseded and taken out. Memory is some 250 bytes for each planned span,
and a row for each that is left to do.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.read import ShardError, open_shard
from pipeline.rows import PLAN_FIELDS, PLAN_SCHEMA, manifest_fields, rejections_table, row_part
from pipeline.shards import (
    REJECTS,
    SPAN_CLIPS_KEY,
    SPAN_SECONDS_KEY,
    SPANS_KEY,
    parquet_bytes,
    shard_paths,
    write_rejects,
)
from schemas.video import Part, Reason, Rejection, Stage

PLANNED = "plan"
"""The folder of what was planned."""

ENTRY_TYPE = pa.binary(16)
CATALOGUE_SCHEMA = pa.schema(
    [
        pa.field("entry", ENTRY_TYPE, nullable=False),
        pa.field("seen_entry", ENTRY_TYPE, nullable=False),
        *(field.with_nullable(True) for field in PLAN_FIELDS),
    ]
)
"""A row of ``plan/``: a span; or a video without any, which was rejected when it was opened. ``entry`` is made of what
the input says of the file, ``seen_entry`` of what whoever opened it found."""

_READERS = 16
"""Files whose ends are read at once: on an object store each is a request or two."""


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
    videos = videos.append_column(CATALOGUE_SCHEMA.field("entry"), pa.chunked_array(parts, ENTRY_TYPE))
    numbered = pa.table({"entry": videos["entry"], "number": _numbers(videos)})
    first = numbered.group_by("entry").aggregate([("number", "min")])["number_min"]
    if len(first) == videos.num_rows:
        return videos, []
    is_first = pc.is_in(_numbers(videos), first.combine_chunks())
    return videos.filter(is_first), videos["uri"].filter(pc.invert(is_first)).to_pylist()


# What was planned.


def write_planned(out: str, rows: pa.Table) -> None:
    """Add rows to the plan, ``CATALOGUE_SCHEMA``, as a file of their own after those that are there."""
    paths = storage.list_files(storage.join(out, PLANNED), ".parquet")
    number = 1 + max((int(path.rsplit("/", 1)[-1].split(".")[0]) for path in paths), default=0)
    data = _parquet(rows.select(CATALOGUE_SCHEMA.names).cast(CATALOGUE_SCHEMA))
    storage.write_atomic(storage.join(out, PLANNED, f"{number:06d}.parquet"), data)


def _parquet(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=1 << 16)
    return sink.getvalue()


def read_planned(out: str, columns: Sequence[str] = CATALOGUE_SCHEMA.names) -> pa.Table:
    """The plan, oldest rows first.

    Raises:
        ShardError: a file of it is damaged.
    """
    schema = pa.schema([CATALOGUE_SCHEMA.field(name) for name in columns])
    tables = [batch for _, batch in _planned_groups(out, columns)]
    return pa.concat_tables([schema.empty_table(), *tables])


def _planned_groups(
    out: str, columns: Sequence[str], wanted: Callable[[int, int], bool] = lambda _first, _end: True
) -> Iterator[tuple[int, pa.Table]]:
    """(number of the first row, rows) of the plan's row groups, those whose range of rows is wanted."""
    first = 0
    for path in storage.list_files(storage.join(out, PLANNED), ".parquet"):
        with _readable(path), storage.open_binary(path) as file:
            parquet = pq.ParquetFile(file)
            for group in range(parquet.num_row_groups):
                end = first + parquet.metadata.row_group(group).num_rows
                if wanted(first, end):
                    yield first, parquet.read_row_group(group, columns=list(columns)).select(list(columns))
                first = end


class _readable:  # noqa: N801
    """Names the file in what Arrow says of damage."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, (pa.ArrowException, ValueError, KeyError)) and not isinstance(error, ShardError):
            raise ShardError(
                f"{self.path} is damaged ({' '.join(str(error).split())[:200]}): `vidshard verify --repair` takes it "
                "out, and the same command again fills it in"
            ) from error


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
    with _readable(path), storage.open_binary(path) as file:
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
    with _readable(path):
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
            storage.write_atomic(path, _parquet(table.filter(pa.array(keeps))))
    return dropped


def is_partial(reject: Mapping[str, Any]) -> bool:
    """Whether a rejection says what is missing beside clips that were kept: these make its span a finished one."""
    return bool(reject["kept_clips"])


def retry_rejected(out: str, reasons: Collection[Reason] | None) -> Retried:
    """Forget rejections, so that what they are about counts as not done yet.

    The clips that were kept of a damaged stretch are taken out first: killed between the two, the stretch is redone.

    Args:
        out: the output.
        reasons: which ones; None for all but copies of other videos.
    """

    def is_meant(row: Mapping[str, Any]) -> bool:
        return row["reason"] != Reason.DUPLICATE if reasons is None else row["reason"] in reasons

    rejects = [row for row in read_rejects(out).to_pylist() if is_meant(row)]
    partly = {row["span_id"] for row in rejects if row["span_id"] is not None and is_partial(row)}
    if partly:
        for path in shard_paths(out):
            if not partly.isdisjoint(shard_spans(path).spans):
                drop_spans(path, partly)
    dropped = drop_rejects(out, lambda row: not is_meant(row))
    return Retried(
        spans=frozenset(row["span_id"] for row in dropped if row["span_id"] is not None),
        uris=frozenset(row["uri"] for row in dropped if row["span_id"] is None),
    )


@dataclass(frozen=True, kw_only=True)
class Retried:
    """What is to be tried again, and nothing else."""

    spans: frozenset[str]
    uris: frozenset[str]
    """Of whole videos that could not be opened."""


def damaged_files(out: str) -> list[tuple[str, str]]:
    """(path, what is wrong) of the files of the plan and of the rejections that cannot be read."""
    damaged = []
    for folder, names in ((PLANNED, CATALOGUE_SCHEMA.names), (REJECTS, [])):
        for path in storage.list_files(storage.join(out, folder), ".parquet"):
            try:
                with _readable(path):
                    pq.read_table(pa.BufferReader(storage.read_bytes(path))).select(names)
            except ShardError as error:
                damaged.append((path, str(error)))
    return damaged


# What is left to do.


def videos_to_open(out: str, videos: pa.Table, retried: Retried | None = None) -> pa.Table:
    """Those of the videos that the plan does not know as they are now.

    Args:
        out: the output.
        videos: with their entries.
        retried: open only those of them that are to be tried again.
    """
    planned = _with_input_rows(read_planned(out, ["entry", "seen_entry", "video_id"]), videos)
    known = pc.is_in(_numbers(videos), planned.filter(pc.is_valid(planned["video_id"]))["input_row"].combine_chunks())
    refused = {row["uri"] for row in read_rejects(out).to_pylist() if row["span_id"] is None}
    if refused:
        without = pc.is_in(
            _numbers(videos), planned.filter(pc.is_null(planned["video_id"]))["input_row"].combine_chunks()
        )
        known = pc.or_(known, pc.and_(without, _has_uri(videos, refused)))
    unknown = videos.filter(pc.invert(known))
    if retried is not None:
        unknown = unknown.filter(_has_uri(unknown, retried.uris))
    return unknown


def _numbers(table: pa.Table) -> pa.Array:
    return pa.array(range(table.num_rows), pa.int32())


def _has_uri(videos: pa.Table, uris: Collection[str]) -> pa.Array:
    """Whether each video's URI, without credentials, is one of these."""
    return pa.array([storage.public_uri(uri) in uris for uri in videos["uri"].to_pylist()], pa.bool_())


def _with_input_rows(planned: pa.Table, videos: pa.Table) -> pa.Table:
    """The planned rows with the number of the video that each is about, null for one that is not among them."""
    entries = videos["entry"].combine_chunks()
    row = pc.coalesce(pc.index_in(planned["entry"], entries), pc.index_in(planned["seen_entry"], entries))
    return planned.append_column("input_row", row)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What there is to do for the videos of the inputs, and how much of it is done."""

    todo: pa.Table
    """``PLAN_SCHEMA`` and the manifests' columns, one row a span that is neither finished nor rejected: those of one
    frame size together, in the order of the inputs."""
    num_spans: int
    """In all."""
    num_committed: int
    num_rejected: int
    """Of all spans, those with no clip in a shard."""
    expected_clips: int
    """Of all spans, if the headers tell the truth."""
    copies: tuple[Rejection, ...]
    """Videos that are the same as others of the inputs."""
    superseded: frozenset[str]
    """Ids of videos that were replaced by others since."""
    opened: pa.Array
    """bool, for each video of the inputs whether it could be opened; the others were rejected."""


def lay_out(
    out: str,
    videos: pa.Table,
    committed: pa.Array,
    rejected: pa.Array,
    retried: Retried | None = None,
    opened: pa.Array | None = None,
) -> Plan:
    """Lay what was planned against what is done.

    Args:
        out: the output.
        videos: of the inputs, with their entries; all of them are in the plan, or were rejected.
        committed: ids of spans in shards.
        rejected: ids of spans that gave nothing.
        retried: to do nothing else than try these again.
        opened: and, with it, entries of the videos that could be opened this time.
    """
    names = ["entry", "seen_entry", "span_id", "video_id", "first_clip", "part_start_seconds", "part_end_seconds"]
    names.append("expected_clips")
    planned = _with_input_rows(read_planned(out, names), videos)
    is_span = pc.is_valid(planned["span_id"])
    heads = planned.filter(pc.and_(is_span, pc.equal(planned["first_clip"], 0)))
    present = heads.filter(pc.is_valid(heads["input_row"]))
    keys = ["video_id", "part_start_seconds", "part_end_seconds"]
    first = present.group_by(keys).aggregate([("input_row", "min")])["input_row_min"]
    wanted = pc.and_(is_span, pc.fill_null(pc.is_in(planned["input_row"], first.combine_chunks()), False))
    if present.num_rows > len(first):  # several entries of one video: whoever opened a file again found the same
        numbers = planned.append_column("number", _numbers(planned)).filter(wanted)
        wanted = pc.is_in(_numbers(planned), numbers.group_by("span_id").aggregate([("number", "min")])["number_min"])
    counted = planned.filter(wanted)
    is_done, is_refused = (pc.is_in(planned["span_id"], done) for done in (committed, rejected))
    is_refused = pc.and_(is_refused, pc.invert(is_done))
    left = pc.and_(wanted, pc.invert(pc.or_(is_done, is_refused)))
    if retried is not None:
        again = pc.is_in(planned["span_id"], pa.array(sorted(retried.spans), pa.string()))
        if opened is not None:
            again = pc.or_(again, pc.is_in(planned["entry"], opened))
        left = pc.and_(left, again)
    return Plan(
        todo=_todo(out, videos, pc.fill_null(left, False), planned["input_row"]),
        num_spans=counted.num_rows,
        num_committed=pc.sum(pc.and_(wanted, is_done)).as_py() or 0,
        num_rejected=pc.sum(pc.and_(wanted, is_refused)).as_py() or 0,
        expected_clips=pc.sum(counted["expected_clips"]).as_py() or 0,
        copies=_copies(videos, present, first),
        superseded=_superseded(out, videos, planned, present),
        opened=pc.is_in(_numbers(videos), present["input_row"].combine_chunks()),
    )


def _todo(out: str, videos: pa.Table, left: pa.ChunkedArray, input_row: pa.ChunkedArray) -> pa.Table:
    """The rows that are left, with where each video is now and its manifest's columns."""
    mask = pa.array(left.to_numpy()) if isinstance(left, pa.ChunkedArray) else left
    numbers = input_row.combine_chunks()
    names = PLAN_SCHEMA.names
    tables = [pa.schema([CATALOGUE_SCHEMA.field(name) for name in names]).empty_table()]
    rows = [pa.array([], pa.int32())]

    def any_left(first: int, end: int) -> bool:
        return bool(pc.any(mask[first:end]).as_py())

    for first, group in _planned_groups(out, names, any_left):
        here = mask[first : first + group.num_rows]
        tables.append(group.filter(here))
        rows.append(numbers[first : first + group.num_rows].filter(here))
    spans = pa.concat_tables(tables).combine_chunks()
    row = pa.concat_arrays(rows)
    now = videos.take(row)
    spans = spans.set_column(names.index("uri"), PLAN_SCHEMA.field("uri"), now["uri"])
    for field in manifest_fields(now.schema):
        spans = spans.append_column(field, now[field.name])
    schema = pa.schema([*PLAN_SCHEMA, *manifest_fields(spans.schema)])
    return _in_order(spans.append_column("input_row", row)).select(schema.names).cast(schema)


def _in_order(spans: pa.Table) -> pa.Table:
    """Spans of one frame size together, so that batches are full, and those of one video, so that one pass does."""
    first = spans.group_by("video_id").aggregate([("input_row", "min")])
    video_order = first["input_row_min"].take(pc.index_in(spans["video_id"], first["video_id"].combine_chunks()))
    keys = pa.table(
        {
            "height": spans["frame_height"],
            "width": spans["frame_width"],
            "video": video_order,
            "start": pc.fill_null(spans["part_start_seconds"], -1.0),
            "end": pc.fill_null(spans["part_end_seconds"], -1.0),
            "clip": spans["first_clip"],
        }
    )
    return spans.take(pc.sort_indices(keys, sort_keys=[(key, "ascending") for key in keys.column_names]))


def _copies(videos: pa.Table, present: pa.Table, first: pa.ChunkedArray) -> tuple[Rejection, ...]:
    """What to say of videos that are the same as an earlier one of the inputs."""
    copies = present.filter(pc.invert(pc.is_in(present["input_row"], first.combine_chunks()))).sort_by("input_row")
    if not copies.num_rows:
        return ()
    owners = present.filter(pc.is_in(present["input_row"], first.combine_chunks()))
    owners = owners.filter(pc.is_in(owners["video_id"], copies["video_id"].combine_chunks()))
    uri_of = {
        video_id: videos["uri"][row].as_py()
        for video_id, row in zip(owners["video_id"].to_pylist(), owners["input_row"].to_pylist(), strict=True)
    }
    rejections: dict[int, Rejection] = {}
    for video_id, row in zip(copies["video_id"].to_pylist(), copies["input_row"].to_pylist(), strict=True):
        rejections[row] = Rejection(
            uri=storage.public_uri(videos["uri"][row].as_py()),
            video_id=video_id,
            span_id=None,
            start_seconds=None,
            stage=Stage.PROBE,
            reason=Reason.DUPLICATE,
            detail=f"the same content as {storage.public_uri(uri_of[video_id])}",
        )
    return tuple(rejections.values())


def _superseded(out: str, videos: pa.Table, planned: pa.Table, present: pa.Table) -> frozenset[str]:
    """Ids of videos whose place is taken by others: at each place of theirs that the inputs name is another one now.

    One that stands nowhere in the inputs any more was removed, not replaced, and stays.
    """
    gone = pc.and_(pc.is_null(planned["input_row"]), pc.is_valid(planned["video_id"]))
    if not pc.any(gone).as_py():
        return frozenset()
    mask = pa.array(gone.to_numpy())
    now: dict[str, set[str]] = defaultdict(set)
    for video_id, row in zip(present["video_id"].to_pylist(), present["input_row"].to_pylist(), strict=True):
        now[storage.public_uri(videos["uri"][row].as_py())].add(video_id)
    replaced: set[str] = set()
    elsewhere: set[str] = set(present["video_id"].to_pylist())
    for first, group in _planned_groups(out, ["uri", "video_id"], lambda a, b: bool(pc.any(mask[a:b]).as_py())):
        former = group.filter(mask[first : first + group.num_rows])
        for uri, video_id in zip(former["uri"].to_pylist(), former["video_id"].to_pylist(), strict=True):
            if video_id not in now.get(uri, set()):
                (replaced if uri in now else elsewhere).add(video_id)
    return frozenset(replaced - elsewhere)


def take_out_superseded(out: str, video_ids: Collection[str]) -> int:
    """Take the rows of videos that were replaced out of the shards and the rejections; gives the number of spans."""
    if not video_ids:
        return 0
    dropped = 0
    for path in shard_paths(out):
        former = {span for span in shard_spans(path).spans if span.split("-", 1)[0] in video_ids}
        if former:
            drop_spans(path, former)
            dropped += len(former)
    drop_rejects(out, lambda row: row["video_id"] not in video_ids)
    return dropped


def settle_rejects(
    out: str, videos: pa.Table, committed: pa.Array, plan: Plan, copies: Sequence[Rejection]
) -> list[Rejection]:
    """Make the rejections agree with the rest, as a run that was killed between two writes may have left them.

    Taken out are those whose file changed since (which are tried again), those of spans that are in shards after all,
    what is missing beside clips that never came to be written, and those of whole videos that could be opened since.
    Copies of other videos are listed as they are now; gives those that were not.

    Args:
        out: the output.
        videos: of the inputs, with their entries.
        committed: ids of spans in shards.
        plan: of the videos.
        copies: all that are known, those of the plan among them.
    """
    rows = read_rejects(out).to_pylist()
    whole = {row["uri"] for row in rows if row["span_id"] is None}
    listed, opened = (
        {uri for uri in map(storage.public_uri, uris.to_pylist()) if uri in whole} if whole else set()
        for uris in (videos["uri"], videos["uri"].filter(plan.opened))
    )
    named = pa.array(sorted({row["span_id"] for row in rows if row["span_id"] is not None}), pa.string())
    finished = set(named.filter(pc.is_in(named, committed)).to_pylist())
    new = {(copy.uri, copy.detail): copy for copy in copies}

    def is_wanted(row: dict[str, Any]) -> bool:
        if row["reason"] == Reason.DUPLICATE:
            return new.pop((row["uri"], row["detail"]), None) is not None or row["uri"] not in listed
        if row["span_id"] is None:
            return row["uri"] not in opened
        return row["reason"] != Reason.CHANGED and is_partial(row) == (row["span_id"] in finished)

    drop_rejects(out, is_wanted)
    if new:
        write_rejects(out, list(new.values()))
    return list(new.values())


def rejected_spans(rejects: pa.Table) -> pa.Array:
    """Ids of the spans that gave nothing, but for those that are tried again in any case."""
    rows = rejects.filter(
        pc.and_(
            pc.and_(pc.is_valid(rejects["span_id"]), pc.equal(pc.fill_null(rejects["kept_clips"], 0), 0)),
            pc.not_equal(rejects["reason"], str(Reason.CHANGED)),
        )
    )
    return rows["span_id"].combine_chunks()
