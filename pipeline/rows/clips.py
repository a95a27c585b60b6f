"""Clips, payload and receipts of rows: what the stages add to them, and the shard rows that come of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vidshard.pipeline.rows.layout import (
    CLIP_TYPE,
    CLIPS,
    DECODE_SECONDS,
    DECODED_ON,
    FRAMES,
    IS_RECUT,
    QUALITY,
    RECEIPT_SCHEMA,
    REJECTION,
    STATS_COLUMNS,
    WORK_SCHEMA,
    EncodeStats,
)
from vidshard.pipeline.rows.spans import rejection_row
from vidshard.pipeline.storage import public_uri
from vidshard.schemas.rejections import Rejection, Stage, VideoError
from vidshard.schemas.tokens import QUALITY_FIELDS, Payload
from vidshard.schemas.video import Clip, SpanClips


def add_clips(
    plan: pa.Table,
    outcome: SpanClips,
    *,
    uri: str,
    start_seconds: float,
    seconds: float,
    is_recut: bool = False,
    continuous: bool = False,
) -> pa.Table:
    """Add the result of decoding to one row of the plan.

    Args:
        plan: table of one row.
        outcome: clips of the halo, then of the span, and an error, which may accompany clips if some are missing.
            Only the frames of halo clips are stored.
        uri: URI of the video in rejections.
        start_seconds: start of the span, in seconds after the first frame.
        seconds: decoding time.
        is_recut: whether it was decoded a second time with another cut, and compared.
        continuous: whether each clip continues the previous one.
    """
    row = plan.to_pylist()[0]
    rejection = None
    told = outcome.error or outcome.doubt
    if told is not None:
        rejection = rejection_row(
            Rejection(
                uri=uri,
                video_id=row["video_id"],
                span_id=row["span_id"],
                start_seconds=start_seconds,
                stage=Stage.DECODE,
                reason=told.reason,
                detail=told.detail,
            )
        )
    own = [clip for clip in outcome.clips if clip.clip_index >= row["first_clip"]]
    clips = [_clip_row(clip, continuous and clip.clip_index > 0, outcome.num_errors) for clip in own]
    # the only copy of frames between the decoder's process and the object store
    flat = [clip.frames.reshape(-1) for clip in outcome.clips]
    buffer = pa.py_buffer(np.concatenate(flat) if flat else b"")
    offsets = pa.py_buffer(np.array([0, buffer.size], np.int64))
    return (
        plan.append_column(FRAMES, pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, buffer]))
        .append_column(CLIPS, pa.array([clips], CLIPS.type))
        .append_column(REJECTION, pa.array([rejection], REJECTION.type))
        .append_column(DECODE_SECONDS, pa.array([seconds], pa.float64()))
        .append_column(IS_RECUT, pa.array([is_recut], pa.bool_()))
    )


def add_signals(row: pa.Table, columns: Sequence[tuple[pa.Field, pa.Array]]) -> pa.Table:
    """Add signal columns to one row of the plan.

    Args:
        row: table of one row.
        columns: field and values of each column, one value per clip; they are stored as a list.
    """
    for field, values in columns:
        row = row.append_column(field.name, pa.ListArray.from_arrays(_offsets([len(values)]), values))
    return row


def _clip_row(clip: Clip, continues: bool, decode_errors: int) -> dict[str, Any]:
    geometry = clip.geometry
    return {
        "clip_index": clip.clip_index,
        "start_seconds": clip.start_seconds,
        "frame_pts_seconds": clip.frame_pts_seconds,
        "num_valid_frames": clip.num_valid_frames,
        "continues_previous": continues,
        "decode_errors": decode_errors,
        "geometry": {
            "policy": geometry.policy,
            "scaled_width": geometry.scaled_width,
            "scaled_height": geometry.scaled_height,
            "left": geometry.left,
            "top": geometry.top,
        },
    }


def clip_frames(rows: pa.Table, num_frames: int) -> list[list[np.ndarray]]:
    """Clips of each row in order, halo first: uint8 (T, H, W, 3), views of the rows' memory.

    Args:
        num_frames: frames per clip; height and width are columns of the row.
    """
    flats = [np.frombuffer(scalar.as_buffer(), np.uint8) for scalar in rows["frames"]]
    return [
        list(flat.reshape(-1, num_frames, height, width, 3))
        for flat, (height, width) in zip(flats, frame_sizes(rows), strict=True)
    ]


def frame_sizes(rows: pa.Table) -> list[tuple[int, int]]:
    """Frame size (height, width) of each row."""
    return list(zip(rows["frame_height"].to_pylist(), rows["frame_width"].to_pylist(), strict=True))


def clip_counts(rows: pa.Table) -> list[int]:
    """Number of clips of each row, without the halo."""
    counts: list[int] = pc.list_value_length(rows["clips"]).to_pylist()
    return counts


def add_payload(
    rows: pa.Table, values: Mapping[str, Sequence[np.ndarray]], payload: Payload, stats: EncodeStats
) -> pa.Table:
    """Replace the frames of rows by the payload.

    Args:
        values: by payload column, one array (values per clip,) of the column's dtype for each clip of all rows.
            The number of values depends on the frame size, so they are lists of variable length until stored.
    """
    counts = np.diff(rows["clips"].combine_chunks().offsets.to_numpy())
    rows = rows.drop_columns(["frames"])
    for column in payload:
        clips = values[column.name]
        flat = pa.array(np.concatenate(clips) if clips else [], column.arrow_type.value_type)
        lists = pa.ListArray.from_arrays(_offsets([len(clip) for clip in clips]), flat)
        rows = rows.append_column(column.name, pa.ListArray.from_arrays(_offsets(counts), lists))
    for name, stats_column in STATS_COLUMNS.items():
        first = getattr(stats, name)
        rows = rows.append_column(stats_column, pa.array([first] + [type(first)(0)] * (rows.num_rows - 1)))
    return rows


def add_quality(rows: pa.Table, quality: Sequence[Sequence[Mapping[str, Any] | None]]) -> pa.Table:
    """Add the quality of the clips of each row, see ``QUALITY``."""
    return rows.append_column(QUALITY, pa.array(quality, QUALITY.type))


def frame_bytes(rows: pa.Table, node: str) -> tuple[pa.Array, pa.Array]:
    """Count the bytes of the frames of each row, and those of frames that came to a node from another one.

    Args:
        rows: decoded rows with ``DECODED_ON``.
        node: node on which they are now.

    Returns:
        Two arrays, int64 (rows,).
    """
    sizes = pc.binary_length(rows["frames"].combine_chunks())
    return sizes, pc.if_else(pc.equal(rows[DECODED_ON.name].combine_chunks(), node), 0, sizes)


def receipts_of(rows: pa.Table, frames: tuple[pa.Array, pa.Array] | None = None) -> pa.Table:
    """Receipts of encoded rows, ``RECEIPT_SCHEMA``: one a row, no payload; with ``--audit`` ``uri`` and quality too.

    Args:
        frames: as `frame_bytes`; None in one process.
    """
    sizes, moved = frames or [pa.array(np.zeros(rows.num_rows, np.int64))] * 2
    clips = rows["clips"].combine_chunks()
    counts = pc.struct_field(clips.flatten(), "num_valid_frames").to_numpy(zero_copy_only=False)
    valid = np.bincount(clips.value_parent_indices().to_numpy(), weights=counts, minlength=rows.num_rows)
    made = {
        "num_clips": pc.list_value_length(clips).cast(pa.int64()),
        "num_valid_frames": pa.array(valid.astype(np.int64)),
        "is_last": pc.is_null(rows["end_clip"]),
        "frame_bytes": sizes,
        "moved_frame_bytes": moved,
    }
    schema = RECEIPT_SCHEMA
    if QUALITY.name in rows.schema.names:
        schema = schema.append(WORK_SCHEMA.field("uri")).append(QUALITY)
    columns = [made[f.name] if f.name in made else rows[f.name] for f in schema]
    arrays = [column.cast(f.type) for column, f in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def refuse(rows: pa.Table, errors: Mapping[int, VideoError], stage: Stage) -> pa.Table:
    """Replace the clips of failed rows by a rejection of the whole span.

    An earlier rejection of such a row, for clips missing after decoding, is replaced, as the new one covers it.

    Args:
        errors: failures by row number; these rows have clips.
        stage: stage that failed.
    """
    if not errors:
        return rows
    lists, rejections = rows["clips"].to_pylist(), rows["rejection"].to_pylist()
    for number, error in errors.items():
        row = rows.select(WORK_SCHEMA.names).slice(number, 1).to_pylist()[0]
        first_seconds = row["grid_start_pts"] * row["time_base_numerator"] / row["time_base_denominator"]
        before = rejections[number]
        rejections[number] = rejection_row(
            Rejection(
                uri=public_uri(row["uri"]),
                video_id=row["video_id"],
                span_id=row["span_id"],
                start_seconds=(
                    max(0.0, lists[number][0]["start_seconds"] - first_seconds)
                    if before is None
                    else before["start_seconds"]
                ),
                stage=stage,
                reason=error.reason,
                detail=error.detail,
            )
        )
        lists[number] = []
    for field, values in ((CLIPS, lists), (REJECTION, rejections)):
        rows = rows.set_column(rows.schema.get_field_index(field.name), field.name, pa.array(values, field.type))
    return rows


def _offsets(lengths: Sequence[int] | np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def explode(
    rows: pa.Table,
    schema: pa.Schema,
    payload: Payload,
    *,
    clip_ids: Sequence[str],
    fps: float,
    signals: Sequence[str] = (),
) -> pa.Table:
    """Convert encoded rows (one per span, all of one frame size) to shard rows (one per clip).

    Args:
        schema: schema of the shard; manifest columns are taken from the rows by name, or null if absent.
        clip_ids: id of each clip, in order.
        fps: frames per second of the grid.
        signals: columns with one value per clip.
    """
    rows = rows.combine_chunks()
    lists = rows["clips"].combine_chunks()
    clips = lists.flatten()
    # Columns with one value per clip are left out before rows are repeated for each clip: repeating the payload of a
    # span of ten clips took ten times a shard's memory, and the sink 540 clips/s instead of 3,850 (benchmarks/scale.py)
    own = {*(column.name for column in payload), *signals}
    kept = [f.name for f in schema if f.name in rows.schema.names and f.name not in own]
    parents = rows.select([*dict.fromkeys(["frame_height", "frame_width", *kept])]).take(lists.value_parent_indices())
    made: dict[str, Any] = {
        "clip_id": pa.array(clip_ids, pa.string()),
        "fps": pa.array(np.full(len(clips), fps)),
        **dict(zip(CLIP_TYPE.names, clips.flatten(), strict=True)),
        "bucket": pa.array([f"{height}x{width}" for height, width in frame_sizes(parents)], pa.string()),
        **{
            column.name: pa.FixedSizeListArray.from_arrays(
                rows[column.name].combine_chunks().flatten().flatten(), type=column.arrow_type
            )
            for column in payload
        },
        **{name: rows[name].combine_chunks().flatten() for name in signals},
        **_audit_columns(rows),
    }
    columns = []
    for field in schema:
        column = made.get(field.name)
        if column is None and field.name in parents.schema.names:
            column = parents[field.name].cast(field.type)
        columns.append(pa.nulls(len(clips), field.type) if column is None else column)
    return pa.Table.from_arrays(columns, schema=schema)


def _audit_columns(rows: pa.Table) -> dict[str, pa.Array]:
    """Columns of ``QUALITY_FIELDS``, one value per clip; none for rows without ``QUALITY``."""
    if QUALITY.name not in rows.schema.names:
        return {}
    quality = rows[QUALITY.name].combine_chunks().flatten()
    return {field.name: pc.struct_field(quality, field.name.removeprefix("audit_")) for field in QUALITY_FIELDS}
