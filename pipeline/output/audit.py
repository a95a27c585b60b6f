"""Audit of an output: what became of every video, and of every second of it.

It compares what was planned with what the shards say is in them and with the rejections. Whether a shard's rows are
what its metadata says is checked by ``jobs.shards.verify``. Memory is some 400 bytes for each planned span.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vidshard.pipeline.output.parquet import Mask
from vidshard.pipeline.output.state import OutputState
from vidshard.schemas.rejections import Reason
from vidshard.schemas.video import ClipSpec

AUDIT_COLUMNS = (
    "place",
    "span_id",
    "video_id",
    "uri",
    "first_clip",
    "end_clip",
    "duration_seconds_from_header",
    "part_start_seconds",
    "part_end_seconds",
    "expected_clips",
)
"""Columns of the plan that an audit reads."""

_SECONDS = ("planned", "tokenized", "rejected", "pending", "tail", "header")

AUDIT_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("video_id", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("num_clips", pa.int64(), nullable=False),
        *(pa.field(f"{name}_seconds", pa.float64(), nullable=False) for name in _SECONDS),
        pa.field("reasons", pa.string()),
        pa.field("remedy", pa.string()),
    ]
)
"""One row a video, or a copy of one. ``status`` is ``tokenized``, ``partly``, ``rejected``, ``copy`` or ``pending``.
Planned seconds are tokenized, rejected, pending, tail and header: the tail is a last clip that ``--tail drop`` or
``--min-seconds`` leave out; ``header_seconds`` are what headers promise beyond the last frame there was, negative where
there was more, or where the last grid time reaches beyond the end."""


@dataclass(kw_only=True)
class Audit:
    """Audit of an output: the fate of everything that it was to hold."""

    videos: pa.Table
    """``AUDIT_SCHEMA``."""
    num_spans: int
    num_pending: int
    unplanned: list[str] = field(default_factory=list)
    """Spans of shards that are in no plan."""
    superseded: list[str] = field(default_factory=list)
    """Spans of shards whose video was replaced by another since."""
    short: list[str] = field(default_factory=list)
    """Spans of shards with fewer clips than planned though the video goes on after them."""

    @property
    def statuses(self) -> Counter[str]:
        """Number of videos by status."""
        return Counter(self.videos["status"].to_pylist())

    def seconds(self, name: str) -> float:
        """Sum of one of the columns ``NAME_seconds``."""
        return float(pc.sum(self.videos[f"{name}_seconds"]).as_py() or 0.0)


def make_audit(state: OutputState, specs: Mapping[tuple[int, int], ClipSpec]) -> Audit:
    """Compare what was planned with what is there.

    Args:
        state: of the output, with ``AUDIT_COLUMNS`` of its plan.
        specs: how clips are made, by (height, width).
    """
    planned = _current_plan(state.plan)
    spans = planned.spans
    outcomes = _span_outcomes(state, spans, specs)
    committed = state.committed.table["span_id"]
    is_known = pc.is_in(committed, spans["span_id"].combine_chunks())
    is_former = pc.is_in(committed, planned.superseded)
    return Audit(
        videos=_audit_videos(outcomes, planned, state.rejects.table),
        num_spans=spans.num_rows,
        num_pending=int(outcomes.is_pending.sum()),
        unplanned=committed.filter(pc.invert(pc.or_(is_known, is_former))).to_pylist(),
        superseded=committed.filter(pc.and_(is_former, pc.invert(is_known))).to_pylist(),
        short=_short(spans, outcomes.num_clips, outcomes.is_there & ~outcomes.has_gaps),
    )


# The plan.


@dataclass(frozen=True, kw_only=True)
class _CurrentPlan:
    """The plan as it holds now: of several videos at one location the last, of several copies of a video one."""

    spans: pa.Table
    """Each span once."""
    superseded: pa.Array
    """Ids of spans of videos that were replaced."""
    without: pa.Table
    """``place``, ``uri_min`` and ``video_id_max`` of locations without a span: rejected videos, and copies."""


def _current_plan(rows: pa.Table) -> _CurrentPlan:
    rows = rows.append_column("number", pa.array(range(rows.num_rows), pa.int64()))
    opened = rows.filter(pc.is_valid(rows["span_id"]))
    latest = opened.group_by("place").aggregate([("number", "max")])["number_max"].combine_chunks()
    now = opened.filter(pc.is_in(opened["number"], latest))
    here = now["video_id"].combine_chunks().take(pc.index_in(opened["place"], now["place"].combine_chunks()))
    is_current = pc.is_in(opened["video_id"], now["video_id"].combine_chunks())
    current = opened.filter(pc.equal(opened["video_id"], here))
    first = current.group_by("span_id").aggregate([("number", "min")])["number_min"].combine_chunks()
    unique = current.filter(pc.is_in(current["number"], first))
    owners = unique["place"].combine_chunks().unique()
    others = rows.filter(pc.invert(pc.is_in(rows["place"], owners)))
    return _CurrentPlan(
        spans=unique,
        superseded=opened.filter(pc.invert(is_current))["span_id"].combine_chunks(),
        without=others.group_by("place").aggregate([("uri", "min"), ("video_id", "max")]),
    )


# The spans.


@dataclass(frozen=True, kw_only=True)
class _SpanOutcomes:
    """Outcome of each planned span; arrays (spans,)."""

    video: pa.Table
    """``place``, ``uri`` and ``video_id`` of the span."""
    is_there: Mask
    is_refused: Mask
    """Rejected, and in no shard."""
    has_gaps: Mask
    """In a shard, with a rejection for what is missing."""
    num_clips: npt.NDArray[np.int64]
    """Clips in the shard; for others those that were planned."""
    seconds: Mapping[str, npt.NDArray[np.float64]]
    """By the names of ``AUDIT_SCHEMA``."""

    @property
    def is_pending(self) -> Mask:
        return ~self.is_there & ~self.is_refused


def _span_outcomes(state: OutputState, spans: pa.Table, specs: Mapping[tuple[int, int], ClipSpec]) -> _SpanOutcomes:
    committed = state.committed.table
    at = pc.index_in(spans["span_id"], committed["span_id"].combine_chunks())
    there = np.asarray(pc.is_valid(at).to_numpy(), np.bool_)
    rejects = state.rejects.table.filter(pc.is_valid(state.rejects.table["span_id"]))
    partial = rejects.filter(pc.greater(pc.fill_null(rejects["kept_clips"], 0), 0))
    refused = np.asarray(pc.is_in(spans["span_id"], rejects["span_id"].combine_chunks()).to_numpy(), np.bool_) & ~there
    gaps = np.asarray(pc.is_in(spans["span_id"], partial["span_id"].combine_chunks()).to_numpy(), np.bool_)
    planned, tails = planned_seconds(spans, specs)
    covered = _taken(committed["seconds"], at, default=planned)
    missing = np.where(there, planned - covered, 0.0)
    tail = np.where(there & ~gaps, tails, 0.0)
    return _SpanOutcomes(
        video=spans.select(["place", "uri", "video_id"]),
        is_there=there,
        is_refused=refused,
        has_gaps=gaps,
        num_clips=_taken(committed["num_clips"], at, default=spans["expected_clips"].to_numpy()),
        seconds={
            "planned": planned,
            "tokenized": np.where(there, covered, 0.0),
            "rejected": np.where(refused, planned, 0.0) + np.where(gaps, missing, 0.0),
            "pending": np.where(~there & ~refused, planned, 0.0),
            "tail": tail,
            "header": np.where(gaps, 0.0, missing) - tail,
        },
    )


def planned_seconds(
    spans: pa.Table, specs: Mapping[tuple[int, int], ClipSpec]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Seconds of video in spans, if the headers tell the truth.

    Args:
        spans: rows of the plan.
        specs: how clips are made, by (height, width); they differ in the frame size alone.

    Returns:
        float64 (spans,) twice: the seconds of each span, and how many of them are in no clip, because its last one is
        left out.
    """
    none = np.zeros(spans.num_rows)
    if not spans.num_rows:
        return none, none
    spec = next(iter(specs.values()))
    clip, stride, lead = float(spec.clip_seconds), float(spec.stride), float(spec.lead_frames / spec.fps)
    first = spans["first_clip"].to_numpy().astype(np.float64)
    expected = spans["expected_clips"].to_numpy().astype(np.float64)
    start = pc.fill_null(spans["part_start_seconds"], 0.0).to_numpy()
    duration = spans["duration_seconds_from_header"].to_numpy()
    end = np.minimum(pc.fill_null(spans["part_end_seconds"], float("inf")).to_numpy(), duration)
    length = np.maximum(0.0, end - start)
    is_open = pc.is_null(spans["end_clip"]).to_numpy(zero_copy_only=False)
    if spec.clips_per_video is not None:
        return np.where(expected > 1, expected * clip, np.minimum(expected * clip, length)), none
    if spec.stride_seconds is None:
        begins = np.where(first > 0, first * clip - lead, 0.0)
        ends = np.where(is_open, np.maximum(length, begins), (first + expected) * clip - lead)
        left_out = np.where(is_open, np.maximum(0.0, ends - ((first + expected) * clip - lead)), 0.0)
        return ends - begins, np.minimum(left_out, clip)
    last = length - (first + expected - 1) * stride  # what is there of the last clip
    whole = np.where(is_open, np.clip(last, 0.0, clip), clip)
    return np.where(expected > 0, (expected - 1) * clip + whole, 0.0), none


