"""What is left to do: the videos of the inputs laid against what an output holds.

A video is known again by its *entry*: a digest of where it is, of its size and time stamp as the storage states them,
and of the part that is asked for. One that was replaced has another entry and is opened again; if its content is
another one, the rows of the former are superseded and taken out.

Where nothing was rejected, replaced or removed, no Python object is held for each video: a million of them take some
300 MiB for a moment, a row that is left to do a bit (benchmarks/scale.py).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vidshard.pipeline import storage
from vidshard.pipeline.output.committed import drop_spans, shard_spans
from vidshard.pipeline.output.entries import location_keys
from vidshard.pipeline.output.layout import RETRY_FILE, WORK_FILE, shard_paths
from vidshard.pipeline.output.plan_store import PLAN_SCHEMA, planned_groups, read_planned
from vidshard.pipeline.output.rejects import (
    RetrySet,
    drop_rejects,
    is_partial,
    read_rejects,
    read_retried,
    write_rejects,
)
from vidshard.pipeline.rows import WORK_NUMBER, WORK_SCHEMA, manifest_fields
from vidshard.schemas.rejections import Reason, Rejection, Stage

_SORTED_ROWS = 1 << 16

Mask = npt.NDArray[np.bool_]


def _location_keys(videos: pa.Table) -> list[bytes]:
    places: list[bytes] = []
    for chunk in videos.select(["uri"]).to_batches(max_chunksize=_SORTED_ROWS):
        places += location_keys(chunk["uri"].to_pylist()).to_pylist()
    return places


def _input_rows(out: str, videos: pa.Table) -> npt.NDArray[np.int32]:
    """For each row of the plan the number of the video that it is about; -1 for one that is not among them."""
    entries = videos["entry"].combine_chunks()
    planned = read_planned(out, ["entry", "seen_entry"])
    row = pc.fill_null(pc.index_in(planned["entry"], entries), -1).to_numpy()
    if (row < 0).any():
        seen = pc.fill_null(pc.index_in(planned["seen_entry"], entries), -1).to_numpy()
        row = np.where(row < 0, seen, row)
    _give_back()
    return np.asarray(row, np.int32)


def _give_back() -> None:
    """Hand what look-ups and reading took back to the system: Arrow keeps it, 300 MiB for a million videos."""
    pa.default_memory_pool().release_unused()


def _is_valid(out: str, column: str) -> Mask:
    """Whether each row of the plan has a value there."""
    return np.asarray(pc.is_valid(read_planned(out, [column])[column]).to_numpy(), np.bool_)


def _at(rows: npt.NDArray[np.int32], num_videos: int) -> Mask:
    """Which of the videos are among these."""
    found = np.zeros(num_videos, np.bool_)
    found[rows[rows >= 0]] = True
    return found


def videos_to_open(out: str, videos: pa.Table, retried: RetrySet | None = None) -> pa.Table:
    """Those of the videos that the plan does not know as they are now.

    Args:
        out: the output.
        videos: with their entries.
        retried: open only those of them that are to be tried again.
    """
    row = _input_rows(out, videos)
    has_span = _is_valid(out, "span_id")
    known = _at(row[has_span], videos.num_rows)
    if (has_span & (row < 0)).any():
        known &= ~_came_back(out, videos, row, has_span)
    refused = {reject["place"] for reject in read_rejects(out).to_pylist() if reject["span_id"] is None}
    if refused:
        is_refused = np.array([place.hex() in refused for place in _location_keys(videos)], np.bool_)
        known |= _at(row[~has_span], videos.num_rows) & is_refused
    unknown = videos if not known.any() else videos.filter(pa.array(~known))
    return unknown if retried is None else unknown.filter(pa.array(_has_uri(unknown, retried.uris)))


def _came_back(out: str, videos: pa.Table, row: npt.NDArray[np.int32], has_span: Mask) -> Mask:
    """Which of the videos are planned, but at their place another one was planned since: it is opened again."""
    places = read_planned(out, ["place"])["place"]
    latest: dict[bytes, int] = {}
    for number in np.flatnonzero(has_span & (row < 0)):
        latest[places[int(number)].as_py()] = int(number)
    own = np.full(videos.num_rows, -1)
    planned = np.flatnonzero(has_span & (row >= 0))
    np.maximum.at(own, row[planned], planned)
    return np.array(
        [latest.get(place, -1) > mine >= 0 for place, mine in zip(_location_keys(videos), own, strict=True)], np.bool_
    )


def _has_uri(videos: pa.Table, uris: Collection[str]) -> Mask:
    """Whether each video's URI, without credentials, is one of these."""
    flags = [uri in uris for uri in _public_uris(videos)]
    return np.array(flags, np.bool_)


