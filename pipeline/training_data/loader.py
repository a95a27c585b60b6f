"""Clip loader: decodes drawn clips in Ray tasks, in the order of the sequence, and feeds them to training workers.

    ClipSampler ──▶ ClipReader ──▶ blocks of clips, in order ──▶ batches of each worker
     seeded order    CPU tasks

Clips are probed and decoded as for tokenization. A video that cannot be decoded is a rejection, counted, and a
substitute takes its place, so the number of clips read is the position in the sequence and no black frame is ever seen.

Each clip is decoded by itself, at a random place of its video. This is a shuffle over all videos that needs no buffer,
and costs opening one file per clip; `pipeline.training_data.cache` pays that cost once.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import DataContext, Dataset

from vidshard.pipeline import storage
from vidshard.pipeline.decode_stage import decode_clip, header_of
from vidshard.pipeline.rows import row_span
from vidshard.pipeline.training_data.sampler import ClipSampler
from vidshard.pipeline.training_data.variation import Variation
from vidshard.pipeline.training_data.videos import ITEM_SCHEMA, TrainingVideos, UnusableError, rejection_of
from vidshard.pipeline.video.sampling import ClipTimeline
from vidshard.schemas.rejections import Reason, Rejection, Stage, VideoError
from vidshard.schemas.video import ClipSpec, Limits

REJECTED_TYPE = pa.list_(
    pa.struct([("uri", pa.string()), ("video_id", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
)
CLIP_SCHEMA = pa.schema(
    [
        pa.field("sample", pa.int64(), nullable=False),
        pa.field("video_id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("frames", pa.large_binary()),
        pa.field("rejected", REJECTED_TYPE, nullable=False),
        pa.field("made", pa.list_(pa.string())),
    ]
)
"""A clip on its way to a worker: its position in the sequence, its frames as uint8 (T, H, W, 3) in C order, the
candidates that could not be decoded before it, and the ways of ``schemas.training.MADE`` in which it was made."""

BLOCK_BYTES = 32 << 20
"""Largest size of one block of clips."""

_BLOCKS_PER_TASK = 16


# From draws to clips


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipReader:
    """Decodes draws: takes rows of candidates, and returns for each row the first clip that can be decoded."""

    spec: ClipSpec
    limits: Limits
    required: bool = True
    """Whether a row without a clip is an error; otherwise its frames are null."""
    variation: Variation = Variation()  # noqa: RUF009  frozen
    """Crops, mirroring and short videos."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Decode rows of `ClipSampler.rows`, or read them from the cache, into ``CLIP_SCHEMA``.

        Raises:
            UnusableError: no candidate of a row can be decoded, and clips are required.
        """
        return pa.Table.from_pylist([self._row(row) for row in rows.to_pylist()], schema=CLIP_SCHEMA)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        rejected = []
        found: dict[str, Any] = {"video_id": None, "uri": None, "frames": None, "made": []}
        for item in row["candidates"]:
            try:
                frames, made = self.clip_of(item)
            except VideoError as error:
                about = {name: item[name] for name in ("uri", "video_id")}
                rejected.append(about | {"reason": str(error.reason), "detail": error.detail})
                continue
            found = {"video_id": item["video_id"], "uri": item["uri"], "frames": frames, "made": made}
            break
        else:
            if self.required:
                reasons = "; ".join(sorted({f"{r['uri']}: {r['reason']}" for r in rejected}))
                raise UnusableError(
                    f"none of {len(rejected)} places drawn one after the other can be decoded: {reasons}. Take these "
                    "videos away, or put back what they were, and go on"
                )
        return {"sample": row["sample"], "rejected": rejected, **found}

    def clip_of(self, item: dict[str, Any]) -> tuple[bytes, list[str]]:
        """Decode the clip of an item, or read it from the cache.

        Args:
            item: row of ``ITEM_SCHEMA`` with its ``placement_seed``.

        Returns:
            The frames, uint8 (T, H, W, 3) in C order, and the ways of ``MADE`` in which they were made.

        Raises:
            VideoError: the clip cannot be decoded.
            UnusableError: the cached clip is gone or damaged.
        """
        cached = item["shard"] is not None
        frames, made = _cached_clip(item["shard"], item["shard_row"]) if cached else self._decoded(item)
        if not self.variation.mirrors(item):
            return frames, made
        shape = (self.spec.num_frames, self.spec.height, self.spec.width, 3)
        return np.frombuffer(frames, np.uint8).reshape(shape)[:, :, ::-1].tobytes(), [*made, "mirrored"]

    def _decoded(self, item: dict[str, Any]) -> tuple[bytes, list[str]]:
        spec = self.variation.spec_of(item, self.spec_of(item["placement_seed"]))
        span = row_span(item | {"first_clip": 0, "end_clip": None})
        places = ClipTimeline.of(span, span.part, spec).placed
        assert places  # at least one, however short the video is
        span = row_span(item | {"first_clip": item["number"] % len(places), "end_clip": None})
        try:
            clip = decode_clip(span, spec, limits=self.limits, fingerprint=item["fingerprint"])
        except VideoError as error:
            if error.reason is not Reason.CHANGED or not self._has_same_content(item["uri"], item["video_id"]):
                raise
            clip = decode_clip(span, spec, limits=self.limits)
        return clip.frames.tobytes(), self.variation.made(item, clip, self.spec)

    def _has_same_content(self, uri: str, video_id: str) -> bool:
        """Whether a file with another time stamp than before still has its content."""
        return _has_content(uri, video_id, storage.fingerprint(uri), self.limits)

    def spec_of(self, placement_seed: int) -> ClipSpec:
        """The clip specification with the random places of one round."""
        return replace(self.spec, placement_seed=placement_seed)


@lru_cache(maxsize=4096)
def _has_content(uri: str, video_id: str, _fingerprint: str | None, limits: Limits) -> bool:
    """Whether a file can be opened and holds the video. The fingerprint is part of the cache's key."""
    try:
        return header_of(uri, video_id, limits).video_id == video_id
    except VideoError:
        return False