def _taken(values: pa.ChunkedArray, at: pa.ChunkedArray, default: np.ndarray) -> np.ndarray:
    """A value for each span from its shard; the expected one where there is none, or it was not recorded."""
    found = values.combine_chunks().take(at.combine_chunks() if isinstance(at, pa.ChunkedArray) else at)
    filled: np.ndarray = pc.coalesce(found, pa.array(default).cast(found.type)).to_numpy(zero_copy_only=False)
    return filled


def _short(spans: pa.Table, clips: np.ndarray, is_whole: np.ndarray) -> list[str]:
    """Spans that gave fewer clips than planned, while a later one of their video gave some."""
    expected = spans["expected_clips"].to_numpy()
    closed = ~pc.is_null(spans["end_clip"]).to_numpy(zero_copy_only=False)
    suspects = is_whole & closed & (clips < expected)
    if not suspects.any():
        return []
    keys = spans["span_id"].to_pylist()
    videos = [key.rsplit("-", 2)[0] for key in keys]
    first = spans["first_clip"].to_numpy()
    last: dict[str, int] = {}
    for video, clip, count, there in zip(videos, first, clips, is_whole, strict=True):
        if there and count > 0:
            last[video] = max(last.get(video, -1), int(clip))
    return [keys[at] for at in np.flatnonzero(suspects) if last.get(videos[at], -1) > first[at]]


