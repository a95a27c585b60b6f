"""LeRobot folder with latents, as the post-training of LingBot-VA reads it (LeRobot v2.1, latents in .pth files).

A sequence of consecutive clips of one video is an episode, at the frame rate of the clips. Each clip is a segment of
it, ``[start_frame, end_frame)``, with one file of latents; a sequence of ``--continuous`` is one segment. Latents are
stored in bfloat16, as the trainer takes them, so they are rounded from float16. Clips of a LeRobot dataset may be
written into that dataset instead (``lerobot_dataset``).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vidshard.jobs.export.fastvideo import TEXT_WIDTH
from vidshard.jobs.export.layout import (
    Clips,
    Field,
    Refusal,
    Source,
    Written,
    matrix_values,
    padded,
    signal_values,
    without,
)
from vidshard.jobs.export.lerobot_dataset import DatasetLatents
from vidshard.pipeline import storage
from vidshard.schemas.errors import UserError

CAMERA = "observation.images.main"
"""Key of the only camera."""
_CHUNK = 1000
"""Episodes of a folder ``chunk-000``."""
_TIME_STRIDE = 4
"""Frames of a latent that the loader counts on when it groups actions."""


class LeRobotLatents:
    """Layout of a LeRobot v2.1 folder with ``latents/``; see `Layout`."""

    name = "lerobot-latents"
    meaning = "a LeRobot v2.1 folder with .pth files of latents, for the post-training of LingBot-VA"
    fields: Sequence[Field] = (
        Field(name="action", kind="signal", meaning="action at each frame", is_required=True),
        Field(name="observation.state", kind="signal", meaning="state at each frame"),
        Field(name="text", kind="text", meaning="description of the clip"),
        Field(name="text_emb", kind="matrix", meaning="embedding of the description, (tokens, width)"),
    )
    whole_runs = True

    def __init__(self) -> None:
        """Know no description yet."""
        self._tasks: dict[str, int] | None = None
        self._dataset: DatasetLatents | None = None

    @property
    def adds_to_dataset(self) -> bool:
        """Whether the destination is the dataset of the clips, which gets files beside its own."""
        return self._dataset is not None

    def check(self, source: Source) -> list[str]:
        """Check that clips are latents whose number the loader computes from the number of frames."""
        latents = source.only(self.name, "latents")
        source.refuse_several_shapes(self.name)
        if source.fps.denominator != 1:
            raise UserError(
                f"--to lerobot-latents has whole frames per second, and these clips have {source.fps}: tokenize with "
                f"--fps {max(1, round(source.fps))}"
            )
        if (
            not source.is_causal
            or source.time_stride != _TIME_STRIDE
            or len(latents.shape) != 4
            or latents.shape[1] < 2
        ):
            raise UserError(
                f"--to lerobot-latents holds two or more latents of a causal tokenizer with {_TIME_STRIDE} frames per "
                f"latent, as its loader counts actions so; {source.tokenizer} has {source.time_stride} frames per "
                f"latent and {list(latents.shape)} values per clip"
            )
        if DatasetLatents.is_at(source):
            self._dataset = DatasetLatents(source)
        return [column.name for column in source.payload if column.is_logvar]

    def write(self, source: Source, clips: Clips, before: Sequence[Written], /) -> Written:
        """Write the files of whole episodes; `finish` makes the folder a dataset."""
        if self._dataset is not None:
            return _written_beside(self._dataset, source, clips)
        written = Written()
        rows = clips.table.to_pylist()
        refused: dict[int, Refusal] = {}
        signals: dict[int, dict[str, np.ndarray]] = {}
        widths: dict[str, int] = dict(next((batch.facts["widths"] for batch in before if batch.num_clips), {}))
        tasks = self._tasks_of(source, before)
        is_padded = padded(clips)
        for at, values in enumerate(rows):
            found = Refusal.PADDED if is_padded[at] else _signals(source, values, self.fields, widths)
            if isinstance(found, Refusal):
                refused[at] = found
            else:
                signals[at] = found
        starts_inside = _starts_inside(source, clips, rows, refused)
        refused |= dict.fromkeys(starts_inside, Refusal.STARTS_INSIDE)
        written.refused.update(refused.values())
        kept = [at for at in range(len(clips)) if at not in refused]
        chosen = without(clips, list(refused))
        first = sum(batch.facts["episodes"] for batch in before)
        first_frame = sum(batch.facts["frames"] for batch in before)
        episodes: list[dict[str, Any]] = []
        for run in range(int(chosen.runs.max(initial=-1)) + 1):
            members = [kept[at] for at in np.flatnonzero(chosen.runs == run)]
            number = first + run
            episode = _Episode(source, clips, rows, signals, members)
            for start, end, content in episode.segments():
                path = f"latents/{_chunk(number)}/{CAMERA}/episode_{number:06d}_{start}_{end}.pth"
                written.put(source, path, _saved(content))
            frames = first_frame + sum(e["length"] for e in episodes)
            for text in episode.texts:
                tasks.setdefault(text, len(tasks))
            data = episode.data(number, frames, tasks)
            written.put(source, f"data/{_chunk(number)}/episode_{number:06d}.parquet", data)
            episodes.append(episode.record(number))
        written.num_clips = len(kept)
        lines = "".join(json.dumps(episode) + "\n" for episode in episodes)
        path = f"meta/batches/{clips.number:06d}.jsonl"
        written.put(source, path, lines.encode())
        written.facts = {
            "episodes": len(episodes),
            "frames": sum(episode["length"] for episode in episodes),
            "widths": widths if kept else {},
            "records": path,
        }
        return written

    def finish(self, source: Source, batches: Sequence[Written], /) -> dict[str, int]:
        """Write ``meta/``; info.json, by which a folder is found, comes last."""
        if self._dataset is not None:
            return self._dataset.finish(batches)
        written = Written()
        episodes: list[str] = []
        stats: list[str] = []
        for batch in batches:
            for line in storage.read_bytes(storage.join(source.dest, batch.facts["records"])).decode().splitlines():
                record = json.loads(line)
                stats.append(json.dumps({"episode_index": record["episode_index"], "stats": record.pop("stats")}))
                episodes.append(json.dumps(record))
        found = self._tasks_of(source, batches)
        tasks = [json.dumps({"task_index": at, "task": text}) for text, at in found.items()]
        for name, lines in (("episodes", episodes), ("episodes_stats", stats), ("tasks", tasks)):
            written.put(source, f"meta/{name}.jsonl", "".join(f"{line}\n" for line in lines).encode())
        info = _info(source, batches, len(tasks))
        written.put(source, "meta/info.json", json.dumps(info, indent=2).encode())
        return written.files

    def _tasks_of(self, source: Source, before: Sequence[Written]) -> dict[str, int]:
        """Number of each description, in the order of the episodes."""
        if self._tasks is None:
            self._tasks = {}
            for batch in before:
                for line in storage.read_bytes(storage.join(source.dest, batch.facts["records"])).decode().splitlines():
                    for text in json.loads(line)["tasks"]:
                        self._tasks.setdefault(text, len(self._tasks))
        return self._tasks


class _Episode:
    """Consecutive clips of one video, and what they become."""

    def __init__(
        self,
        source: Source,
        clips: Clips,
        rows: Sequence[Mapping[str, Any]],
        signals: Mapping[int, Mapping[str, np.ndarray]],
        members: Sequence[int],
    ) -> None:
        self._source, self._clips = source, clips
        self._rows = [rows[at] for at in members]
        self._latents = [clips.payload["latents"][at] for at in members]
        self._signals = {
            name: np.concatenate([signals[at][name] for at in members]) for name in next(iter(signals.values()), {})
        }
        self._lengths = [len(row["frame_pts_seconds"]) for row in self._rows]
        self._ends = np.cumsum(self._lengths).tolist()
        texts = [self._text(row) for row in self._rows]
        self.texts = texts[:1] * len(texts) if source.is_continuous else texts
        """Description of each clip; that of the first one in a sequence, which is one segment."""

    def segments(self) -> list[tuple[int, int, dict[str, Any]]]:
        """(first frame, frame after the last, content of the file) of each segment."""
        latents = [np.concatenate(self._latents, axis=1)] if self._source.is_continuous else self._latents
        found = zip(self._bounds(), self._rows, latents, strict=False)
        return [(start, end, self._content(row, values, start, end)) for (start, end), row, values in found]

    def _bounds(self) -> list[tuple[int, int]]:
        if self._source.is_continuous:
            return [(0, self._ends[-1])]
        return list(zip([0, *self._ends[:-1]], self._ends, strict=True))

    def _content(self, row: Mapping[str, Any], latents_CTHW: np.ndarray, start: int, end: int) -> dict[str, Any]:
        ids, fps = list(range(start, end)), int(self._source.fps)
        return _segment_content(self._source, row, latents_CTHW, text=self._text(row), ids=ids, end=end, ori_fps=fps)

    def _text(self, row: Mapping[str, Any]) -> str:
        column = self._source.columns.get("text")
        return "" if column is None else str(row[column])

    def record(self, number: int) -> dict[str, Any]:
        """Line of episodes.jsonl, with ``stats`` for episodes_stats.jsonl."""
        return {
            "episode_index": number,
            "tasks": list(dict.fromkeys(self.texts)),
            "length": self._ends[-1],
            "action_config": [
                {"start_frame": start, "end_frame": end, "action_text": text}
                for (start, end), text in zip(self._bounds(), self.texts, strict=False)
            ],
            "clip_ids": [row["clip_id"] for row in self._rows],
            "video_id": self._rows[0]["video_id"],
            "stats": {name: _stats(values) for name, values in self._signals.items()},
        }

    def data(self, number: int, first_frame: int, tasks: Mapping[str, int]) -> memoryview:
        """Parquet file of the frames; ``first_frame`` counts the frames of the episodes before."""
        length = self._ends[-1]
        frames = np.arange(length)
        columns: dict[str, Any] = {
            name: pa.array(list(values), pa.list_(pa.float32())) for name, values in self._signals.items()
        }
        columns |= {
            "timestamp": pa.array(frames / int(self._source.fps), pa.float32()),
            "frame_index": pa.array(frames, pa.int64()),
            "episode_index": pa.array(np.full(length, number), pa.int64()),
            "index": pa.array(first_frame + frames, pa.int64()),
            "task_index": pa.array(np.repeat([tasks[text] for text in self.texts], self._lengths), pa.int64()),
        }
        out = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), out, compression="zstd", write_page_checksum=True)
        return memoryview(out.getvalue())


def _written_beside(dataset: DatasetLatents, source: Source, clips: Clips) -> Written:
    """Write the segments of a batch into the dataset that its clips are of."""
    written = Written()
    segments, refused = dataset.segments(clips, source.columns.get("text"))
    for segment in segments:
        latents = np.concatenate([clips.payload["latents"][at] for at in segment.at], axis=1)
        content = _segment_content(
            source,
            segment.rows[0],
            latents,
            text=segment.text,
            ids=segment.frame_ids,
            end=segment.end_frame,
            ori_fps=dataset.fps,
        )
        written.put(source, dataset.path_of(segment), _saved(content))
    dataset.record(written, clips.number, segments)
    written.num_clips = len(clips) - len(refused)
    written.refused.update(refused.values())
    return written


def _segment_content(
    source: Source,
    row: Mapping[str, Any],
    latents_CTHW: np.ndarray,
    *,
    text: str,
    ids: list[int],
    end: int,
    ori_fps: int,
) -> dict[str, Any]:
    """Content of the file of a segment.

    Args:
        source: of the clips.
        row: columns of its first clip.
        latents_CTHW: float16, its latents.
        text: its description.
        ids: numbers of its frames in the episode.
        end: number of the frame after the last.
        ori_fps: frames per second of the episode.
    """
    C, T, H, W = latents_CTHW.shape
    flat = torch.from_numpy(np.ascontiguousarray(latents_CTHW.transpose(1, 2, 3, 0), np.float32).reshape(-1, C))
    column = source.columns.get("text_emb")
    found = None if column is None else matrix_values(row[column])
    embedding = np.zeros((0, TEXT_WIDTH), np.float32) if found is None else found
    return {
        "latent": flat.to(torch.bfloat16),
        "latent_num_frames": T,
        "latent_height": H,
        "latent_width": W,
        "video_num_frames": len(ids),
        "video_height": _size(row)[0],
        "video_width": _size(row)[1],
        "text_emb": torch.from_numpy(embedding).to(torch.bfloat16),
        "text": text,
        "frame_ids": ids,
        "start_frame": ids[0],
        "end_frame": end,
        "fps": int(source.fps),
        "ori_fps": ori_fps,
    }


def _signals(
    source: Source, values: Mapping[str, Any], fields: Sequence[Field], widths: dict[str, int]
) -> dict[str, np.ndarray] | Refusal:
    """Signals of a clip by field, each float32 (frames, width); the first clip decides the widths."""
    found: dict[str, np.ndarray] = {}
    for field in fields:
        column = source.columns.get(field.name)
        if column is None:
            continue
        value = values[column]
        if value is None or (field.kind == "matrix" and matrix_values(value) is None):
            return Refusal.NO_VALUE
        if field.kind == "signal":
            array = signal_values(value, len(values["frame_pts_seconds"]), widths.get(field.name))
            if array is None:
                return Refusal.UNEVEN_SIGNAL
            found[field.name] = array
    for name, array in found.items():
        widths.setdefault(name, array.shape[1])
    return found


def _starts_inside(
    source: Source, clips: Clips, rows: Sequence[Mapping[str, Any]], refused: Mapping[int, Refusal]
) -> list[int]:
    """Clips of --continuous sequences whose start is missing: their latents do not begin with a single frame."""
    if not source.is_continuous:
        return []
    found: list[int] = []
    has_start = False
    for at, row in enumerate(rows):
        if at == 0 or clips.runs[at] != clips.runs[at - 1] or at - 1 in refused:
            has_start = False
        has_start = has_start or not row.get("continues_previous")
        if at not in refused and not has_start:
            found.append(at)
    return found


def _chunk(episode: int) -> str:
    return f"chunk-{episode // _CHUNK:03d}"


def _saved(content: Mapping[str, Any]) -> bytes:
    out = io.BytesIO()
    torch.save(dict(content), out)
    return out.getvalue()


def _size(row: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the frames that were encoded, in pixels."""
    height, width = (row.get("bucket") or "0x0").split("x")
    return int(height), int(width)


def _stats(values: np.ndarray) -> dict[str, Any]:
    """Statistics of a signal over the frames of an episode, by dimension."""
    found = {name: getattr(values, name)(axis=0).astype(float).tolist() for name in ("min", "max", "mean", "std")}
    return {**found, "count": [len(values)]}


def _info(source: Source, batches: Sequence[Written], num_tasks: int) -> dict[str, Any]:
    """Content of info.json."""
    episodes = sum(batch.facts["episodes"] for batch in batches)
    widths: dict[str, int] = next((batch.facts["widths"] for batch in batches if batch.num_clips), {})
    features: dict[str, Any] = {
        name: {"dtype": "float32", "shape": [width], "names": None} for name, width in widths.items()
    }
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for name in ("frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "int64", "shape": [1], "names": None}
    return {
        "codebase_version": "v2.1",
        "robot_type": None,
        "total_episodes": episodes,
        "total_frames": sum(batch.facts["frames"] for batch in batches),
        "total_tasks": num_tasks,
        "total_videos": 0,
        "total_chunks": -(-episodes // _CHUNK),
        "chunks_size": _CHUNK,
        "fps": int(source.fps),
        "splits": {"train": f"0:{episodes}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": None,
        "features": features,
        "vidshard": source.metadata,
    }