@lru_cache(maxsize=16)
def _open_cache_file(path: str) -> storage.ParquetFile:
    return storage.ParquetFile(path if storage.is_local(path) else io.BytesIO(storage.read_bytes(path)))


def _cached_clip(path: str, row: int) -> tuple[bytes, list[str]]:
    try:
        # a cache of an earlier version has no column "made", and PyArrow leaves it out
        group = _open_cache_file(path).read_row_group(row, ["frames", "made"])
        frames: bytes = group["frames"][0].as_py()
        made: list[str] = group["made"][0].as_py() if "made" in group.column_names else []
    except (pa.ArrowException, OSError, IndexError, storage.StorageError) as error:
        raise UnusableError(
            f"the cache's {storage.public_uri(path)} is gone or damaged ({error}): delete it and go on, and it is made "
            "anew"
        ) from error
    return frames, made


# To the workers


class _IdleThrottle:
    """Pauses Ray Data's scheduler after a step in which nothing happened; one of its execution callbacks.

    The scheduler normally waits for tasks to finish. Where enough clips are ready, no task runs, or tasks have results
    that it does not take yet. It then loops without a pause, and takes a core from the training that it feeds.
    """

    PAUSE_SECONDS = 0.05

    def __init__(self) -> None:
        self._before: list[Any] = []

    def on_execution_step(self, executor: Any) -> None:
        try:
            metrics = [operator.metrics for operator in executor._topology]
            now = [(m.num_tasks_submitted, m.num_task_outputs_generated, m.num_outputs_taken) for m in metrics]
        except (AttributeError, TypeError):
            return  # a version of Ray that keeps these counts elsewhere: no throttle
        if now == self._before:
            time.sleep(self.PAUSE_SECONDS)
        self._before = now

    def before_execution_starts(self, _executor: object) -> None:
        pass

    def after_execution_succeeds(self, _executor: object) -> None:
        pass

    def after_execution_fails(self, _executor: object, error: Exception) -> None:
        pass


