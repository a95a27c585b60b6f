"""Arrow layout of the rows that Ray carries from stage to stage, and its conversion to the records of ``schemas``.

One row is one span, from the plan to the sink. Stages add columns and never add or drop rows, so that rows can
be counted. Manifest columns are carried unchanged. Only this module knows the layout.

==========  ==================================================================
after       columns
==========  ==================================================================
plan        ``PLAN_FIELDS``, manifest columns
decode      adds ``frames``, ``clips``, ``rejection``, ``decode_seconds``,
            ``is_recut``
encode      replaces ``frames`` by the payload (``tokens`` or ``latents`` …), and
            adds the columns of :class:`EncodeStats`, and ``quality`` with ``--audit``
write       ``RECEIPT_SCHEMA`` alone, as the rows stay with the writer
==========  ==================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vidshard.pipeline.storage import public_uri
from vidshard.pipeline.video.sampling import expected_clips
from vidshard.schemas.rejections import REMEDIES, Reason, Rejection, Stage, VideoError
from vidshard.schemas.tokens import AUDIT_FIELDS, GEOMETRY_TYPE, REJECT_SCHEMA, RESERVED_COLUMNS, Payload
from vidshard.schemas.video import Clip, ClipSpec, Part, Span, SpanClips, VideoSource

PLAN_FIELDS = (
    pa.field("span_id", pa.string(), nullable=False),
    pa.field("video_id", pa.string(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("time_base_numerator", pa.int64(), nullable=False),
    pa.field("time_base_denominator", pa.int64(), nullable=False),
    pa.field("grid_start_pts", pa.int64(), nullable=False),
    pa.field("first_clip", pa.int32(), nullable=False),
    pa.field("end_clip", pa.int32()),
    pa.field("duration_seconds_from_header", pa.float64(), nullable=False),
    pa.field("source_width", pa.int32(), nullable=False),
    pa.field("source_height", pa.int32(), nullable=False),
    pa.field("source_codec", pa.string(), nullable=False),
    pa.field("source_fps", pa.float64(), nullable=False),
    pa.field("source_rotation", pa.int32(), nullable=False),
    pa.field("part_start_seconds", pa.float64()),
    pa.field("part_end_seconds", pa.float64()),
    pa.field("frame_height", pa.int32(), nullable=False),
    pa.field("frame_width", pa.int32(), nullable=False),
    pa.field("expected_clips", pa.int32(), nullable=False),
    pa.field("fingerprint", pa.string()),
)
WORK_SCHEMA = pa.schema(PLAN_FIELDS)

WORK_NUMBER = pa.field("todo_number", pa.int64())
"""Position of the row in the work list, from 0; the driver uses it to tell which rows have come out."""

FRAME_SECONDS = pa.field("frame_seconds_of_episode", pa.float64())
"""Seconds of a frame in a row whose times are a dataset's and not relative to the first frame: the first frame of the
video must then be shown less than half of it from time 0, and the part must not end beyond the video."""

CLIP_TYPE = pa.struct(
    [
        ("clip_index", pa.int32()),
        ("start_seconds", pa.float64()),
        ("frame_pts_seconds", pa.list_(pa.float64())),
        ("num_valid_frames", pa.int32()),
        ("continues_previous", pa.bool_()),
        ("decode_errors", pa.int32()),
        ("geometry", GEOMETRY_TYPE),
    ]
)
REJECTION_TYPE = pa.struct(list(REJECT_SCHEMA))

QUALITY = pa.field(
    "quality",
    pa.list_(
        pa.struct(
            [
                ("psnr", pa.float32()),
                ("ssim", pa.float32()),
                ("lpips", pa.float32()),
                ("moments", pa.list_(pa.float64())),
            ]
        )
    ),
)
"""Quality of each clip of a row, in a run with ``--audit``: null for clips that were not chosen. An audited clip whose
decoding failed has nulls inside."""

FRAMES = pa.field("frames", pa.large_binary(), nullable=False)  # int64 offsets: a batch may pass 2 GiB
CLIPS = pa.field("clips", pa.list_(CLIP_TYPE), nullable=False)
REJECTION = pa.field("rejection", REJECTION_TYPE)
DECODE_SECONDS = pa.field("decode_seconds", pa.float64(), nullable=False)
IS_RECUT = pa.field("is_recut", pa.bool_(), nullable=False)
"""Whether the span was decoded a second time with another cut, and compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeStats:
    """Cost of one encoder call, stored in the call's first row; its other rows hold zeros."""

    seconds: float
    wait_seconds: float
    """Idle time since the previous call, spent waiting for decoded frames."""
    num_slots: int
    """Capacity of the forward passes, in clips; it exceeds the number of clips if the last pass was not full."""


