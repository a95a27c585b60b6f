"""Training videos: finds and opens the videos of each corpus once, and holds some out for validation.

Videos are discovered and probed as for tokenization, on the cluster. The result is a table of items. An item is one
place of one video that a clip can be drawn from; `pipeline.training_data.sampler` decides which item each clip takes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vidshard.pipeline import storage
from vidshard.pipeline.discover import discover
from vidshard.pipeline.flow import map_videos
from vidshard.pipeline.output.entries import Inputs
from vidshard.pipeline.plan import open_videos
from vidshard.pipeline.rows import WORK_SCHEMA, row_rejection
from vidshard.schemas.errors import VidshardError, one_line
from vidshard.schemas.rejections import Reason, Rejection, Stage, VideoError
from vidshard.schemas.video import ClipSpec, Limits, Part

ITEM_SCHEMA = pa.schema(
    [
        *(field for field in WORK_SCHEMA if field.name not in ("first_clip", "end_clip", "expected_clips")),
        pa.field("corpus", pa.int32(), nullable=False),
        pa.field("number", pa.int32(), nullable=False),
        pa.field("shard", pa.string()),
        pa.field("shard_row", pa.int32()),
    ]
)
"""Columns of an item: a video or part, its corpus, the number of the place in it, and file and row of its cached clip
(null without a cache)."""

_IS_HELD_OUT, _NUM_VIDEOS = "is_held_out", b"num_videos"


class UnusableError(VidshardError):
    """The videos cannot be trained on; the message says why and what to change."""


@dataclass(frozen=True, kw_only=True)
class TrainingVideos:
    """The videos of a training run, opened once."""

    train: pa.Table
    """``ITEM_SCHEMA``: every place that clips are drawn from."""
    held_out: pa.Table
    """``ITEM_SCHEMA``: one place in the middle of each video that is never trained on."""
    rejections: list[Rejection]
    num_videos: int
    """Number of usable videos, held-out ones included."""

    @property
    def digest(self) -> str:
        """SHA-256 in hex over the videos' content and which are held out, whatever their names and locations."""
        parts = ("video_id", "part_start_seconds", "part_end_seconds", "corpus")
        rows = {
            (aside, *(row[name] for name in parts))
            for aside, table in enumerate((self.train, self.held_out))
            for row in table.select(parts).to_pylist()
        }
        return hashlib.sha256("\n".join(sorted(map(str, rows))).encode()).hexdigest()

    def without_held_out(self, broken: Set[str], before: TrainingVideos | None = None) -> TrainingVideos:
        """Copy without some held-out videos, in whose place the next ones by the same order of hashes are held out.

        Those come from the videos to train on, none of which may have been trained on yet. A corpus keeps a video to
        train on, so there may be fewer held-out videos than before.

        Args:
            broken: ids of held-out videos that cannot be decoded.
            before: videos of the stage that this one starts from; what it trained on is not held out.
        """
        held_out = [row for row in self.held_out.to_pylist() if row["video_id"] not in broken]
        train = self.train.to_pylist()
        in_corpus: dict[int, set[str]] = {}
        for row in train:
            in_corpus.setdefault(row["corpus"], set()).add(row["video_id"])
        trained = set() if before is None else set(before.train["video_id"].to_pylist())
        corpus_of = {row["video_id"]: row["corpus"] for row in train}
        chosen: set[str] = set()
        for video_id in sorted(corpus_of.keys() - trained, key=held_out_order):
            if len(chosen) == len(broken):
                break
            own = in_corpus[corpus_of[video_id]]
            if len(own) > 1:
                own.remove(video_id)
                chosen.add(video_id)
        held_out += [row for row in train if row["video_id"] in chosen and row["number"] == 0]
        return replace(
            self,
            train=self.train.filter(pc.invert(pc.is_in(self.train["video_id"], pa.array(chosen, pa.string())))),
            held_out=pa.Table.from_pylist(held_out, schema=ITEM_SCHEMA),
            num_videos=self.num_videos - len(broken),
        )

    def write(self, path: str) -> None:
        """Store the videos, without the rejections, as Parquet for `read_training_videos`."""
        tables = [
            table.append_column(_IS_HELD_OUT, pa.array([aside] * table.num_rows, pa.bool_()))
            for aside, table in ((False, self.train), (True, self.held_out))
        ]
        together = pa.concat_tables(tables).replace_schema_metadata({_NUM_VIDEOS: str(self.num_videos)})
        buffer = pa.BufferOutputStream()
        pq.write_table(together, buffer, compression="zstd", write_page_checksum=True)
        storage.write_atomic(path, buffer.getvalue().to_pybytes())


