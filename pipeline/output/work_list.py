"""Writes what resuming decided: the list of spans to process, and corrections of outdated files.

The order of the writes makes each crash harmless: whatever a killed process did not come to, the next one finds again
from plan, shards and rejections. The work list is not state; it is made anew by every run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vidshard.pipeline import storage
from vidshard.pipeline.output.committed import drop_spans
from vidshard.pipeline.output.entries import Inputs
from vidshard.pipeline.output.layout import WORK_FILE
from vidshard.pipeline.output.parquet import Mask
from vidshard.pipeline.output.plan_store import planned_groups
from vidshard.pipeline.output.rejects import (
    RetrySet,
    is_partial,
    read_retry_set,
    update_rejects,
    write_rejects,
    write_retry_set,
)
from vidshard.pipeline.output.resume import Resume, rejects_to_retry
from vidshard.pipeline.output.state import OutputState
from vidshard.pipeline.rows import FRAME_SECONDS, WORK_NUMBER, WORK_SCHEMA, manifest_fields
from vidshard.schemas.rejections import Reason

_SORTED_ROWS = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkList:
    """The spans that a run is to process, one row each: ``WORK_SCHEMA``, ``WORK_NUMBER`` and the manifests' columns."""

    source: str | pa.Table
    """The file; or its rows, where URIs carry credentials that no file may hold."""
    num_spans: int
    schema: pa.Schema


def rows_of_spans(work: WorkList, wanted: Mask) -> pa.Table:
    """Read the rows of some spans.

    Args:
        work: the work list.
        wanted: bool (spans,), by the number of the span.

    Raises:
        storage.StorageError: the work list could not be read.
    """
    if isinstance(work.source, pa.Table):
        return work.source.filter(pa.array(wanted))
    found = [work.schema.empty_table()]
    with storage.open_binary(work.source) as file:
        parquet = storage.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            rows = parquet.read_row_group(group)
            found.append(rows.filter(pa.array(wanted[rows[WORK_NUMBER.name].to_numpy()])).cast(work.schema))
    return pa.concat_tables(found)


def begin_retry(out: str, state: OutputState, inputs: Inputs, reasons: Collection[Reason] | None) -> RetrySet:
    """Forget rejections, so that what they are about counts as not done; the state is to be loaded again after this.

    ``retry.json`` is written first, so that the same command goes on after a crash. Clips that were kept of a damaged
    span leave their shard before its rejection is removed: after a crash between the two the span is processed again.

    Args:
        out: the output.
        state: of the output.
        inputs: the videos; rejections of others are left as they are.
        reasons: the reasons asked for; None for all but copies of other videos.

    Returns:
        What is to be tried again, what an earlier run did not come to included.

    Raises:
        ShardError: a shard or ``retry.json`` is damaged.
        storage.StorageError: the output could not be read or written.
    """
    is_meant = rejects_to_retry(state.rejects.table, reasons, inputs)
    meant = state.rejects.table.filter(pa.array(is_meant)).to_pylist()
    retry = read_retry_set(out).with_rejects(meant)
    write_retry_set(out, retry)
    partial = pa.array(sorted({row["span_id"] for row in meant if row["span_id"] and is_partial(row)}), pa.string())
    _drop_from_shards(state, np.asarray(pc.is_in(state.committed.table["span_id"], partial).to_numpy(), np.bool_))
    update_rejects(state.rejects, ~is_meant)
    return retry


def correct_output(out: str, state: OutputState, resume: Resume) -> None:
    """Take out of the shards and the rejections what is outdated, and write the rejections that are new.

    Args:
        out: the output.
        state: of the output, which ``resume`` was made of.
        resume: what is outdated.

    Raises:
        ShardError: a shard is damaged.
        storage.StorageError: the output could not be read or written.
    """
    _drop_from_shards(state, resume.outdated_spans)
    update_rejects(state.rejects, resume.kept_rejects)
    if resume.new_rejects:
        write_rejects(out, resume.new_rejects)


def _drop_from_shards(state: OutputState, unwanted: Mask) -> None:
    for path, rows in state.committed.touched(unwanted):
        spans = state.committed.table["span_id"].slice(rows.start, rows.stop - rows.start)
        drop_spans(path, set(spans.filter(pa.array(unwanted[rows])).to_pylist()))