# The videos.


@dataclass(frozen=True, kw_only=True)
class _VideoRejects:
    """Rejections by video."""

    remedies: Mapping[str, Mapping[str, str]]
    """By URI the reasons, each with its remedy."""
    whole: Mapping[str, str]
    """By location key, in hex, the URI of videos that were rejected as a whole, copies included."""
    copies: frozenset[str]
    """Location keys of those that are copies of others."""

    @classmethod
    def of(cls, rejects: pa.Table) -> _VideoRejects:
        remedies: dict[str, dict[str, str]] = {}
        rows = rejects.select(["uri", "reason", "remedy", "span_id", "place"]).to_pylist()
        for row in rows:
            remedies.setdefault(row["uri"], {})[row["reason"]] = row["remedy"]
        whole = [row for row in rows if row["span_id"] is None]
        return cls(
            remedies=remedies,
            whole={row["place"]: row["uri"] for row in whole},
            copies=frozenset(row["place"] for row in whole if row["reason"] == Reason.DUPLICATE),
        )

    def reasons(self, uri: str) -> str | None:
        """All reasons of a video, None without any."""
        return ", ".join(self.remedies.get(uri, {})) or None

    def remedy(self, uri: str) -> str | None:
        """Remedies of the rejections."""
        return "; ".join(self.remedies.get(uri, {}).values()) or None


