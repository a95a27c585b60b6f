"""Raw videos to training clips, in an order that is known beforehand: the same from any position on.

    draws of the epochs ──▶ ClipReader ──▶ one clip for each draw, to the training workers
     by seeded shuffles      CPU tasks

A training takes clips number 0, 1, 2 ... of an endless sequence; clip ``n`` of it, and which video and place it shows,
follows from the videos, the settings and the seed alone (:class:`ClipSampler`). Who goes on at clip ``n`` gets what an
uninterrupted run would have got, without reading what came before. Clips are made by the probing and decoding of
production; a video that breaks is a rejection, counted, and another one takes its place in the sequence, so that the
count of clips stays the position and no black frame is ever seen.

Every clip is decoded by itself, at a random place of its video: a shuffle over all videos that needs no buffer, at the
cost of opening a file for each clip. A cache (:func:`fill_cache`) pays that once.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from ray.data import DataContext, Dataset

from vidshard.pipeline import storage
from vidshard.pipeline.decode_stage import decode_clip, probe
from vidshard.pipeline.discover import Discovery, discover
from vidshard.pipeline.output.resume import with_entries
from vidshard.pipeline.plan import open_videos
from vidshard.pipeline.rows import WORK_SCHEMA, row_rejection, row_span
from vidshard.pipeline.video.sampling import ClipTimeline
from vidshard.schemas.errors import VidshardError
from vidshard.schemas.rejections import Reason, Rejection, Stage, VideoError
from vidshard.schemas.video import ClipSpec, Limits, Part, VideoRef

ITEM_SCHEMA = pa.schema(
    [
        *(field for field in WORK_SCHEMA if field.name not in ("first_clip", "end_clip", "expected_clips")),
        pa.field("corpus", pa.int32(), nullable=False),
        pa.field("number", pa.int32(), nullable=False),
        pa.field("shard", pa.string()),
        pa.field("shard_row", pa.int32()),
    ]
)
"""What can be drawn: one of the places of a video; and the file and row where a cache holds its clip."""

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
    ]
)
"""A clip as it travels to whoever trains on it: its place in the sequence, its frames as uint8 (T, H, W, 3) in C order,
and what had to be passed over on the way to it."""

SUBSTITUTES = 15
"""Items, each another one, that are tried in place of one that breaks, for one clip; when all of them break too,
training stops. Of a million clips of a corpus of which every third video breaks, 0.02 are expected to."""

_BLOCKS_PER_TASK = 16
_BLOCK_BYTES = 32 << 20


class UnusableError(VidshardError):
    """The videos give no training; the message says why and what to change."""


# Which videos there are.


@dataclass(frozen=True, kw_only=True)
class TrainingVideos:
    """The videos of a training, opened once."""

    train: pa.Table
    """``ITEM_SCHEMA``: every place that can be drawn."""
    held_out: pa.Table
    """The same, one place in the middle of each video that is never trained on."""
    rejections: list[Rejection]
    num_videos: int
    """That can be used, held-out ones too."""

    @property
    def digest(self) -> str:
        """Of what the videos hold and which are held out: SHA-256, whatever they are called and wherever they lie."""
        parts = ("video_id", "part_start_seconds", "part_end_seconds", "corpus")
        rows = {
            (aside, *(row[name] for name in parts))
            for aside, table in enumerate((self.train, self.held_out))
            for row in table.select(parts).to_pylist()
        }
        return hashlib.sha256("\n".join(sorted(map(str, rows))).encode()).hexdigest()

    def write(self, path: str) -> None:
        """Keep them in a Parquet file, for `read_training_videos`; without the rejections."""
        tables = [
            table.append_column(_IS_HELD_OUT, pa.array([aside] * table.num_rows, pa.bool_()))
            for aside, table in ((False, self.train), (True, self.held_out))
        ]
        together = pa.concat_tables(tables).replace_schema_metadata({_NUM_VIDEOS: str(self.num_videos)})
        buffer = pa.BufferOutputStream()
        pq.write_table(together, buffer, compression="zstd")
        storage.write_atomic(path, buffer.getvalue().to_pybytes())


def read_training_videos(path: str) -> TrainingVideos:
    """What `TrainingVideos.write` kept.

    Raises:
        StorageError: it cannot be read.
        UnusableError: it is damaged.
    """
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(path)))
        aside, num_videos = table[_IS_HELD_OUT], int(table.schema.metadata[_NUM_VIDEOS])
        items = table.drop_columns(_IS_HELD_OUT).cast(ITEM_SCHEMA)
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UnusableError(f"{storage.public_uri(path)} is damaged ({error}): choose another --out") from error
    return TrainingVideos(
        train=items.filter(pc.invert(aside)), held_out=items.filter(aside), rejections=[], num_videos=num_videos
    )


_IS_HELD_OUT, _NUM_VIDEOS = "is_held_out", b"num_videos"


def open_training_videos(
    paths: Sequence[str],
    *,
    spec: ClipSpec,
    held_out: float,
    num_tasks: int,
    limits: Limits | None = None,
    before: TrainingVideos | None = None,
    on_video: Callable[[int, int], None] | None = None,
) -> TrainingVideos:
    """Find and open the videos of corpora, and set some aside.

    Args:
        paths: one for each corpus; a video that is in two belongs to the first.
        spec: how clips are made of them, with ``clips_per_video``.
        held_out: share of the videos, in [0, 1); unless it is 0 one at least. Their ids alone choose them.
        num_tasks: that opening them is spread over.
        before: those of the stage that this one goes on from. What it held out stays held out, and nothing that it
            trained on is held out, if there is anything else.
        on_video: called with how many are done and how many there are, of one corpus after the other.

    Raises:
        InputError, StorageError: as ``discover``.
        UnusableError: no video is left to train on, in all corpora or in one; or URLs carry credentials.
    """
    assert spec.clips_per_video is not None
    limits = limits or Limits()
    rejections: list[Rejection] = []
    videos: dict[tuple[str, float | None, float | None], dict[str, Any]] = {}
    for corpus, path in enumerate(paths):
        num_rejections = len(rejections)
        found = discover([path])
        for done, row in enumerate(_opened(found, spec, limits, num_tasks), start=1):
            if on_video is not None:
                on_video(done, found.videos.num_rows)
            if row["rejection"] is not None:
                rejections.append(row_rejection(row["rejection"]))
                continue
            seconds = Fraction(row["duration_seconds_from_header"])
            if 0 < seconds < (spec.num_frames - 1) / spec.fps:
                detail = f"{float(seconds):.3g} s, and a clip of {spec.num_frames} frames takes {_seconds(spec)}"
                rejections.append(_rejection(row, VideoError(Reason.TOO_SHORT, detail), Stage.PROBE))
                continue
            key = (row["video_id"], row["part_start_seconds"], row["part_end_seconds"])
            videos.setdefault(key, row | {"corpus": corpus})
        if not any(video["corpus"] == corpus for video in videos.values()):
            raise UnusableError(_nothing_left(path, rejections[num_rejections:], 0))
    ids = sorted({video_id for video_id, _, _ in videos}, key=lambda video_id: _hash("held out", video_id))
    aside = _held_out_of(ids, max(1, round(held_out * len(ids))), before) if held_out else set()
    for corpus, path in enumerate(paths):
        own = {video_id for (video_id, _, _), row in videos.items() if row["corpus"] == corpus}
        if own <= aside:
            raise UnusableError(_nothing_left(path, rejections, len(own)))
    ordered = [videos[key] for key in sorted(videos, key=str)]  # not as they came out of the cluster
    train = [
        row | {"number": n} for row in ordered if row["video_id"] not in aside for n in range(row["expected_clips"])
    ]
    apart = [row | {"number": 0} for row in ordered if row["video_id"] in aside]
    return TrainingVideos(
        train=pa.Table.from_pylist(train, schema=ITEM_SCHEMA),
        held_out=pa.Table.from_pylist(apart, schema=ITEM_SCHEMA),
        rejections=rejections,
        num_videos=len(ids),
    )


def _opened(found: Discovery, spec: ClipSpec, limits: Limits, num_tasks: int) -> Iterator[dict[str, Any]]:
    videos, _ = with_entries(found.videos, Part())
    secret = [uri for uri in videos["uri"].to_pylist() if uri != storage.public_uri(uri)]
    if secret:
        raise UnusableError(
            f"{storage.public_uri(secret[0])}: the URL carries credentials, which no record of a training may hold; "
            "put them into the environment"
        )
    every_clip = 1 << 30
    for table in open_videos(videos, [spec], part=Part(), span_clips=every_clip, num_tasks=num_tasks, limits=limits):
        yield from table.to_pylist()


def _seconds(spec: ClipSpec) -> str:
    return f"{float((spec.num_frames - 1) / spec.fps):.3g} s at {spec.fps} frames per second"


def _held_out_of(ids: Sequence[str], count: int, before: TrainingVideos | None) -> set[str]:
    """The first of some videos, but for what the stage before trained on or held out."""
    if before is None:
        return set(ids[:count])
    measured = set(before.held_out["video_id"].to_pylist()).intersection(ids)
    trained = set(before.train["video_id"].to_pylist())
    fresh = [video_id for video_id in ids if video_id not in measured and video_id not in trained]
    return measured | set(fresh[: max(0, count - len(measured))]) or set(ids[:1])


def _hash(*parts: object) -> str:
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()


def _rejection(row: dict[str, Any], error: VideoError, stage: Stage) -> Rejection:
    return Rejection(
        uri=row["uri"],
        video_id=row["video_id"],
        span_id=None,
        start_seconds=None,
        stage=stage,
        reason=error.reason,
        detail=error.detail,
    )


def _nothing_left(path: str, rejections: Sequence[Rejection], num_usable: int) -> str:
    where = storage.public_uri(path)
    if num_usable:
        return f"{num_usable} usable video in {where}, which is held out: give more videos, or set --held-out 0"
    if not rejections:
        return f"no usable video in {where} that is not in another corpus before it: leave it out"
    counts: dict[str, int] = {}
    for rejection in rejections:
        counts[str(rejection.reason)] = counts.get(str(rejection.reason), 0) + 1
    reasons = ", ".join(f"{count} x {reason}" for reason, count in sorted(counts.items()))
    first = f"; the first: {rejections[0].uri}: {rejections[0].detail}" if rejections else ""
    hint = ". Fewer --frames or a higher --fps make clips shorter" if Reason.TOO_SHORT in counts else ""
    return f"no usable video in {where}: {reasons}{first}{hint}"


# In which order they are drawn.


@dataclass(frozen=True, kw_only=True)
class ClipSampler:
    """The endless sequence of draws: which item clip ``n`` of a training shows.

    An epoch has as many draws as there are items. Without weights it is a permutation of them. With weights each corpus
    has its share, to a clip, of all epochs up to any of them, and goes through all of its own items, shuffled anew each
    round, before it repeats one.
    """

    items: pa.Table
    """``ITEM_SCHEMA``."""
    weights: tuple[float, ...] | None
    """Of the corpora; None for every item as often as any other."""
    seed: int

    @property
    def epoch_length(self) -> int:
        """Draws of an epoch."""
        return int(self.items.num_rows)

    @cached_property
    def _of_corpus(self) -> list[npt.NDArray[np.int64]]:
        """Items of each corpus that has any."""
        corpora = self.items["corpus"].to_numpy()
        return [np.flatnonzero(corpora == corpus) for corpus in np.unique(corpora)]

    def _drawn_before(self, epoch: int) -> list[int]:
        """Draws of each of these in all epochs before one."""
        if self.weights is None:
            return [epoch * len(items) for items in self._of_corpus]
        present = np.unique(self.items["corpus"].to_numpy())
        return _apportioned([self.weights[corpus] for corpus in present], epoch * self.epoch_length)

    def epoch(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The draws of an epoch in order: items, and for each the round in which its corpus is; int64 (L,) both."""
        items, rounds = [], []
        bounds = zip(self._of_corpus, self._drawn_before(number), self._drawn_before(number + 1), strict=True)
        for corpus, (own, begin, end) in enumerate(bounds):
            at = np.arange(begin, end)
            for turn in np.unique(at // len(own)):
                order = self._random("round", corpus, int(turn)).permutation(own)
                items.append(order[at[at // len(own) == turn] % len(own)])
            rounds.append(at // len(own))
        order = self._random("epoch", number).permutation(self.epoch_length)
        return np.concatenate(items)[order], np.concatenate(rounds)[order]

    def rows(self, samples: Sequence[int]) -> pa.Table:
        """For each sample the item that is drawn and those that stand in for it, with the seed of their places.

        Returns:
            ``sample``, and ``candidates``: lists of ``ITEM_SCHEMA`` as structs with ``placement_seed``.
        """
        drawn, rounds, offsets = [], [], [0]
        for sample in samples:
            epoch, at = divmod(sample, self.epoch_length)
            items, turns = self._epoch_kept(epoch)
            same = self._of_corpus[self._corpus_of[items[at]]]
            spare = self._random("spare", sample).choice(len(same), min(len(same), SUBSTITUTES + 1), replace=False)
            candidates = [items[at], *(item for item in same[spare] if item != items[at])][: SUBSTITUTES + 1]
            drawn += candidates
            rounds += [turns[at]] * len(candidates)
            offsets.append(len(drawn))
        chosen = self.items.take(pa.array(drawn, pa.int64())).combine_chunks()
        chosen = chosen.append_column(
            "placement_seed", pa.array([self._location_keys(int(r)) for r in rounds], pa.int64())
        )
        structs = pa.StructArray.from_arrays(
            [column.combine_chunks() for column in chosen.itercolumns()], fields=list(chosen.schema)
        )
        lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), structs)
        return pa.table({"sample": pa.array(samples, pa.int64()), "candidates": lists})

    @cached_property
    def _corpus_of(self) -> npt.NDArray[np.int64]:
        """Of each item, the number of its corpus among those that have any."""
        number = np.empty(self.epoch_length, np.int64)
        for corpus, items in enumerate(self._of_corpus):
            number[items] = corpus
        return number

    @cached_property
    def _kept(self) -> dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        return {}

    def _epoch_kept(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        if number not in self._kept:
            while len(self._kept) > 1:
                self._kept.pop(next(iter(self._kept)))
            self._kept[number] = self.epoch(number)
        return self._kept[number]

    def _location_keys(self, turn: int) -> int:
        return int(_hash(self.seed, "places", turn)[:15], 16)

    def _random(self, *what: object) -> np.random.Generator:
        return np.random.default_rng(int(_hash(self.seed, *what)[:16], 16))


def _apportioned(weights: Sequence[float], total: int) -> list[int]:
    """Whole shares of a total by weight, none of which falls when the total grows.

    Sainte-Laguë's method: shares are rounded quotients by a common divisor (Balinski and Young, "Fair Representation",
    1982; of methods that never let a share fall it is the one without bias).
    """
    whole = sum(weights)
    shares = [round(weight / whole * total) for weight in weights]
    numbers = range(len(weights))
    while (missing := total - sum(shares)) != 0:
        if missing > 0:
            shares[max(numbers, key=lambda n: (weights[n] / (2 * shares[n] + 1), -n))] += 1
        else:
            with_some = [n for n in numbers if shares[n]]
            shares[min(with_some, key=lambda n: (weights[n] / (2 * shares[n] - 1), -n))] -= 1
    return shares


# From draws to clips.


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipReader:
    """Draws to clips: a row of candidates in, the clip of the first that can be had out."""

    spec: ClipSpec
    limits: Limits
    required: bool = True
    """Whether a row without a clip is an error; else its frames are null."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Read or decode.

        Raises:
            UnusableError: all candidates of a row are broken.
        """
        return pa.Table.from_pylist([self._row(row) for row in rows.to_pylist()], schema=CLIP_SCHEMA)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        rejected = []
        found: dict[str, Any] = {"video_id": None, "uri": None, "frames": None}
        for item in row["candidates"]:
            try:
                frames = self.frames_of(item)
            except VideoError as error:
                about = {name: item[name] for name in ("uri", "video_id")}
                rejected.append(about | {"reason": str(error.reason), "detail": error.detail})
                continue
            found = {"video_id": item["video_id"], "uri": item["uri"], "frames": frames}
            break
        else:
            if self.required:
                reasons = "; ".join(sorted({f"{r['uri']}: {r['reason']}" for r in rejected}))
                raise UnusableError(
                    f"none of {len(rejected)} places drawn one after the other can be decoded: {reasons}. Take these "
                    "videos away, or put back what they were, and go on"
                )
        return {"sample": row["sample"], "rejected": rejected, **found}

    def frames_of(self, item: dict[str, Any]) -> bytes:
        """uint8 (T, H, W, 3) of an item with its ``placement_seed``.

        Raises:
            VideoError: it cannot be had.
        """
        if item["shard"] is not None:
            return _cached_frames(item["shard"], item["shard_row"])
        spec = self.spec_of(item["placement_seed"])
        span = row_span(item | {"first_clip": 0, "end_clip": None})
        places = ClipTimeline.of(span, span.part, spec).placed
        assert places  # one at least, be the video ever so short
        span = row_span(item | {"first_clip": item["number"] % len(places), "end_clip": None})
        try:
            clip = decode_clip(span, spec, limits=self.limits, fingerprint=item["fingerprint"])
        except VideoError as error:
            if error.reason is not Reason.CHANGED or not self._is_the_same(item["uri"], item["video_id"]):
                raise
            clip = decode_clip(span, spec, limits=self.limits)
        frames: bytes = clip.frames.tobytes()
        return frames

    def _is_the_same(self, uri: str, video_id: str) -> bool:
        """Whether a file that has another time stamp than when it was opened has the content that it had."""
        return _content_of(uri, storage.fingerprint(uri), self.limits) == video_id

    def spec_of(self, placement_seed: int) -> ClipSpec:
        """The spec with the places of a round."""
        return replace(self.spec, placement_seed=placement_seed)


@lru_cache(maxsize=4096)
def _content_of(uri: str, _fingerprint: str | None, limits: Limits) -> str | None:
    """The video's id; None where it cannot be opened."""
    found = probe(VideoRef(uri=uri, num_bytes=-1), limits)
    return None if isinstance(found, VideoError) else found.video_id


@lru_cache(maxsize=16)
def _open_shard(path: str) -> pq.ParquetFile:
    return pq.ParquetFile(path if storage.is_local(path) else io.BytesIO(storage.read_bytes(path)))


def _cached_frames(path: str, row: int) -> bytes:
    try:
        frames: bytes = _open_shard(path).read_row_group(row, columns=["frames"])["frames"][0].as_py()
    except (pa.ArrowException, OSError, IndexError, storage.StorageError) as error:
        raise UnusableError(
            f"the cache's {storage.public_uri(path)} is gone or damaged ({error}): delete it and go on, and it is made "
            "anew"
        ) from error
    return frames


class _IdleThrottle:
    """Lets Ray Data's scheduler pause after a step in which nothing happened.

    It waits for tasks to give something. Where enough clips lie ready, tasks have something that it does not take, or
    none runs; then it goes round without a pause, and takes a core from the training that it works for. One of Ray
    Data's execution callbacks.
    """

    PAUSE_SECONDS = 0.05

    def __init__(self) -> None:
        self._before: list[Any] = []

    def on_execution_step(self, executor: Any) -> None:
        try:
            metrics = [operator.metrics for operator in executor._topology]
            now = [(m.num_tasks_submitted, m.num_task_outputs_generated, m.num_outputs_taken) for m in metrics]
        except (AttributeError, TypeError):
            return  # a Ray that keeps these figures elsewhere: as if this were not here
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
    draws: ray.ObjectRef[ClipSampler], reader: ClipReader, start: int, stop: int, *, rows_per_block: int
) -> Dataset:
    """Clips ``start`` to ``stop``, exclusive, of the sequence as a lazy dataset of ``CLIP_SCHEMA``, in order.

    Blocks hold exactly ``rows_per_block`` rows: handed out in turns they give n workers the first n blocks, then the
    next n, so that their batches together are the sequence without gap or repetition. Needs ``preserve_order``.

    Args:
        draws: in the object store, as every task looks at them.
    """

    context = DataContext.get_current()  # of whichever process this is; datasets take a copy along
    context.memory_usage_poll_interval_s = None  # walks the page tables of every worker each second, for a statistic
    if _IdleThrottle not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(_IdleThrottle)

    def drawn(blocks: pa.Table) -> pa.Table:
        known: ClipSampler = ray.get(draws)
        begins = blocks["begin"].to_pylist()
        return known.rows(range(begins[0], min(begins[-1] + rows_per_block, stop)))

    begins = range(start, stop, rows_per_block)
    tasks = [begins[first : first + _BLOCKS_PER_TASK] for first in range(0, len(begins), _BLOCKS_PER_TASK)]
    return (
        # Ray makes one task of all this for each table, and hands out its blocks as they come. A task for each block
        # would cost more than reading its clips. Tables, as Ray takes no `ray.data.range` into the tasks: it runs all
        # of that before the first clip, 68 s for 17,000 blocks.
        ray.data.from_arrow([pa.table({"begin": list(task)}) for task in tasks])
        .map_batches(drawn, batch_format="pyarrow", batch_size=None)
        .map_batches(reader, batch_format="pyarrow", batch_size=rows_per_block, num_cpus=1)
        .repartition(target_num_rows_per_block=rows_per_block)
    )


def rows_per_block(clips: int, spec: ClipSpec) -> int:
    """The most clips of a block that divide a worker's part of a batch and keep it small."""
    most = max(1, _BLOCK_BYTES // spec.clip_bytes)
    return max(rows for rows in range(1, clips + 1) if clips % rows == 0 and rows <= most)


@dataclass(kw_only=True, eq=False)
class Batch:
    """What one worker gets for one step."""

    samples: list[int]
    """Their places in the sequence."""
    frames: npt.NDArray[np.uint8]
    """(B, T, H, W, 3)."""
    rejected: list[dict[str, Any]]
    """Videos that were passed over."""
    wait_seconds: float
    """What the worker waited for it."""


def batches(
    tables: Iterator[pa.Table], spec: ClipSpec, *, first: int, clock: Callable[[], float] = time.perf_counter
) -> Iterator[Batch]:
    """A worker's batches out of its part of ``training_clips``, from a place in the sequence on.

    Args:
        first: clips before this one are dropped: those of a checkpoint that turned out to be older than another.
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
            wait_seconds=waited,
        )


# Clips that are kept.


def decode_held_out(items: pa.Table, spec: ClipSpec, limits: Limits) -> tuple[pa.Table, list[Rejection]]:
    """The clips in the middle of held-out videos: ``CLIP_SCHEMA``, and what could not be decoded."""
    if not items.num_rows:
        return CLIP_SCHEMA.empty_table(), []
    items = items.append_column("placement_seed", pa.array([0] * items.num_rows, pa.int64()))
    numbered = pa.table(
        {
            "sample": pa.array(range(items.num_rows), pa.int64()),
            "candidates": pa.array([[row] for row in items.to_pylist()], pa.list_(pa.struct(list(items.schema)))),
        }
    )
    reader = ClipReader(spec=spec, limits=limits, required=False)
    dataset = ray.data.from_arrow([numbered.slice(at, 1) for at in range(numbered.num_rows)]).map_batches(
        reader, batch_format="pyarrow", batch_size=None, num_cpus=1
    )
    tables = list(dataset.iter_batches(batch_format="pyarrow", batch_size=None))
    table = pa.concat_tables(tables).sort_by("sample")
    return table.filter(pc.is_valid(table["frames"])), _rejections_of(table)


def _rejections_of(table: pa.Table) -> list[Rejection]:
    return [
        _rejection(entry, VideoError(Reason(entry["reason"]), entry["detail"]), Stage.DECODE)
        for row in table["rejected"].to_pylist()
        for entry in row
    ]


CACHE = "cache.json"
_CACHE_FORMAT = 1


def fill_cache(
    folder: str, items: pa.Table, spec: ClipSpec, limits: Limits, seed: int, on_clips: Callable[[int], None]
) -> tuple[pa.Table, list[Rejection]]:
    """Decode every item once, and keep the clips; what a run before this one kept is not decoded again.

    Args:
        on_clips: called with the number of clips as they are finished.

    Returns:
        The items that have a clip, with its place, and what could not be decoded.

    Raises:
        UnusableError: the folder holds clips of other videos or settings, or nothing could be decoded.
        StorageError: it cannot be reached.
    """
    folder = storage.absolute(folder)
    digest = hashlib.sha256(
        "\n".join(
            " ".join(str(value) for value in row.values() if value is not None)
            for row in items.select(["video_id", "number", "part_start_seconds", "part_end_seconds"]).to_pylist()
        ).encode()
    )
    identity = {"format": _CACHE_FORMAT, "clips": spec.digest(), "seed": seed, "items": digest.hexdigest()}
    record = storage.join(folder, CACHE)
    storage.check_writable(folder)
    there: Any = identity
    if storage.exists(record):
        try:
            there = json.loads(storage.read_bytes(record))
        except ValueError:
            there = None
    if there != identity:
        known = there if isinstance(there, dict) else {}
        differing = ", ".join(name for name in identity if known.get(name) != identity[name])
        raise UnusableError(
            f"--cache {storage.public_uri(folder)} holds clips of other videos or settings ({differing} differ): "
            "choose another folder, or delete it"
        )
    storage.write_atomic(record, json.dumps(identity).encode())
    size = max(1, 2 * _BLOCK_BYTES // spec.clip_bytes)
    writer = _CacheWriter(folder=folder, reader=ClipReader(spec=spec, limits=limits, required=False), seed=seed)
    numbered = items.append_column("item", pa.array(range(items.num_rows), pa.int64()))
    parts = [numbered.slice(at, size).combine_chunks() for at in range(0, items.num_rows, size)]
    dataset = ray.data.from_arrow(parts).map_batches(writer, batch_format="pyarrow", batch_size=None, num_cpus=1)
    tables = []
    for table in dataset.iter_batches(batch_format="pyarrow", batch_size=None):
        tables.append(table)
        on_clips(sum(part.num_rows for part in tables))
    places = pa.concat_tables(tables).sort_by("item")
    at = items.schema.get_field_index("shard")
    filled = items.set_column(at, ITEM_SCHEMA.field("shard"), places["shard"])
    filled = filled.set_column(at + 1, ITEM_SCHEMA.field("shard_row"), places["shard_row"])
    filled = filled.filter(pc.is_valid(places["shard_row"]))
    rejections = _rejections_of(places)
    if not filled.num_rows:
        raise UnusableError(_nothing_left(folder, rejections, 0))
    return filled, rejections


@dataclass(frozen=True, kw_only=True, slots=True)
class _CacheWriter:
    """Items in; a shard of their clips on the storage, whole, and where each clip is out."""

    folder: str
    reader: ClipReader
    seed: int

    def __call__(self, items: pa.Table) -> pa.Table:
        rows = items.to_pylist()
        path = storage.join(self.folder, f"clips-{rows[0]['item']:08d}.parquet")
        known = self._known(path) if storage.exists(path) else None
        if known is None or known["item"].to_pylist() != [row["item"] for row in rows]:
            self._write(path, rows)
            known = self._known(path)
            assert known is not None
        shard_rows = [row if kept else None for row, kept in enumerate(known["kept"].to_pylist())]
        return pa.table(
            {
                "item": known["item"],
                "shard": pa.array([path] * len(rows), pa.string()),
                "shard_row": pa.array(shard_rows, pa.int32()),
                "rejected": known["rejected"].cast(REJECTED_TYPE),
            }
        )

    def _known(self, path: str) -> pa.Table | None:
        """What a shard holds but for the frames; None of a damaged one."""
        try:
            with storage.open_binary(path) as file:
                return pq.ParquetFile(file).read(columns=["item", "kept", "rejected"])
        except (pa.ArrowException, OSError):
            return None

    def _write(self, path: str, rows: list[dict[str, Any]]) -> None:
        schema = CLIP_SCHEMA.append(pa.field("item", pa.int64())).append(pa.field("kept", pa.bool_()))
        buffer = io.BytesIO()
        place = int(_hash(self.seed, "places", 0)[:15], 16)
        # a row group for each clip, so that one is read without the others; noise hardly compresses
        with pq.ParquetWriter(buffer, schema, compression="lz4") as file:
            for row in rows:
                table = self.reader(
                    pa.Table.from_pylist([{"sample": row["item"], "candidates": [row | {"placement_seed": place}]}])
                )
                kept = table["frames"].null_count == 0
                table = table.append_column("item", pa.array([row["item"]], pa.int64()))
                file.write_table(table.append_column("kept", pa.array([kept])).cast(schema))
        storage.write_atomic(path, buffer.getvalue())