def _public_uris(videos: pa.Table) -> Iterator[str]:
    for chunk in videos.select(["uri"]).to_batches(max_chunksize=_SORTED_ROWS):
        yield from map(storage.public_uri, chunk["uri"].to_pylist())


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What there is to do for the videos of the inputs, and how much of it is done."""

    left: Mask
    """For each row of the plan whether it is to be done now."""
    input_row: npt.NDArray[np.int32]
    """For each row of the plan the number of its video among the inputs, or -1."""
    num_left: int
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
    opened: Mask
    """For each video of the inputs whether it could be opened; the others were rejected."""


def reconcile(
    out: str,
    videos: pa.Table,
    committed: pa.Array,
    rejected: pa.Array,
    retried: RetrySet | None = None,
    opened: pa.Table | None = None,
) -> Plan:
    """Lay what was planned against what is done.

    Args:
        out: the output.
        videos: of the inputs, with their entries; all of them are in the plan, or were rejected.
        committed: ids of spans in shards.
        rejected: ids of spans that gave nothing.
        retried: to do nothing else than try these again.
        opened: and, with it, the videos that were opened this time.
    """
    row = _input_rows(out, videos)
    present = _heads(out, row)
    keys = ["video_id", "part_start_seconds", "part_end_seconds"]
    first = present.group_by(keys).aggregate([("input_row", "min")])["input_row_min"].to_numpy()
    _give_back()
    spans = read_planned(out, ["span_id", "expected_clips"])
    wanted = _at(first, videos.num_rows)[row] & (row >= 0) & pc.is_valid(spans["span_id"]).to_numpy()
    if present.num_rows > len(first):  # several entries of one video: whoever opened a file again found the same
        wanted &= _first_of_each(spans["span_id"], wanted)
    is_done, is_refused = (pc.is_in(spans["span_id"], done).to_numpy() for done in (committed, rejected))
    is_refused = is_refused & ~is_done
    _give_back()
    left = wanted & ~is_done & ~is_refused
    if retried is not None:
        again = pc.is_in(spans["span_id"], pa.array(sorted(retried.spans), pa.string())).to_numpy()
        if opened is not None:
            entries = read_planned(out, ["entry"])["entry"]
            again = again | pc.is_in(entries, opened["entry"].combine_chunks()).to_numpy()
        left &= again
    return Plan(
        left=left,
        input_row=row,
        num_left=int(left.sum()),
        num_spans=int(wanted.sum()),
        num_committed=int((wanted & is_done).sum()),
        num_rejected=int((wanted & is_refused).sum()),
        expected_clips=int(pc.fill_null(spans["expected_clips"], 0).to_numpy()[wanted].sum()),
        copies=_copies(videos, present, first),
        superseded=_superseded(out, videos, row, present),
        opened=_at(present["input_row"].to_numpy(), videos.num_rows),
    )


def _heads(out: str, row: npt.NDArray[np.int32]) -> pa.Table:
    """Of each planned video among the inputs one row: its id, its part, and its number there."""
    names = ["video_id", "part_start_seconds", "part_end_seconds"]
    tables = [pa.schema([*(PLAN_SCHEMA.field(n) for n in names), pa.field("input_row", pa.int32())]).empty_table()]
    for at, group in planned_groups(out, [*names, "first_clip", "span_id"]):
        here = row[at : at + group.num_rows]
        is_first = pc.fill_null(pc.equal(group["first_clip"], 0), False).to_numpy()
        is_head = is_first & pc.is_valid(group["span_id"]).to_numpy() & (here >= 0)
        table = group.select(names).append_column("input_row", pa.array(here, pa.int32()))
        tables.append(table.filter(pa.array(is_head)))
    return pa.concat_tables(tables)


def _first_of_each(spans: pa.ChunkedArray, wanted: Mask) -> Mask:
    numbers = np.flatnonzero(wanted)
    table = pa.table({"span_id": spans.filter(pa.array(wanted)), "number": numbers})
    first = table.group_by("span_id").aggregate([("number", "min")])["number_min"].to_numpy()
    flags = np.zeros(len(wanted), np.bool_)
    flags[first] = True
    return flags


def _superseded(out: str, videos: pa.Table, row: npt.NDArray[np.int32], present: pa.Table) -> frozenset[str]:
    """Ids of videos whose place is taken by others: at each place of theirs that the inputs name is another one now.

    One that stands nowhere in the inputs any more was removed, not replaced, and stays.
    """
    gone = (row < 0) & _is_valid(out, "video_id")
    if not gone.any():
        return frozenset()
    at = dict(zip(present["input_row"].to_pylist(), present["video_id"].to_pylist(), strict=True))
    now: dict[bytes, set[str]] = defaultdict(set)
    for number, place in enumerate(_location_keys(videos)):
        if number in at:
            now[place].add(at[number])
    replaced: set[str] = set()
    elsewhere: set[str] = set(at.values())
    for first, group in planned_groups(out, ["place", "video_id"], lambda a, b: bool(gone[a:b].any())):
        former = group.filter(pa.array(gone[first : first + group.num_rows]))
        for place, video_id in zip(former["place"].to_pylist(), former["video_id"].to_pylist(), strict=True):
            if video_id not in now.get(place, set()):
                (replaced if place in now else elsewhere).add(video_id)
    return frozenset(replaced - elsewhere)


def _copies(videos: pa.Table, present: pa.Table, first: npt.NDArray[np.int32]) -> tuple[Rejection, ...]:
    """What to say of videos that are the same as an earlier one of the inputs."""
    if present.num_rows == len(first):
        return ()
    is_first = pc.is_in(present["input_row"], pa.array(first, pa.int32()))
    copies = present.filter(pc.invert(is_first)).sort_by("input_row")
    owners = present.filter(is_first)
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
            place=location_keys([videos["uri"][row].as_py()])[0].as_py().hex(),
            detail=f"the same content as {storage.public_uri(uri_of[video_id])}",
        )
    return tuple(rejections.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkList:
    """What a run is to do, one row a span: ``WORK_SCHEMA``, ``WORK_NUMBER`` and the manifests' columns."""

    source: str | pa.Table
    """Its file; or its rows, where URIs carry credentials that no file may hold."""
    num_spans: int
    schema: pa.Schema