def _audit_videos(outcomes: _SpanOutcomes, planned: _CurrentPlan, rejects: pa.Table) -> pa.Table:
    """``AUDIT_SCHEMA``: the videos with spans, and those without any."""
    by_video = _VideoRejects.of(rejects)
    sums = _sums(outcomes)
    rows = _videos_without_spans({place.hex() for place in sums["place"].to_pylist()}, planned.without, by_video)
    others = pa.Table.from_pylist(rows, schema=AUDIT_SCHEMA)
    return pa.concat_tables([_videos_with_spans(sums, by_video), others]).sort_by("uri")


def _sums(outcomes: _SpanOutcomes) -> pa.Table:
    """Outcomes added up by location: ``place``, ``uri_min``, ``video_id_min`` and sums."""
    columns = {
        "num_clips": np.where(outcomes.is_there, outcomes.num_clips, 0),
        "spans": np.ones(len(outcomes.is_there), np.int64),
        "there": outcomes.is_there.astype(np.int64),
        "refused": outcomes.is_refused.astype(np.int64),
        "gaps": (outcomes.has_gaps & outcomes.is_there).astype(np.int64),
        **outcomes.seconds,
    }
    table = outcomes.video
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    added = [(name, "sum") for name in columns]
    return table.group_by("place").aggregate([("uri", "min"), ("video_id", "min"), *added])


def _videos_with_spans(sums: pa.Table, rejects: _VideoRejects) -> pa.Table:
    spans, there, refused, gaps = (sums[f"{name}_sum"].to_numpy() for name in ("spans", "there", "refused", "gaps"))
    status = np.select(
        [spans - there - refused > 0, refused == spans, (refused > 0) | (gaps > 0)],
        ["pending", "rejected", "partly"],
        "tokenized",
    )
    # replaced by a file that cannot be opened: the clips of the former stay
    failed = rejects.whole.keys() - rejects.copies
    is_replaced = np.array([place.hex() in failed for place in sums["place"].to_pylist()], np.bool_)
    status = np.where((status == "tokenized") & is_replaced, "partly", status)
    uris = sums["uri_min"].to_pylist()
    return pa.Table.from_arrays(
        [
            sums["uri_min"],
            sums["video_id_min"],
            pa.array(status.tolist(), pa.string()),
            sums["num_clips_sum"].cast(pa.int64()),
            *(sums[f"{name}_sum"].cast(pa.float64()) for name in _SECONDS),
            pa.array([rejects.reasons(uri) for uri in uris], pa.string()),
            pa.array([rejects.remedy(uri) for uri in uris], pa.string()),
        ],
        schema=AUDIT_SCHEMA,
    )


def _videos_without_spans(with_spans: set[str], without: pa.Table, rejects: _VideoRejects) -> list[dict[str, Any]]:
    """Rows of ``AUDIT_SCHEMA``: rejected videos, copies of others, and videos that are to be opened again."""
    columns = (without[name].to_pylist() for name in ("place", "uri_min", "video_id_max"))
    videos = [(place.hex(), uri, video_id) for place, uri, video_id in zip(*columns, strict=True)]
    named = with_spans | {place for place, _, _ in videos}
    videos += [(place, uri, None) for place, uri in rejects.whole.items() if place not in named]  # lost with their plan
    rows = []
    for place, uri, video_id in videos:
        status = "pending"
        if video_id is not None or place in rejects.copies:
            status = "copy"
        elif place in rejects.whole:
            status = "rejected"
        rows.append(
            {
                "uri": uri,
                "video_id": video_id,
                "status": status,
                "num_clips": 0,
                **{f"{name}_seconds": 0.0 for name in _SECONDS},
                "reasons": rejects.reasons(uri),
                "remedy": rejects.remedy(uri),
            }
        )
    return rows