def write_work_list(out: str, inputs: Inputs, resume: Resume, uri_columns: Sequence[str] = ("uri",)) -> WorkList:
    """Write the spans to process, for the workers and for people to read.

    Spans of one frame size are together, so that batches are full, and those of one video, so that it is decoded in one
    pass. Videos that take longest come first, so that what is begun last is short and no worker is waited for at the
    end. This holds within the next 131,072 spans; of these the half that comes first is written.

    Args:
        out: the output.
        inputs: the videos.
        resume: what of them is left.
        uri_columns: columns of the videos that hold paths or URLs, perhaps with credentials.

    Raises:
        ShardError: a file of the plan is damaged.
        storage.StorageError: the output could not be read or written.
    """
    videos = inputs.videos
    extras = manifest_fields(videos.schema)
    if FRAME_SECONDS.name in videos.column_names:
        extras.append(FRAME_SECONDS)
    schema = pa.schema([*WORK_SCHEMA, WORK_NUMBER, *extras])
    has_secrets = _has_credentials(videos, uri_columns)
    sink = pa.BufferOutputStream()
    with_secrets: list[pa.Table] = []
    number = 0
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for spans in _stretches(out, resume):
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
    path = storage.join(out, WORK_FILE)
    storage.write_atomic(path, sink.getvalue())
    source = pa.concat_tables([schema.empty_table(), *with_secrets]) if has_secrets else path
    return WorkList(source=source, num_spans=number, schema=schema)


def _has_credentials(videos: pa.Table, uri_columns: Sequence[str]) -> bool:
    return any(
        uri is not None and uri != storage.public_uri(uri)
        for chunk in videos.select(list(uri_columns)).to_batches(max_chunksize=_SORTED_ROWS)
        for column in chunk.columns
        for uri in column.to_pylist()
    )


def _without_credentials(table: pa.Table, uri_columns: Sequence[str]) -> pa.Table:
    for name in uri_columns:
        uris = [None if uri is None else storage.public_uri(uri) for uri in table[name].to_pylist()]
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(name), pa.array(uris, pa.string()))
    return table


def _stretches(out: str, resume: Resume) -> Iterator[pa.Table]:
    """Rows of the plan that are left, with ``input_row``, in sorted stretches.

    The later half of each two stretches is sorted again with what follows, so that the list ends with short videos.
    """
    held: list[pa.Table] = []
    count = 0
    for first, group in planned_groups(out, WORK_SCHEMA.names, lambda a, b: bool(resume.left[a:b].any())):
        here = slice(first, first + group.num_rows)
        rows = group.append_column("input_row", pa.array(resume.input_row[here])).filter(pa.array(resume.left[here]))
        held.append(rows)
        count += rows.num_rows
        while count >= 2 * _SORTED_ROWS:
            ordered = in_order(pa.concat_tables(held))
            yield ordered.slice(0, _SORTED_ROWS)
            held, count = [ordered.slice(_SORTED_ROWS)], count - _SORTED_ROWS
    if held:
        yield in_order(pa.concat_tables(held))


def in_order(spans: pa.Table) -> pa.Table:
    """Sort spans: those of one frame size together, then those of one video, the longest video first.

    A video is as long as its clips here take to decode, by the pixels of their source: clips x width x height x frames
    per second. Equally long ones keep the order of the inputs.

    Args:
        spans: rows of the plan, with ``input_row``.
    """
    pixels = pc.multiply(
        pc.multiply(spans["source_width"].cast(pa.float64()), spans["source_height"]), spans["source_fps"]
    )
    cost = pc.multiply(pixels, spans["expected_clips"])
    videos = pa.table({"video_id": spans["video_id"], "input_row": spans["input_row"], "cost": cost})
    videos = videos.group_by("video_id").aggregate([("input_row", "min"), ("cost", "sum")])
    of_video = pc.index_in(spans["video_id"], videos["video_id"].combine_chunks())
    keys = pa.table(
        {
            "height": spans["frame_height"],
            "width": spans["frame_width"],
            "cost": pc.negate(videos["cost_sum"].take(of_video)),
            "video": videos["input_row_min"].take(of_video),
            "start": pc.fill_null(spans["part_start_seconds"], -1.0),
            "end": pc.fill_null(spans["part_end_seconds"], -1.0),
            "clip": spans["first_clip"],
        }
    )
    return spans.take(pc.sort_indices(keys, sort_keys=[(key, "ascending") for key in keys.column_names]))