def write_work_list(out: str, videos: pa.Table, plan: Plan, uri_columns: Sequence[str] = ("uri",)) -> WorkList:
    """Write what is left to do for the workers, and for people, to read.

    Spans of one frame size stand together, so that batches are full, and those of one video, so that one pass does, in
    the order of the inputs; all of it within stretches of 65,536 spans.

    Args:
        out: the output.
        videos: of the inputs.
        plan: what of them is left.
        uri_columns: those that hold paths or URLs.
    """
    extras = manifest_fields(videos.schema)
    schema = pa.schema([*WORK_SCHEMA, WORK_NUMBER, *extras])
    has_secrets = any(
        uri is not None and uri != storage.public_uri(uri)
        for chunk in videos.select(list(uri_columns)).to_batches(max_chunksize=_SORTED_ROWS)
        for column in chunk.columns
        for uri in column.to_pylist()
    )
    sink = pa.BufferOutputStream()
    with_secrets: list[pa.Table] = []
    number = 0
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for spans in _stretches(out, plan):
            now = videos.select(["uri", *(field.name for field in extras)]).take(spans["input_row"])
            columns = {name: spans[name] for name in WORK_SCHEMA.names} | {name: now[name] for name in now.column_names}
            columns[WORK_NUMBER.name] = pa.array(range(number, number + spans.num_rows), pa.int64())
            number += spans.num_rows
            arrays = [columns[field.name].cast(field.type) for field in schema]
            table = pa.Table.from_arrays(arrays, schema=schema)
            if has_secrets:
                with_secrets.append(table)
                table = _without_credentials(table, uri_columns)
            writer.write_table(table)
    storage.write_atomic(storage.join(out, WORK_FILE), sink.getvalue())
    source = pa.concat_tables([schema.empty_table(), *with_secrets]) if has_secrets else storage.join(out, WORK_FILE)
    return WorkList(source=source, num_spans=number, schema=schema)