def read_training_videos(path: str) -> TrainingVideos:
    """Read the videos that `TrainingVideos.write` stored.

    Raises:
        StorageError: the file cannot be read.
        UnusableError: the file is damaged.
    """
    data = storage.read_bytes(path)
    try:
        table = storage.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read()
        aside, num_videos = table[_IS_HELD_OUT].cast(pa.bool_()), int(table.schema.metadata[_NUM_VIDEOS])
        items = table.drop_columns(_IS_HELD_OUT).cast(ITEM_SCHEMA)
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
        raise UnusableError(
            f"{storage.public_uri(path)} is damaged ({one_line(error, 200)}): choose another --out"
        ) from error
    return TrainingVideos(
        train=items.filter(pc.invert(aside)), held_out=items.filter(aside), rejections=[], num_videos=num_videos
    )


# Opening


_Key = tuple[str, float | None, float | None]
"""A video or part of one: video_id, part_start_seconds, part_end_seconds."""


def open_training_videos(
    paths: Sequence[str],
    *,
    spec: ClipSpec,
    validation_share: float,
    num_tasks: int,
    limits: Limits | None = None,
    before: TrainingVideos | None = None,
    on_video: Callable[[int, int], None] | None = None,
    keep_short: bool = False,
) -> TrainingVideos:
    """Find and open the videos of all corpora, and hold some out.

    Args:
        paths: one path per corpus; a video that is in two corpora belongs to the first.
        spec: how videos become clips, with ``clips_per_video``.
        validation_share: share of the videos that is held out, in [0, 1); at least one video unless it is 0. The
            choice depends on the video ids alone, so it is the same whatever the videos are called.
        num_tasks: number of Ray tasks that open videos.
        before: videos of the stage that this one starts from. Its held-out videos stay held out, and no video that it
            trained on is held out as long as there is another one.
        on_video: called with the number of videos opened and their total, for one corpus after the other.
        keep_short: whether videos shorter than a clip are usable.

    Raises:
        InputError, StorageError: as raised by `discover`.
        UnusableError: a corpus has no video left to train on, or URLs carry credentials.
    """
    assert spec.clips_per_video is not None
    videos, rejections = _usable_videos(paths, spec, limits or Limits(), num_tasks, on_video, keep_short)
    ids = sorted({video_id for video_id, _, _ in videos}, key=held_out_order)
    held_out = _choose_held_out(ids, max(1, round(validation_share * len(ids))), before) if validation_share else set()
    for corpus, path in enumerate(paths):
        own = {video_id for (video_id, _, _), row in videos.items() if row["corpus"] == corpus}
        if own <= held_out:
            raise UnusableError(no_usable_video(path, rejections, num_usable=len(own)))
    ordered = [videos[key] for key in sorted(videos, key=str)]  # the cluster returns them in any order
    train = [
        row | {"number": n} for row in ordered if row["video_id"] not in held_out for n in range(row["expected_clips"])
    ]
    apart = [row | {"number": 0} for row in ordered if row["video_id"] in held_out]
    return TrainingVideos(
        train=pa.Table.from_pylist(train, schema=ITEM_SCHEMA),
        held_out=pa.Table.from_pylist(apart, schema=ITEM_SCHEMA),
        rejections=rejections,
        num_videos=len(ids),
    )


