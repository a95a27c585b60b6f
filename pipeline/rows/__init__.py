"""Arrow layout of the rows that Ray carries from stage to stage, and its conversion to the records of ``schemas``.

One row is one span, from the plan to the sink. Stages add columns and never add or drop rows, so that rows can
be counted. Manifest columns are carried unchanged. Only this room knows the layout.

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

from vidshard.pipeline.rows.clips import (
    add_clips,
    add_payload,
    add_quality,
    add_signals,
    clip_counts,
    clip_frames,
    explode,
    frame_bytes,
    frame_sizes,
    receipts_of,
    refuse,
)
from vidshard.pipeline.rows.layout import (
    CLIP_TYPE,
    CLIPS,
    DECODE_SECONDS,
    DECODED_ON,
    FRAME_SECONDS,
    FRAMES,
    INTERNAL_COLUMNS,
    IS_RECUT,
    PLAN_FIELDS,
    QUALITY,
    RECEIPT_SCHEMA,
    REJECTION,
    REJECTION_TYPE,
    WORK_NUMBER,
    WORK_SCHEMA,
    EncodeStats,
    manifest_fields,
    signal_source,
)
from vidshard.pipeline.rows.spans import (
    rejection_row,
    rejections_table,
    row_part,
    row_rejection,
    row_span,
    row_spec,
    span_row,
)

__all__ = [
    "CLIPS",
    "CLIP_TYPE",
    "DECODED_ON",
    "DECODE_SECONDS",
    "FRAMES",
    "FRAME_SECONDS",
    "INTERNAL_COLUMNS",
    "IS_RECUT",
    "PLAN_FIELDS",
    "QUALITY",
    "RECEIPT_SCHEMA",
    "REJECTION",
    "REJECTION_TYPE",
    "WORK_NUMBER",
    "WORK_SCHEMA",
    "EncodeStats",
    "add_clips",
    "add_payload",
    "add_quality",
    "add_signals",
    "clip_counts",
    "clip_frames",
    "explode",
    "frame_bytes",
    "frame_sizes",
    "manifest_fields",
    "receipts_of",
    "refuse",
    "rejection_row",
    "rejections_table",
    "row_part",
    "row_rejection",
    "row_span",
    "row_spec",
    "signal_source",
    "span_row",
]
