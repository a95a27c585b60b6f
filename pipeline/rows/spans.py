"""Conversion of rows of the plan and of rejections to the records of `schemas`, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pyarrow as pa

from vidshard.pipeline.video.sampling import expected_clips
from vidshard.schemas.rejections import Reason, Rejection, Stage, remedy_of
from vidshard.schemas.tokens import REJECT_SCHEMA
from vidshard.schemas.video import ClipSpec, Part, Span, VideoSource


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
        "remedy": remedy_of(rejection.reason, can_keep=rejection.stage == Stage.DECODE and rejection.kept_clips == 0),
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