_STATS_COLUMNS = {"seconds": "encode_seconds", "wait_seconds": "encode_wait_seconds", "num_slots": "encode_slots"}

RECEIPT_SCHEMA = pa.schema(
    [
        WORK_NUMBER,
        WORK_SCHEMA.field("span_id"),
        pa.field("num_clips", pa.int64(), nullable=False),
        pa.field("num_valid_frames", pa.int64(), nullable=False),
        pa.field("is_last", pa.bool_(), nullable=False),
        REJECTION,
        DECODE_SECONDS,
        IS_RECUT,
        pa.field("encode_seconds", pa.float64(), nullable=False),
        pa.field("encode_wait_seconds", pa.float64(), nullable=False),
        pa.field("encode_slots", pa.int64(), nullable=False),
    ]
)
"""Receipt of one span: what the driver counts of it. ``num_valid_frames`` is summed over its clips, and ``is_last``
says whether it reaches the end of its video."""

INTERNAL_COLUMNS = (
    RESERVED_COLUMNS
    | set(WORK_SCHEMA.names)
    | set(_STATS_COLUMNS.values())
    | {
        "frames",
        "clips",
        "rejection",
        "decode_seconds",
        "is_recut",
        "quality",
        "num_bytes",
        "input_row",
        "entry",
        "fault",
        "refusal",
        "seen_entry",
        WORK_NUMBER.name,
        FRAME_SECONDS.name,
    }
)
"""Column names of the flow and the shards, which manifest columns must not use."""


def manifest_fields(schema: pa.Schema) -> list[pa.Field]:
    """Manifest columns of a row's schema, in order."""
    return [field for field in schema if field.name not in INTERNAL_COLUMNS]


def span_row(span: Span, spec: ClipSpec, fingerprint: str | None) -> dict[str, Any]:
    """Convert a span to a row of the plan.

    Args:
        spec: clip settings of the span, including its frame size.
        fingerprint: state of the file on its storage; None if the storage reports none.
    """
    part = span.part
    return {
        "span_id": span.span_id,
        "video_id": span.video_id,
        "uri": span.uri,
        "time_base_numerator": span.time_base.numerator,
        "time_base_denominator": span.time_base.denominator,
        "grid_start_pts": span.grid_start_pts,
        "first_clip": span.first_clip,
        "end_clip": span.end_clip,
        "duration_seconds_from_header": span.duration_seconds_from_header,
        "source_width": span.source.width,
        "source_height": span.source.height,
        "source_codec": span.source.codec,
        "source_fps": span.source.fps,
        "source_rotation": span.source.rotation_degrees,
        "part_start_seconds": None if part.is_whole else float(part.start_seconds),
        "part_end_seconds": None if part.end_seconds is None else float(part.end_seconds),
        "frame_height": spec.height,
        "frame_width": spec.width,
        "expected_clips": expected_clips(span, spec),
        "fingerprint": fingerprint,
    }


