"""The plan: every video opened once, its stretches as rows of one table, its failures as rejections.

The table is the run's account: each of its rows must come out of the sink as tokens or as a rejection. Ids come
from content and settings, so the same videos give the same rows on any machine and in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipeline import storage
from pipeline.geometry import nearest_bucket
from pipeline.rows import (
    PLAN_SCHEMA,
    REJECTION,
    manifest_fields,
    rejection_row,
    row_part,
    row_rejection,
    span_row,
)
from pipeline.sampling import plan_spans
from pipeline.stages import probe
from schemas.video import ClipSpec, Limits, Part, Reason, Rejection, Stage, VideoError, VideoProbe, VideoRef

SPAN_BYTES = 32 << 20
"""Frames in one unit of work, unless the user says how many clips: some units fit one of Ray's 128 MiB blocks,
and at 256x256 a unit is some 20 s of video, which keeps the share of seeking to its keyframe low."""

_INPUT_ROW = pa.field("input_row", pa.int64(), nullable=False)
_MAX_VIDEOS_PER_TASK = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What there is to do."""

    spans: pa.Table
    """``PLAN_SCHEMA`` and the manifests' columns, one row a unit of work, in the order of the inputs."""
    rejections: tuple[Rejection, ...]
    """Videos that could not be opened, and copies of others."""
    num_videos: int
    """Videos looked at, the rejected ones included; one of which several parts are named counts once."""
    expected_clips: int
    """Clips of all spans if the headers tell the truth."""


def clips_per_span(spec: ClipSpec, wanted: int | None) -> int:
    """Clips in one unit of work: as the user wants, or as many as fit ``SPAN_BYTES``.

    In a continuous sequence at least four times the halo, which then adds a quarter to the work.
    """
    return wanted or max(1, SPAN_BYTES // spec.clip_bytes, 4 * spec.halo_clips)


def make_plan(
    videos: pa.Table,
    specs: Sequence[ClipSpec],
    *,
    part: Part,
    span_clips: int,
    num_tasks: int,
    limits: Limits | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Plan:
    """Open every video on the cluster and lay out its spans.

    Args:
        videos: as ``pipeline.discover`` lists them.
        specs: how clips are made, one for each frame size; a video gets that of the nearest aspect ratio.
        part: which part of each video that does not say so itself.
        span_clips: clips in one unit of work.
        num_tasks: tasks that the work should at least be spread over.
        limits: what one video may cost.
        on_progress: told, as results come in, how many more videos have been opened.
    """
    size = max(1, min(_MAX_VIDEOS_PER_TASK, -(-videos.num_rows // num_tasks)))
    numbered = videos.append_column(_INPUT_ROW, pa.array(range(videos.num_rows), pa.int64()))
    tables = [numbered.slice(at, size).combine_chunks() for at in range(0, videos.num_rows, size)]
    dataset = ray.data.from_arrow(tables).map_batches(
        _Planner(tuple(specs), part, span_clips, limits or Limits()),
        batch_format="pyarrow",
        batch_size=None,
        max_retries=2,
    )
    opened: list[pa.Table] = []
    for rows in dataset.iter_batches(batch_format="pyarrow", batch_size=None, prefetch_batches=0):
        opened.append(rows)
        on_progress(pc.count_distinct(rows["input_row"]).as_py())
    return _without_copies(pa.concat_tables(opened), pc.count_distinct(videos["uri"]).as_py())


@dataclass(frozen=True)
class _Planner:
    """The probing stage: videos in, their spans out, or one row with a rejection."""

    specs: tuple[ClipSpec, ...]
    part: Part
    span_clips: int
    limits: Limits

    def __call__(self, videos: pa.Table) -> pa.Table:
        extras = manifest_fields(videos.schema)
        probes: dict[str, VideoProbe | VideoError] = {}
        rows = [row for video in videos.to_pylist() for row in self._rows(video, probes)]
        fields = [f.with_nullable(True) for f in PLAN_SCHEMA]
        return pa.Table.from_pylist(rows, schema=pa.schema([*fields, REJECTION, _INPUT_ROW, *extras]))

    def _rows(self, video: dict[str, Any], probes: dict[str, VideoProbe | VideoError]) -> list[dict[str, Any]]:
        ref = VideoRef(uri=video["uri"], num_bytes=video.pop("num_bytes"))
        if ref.uri not in probes:
            probes[ref.uri] = probe(ref, self.limits)
        result = probes[ref.uri]
        if isinstance(result, VideoError):
            rejection = Rejection(
                uri=storage.public_uri(ref.uri),
                video_id=None,
                span_id=None,
                start_seconds=None,
                stage=Stage.PROBE,
                reason=result.reason,
                detail=result.detail,
            )
            return [video | {"rejection": rejection_row(rejection)}]
        part = row_part(video)
        sizes = {(spec.height, spec.width): spec for spec in self.specs}
        spec = sizes[nearest_bucket(result.source.width, result.source.height, list(sizes))]
        spans = plan_spans(result, spec, self.span_clips, self.part if part.is_whole else part)
        return [video | span_row(span, spec) for span in spans]


def _in_order(spans: pa.Table) -> pa.Table:
    """Spans of one frame size together, so that batches are full, and those of one video, so that one pass does."""
    first = spans.group_by("video_id").aggregate([("input_row", "min")])
    video_order = first["input_row_min"].take(pc.index_in(spans["video_id"], first["video_id"]))
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


def _without_copies(rows: pa.Table, num_videos: int) -> Plan:
    """Split rows into spans and rejections, the first of several equal videos kept."""
    refused = rows.filter(pc.is_valid(rows["rejection"])).sort_by("input_row")
    by_uri = {r["uri"]: row_rejection(r) for r in refused["rejection"].to_pylist()}
    rejections = list(by_uri.values())
    spans = rows.filter(pc.is_null(rows["rejection"])).drop_columns(["rejection"])
    first = spans.group_by(["video_id", "part_start_seconds", "part_end_seconds"]).aggregate([("input_row", "min")])
    keeps = pc.is_in(spans["input_row"], first["input_row_min"])
    copies, spans = spans.filter(pc.invert(keeps)).sort_by("input_row"), _in_order(spans.filter(keeps))
    columns = spans.select(["video_id", "uri"]) if copies.num_rows else spans.slice(0, 0)
    uri_of = dict(zip(columns["video_id"].to_pylist(), columns["uri"].to_pylist(), strict=True))
    seen: set[int] = set()
    for row in copies.select(["input_row", "video_id", "uri"]).to_pylist():
        if row["input_row"] not in seen:
            seen.add(row["input_row"])
            rejections.append(
                Rejection(
                    uri=storage.public_uri(row["uri"]),
                    video_id=row["video_id"],
                    span_id=None,
                    start_seconds=None,
                    stage=Stage.PROBE,
                    reason=Reason.DUPLICATE,
                    detail=f"the same content as {storage.public_uri(uri_of[row['video_id']])}",
                )
            )
    expected = pc.sum(spans["expected_clips"]).as_py() or 0
    plain = spans.drop_columns(["input_row"])
    schema = pa.schema([*PLAN_SCHEMA, *manifest_fields(plain.schema)])
    return Plan(
        spans=plain.select(schema.names).cast(schema),
        rejections=tuple(rejections),
        num_videos=num_videos,
        expected_clips=expected,
    )
