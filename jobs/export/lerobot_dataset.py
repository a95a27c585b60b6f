"""Latents written into the LeRobot dataset that they were made of, for the post-training of LingBot-VA.

Each clip becomes ``latents/chunk-000/<camera>/episode_000000_<start>_<end>.pth`` with the dataset's own episode index,
camera and frame numbers, so that the trainer takes actions from the dataset's rows. ``meta/episodes.jsonl`` gets an
``action_config`` that lists these segments; its other fields, and all other files, stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vidshard.jobs.export.layout import Clips, Refusal, Source, Written, padded
from vidshard.pipeline import storage
from vidshard.pipeline.inputs.lerobot import PREFIX, Dataset
from vidshard.schemas.errors import UserError
from vidshard.schemas.uris import shown_uri

COLUMNS = ("episode_index", "camera")
"""Columns of the rows of a dataset."""
_CHUNK = 1000
_RECORDS = "vidshard-export/segments"
_MAX_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Consecutive clips of one episode and camera that become one file."""

    rows: Sequence[Mapping[str, Any]]
    """Their columns."""
    at: Sequence[int]
    """Their positions among the clips of the batch."""
    frame_ids: list[int]
    """Numbers of their frames in the episode."""
    end_frame: int
    """Number of the frame after the last, as the dataset counts."""
    text: str


class DatasetLatents:
    """The dataset at the destination of an export."""

    def __init__(self, source: Source) -> None:
        """Read its metadata.

        Raises:
            UserError: it is of another version than the trainer reads, or its rate does not fit.
        """
        self._source = source
        dataset = Dataset.open(PREFIX + source.dest)
        if dataset.major != 2:
            raise UserError(
                f"{dataset.shown} is a LeRobot dataset of version 3, and LingBot-VA reads 2.1: export to another folder"
            )
        stride = dataset.fps / source.fps
        if stride.denominator != 1 or dataset.fps.denominator != 1:
            raise UserError(
                f"the clips have {source.fps} frames per second, and {dataset.shown} {dataset.fps}: tokenize with an "
                "--fps that divides the dataset's"
            )
        self.fps, self._stride = int(dataset.fps), int(stride)
        self._path = storage.join(source.dest, "meta/episodes.jsonl")
        data = storage.read_bytes(self._path, max_bytes=_MAX_BYTES)
        self._episodes = [json.loads(line) for line in data.decode().splitlines() if line.strip()]
        self._lengths = {episode["episode_index"]: episode["length"] for episode in self._episodes}

    @staticmethod
    def is_at(source: Source) -> bool:
        """Whether the clips are of a dataset, and one is at the destination."""
        known = set(source.schema.names)
        return known.issuperset(COLUMNS) and storage.exists(storage.join(source.dest, "meta/info.json"))

    def segments(self, clips: Clips, text: str | None) -> tuple[list[Segment], dict[int, Refusal]]:
        """The segments of a batch, and the clips that are refused, by position.

        Args:
            clips: of the batch.
            text: column of descriptions; None for the tasks.

        Raises:
            UserError: the destination is another dataset.
        """
        rows = clips.table.to_pylist()
        refused = {int(at): Refusal.PADDED for at, is_padded in enumerate(padded(clips)) if is_padded}
        refused |= {at: Refusal.NO_VALUE for at, row in enumerate(rows) if any(row[name] is None for name in COLUMNS)}
        groups: dict[int, list[int]] = {}
        for at in range(len(rows)):
            if at not in refused:
                groups.setdefault(int(clips.runs[at]) if self._source.is_continuous else at, []).append(at)
        found = []
        for members in groups.values():
            first = rows[members[0]]
            if self._source.is_continuous and first["continues_previous"]:
                refused |= dict.fromkeys(members, Refusal.STARTS_INSIDE)
                continue
            kept = [at for number, at in enumerate(members) if at - members[0] == number]  # up to the first gap
            refused |= dict.fromkeys(members[len(kept) :], Refusal.STARTS_INSIDE)
            found.append(self._segment([rows[at] for at in kept], kept, text))
        return found, refused

    def _segment(self, rows: list[dict[str, Any]], at: list[int], text: str | None) -> Segment:
        first = rows[0]
        episode = first["episode_index"]
        if episode not in self._lengths:
            raise UserError(
                f"{shown_uri(self._source.dest)} has no episode {episode}: export into the clips' own dataset"
            )
        inside = first["start_seconds"] - (first["part_start_seconds"] or 0.0)
        start = round(inside * self.fps)
        count = sum(len(row["frame_pts_seconds"]) for row in rows)
        ids = [start + self._stride * number for number in range(count)]
        name = text or ("task" if "task" in first else None)
        words = "" if name is None or first[name] is None else str(first[name])
        end = min(ids[-1] + self._stride, self._lengths[episode])
        return Segment(rows=rows, at=at, frame_ids=ids, end_frame=end, text=words)

    @staticmethod
    def path_of(segment: Segment) -> str:
        """Path of a segment's file below the dataset."""
        row = segment.rows[0]
        episode, camera = row["episode_index"], str(row["camera"])
        if "/" in camera or camera in ("", ".", ".."):
            raise UserError(f"the camera {camera!r:.80} cannot be the name of a folder")
        name = f"episode_{episode:06d}_{segment.frame_ids[0]}_{segment.end_frame}.pth"
        return f"latents/chunk-{episode // _CHUNK:03d}/{camera}/{name}"

    def record(self, written: Written, number: int, segments: Sequence[Segment]) -> None:
        """Store the segments of a batch, for :meth:`finish`."""
        path = f"{_RECORDS}/{number:06d}.json"
        found = [[s.rows[0]["episode_index"], s.frame_ids[0], s.end_frame, s.text] for s in segments]
        written.put(self._source, path, json.dumps(found).encode())
        written.facts = {"records": path}

    def finish(self, batches: Sequence[Written]) -> dict[str, int]:
        """List the segments of all batches in ``meta/episodes.jsonl``; cameras of an episode share them."""
        found: dict[int, dict[tuple[int, int], str]] = {}
        for batch in batches:
            path = storage.join(self._source.dest, batch.facts["records"])
            for episode, start, end, text in json.loads(storage.read_bytes(path)):
                found.setdefault(episode, {})[start, end] = text
        lines = []
        for episode in self._episodes:
            segments = sorted(found.get(episode["episode_index"], {}).items())
            names = ("start_frame", "end_frame", "action_text")
            config = [dict(zip(names, (start, end, text), strict=True)) for (start, end), text in segments]
            lines.append(json.dumps({**episode, "action_config": config} if config else episode) + "\n")
        written = Written()
        written.put(self._source, "meta/episodes.jsonl", "".join(lines).encode())
        return written.files