def row_span(row: dict[str, Any]) -> Span:
    """Convert a row of the plan to its span; inverse of :func:`span_row`."""
    return Span(
        video_id=row["video_id"],
        uri=row["uri"],
        time_base=Fraction(row["time_base_numerator"], row["time_base_denominator"]),
        grid_start_pts=row["grid_start_pts"],
        first_clip=row["first_clip"],
        end_clip=row["end_clip"],
        duration_seconds_from_header=row["duration_seconds_from_header"],
        source=VideoSource(
            width=row["source_width"],
            height=row["source_height"],
            codec=row["source_codec"],
            fps=row["source_fps"],
            rotation_degrees=row["source_rotation"],
        ),
        part=row_part(row),
    )


def row_part(row: Mapping[str, Any]) -> Part:
    """Part of the video that a plan or shard row belongs to; older shards have whole videos only."""
    return Part.of(row.get("part_start_seconds"), row.get("part_end_seconds"))


def row_spec(row: Mapping[str, Any], spec: ClipSpec) -> ClipSpec:
    """Clip settings of a plan row: those of the run, with the row's own frame size."""
    return replace(spec, height=row["frame_height"], width=row["frame_width"])


def rejection_row(rejection: Rejection) -> dict[str, Any]:
    """Convert a rejection to a row of ``rejects/``, with its remedy."""
    return {
        "uri": rejection.uri,
        "video_id": rejection.video_id,
        "span_id": rejection.span_id,
        "start_seconds": rejection.start_seconds,
        "stage": str(rejection.stage),
        "reason": str(rejection.reason),
        "detail": rejection.detail,
        "remedy": REMEDIES[rejection.reason],
        "kept_clips": rejection.kept_clips,
        "place": rejection.place,
    }


def row_rejection(row: dict[str, Any]) -> Rejection:
    """Convert a row of ``rejects/`` to its rejection; inverse of :func:`rejection_row`."""
    names = ("uri", "video_id", "span_id", "start_seconds", "detail", "kept_clips", "place")
    values = {name: row[name] for name in names}
    return Rejection(**values, stage=Stage(row["stage"]), reason=Reason(row["reason"]))


def rejections_table(rejections: Sequence[Rejection]) -> pa.Table:
    """Convert rejections to a table of ``REJECT_SCHEMA``."""
    return pa.Table.from_pylist([rejection_row(r) for r in rejections], schema=REJECT_SCHEMA)


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


def signal_source(name: str) -> str:
    """Column with the path of a signal's file; the signal's own name is the column of its values."""
    return f"{name}_source"


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
    for name, stats_column in _STATS_COLUMNS.items():
        first = getattr(stats, name)
        rows = rows.append_column(stats_column, pa.array([first] + [type(first)(0)] * (rows.num_rows - 1)))
    return rows


def add_quality(rows: pa.Table, quality: Sequence[Sequence[Mapping[str, Any] | None]]) -> pa.Table:
    """Add the quality of the clips of each row, see ``QUALITY``."""
    return rows.append_column(QUALITY, pa.array(quality, QUALITY.type))


def receipts_of(rows: pa.Table) -> pa.Table:
    """Receipts of encoded rows, ``RECEIPT_SCHEMA``: one a row, no payload; with ``--audit`` ``uri`` and quality too."""
    clips = rows["clips"].combine_chunks()
    frames = pc.struct_field(clips.flatten(), "num_valid_frames").to_numpy(zero_copy_only=False)
    valid = np.bincount(clips.value_parent_indices().to_numpy(), weights=frames, minlength=rows.num_rows)
    made = {
        "num_clips": pc.list_value_length(clips).cast(pa.int64()),
        "num_valid_frames": pa.array(valid.astype(np.int64)),
        "is_last": pc.is_null(rows["end_clip"]),
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
    """Columns of ``AUDIT_FIELDS``, one value per clip; none for rows without ``QUALITY``."""
    if QUALITY.name not in rows.schema.names:
        return {}
    quality = rows[QUALITY.name].combine_chunks().flatten()
    return {field.name: pc.struct_field(quality, field.name.removeprefix("audit_")) for field in AUDIT_FIELDS}