def _usable_videos(
    paths: Sequence[str],
    spec: ClipSpec,
    limits: Limits,
    num_tasks: int,
    on_video: Callable[[int, int], None] | None,
    keep_short: bool,
) -> tuple[dict[_Key, dict[str, Any]], list[Rejection]]:
    """Open every corpus: the rows of usable videos with their corpus, and the rejections of the others.

    Raises:
        UnusableError: a corpus has no usable video of its own.
    """
    rejections: list[Rejection] = []
    videos: dict[_Key, dict[str, Any]] = {}
    for corpus, path in enumerate(paths):
        num_rejections = len(rejections)
        inputs = Inputs.of(discover([path]).videos, Part())
        rejections += inputs.bad_rows
        for done, row in enumerate(_opened(inputs, spec, limits, num_tasks), start=1):
            if on_video is not None:
                on_video(done, inputs.num_videos)
            rejection = row_rejection(row["rejection"]) if row["rejection"] is not None else None
            if rejection is None and not keep_short:
                rejection = _too_short(row, spec)
            if rejection is not None:
                rejections.append(rejection)
                continue
            key = (row["video_id"], row["part_start_seconds"], row["part_end_seconds"])
            videos.setdefault(key, row | {"corpus": corpus})
        if not any(video["corpus"] == corpus for video in videos.values()):
            raise UnusableError(no_usable_video(path, rejections[num_rejections:]))
    return videos, rejections


def _opened(inputs: Inputs, spec: ClipSpec, limits: Limits, num_tasks: int) -> Iterator[dict[str, Any]]:
    videos = inputs.videos
    secret = [uri for uri in videos["uri"].to_pylist() if uri != storage.public_uri(uri)]
    if secret:
        raise UnusableError(
            f"{storage.public_uri(secret[0])}: the URL carries credentials, which no record of a training may hold; "
            "put them into the environment"
        )
    every_clip = 1 << 30  # one row per video, however long it is
    for table in open_videos(
        videos, [spec], part=Part(), span_clips=every_clip, num_tasks=num_tasks, map_videos=map_videos, limits=limits
    ):
        yield from table.to_pylist()


def _too_short(row: Mapping[str, Any], spec: ClipSpec) -> Rejection | None:
    seconds = Fraction(row["duration_seconds_from_header"])
    needed = (spec.num_frames - 1) / spec.fps
    if not 0 < seconds < needed:
        return None
    detail = (
        f"{float(seconds):.3g} s, and a clip of {spec.num_frames} frames takes {float(needed):.3g} s at {spec.fps} "
        "frames per second"
    )
    return rejection_of(row, VideoError(Reason.TOO_SHORT, detail), Stage.PROBE)


def _choose_held_out(ids: Sequence[str], count: int, before: TrainingVideos | None) -> set[str]:
    """Choose the first ``count`` ids, and none that the stage before trained on or held out for other reasons."""
    if before is None:
        return set(ids[:count])
    measured = set(before.held_out["video_id"].to_pylist()).intersection(ids)
    trained = set(before.train["video_id"].to_pylist())
    fresh = [video_id for video_id in ids if video_id not in measured and video_id not in trained]
    return measured | set(fresh[: max(0, count - len(measured))]) or set(ids[:1])


# Shared with the other rooms of training data


def held_out_order(video_id: str) -> str:
    """Sort key by which videos are held out: the first ones."""
    return stable_hash("held out", video_id)


def stable_hash(*parts: object) -> str:
    """SHA-256 in hex over values' texts: the same in every process and version of Python."""
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()


def rejection_of(row: Mapping[str, Any], error: VideoError, stage: Stage) -> Rejection:
    """Rejection of a whole video.

    Args:
        row: with the video's ``uri`` and ``video_id``.
    """
    return Rejection(
        uri=row["uri"],
        video_id=row["video_id"],
        span_id=None,
        start_seconds=None,
        stage=stage,
        reason=error.reason,
        detail=error.detail,
    )


def no_usable_video(path: str, rejections: Sequence[Rejection], num_usable: int = 0) -> str:
    """Message that a corpus or cache has nothing to train on, with counts of the reasons.

    Args:
        num_usable: number of usable videos, all of which are held out.
    """
    where = storage.public_uri(path)
    if num_usable:
        return f"{num_usable} usable video in {where}, which is held out: give more videos, or set --validation-share 0"
    if not rejections:
        return f"no usable video in {where} that is not in another corpus before it: leave it out"
    counts: dict[str, int] = {}
    for rejection in rejections:
        counts[str(rejection.reason)] = counts.get(str(rejection.reason), 0) + 1
    reasons = ", ".join(f"{count} x {reason}" for reason, count in sorted(counts.items()))
    hint = (
        ". Fewer --frames or a higher --fps make clips shorter; --short-videos repeat keeps them"
        if Reason.TOO_SHORT in counts
        else ""
    )
    return f"no usable video in {where}: {reasons}; the first: {rejections[0].uri}: {rejections[0].detail}{hint}"
