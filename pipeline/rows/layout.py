"""Columns of the rows that Ray carries from stage to stage."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from vidshard.schemas.tokens import GEOMETRY_TYPE, REJECT_SCHEMA, RESERVED_COLUMNS

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

DECODED_ON = pa.field("decoded_on", pa.string(), nullable=False)
"""Node on which a row was decoded, on a cluster; the encoder compares it with its own, and drops it."""

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


STATS_COLUMNS = {"seconds": "encode_seconds", "wait_seconds": "encode_wait_seconds", "num_slots": "encode_slots"}
"""Columns of the fields of ``EncodeStats``."""

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
        pa.field("frame_bytes", pa.int64(), nullable=False),
        pa.field("moved_frame_bytes", pa.int64(), nullable=False),
    ]
)
"""Receipt of one span: what the driver counts of it. ``num_valid_frames`` is summed over its clips, and ``is_last``
says whether it reaches the end of its video. ``frame_bytes`` are those of its decoded frames on a cluster, and
``moved_frame_bytes`` the same if they were decoded on another node than encoded; both are 0 in one process."""

INTERNAL_COLUMNS = (
    RESERVED_COLUMNS
    | set(WORK_SCHEMA.names)
    | set(STATS_COLUMNS.values())
    | {
        "frames",
        "clips",
        "rejection",
        "decode_seconds",
        "is_recut",
        "quality",
        "frame_bytes",
        "moved_frame_bytes",
        "num_bytes",
        "input_row",
        "entry",
        "fault",
        "refusal",
        "seen_entry",
        WORK_NUMBER.name,
        DECODED_ON.name,
        FRAME_SECONDS.name,
    }
)
"""Column names of the flow and the shards, which manifest columns must not use."""


def manifest_fields(schema: pa.Schema) -> list[pa.Field]:
    """Manifest columns of a row's schema, in order."""
    return [field for field in schema if field.name not in INTERNAL_COLUMNS]


def signal_source(name: str) -> str:
    """Column with the path of a signal's file; the signal's own name is the column of its values."""
    return f"{name}_source"
