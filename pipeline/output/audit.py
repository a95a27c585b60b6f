"""The account of an output: what became of every video, and of every second of it.

What was planned stands on one side; on the other what the shards say of their spans, and the rejections. It is read
from the ends of the shards; whether their rows are what these say is for ``jobs.shards.verify``. Memory is some 400
bytes for each planned span.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vidshard.pipeline.output.committed import ShardSpans
from vidshard.pipeline.output.plan_store import read_planned
from vidshard.pipeline.output.rejects import read_rejects
from vidshard.schemas.rejections import Reason
from vidshard.schemas.video import ClipSpec

AUDIT_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("video_id", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("num_clips", pa.int64(), nullable=False),
        pa.field("planned_seconds", pa.float64(), nullable=False),
        pa.field("tokenized_seconds", pa.float64(), nullable=False),
        pa.field("rejected_seconds", pa.float64(), nullable=False),
        pa.field("pending_seconds", pa.float64(), nullable=False),
        pa.field("tail_seconds", pa.float64(), nullable=False),
        pa.field("header_seconds", pa.float64(), nullable=False),
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
    """What became of all that an output was to hold."""

    videos: pa.Table
    """``AUDIT_SCHEMA``."""
    num_spans: int
    num_pending: int
    unplanned: list[str] = field(default_factory=list)
    """Spans of shards that nobody planned."""
    superseded: list[str] = field(default_factory=list)
    """Spans of shards whose video was replaced by another since."""
    short: list[str] = field(default_factory=list)
    """Spans of shards with fewer clips than planned though the video goes on after them."""

    @property
    def statuses(self) -> Counter[str]:
        """Videos by what became of them."""
        return Counter(self.videos["status"].to_pylist())

    def seconds(self, name: str) -> float:
        """Sum of one of the columns ``NAME_seconds``."""
        return float(pc.sum(self.videos[f"{name}_seconds"]).as_py() or 0.0)


def make_audit(out: str, shards: Sequence[ShardSpans], specs: Mapping[tuple[int, int], ClipSpec]) -> Audit:
    """Lay what was planned against what is there.

    Args:
        out: the output.
        shards: what its shards say of their spans.
        specs: how clips are made, by (height, width).

    Raises:
        ShardError: the plan or the rejections are damaged.
    """
    planned = _current(read_planned(out, _COLUMNS))
    spans = planned.current
    rejects = read_rejects(out)
    committed = pa.table(
        {
            "span_id": pa.array([s for shard in shards for s in shard.spans], pa.string()),
            "num_clips": pa.array([n for shard in shards for n in shard.num_clips], pa.int64()),
            "seconds": pa.array([t for shard in shards for t in shard.seconds], pa.float64()),
        }
    )
    known = pc.is_in(committed["span_id"], spans["span_id"].combine_chunks())
    former = pc.is_in(committed["span_id"], planned.superseded)
    at = pc.index_in(spans["span_id"], committed["span_id"].combine_chunks())
    is_there = pc.is_valid(at)
    whole = rejects.filter(pc.is_null(rejects["span_id"]))
    of_spans = rejects.filter(pc.is_valid(rejects["span_id"]))
    is_refused = pc.and_(pc.is_in(spans["span_id"], of_spans["span_id"].combine_chunks()), pc.invert(is_there))
    seconds, tails = planned_seconds(spans, specs)
    expected = spans["expected_clips"].to_numpy()
    clips = _taken(committed["num_clips"], at, default=expected)
    covered = _taken(committed["seconds"], at, default=seconds)
    there, refused = is_there.to_numpy(), is_refused.to_numpy()
    gaps = pc.is_in(spans["span_id"], _partial(of_spans)).to_numpy()
    missing = np.where(there, seconds - covered, 0.0)
    table = spans.select(["video_id", "uri", "place"]).append_column("spans", pa.array(np.ones(len(seconds), np.int64)))
    columns = {
        "num_clips": np.where(there, clips, 0),
        "planned": seconds,
        "tokenized": np.where(there, covered, 0.0),
        "rejected": np.where(refused, seconds, 0.0) + np.where(gaps, missing, 0.0),
        "pending": np.where(~there & ~refused, seconds, 0.0),
        "tail": np.where(there & ~gaps, tails, 0.0),
        "header": np.where(gaps, 0.0, missing) - np.where(there & ~gaps, tails, 0.0),
        "there": there.astype(np.int64),
        "refused": refused.astype(np.int64),
        "gaps": (gaps & there).astype(np.int64),
    }
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    return Audit(
        videos=_videos(table, planned, rejects, whole),
        num_spans=spans.num_rows,
        num_pending=int((~there & ~refused).sum()),
        unplanned=committed["span_id"].filter(pc.invert(pc.or_(known, former))).to_pylist(),
        superseded=committed["span_id"].filter(pc.and_(former, pc.invert(known))).to_pylist(),
        short=_short(spans, clips, there & ~gaps),
    )


_SECONDS = ("planned", "tokenized", "rejected", "pending", "tail", "header")

_COLUMNS = [
    "place",
    "span_id",
    "video_id",
    "uri",
    "first_clip",
    "end_clip",
    "duration_seconds_from_header",
    "part_start_seconds",
    "part_end_seconds",
    "frame_height",
    "frame_width",
    "expected_clips",
]


@dataclass(frozen=True, kw_only=True)
class _Planned:
    current: pa.Table
    """Spans, each once."""
    superseded: pa.Array
    """Ids of spans of videos that were replaced."""
    without: pa.Table
    """``uri_min`` and ``video_id_max`` of places of which no span is theirs: rejected videos, and copies."""


def _current(rows: pa.Table) -> _Planned:
    """What the plan says now: of several videos that stood at one place the last, of several copies one."""
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
    return _Planned(
        current=unique,
        superseded=opened.filter(pc.invert(is_current))["span_id"].combine_chunks(),
        without=others.group_by("place").aggregate([("uri", "min"), ("video_id", "max")]),
    )


def planned_seconds(
    spans: pa.Table, specs: Mapping[tuple[int, int], ClipSpec]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """float64 (spans,) twice, if the headers tell the truth: seconds of video of each span, and how many of them are in
    no clip, as its last one is left out."""
    none = np.zeros(spans.num_rows)
    if not spans.num_rows:
        return none, none
    spec = next(iter(specs.values()))  # they differ in the frame size alone
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
    """A value for each span from its shard, what was expected where there is none, or it was not written down."""
    found = values.combine_chunks().take(at.combine_chunks() if isinstance(at, pa.ChunkedArray) else at)
    filled: np.ndarray = pc.coalesce(found, pa.array(default).cast(found.type)).to_numpy(zero_copy_only=False)
    return filled


def _partial(rejects: pa.Table) -> pa.Array:
    return rejects.filter(pc.greater(pc.fill_null(rejects["kept_clips"], 0), 0))["span_id"].combine_chunks()


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


def _videos(spans: pa.Table, planned: _Planned, rejects: pa.Table, whole: pa.Table) -> pa.Table:
    """One row a video."""
    names = [
        "num_clips",
        "planned",
        "tokenized",
        "rejected",
        "pending",
        "tail",
        "header",
        "spans",
        "there",
        "refused",
        "gaps",
    ]
    sums = spans.group_by("place").aggregate([("uri", "min"), ("video_id", "min"), *((name, "sum") for name in names)])
    column = {name: sums[f"{name}_sum"].to_numpy() for name in names}
    pending = column["spans"] - column["there"] - column["refused"]
    status = np.select(
        [pending > 0, column["refused"] == column["spans"], (column["refused"] > 0) | (column["gaps"] > 0)],
        ["pending", "rejected", "partly"],
        "tokenized",
    )
    remedies: dict[str, dict[str, str]] = {}
    for row in rejects.to_pylist():
        remedies.setdefault(row["uri"], {})[row["reason"]] = row["remedy"]
    uris = sums["uri_min"].to_pylist()
    refused = set(whole["place"].to_pylist())
    copies = set(whole.filter(pc.equal(whole["reason"], str(Reason.DUPLICATE)))["place"].to_pylist())
    # replaced by a file that cannot be opened: the clips of the former stay
    replaced = np.array([place.hex() in refused - copies for place in sums["place"].to_pylist()], np.bool_)
    status = np.where((status == "tokenized") & replaced, "partly", status)
    opened = pa.Table.from_arrays(
        [
            sums["uri_min"],
            sums["video_id_min"],
            pa.array(status.tolist(), pa.string()),
            pa.array(column["num_clips"], pa.int64()),
            *(pa.array(column[name], pa.float64()) for name in _SECONDS),
            pa.array([", ".join(remedies.get(uri, {})) or None for uri in uris], pa.string()),
            pa.array(["; ".join(remedies.get(uri, {}).values()) or None for uri in uris], pa.string()),
        ],
        schema=AUDIT_SCHEMA,
    )
    others = []
    without = planned.without
    columns = (without[name].to_pylist() for name in ("place", "uri_min", "video_id_max"))
    places = [(place.hex(), uri, video_id) for place, uri, video_id in zip(*columns, strict=True)]
    named = {*(place.hex() for place in sums["place"].to_pylist()), *(place for place, _, _ in places)}
    lost = {row["place"]: row["uri"] for row in whole.to_pylist() if row["place"] not in named}  # with their plan
    places += [(place, uri, None) for place, uri in lost.items()]
    for place, uri, video_id in places:
        is_copy = video_id is not None or place in copies
        status_of = "copy" if is_copy else "rejected" if place in refused else "pending"
        others.append(
            {
                "uri": uri,
                "video_id": video_id,
                "status": status_of,
                "num_clips": 0,
                **{f"{name}_seconds": 0.0 for name in _SECONDS},
                "reasons": ", ".join(remedies.get(uri, {})) or None,
                "remedy": "; ".join(remedies.get(uri, {}).values()) or None,
            }
        )
    return pa.concat_tables([opened, pa.Table.from_pylist(others, schema=AUDIT_SCHEMA)]).sort_by("uri")