def _without_credentials(table: pa.Table, uri_columns: Sequence[str]) -> pa.Table:
    for name in uri_columns:
        uris = [None if uri is None else storage.public_uri(uri) for uri in table[name].to_pylist()]
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(name), pa.array(uris, pa.string()))
    return table


def _stretches(out: str, plan: Plan) -> Iterator[pa.Table]:
    """Rows of the plan that are left, with ``input_row``, in sorted stretches."""
    held: list[pa.Table] = []
    count = 0
    for first, group in planned_groups(out, WORK_SCHEMA.names, lambda a, b: bool(plan.left[a:b].any())):
        here = slice(first, first + group.num_rows)
        rows = group.append_column("input_row", pa.array(plan.input_row[here])).filter(pa.array(plan.left[here]))
        held.append(rows)
        count += rows.num_rows
        if count >= _SORTED_ROWS:
            yield _in_order(pa.concat_tables(held))
            held, count = [], 0
    if held:
        yield _in_order(pa.concat_tables(held))


def _in_order(spans: pa.Table) -> pa.Table:
    """Spans of one frame size together, and those of one video."""
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
    whole = {row["place"] for row in rows if row["span_id"] is None}
    listed: set[str] = set()
    refused: set[str] = set()
    if whole:
        for number, place in enumerate(_location_keys(videos)):
            if place.hex() in whole:
                listed.add(place.hex())
                if not plan.opened[number]:
                    refused.add(place.hex())
    named = pa.array(sorted({row["span_id"] for row in rows if row["span_id"] is not None}), pa.string())
    finished = set(named.filter(pc.is_in(named, committed)).to_pylist())
    new = {(copy.uri, copy.detail): copy for copy in copies}

    def is_wanted(row: dict[str, Any]) -> bool:
        if row["reason"] == Reason.DUPLICATE:
            return new.pop((row["uri"], row["detail"]), None) is not None or row["place"] not in listed
        if row["span_id"] is None:
            return row["place"] in refused or row["place"] not in listed
        return row["reason"] != Reason.CHANGED and is_partial(row) == (row["span_id"] in finished)

    drop_rejects(out, is_wanted)
    if new:
        write_rejects(out, list(new.values()))
    return list(new.values())


def retry_rejected(out: str, reasons: Collection[Reason] | None, uris: Collection[str]) -> RetrySet:
    """Forget rejections, so that what they are about counts as not done yet.

    What is meant is written down first, for whoever is interrupted and says the same again. The clips that were kept of
    a damaged stretch are taken out before its rejection: killed between the two, the stretch is redone.

    Args:
        out: the output.
        reasons: which ones; None for all but copies of other videos.
        uris: of the inputs, without credentials: what cannot be tried now is left as it is.
    """

    def is_meant(row: dict[str, Any]) -> bool:
        is_asked_for = row["reason"] != Reason.DUPLICATE if reasons is None else row["reason"] in reasons
        return is_asked_for and row["uri"] in uris

    rejects = [row for row in read_rejects(out).to_pylist() if is_meant(row)]
    before = read_retried(out)
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
