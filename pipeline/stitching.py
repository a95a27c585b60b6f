"""Stitching: the clips of a video, in order, as one sequence of frames.

Clips that follow one another on the grid of their frame rate are joined; frames that overlapping clips share are taken
once. Where clips are missing a new piece begins, so no piece has a jump in it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from vidshard.models.vidtok.tiling import Tiling
from vidshard.pipeline.output.names import safe_name
from vidshard.pipeline.output.shard_reader import ShardError, StoredClip, open_shard, read_clips
from vidshard.pipeline.reconstruct import ClipDecoder, reconstruct_stream
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.video_file import write_video
from vidshard.schemas.errors import VidshardError, one_line
from vidshard.schemas.uris import shown_uri

_SEAM_FRAMES = 0.01
"""Frames by which a clip may miss the grid of the one before it: rounding of float64 seconds."""
_COLUMNS = (
    "clip_id", "video_id", "uri", "clip_index", "start_seconds", "fps", "num_valid_frames", "continues_previous",
    "part_start_seconds", "part_end_seconds", "bucket",
)  # fmt: skip


_Row = tuple[float, int, str, dict[str, Any]]
"""Start, clip index, path of the shard, and columns of a clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceClip:
    """Clip of a piece."""

    path: str
    """Path of its shard."""
    clip_id: str
    clip_index: int
    first: int
    """Number of its first frame that the clips before it do not have."""
    end: int
    """Number after its last real frame."""
    starts_inside: bool
    """Whether it continues a clip that is missing."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Clips of one video that follow one another without a gap."""

    name: str
    """Name of its file, without the extension; safe whatever the shards hold."""
    video_id: str
    uri: str
    start_seconds: float
    fps: float
    clips: tuple[PieceClip, ...]

    @property
    def num_frames(self) -> int:
        """Frames of the piece."""
        return sum(clip.end - clip.first for clip in self.clips)

    def digest(self, settings: Any) -> str:
        """Digest of what is decoded, and by which settings."""
        content = [[clip.clip_id, clip.first, clip.end] for clip in self.clips]
        return hashlib.sha256(json.dumps([content, settings], sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Clips of a video that are missing before or between others, or cannot be decoded without missing ones."""

    video_id: str
    uri: str
    first: int
    """Index of the first clip that is missing."""
    last: int


def plan_pieces(paths: Sequence[str], *, lost_frames: int = 0) -> tuple[list[Piece], list[Gap]]:
    """Plan the pieces of all videos of shards, and the gaps between them; no payload is read.

    Args:
        paths: paths of the shards.
        lost_frames: frames that a clip of a continuous sequence lacks if the clip before it is missing: its first
            latent is then decoded to one frame.

    Raises:
        ShardError: a shard is damaged.
    """
    videos: dict[tuple[Any, ...], list[tuple[float, int, str, dict[str, Any]]]] = defaultdict(list)
    seen: set[str] = set()
    for path in paths:
        with open_shard(path) as (parquet, _):
            names = [name for name in _COLUMNS if name in parquet.schema_arrow.names]
            for group in range(parquet.metadata.num_row_groups):
                for row in parquet.group(group, names).to_pylist():
                    _check(row)
                    if row["clip_id"] in seen:
                        continue  # a clip that stands in two shards is decoded once
                    seen.add(row["clip_id"])
                    part = (row.get("part_start_seconds"), row.get("part_end_seconds"))
                    sequence = row["clip_id"].rsplit("-", 1)[0]
                    key = (sequence, row["video_id"], *part, row["fps"], row.get("bucket"))
                    videos[key].append((row["start_seconds"], row["clip_index"], path, row))
    pieces: list[Piece] = []
    gaps: list[Gap] = []
    names_of: set[str] = set()
    for key in sorted(videos, key=repr):
        name = safe_name(key[0], "video")
        if name in names_of:  # two videos whose clips have alike ids, which only foreign shards have
            name = safe_name(repr(key) + "/", "video")
        names_of.add(name)
        rows = sorted(videos[key], key=lambda row: row[:2])
        runs = list(_runs(rows, lost_frames))
        is_whole = len(runs) == 1 and runs[0][0].clip_index == 0
        by_id = {row["clip_id"]: row for _, _, _, row in rows}
        for clips in runs:
            first = by_id[clips[0].clip_id]
            pieces.append(
                Piece(
                    name=name if is_whole else f"{name}-from-{clips[0].clip_index:06d}",
                    video_id=first["video_id"],
                    uri=first["uri"],
                    start_seconds=first["start_seconds"] + clips[0].first / first["fps"],
                    fps=first["fps"],
                    clips=tuple(clips),
                )
            )
        stored = {row[1] for row in rows}
        there = sorted(stored - _too_short(rows, runs))
        for before, after in itertools.pairwise([-1, *there, max(stored) + 1]):
            if after > before + 1:
                row = rows[0][3]
                gaps.append(Gap(video_id=row["video_id"], uri=row["uri"], first=before + 1, last=after - 1))
    return pieces, gaps


def _check(row: dict[str, Any]) -> None:
    if any(row[name] is None for name in ("clip_id", "video_id", "uri", "clip_index", "start_seconds", "fps")):
        raise ValueError("a row lacks a value that decoding needs")
    if not (row["fps"] > 0 and np.isfinite([row["fps"], row["start_seconds"]]).all() and row["clip_index"] >= 0):
        raise ValueError(f"clip {row['clip_id']!r:.80} has an impossible rate, time or index")
    if not (row["num_valid_frames"] or 0) >= 1:
        raise ValueError(f"clip {row['clip_id']!r:.80} has no valid frames")


def _too_short(rows: Sequence[_Row], runs: Sequence[Sequence[PieceClip]]) -> set[int]:
    """Indices of clips that continue a missing one and have no frame without it."""
    there = {clip.clip_id for clips in runs for clip in clips}
    return {index for _, index, _, row in rows if row.get("continues_previous") and row["clip_id"] not in there}


def _runs(rows: Sequence[_Row], lost_frames: int) -> Iterator[list[PieceClip]]:
    """Clips of one video by runs without a gap, in order."""
    run: list[PieceClip] = []
    start = 0.0
    length = 0
    before: dict[str, Any] | None = None
    for seconds, index, path, row in rows:
        end = int(row["num_valid_frames"])
        continues = bool(row.get("continues_previous"))
        shared = length - (seconds - start) * row["fps"]
        whole = round(shared)
        joins = run and abs(shared - whole) <= _SEAM_FRAMES and whole >= 0
        if continues:
            joins = joins and before is not None and index == before["clip_index"] + 1 and whole == 0
        if not joins:
            if run:
                yield run
            run, start, length, whole = [], seconds, 0, 0
        inside = continues and not run
        first = min(lost_frames, end) if inside else whole
        if first < end:
            run.append(
                PieceClip(
                    path=path, clip_id=row["clip_id"], clip_index=index, first=first, end=end, starts_inside=inside
                )
            )
            length += end - whole
        before = row
    if run:
        yield run


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """Piece that was decoded, or why it was not."""

    name: str
    video: bytes = b""
    """Content of the mp4 file."""
    num_frames: int = 0
    failure: str = ""
    """Reason why there is no file; empty if there is one."""
    is_refused: bool = False
    """Whether no piece can be decoded, as the weights are missing or others."""


class PieceDecoder:
    """Decodes pieces to video files; a plain callable of a worker. The first piece loads the tokenizer."""

    def __init__(
        self, resolved: ResolvedRun, paths: Sequence[str], *, tiling: Tiling | None, parts: Collection[str] = ()
    ) -> None:
        """Prepare to decode.

        Args:
            resolved: run that made the shards.
            paths: paths of the shards.
            tiling: tiles for large frames; None for whole frames.
            parts: payload parts to decode; empty for whole clips.
        """
        self._resolved, self._parts = resolved, tuple(parts)
        self._arguments = (resolved, tuple(paths), tiling)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_decoder"}

    @cached_property
    def _decoder(self) -> ClipDecoder:
        resolved, paths, tiling = self._arguments
        return ClipDecoder(resolved, paths, tiling=tiling)

    def __call__(self, piece: Piece) -> Decoded:
        """Decode a piece; a failure is a value."""
        try:
            _ = self._decoder.tokenizer
        except VidshardError as error:
            return Decoded(name=piece.name, failure=one_line(error), is_refused=True)
        try:
            with TemporaryDirectory() as folder:
                file = Path(folder) / "video.mp4"
                num_frames = write_video(file, self._frames(piece), self._resolved.run.fps)
                return Decoded(name=piece.name, video=file.read_bytes(), num_frames=num_frames)
        except VidshardError as error:
            return Decoded(name=piece.name, failure=one_line(error, 300))

    def _frames(self, piece: Piece) -> Iterator[np.ndarray]:
        if self._resolved.run.continuous and not self._parts:
            yield from reconstruct_stream(_stored(piece), self._decoder.tokenizer, inside=piece.clips[0].starts_inside)
            return
        for clip, stored in zip(piece.clips, _stored(piece), strict=True):
            yield from self._decoder.decode(stored, parts=self._parts or None)[clip.first : clip.end]


def _stored(piece: Piece) -> Iterator[StoredClip]:
    """The clips of a piece; the payloads of one shard's clips are in memory at a time.

    Raises:
        ShardError: a shard is damaged, or a clip is gone.
    """
    prefix = piece.clips[0].clip_id.rsplit("-", 1)[0]
    for path, clips in itertools.groupby(piece.clips, key=lambda clip: clip.path):
        wanted = [clip.clip_id for clip in clips]
        needed, found = set(wanted), dict[str, StoredClip]()
        for stored in read_clips(path, prefix):
            if stored.clip_id in needed:
                found.setdefault(stored.clip_id, stored)
        if len(found) < len(wanted):
            raise ShardError(f"{shown_uri(path)} was replaced while it was decoded: it lacks a clip")
        yield from (found[clip_id] for clip_id in wanted)
