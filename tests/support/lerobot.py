"""Makes small LeRobot datasets of the shape that its own recorder writes, in versions 2.1 and 3.0.

Row ``n`` of episode ``e`` has the action ``[e, n]``. Frames carry numbers: in the file of a camera they count from 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.videos import Pixels, Recipe, read_frame_number, write_video

TOP, WRIST = "observation.images.top", "observation.images.wrist"
TASKS = ("push the block", "open the drawer")

_TEMPLATES = {
    2: (
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    ),
    3: (
        "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Recipe of a dataset to make."""

    version: str = "v3.0"
    fps: int = 10
    lengths: Sequence[int] = (13, 7, 10)
    """Frames of each episode."""
    files: Mapping[str, Sequence[int]] = field(default_factory=lambda: {TOP: (0, 0, 1), WRIST: (0, 0, 0)})
    """Number of the video file of each episode, for each camera of version 3."""
    data_files: Sequence[int] = (0, 0, 1)
    lost: Mapping[tuple[str, int], Sequence[int]] = field(default_factory=dict)
    """Frames that the video of (camera, episode) lacks; the others keep their times."""
    width: int = 96
    height: int = 64


def make_dataset(root: Path, shape: Shape | None = None) -> Path:
    """Write a dataset; returns its folder."""
    shape = shape or Shape()
    major = int(shape.version[1])
    (root / "meta").mkdir(parents=True)
    data_path, video_path = _TEMPLATES[major]
    vectors = {"action": 2, "observation.state": 3}
    features: dict[str, Any] = {
        name: {"dtype": "float32", "shape": [width], "names": None} for name, width in vectors.items()
    }
    features["next.reward"] = {"dtype": "float32", "shape": [1], "names": None}
    features["next.done"] = {"dtype": "bool", "shape": [1], "names": None}
    for camera in shape.files:
        features[camera] = {"dtype": "video", "shape": [shape.height, shape.width, 3], "names": None}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for name in ("frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "int64", "shape": [1], "names": None}
    info = {
        "codebase_version": shape.version,
        "robot_type": "test",
        "total_episodes": len(shape.lengths),
        "total_frames": sum(shape.lengths),
        "total_tasks": len(TASKS),
        "chunks_size": 1000,
        "fps": shape.fps,
        "splits": {"train": f"0:{len(shape.lengths)}"},
        "data_path": data_path,
        "video_path": video_path,
        "features": features,
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    if major == 3:
        _write_v3(root, shape)
    else:
        _write_v2(root, shape)
    return root


def rows_of_episode(shape: Shape, episode: int) -> dict[str, Any]:
    """Columns of an episode's rows."""
    n = np.arange(shape.lengths[episode])
    first = sum(shape.lengths[:episode])
    return {
        "action": pa.array([[float(episode), float(at)] for at in n], pa.list_(pa.float32())),
        "observation.state": pa.array([[at / 2, -float(at), 100.0 + episode] for at in n], pa.list_(pa.float32(), 3)),
        "next.reward": pa.array(n / 8, pa.float32()),
        "next.done": pa.array(n == len(n) - 1),
        "timestamp": pa.array(n / shape.fps, pa.float32()),
        "frame_index": pa.array(n, pa.int64()),
        "episode_index": pa.array(np.full(len(n), episode), pa.int64()),
        "index": pa.array(first + n, pa.int64()),
        "task_index": pa.array(np.full(len(n), episode % 2), pa.int64()),
    }


def _write_v3(root: Path, shape: Shape) -> None:
    records: list[dict[str, Any]] = [
        {
            "episode_index": at,
            "tasks": [TASKS[at % 2]],
            "length": length,
            "data/chunk_index": 0,
            "data/file_index": shape.data_files[at],
            "dataset_from_index": sum(shape.lengths[:at]),
            "dataset_to_index": sum(shape.lengths[: at + 1]),
            "stats/action/min": [0.0, 0.0],
        }
        for at, length in enumerate(shape.lengths)
    ]
    for camera, files in shape.files.items():
        for number in sorted(set(files)):
            times: list[Fraction] = []
            start = Fraction(0)
            for episode in (at for at, file in enumerate(files) if file == number):
                lost = shape.lost.get((camera, episode), ())
                kept = [n for n in range(shape.lengths[episode]) if n not in lost]
                times += [start + Fraction(n, shape.fps) for n in kept]
                end = start + Fraction(shape.lengths[episode], shape.fps)
                records[episode] |= {
                    f"videos/{camera}/chunk_index": 0,
                    f"videos/{camera}/file_index": number,
                    f"videos/{camera}/from_timestamp": float(start),
                    f"videos/{camera}/to_timestamp": float(end),
                }
                start = end
            _write_video(root / f"videos/{camera}/chunk-000/file-{number:03d}.mp4", shape, times)
    for number in sorted(set(shape.data_files)):
        path = root / f"data/chunk-000/file-{number:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        tables = [pa.table(rows_of_episode(shape, at)) for at, file in enumerate(shape.data_files) if file == number]
        with pq.ParquetWriter(path, tables[0].schema) as writer:
            for table in tables:
                writer.write_table(table)
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(records), path)
    pq.write_table(pa.table({"task_index": [0, 1], "task": list(TASKS)}), root / "meta/tasks.parquet")


def _write_v2(root: Path, shape: Shape) -> None:
    lines = []
    for at, length in enumerate(shape.lengths):
        path = root / f"data/chunk-000/episode_{at:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(rows_of_episode(shape, at)), path)
        lines.append(json.dumps({"episode_index": at, "tasks": [TASKS[at % 2]], "length": length}))
        for camera in shape.files:
            lost = shape.lost.get((camera, at), ())
            times = [Fraction(n, shape.fps) for n in range(length) if n not in lost]
            _write_video(root / f"videos/chunk-000/{camera}/episode_{at:06d}.mp4", shape, times)
    (root / "meta/episodes.jsonl").write_text("".join(f"{line}\n" for line in lines))
    tasks = "".join(json.dumps({"task_index": at, "task": task}) + "\n" for at, task in enumerate(TASKS))
    (root / "meta/tasks.jsonl").write_text(tasks)


def _write_video(path: Path, shape: Shape, times: Sequence[Fraction]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    steady = all(time == Fraction(n, shape.fps) for n, time in enumerate(times))
    recipe = Recipe(
        num_frames=len(times),
        rate=Fraction(shape.fps),
        times=None if steady else times,
        width=shape.width,
        height=shape.height,
        gop=4,
    )
    write_video(path, recipe)


def frames_of(path: Path) -> list[tuple[float, int]]:
    """Times and numbers of a video's frames, by plain decoding."""
    with av.open(str(path)) as container:
        return [
            (float(frame.time or 0.0), read_frame_number(cast(Pixels, frame.to_ndarray(format="rgb24"))))
            for frame in container.decode(video=0)
        ]