def training_clips(
    sampler: ray.ObjectRef[ClipSampler], reader: ClipReader, start: int, stop: int, *, rows_per_block: int
) -> Dataset:
    """Lazy dataset of the clips ``start`` to ``stop``, exclusive, of the sequence: ``CLIP_SCHEMA``, in order.

    Blocks hold exactly ``rows_per_block`` rows. Dealt out in turn they give n workers the first n blocks, then the
    next n, so that the workers' batches together are the sequence without gap or repetition. Needs the execution
    option ``preserve_order``.

    Args:
        sampler: in the object store, since every task reads it.
    """

    context = DataContext.get_current()  # of this process; each dataset takes a copy
    context.memory_usage_poll_interval_s = None  # would walk the page tables of every worker each second
    if _IdleThrottle not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(_IdleThrottle)

    def drawn(blocks: pa.Table) -> pa.Table:
        known: ClipSampler = ray.get(sampler)
        begins = blocks["begin"].to_pylist()
        return known.rows(range(begins[0], min(begins[-1] + rows_per_block, stop)))

    begins = range(start, stop, rows_per_block)
    tasks = [begins[first : first + _BLOCKS_PER_TASK] for first in range(0, len(begins), _BLOCKS_PER_TASK)]
    return (
        # Ray runs both maps in one task per table, and passes on its blocks as they are made. A task for each block
        # would cost more than reading its clips. `ray.data.range` is not fused with the maps: all of it would run
        # before the first clip, 68 s for 17,000 blocks.
        ray.data.from_arrow([pa.table({"begin": list(task)}) for task in tasks])
        .map_batches(drawn, batch_format="pyarrow", batch_size=None)
        .map_batches(reader, batch_format="pyarrow", batch_size=rows_per_block, num_cpus=1)
        .repartition(target_num_rows_per_block=rows_per_block)
    )


