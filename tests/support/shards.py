"""Content of an output folder, read as a stranger reads it: with pyarrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.rejects import read_rejects
from vidshard.pipeline.output.shard_reader import StoredClip, check_shard, read_clips
from vidshard.pipeline.storage import open_binary

Tokens = dict[str, list[int]]
"""Token indices by clip id."""


def rows_of(out: str | Path) -> list[dict[str, Any]]:
    """Every row of every shard, in the order of clip ids."""
    tables = [pq.read_table(open_binary(path)) for path in shard_paths(str(out))]
    return sorted(pa.concat_tables(tables).to_pylist(), key=lambda row: row["clip_id"]) if tables else []


def tokens_by_clip(out: str | Path) -> Tokens:
    """The tokens of each clip; fails where a shard is damaged or a clip stands in an output twice."""
    for path in shard_paths(str(out)):
        check_shard(path)
    rows = rows_of(out)
    tokens = {row["clip_id"]: row["tokens"] for row in rows}
    assert len(tokens) == len(rows), "a clip stands there twice"
    return tokens


def clips_of(out: str | Path) -> list[StoredClip]:
    """Every stored clip, in the order of clip ids."""
    clips = [clip for path in shard_paths(str(out)) for clip in read_clips(path)]
    return sorted(clips, key=lambda clip: clip.clip_id)


def shard_bytes(out: str | Path) -> dict[str, bytes]:
    """The content of each shard."""
    return {path: Path(path).read_bytes() for path in shard_paths(str(out))}


def rejects_of(out: str | Path) -> dict[str, str]:
    """The reason by the name of the file of a rejected video."""
    return {Path(row["uri"]).name: row["reason"] for row in read_rejects(str(out)).to_pylist()}
