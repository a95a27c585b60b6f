"""Planning of discovered videos without an output: the rows that the decode stage gets."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from vidshard.pipeline.discover import Discovery
from vidshard.pipeline.output.entries import Inputs
from vidshard.pipeline.plan import VideoPlanner
from vidshard.pipeline.rows import FRAME_SECONDS, manifest_fields, rejection_row
from vidshard.schemas.video import ClipSpec, Limits, Part


def planned(found: Discovery, spec: ClipSpec) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Rows of the plan with the columns of their videos, in the order of the work list; and the rejections."""
    inputs = Inputs.of(found.videos, Part(), found.manifests)
    rows = VideoPlanner((spec,), Part(), 100, Limits())(inputs.videos)
    rejections = [row for row in rows["rejection"].to_pylist() if row is not None]
    spans = rows.filter(pa.array([value is not None for value in rows["span_id"].to_pylist()]))
    number = {entry: at for at, entry in enumerate(inputs.videos["entry"].to_pylist())}
    spans = spans.append_column("number", pa.array([number[entry] for entry in spans["entry"].to_pylist()], pa.int32()))
    fields = manifest_fields(inputs.videos.schema)
    fields += [FRAME_SECONDS] if FRAME_SECONDS.name in inputs.videos.column_names else []
    for field in fields:
        spans = spans.append_column(field, inputs.videos[field.name].take(spans["number"]))
    keys = [("video_id", "ascending"), ("part_start_seconds", "ascending"), ("first_clip", "ascending")]
    return spans.sort_by(keys).drop_columns(["rejection"]), rejections + [rejection_row(one) for one in inputs.bad_rows]