def rows_per_block(clips: int, spec: ClipSpec) -> int:
    """Largest number of clips that divides a worker's part of a batch and stays within ``BLOCK_BYTES``.

    Args:
        clips: of a worker's part of a batch.
    """
    most = max(1, BLOCK_BYTES // spec.clip_bytes)
    return max(rows for rows in range(1, clips + 1) if clips % rows == 0 and rows <= most)


@dataclass(kw_only=True, eq=False)
class Batch:
    """One worker's part of a batch."""

    samples: list[int]
    """Positions of its clips in the sequence."""
    frames: npt.NDArray[np.uint8]
    """(B, T, H, W, 3), RGB in [0, 255]."""
    rejected: list[dict[str, Any]]
    """Candidates that could not be decoded."""
    made: list[str]
    """Ways of ``schemas.training.MADE`` of all its clips."""
    wait_seconds: float
    """Time that the worker waited for it."""


def batches(
    tables: Iterator[pa.Table], spec: ClipSpec, *, first: int, clock: Callable[[], float] = time.perf_counter
) -> Iterator[Batch]:
    """Convert a worker's part of `training_clips` to batches, from a position in the sequence on.

    Args:
        first: clips before this one are dropped. A restarted worker may get such, if a newer checkpoint was finished
            after the dataset began.
    """
    shape = (-1, spec.num_frames, spec.height, spec.width, 3)
    while True:
        began = clock()
        table = next(tables, None)
        waited = clock() - began
        if table is None:
            return
        samples = table["sample"].to_pylist()
        if samples[0] < first:
            continue
        frames = np.frombuffer(bytearray().join(table["frames"].to_pylist()), np.uint8).reshape(shape)
        yield Batch(
            samples=samples,
            frames=frames,
            rejected=[entry for row in table["rejected"].to_pylist() for entry in row],
            made=[way for row in table["made"].to_pylist() for way in row or []],
            wait_seconds=waited,
        )


# Held-out clips


def held_out_clips(
    videos: TrainingVideos,
    spec: ClipSpec,
    count: int,
    limits: Limits,
    *,
    replacing: bool,
    before: TrainingVideos | None,
    variation: Variation = Variation(),  # noqa: B008  frozen
) -> tuple[pa.Table, TrainingVideos]:
    """Decode the clips that a stage is measured by, evenly placed in the held-out videos.

    A video of which no clip can be decoded is a rejection, and the next one by the order of hashes takes its place.

    Args:
        spec: clip specification; the number of clips a video is chosen here.
        count: largest number of clips. Few videos give several clips each.
        replacing: hold out other videos in place of broken ones; not allowed once the stage has trained.
        before: videos of the stage that this one starts from.
        variation: treatment of short videos.

    Returns:
        The clips, ``CLIP_SCHEMA``, the first of each video before the second of any; and the videos as they are held
        out now, with the rejections added.
    """
    tables: list[pa.Table] = []
    tried: set[str] = set()
    rejections = list(videos.rejections)
    number = clips_each(videos.held_out, spec, count)
    even = replace(spec, clips_per_video=number, placement="even")
    while True:
        rows = videos.held_out.slice(0, count)
        rows = rows.filter(pc.invert(pc.is_in(rows["video_id"], pa.array(tried, pa.string()))))
        tried |= set(rows["video_id"].to_pylist())
        clips, broken = decode_held_out(_places(rows, even).slice(0, count), even, limits, variation)
        tables.append(clips)
        rejections += list({(r.video_id, r.reason): r for r in reversed(broken)}.values())
        undecodable = set(rows["video_id"].to_pylist()) - set(clips["video_id"].to_pylist())
        if not undecodable or not replacing:
            break
        videos = videos.without_held_out(undecodable, before)
    return pa.concat_tables(tables).slice(0, count), replace(videos, rejections=rejections)


def clips_each(items: pa.Table, spec: ClipSpec, count: int) -> int:
    """Smallest number of clips of each video that gives ``count`` clips in all, or as many as there are.

    Args:
        items: ``ITEM_SCHEMA``, one row a video.
    """
    room = [len(_placed(row, replace(spec, clips_per_video=count))) for row in items.to_pylist()]
    return next((n for n in range(1, count) if sum(min(n, own) for own in room) >= min(count, sum(room))), count)


def _placed(row: dict[str, Any], spec: ClipSpec) -> Sequence[object]:
    span = row_span(row | {"first_clip": 0, "end_clip": None})
    return ClipTimeline.of(span, span.part, spec).placed or ()


def _places(items: pa.Table, spec: ClipSpec) -> pa.Table:
    """Every place of every video as an item, the first of each video before the second of any."""
    rows = [(row, len(_placed(row, spec))) for row in items.to_pylist()]
    assert spec.clips_per_video is not None
    numbered = [row | {"number": n} for n in range(spec.clips_per_video) for row, room in rows if n < max(1, room)]
    return pa.Table.from_pylist(numbered, schema=ITEM_SCHEMA)


def decode_held_out(
    items: pa.Table,
    spec: ClipSpec,
    limits: Limits,
    variation: Variation = Variation(),  # noqa: B008  frozen
) -> tuple[pa.Table, list[Rejection]]:
    """Decode the clip of each item.

    Args:
        items: ``ITEM_SCHEMA``, each with its ``number`` among the places of the video.

    Returns:
        The clips, ``CLIP_SCHEMA``, and rejections of those that could not be decoded.
    """
    if not items.num_rows:
        return CLIP_SCHEMA.empty_table(), []
    items = items.append_column("placement_seed", pa.array([0] * items.num_rows, pa.int64()))
    numbered = pa.table(
        {
            "sample": pa.array(range(items.num_rows), pa.int64()),
            "candidates": pa.array([[row] for row in items.to_pylist()], pa.list_(pa.struct(list(items.schema)))),
        }
    )
    reader = ClipReader(spec=spec, limits=limits, required=False, variation=variation)
    dataset = ray.data.from_arrow([numbered.slice(at, 1) for at in range(numbered.num_rows)]).map_batches(
        reader, batch_format="pyarrow", batch_size=None, num_cpus=1
    )
    tables = list(dataset.iter_batches(batch_format="pyarrow", batch_size=None))
    table = pa.concat_tables(tables).sort_by("sample")
    return table.filter(pc.is_valid(table["frames"])), rejections_in(table)


def rejections_in(table: pa.Table) -> list[Rejection]:
    """Rejections in the column ``rejected`` of decoded clips."""
    return [
        rejection_of(entry, VideoError(Reason(entry["reason"]), entry["detail"]), Stage.DECODE)
        for row in table["rejected"].to_pylist()
        for entry in row
    ]
