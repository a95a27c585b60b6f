"""Scores of reconstructed clips: their Parquet files, and the figures over all of them.

Figures are exactly rounded sums (`math.fsum`) over rows in the order of their ids. So they are the same to the last bit
however the clips were spread over files, workers, interruptions and resumes.

A file of scores also holds, in its metadata, the ids of the spans that are complete in it, their rejections, and the
counts of their tokens. It is written at once or not at all, so nothing is counted twice.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vidshard.models.codebook_use import MAX_CODEBOOK, CodebookUse
from vidshard.models.frechet import frechet_distance
from vidshard.pipeline import storage
from vidshard.pipeline.output.parquet import BoundedParquet, ShardError, named_if_damaged, write_table
from vidshard.schemas.evaluation import Average
from vidshard.schemas.tokens import METADATA_PREFIX

SCORES = "scores"
"""Folder of the files of scores."""

SCORE_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("tokenizer", pa.string(), nullable=False),
        pa.field("fps", pa.float64(), nullable=False),
        pa.field("span_id", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("clip_index", pa.int32(), nullable=False),
        pa.field("start_seconds", pa.float64(), nullable=False),
        pa.field("psnr", pa.list_(pa.float32()), nullable=False),
        pa.field("ssim", pa.list_(pa.float32())),
        pa.field("lpips", pa.list_(pa.float32())),
        pa.field("num_tokens", pa.int32()),
        pa.field("num_codes", pa.int32()),
        pa.field("features_source", pa.list_(pa.float32())),
        pa.field("features_reconstruction", pa.list_(pa.float32())),
    ]
)
"""One row for each clip and tokenizer. ``psnr`` in dB, ``ssim`` and ``lpips`` have one value a frame; ``num_codes`` is
the number of different tokens of the clip; the features are those of I3D. What was not measured is null."""

_SPANS, _REJECTIONS, _COUNTS = (f"{METADATA_PREFIX}{name}".encode() for name in ("spans", "rejections", "token_counts"))
_REMEDY = "delete it, and the same command measures its clips again"

Counts = dict[str, dict[int, int]]
"""Number of times that each token occurred, by tokenizer and frame rate (`counts_key`)."""


def counts_key(tokenizer: str, fps: float) -> str:
    """Name of the counts of a tokenizer at a frame rate."""
    return f"{tokenizer} at {fps!r}"


@dataclass(kw_only=True)
class ScoredSpans:
    """Scores of some spans, on their way into a file."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """Rows of ``SCORE_SCHEMA``."""
    spans: list[str] = field(default_factory=list)
    """Ids of the spans that are complete: every clip is scored or rejected."""
    rejections: list[dict[str, Any]] = field(default_factory=list)
    counts: Counts = field(default_factory=dict)

    def add(self, other: ScoredSpans) -> None:
        """Add the scores of other spans."""
        self.rows += other.rows
        self.spans += other.spans
        self.rejections += other.rejections
        for name, counts in other.counts.items():
            own = self.counts.setdefault(name, {})
            for token, count in counts.items():
                own[token] = own.get(token, 0) + count


def write_scores(out: str, scored: ScoredSpans) -> None:
    """Write scores as one file, named by a digest of its spans; without spans nothing is written.

    Raises:
        StorageError: it could not be written.
    """
    if not scored.spans:
        return
    metadata = {
        _SPANS: json.dumps(scored.spans),
        _REJECTIONS: json.dumps(scored.rejections),
        _COUNTS: json.dumps({name: _packed(counts) for name, counts in scored.counts.items()}),
    }
    table = pa.Table.from_pylist(scored.rows, schema=SCORE_SCHEMA).replace_schema_metadata(metadata)
    digest = hashlib.blake2b("\n".join(sorted(scored.spans)).encode(), digest_size=12).hexdigest()
    write_table(storage.join(out, SCORES, f"{digest}.parquet"), table)


def read_scores(out: str) -> ScoredSpans:
    """Read all files of scores.

    Raises:
        ShardError: a file is damaged, or a clip or span is in two files; the message names it.
        StorageError: the files cannot be read.
    """
    total = ScoredSpans()
    seen: dict[str, str] = {}
    for path in storage.list_files(storage.join(out, SCORES), ".parquet"):
        with named_if_damaged(path, remedy=_REMEDY):
            table = BoundedParquet(pa.BufferReader(storage.read_bytes(path))).whole()
            metadata = table.schema.metadata or {}
            part = ScoredSpans(
                rows=table.cast(SCORE_SCHEMA).to_pylist(),
                spans=[str(span) for span in json.loads(metadata[_SPANS])],
                rejections=list(json.loads(metadata[_REJECTIONS])),
                counts={name: _unpacked(text) for name, text in json.loads(metadata[_COUNTS]).items()},
            )
        for span in part.spans:
            if span in seen:
                raise ShardError(f"{storage.public_uri(path)} and {seen[span]} hold the same span {span}: delete one")
            seen[span] = storage.public_uri(path)
        total.add(part)
    return total


def _packed(counts: Mapping[int, int]) -> str:
    pairs = np.array(sorted(counts.items()), "<i8").reshape(-1, 2)
    return base64.b64encode(zlib.compress(pairs.tobytes())).decode()


def _unpacked(text: str) -> dict[int, int]:
    pairs = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i8").reshape(-1, 2)
    return {int(token): int(count) for token, count in pairs}


# Figures


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of one tokenizer at one frame rate over all clips."""

    tokenizer: str
    fps: float
    num_videos: int
    num_clips: int
    num_frames: int
    means: Mapping[str, Mapping[Average, float]]
    """Mean of psnr, ssim and lpips by average; without those that were not measured."""
    fvd: float | None
    """Fréchet video distance; None without features."""
    use: CodebookUse | None
    """Counts of tokens; None for continuous latents, and for a codebook that is too large to count."""
    worst: Sequence[tuple[str, str, float]]
    """Clip id, URI and mean PSNR of the clips with the lowest PSNR."""


MEASURES = ("psnr", "ssim", "lpips")
NUM_WORST = 5


def figures_of(scored: ScoredSpans, codebook_sizes: Mapping[str, int | None]) -> list[Figures]:
    """Compute the figures of each tokenizer at each frame rate; the same for any partition of the same clips.

    Args:
        codebook_sizes: number of tokens by tokenizer, in the order of the result; None for continuous latents.
    """
    rows = sorted(scored.rows, key=lambda row: (row["fps"], row["clip_id"], row["tokenizer"]))
    found = []
    for fps in sorted({row["fps"] for row in rows}):
        for name, codebook_size in codebook_sizes.items():
            own = [r for r in rows if (r["fps"], r["tokenizer"]) == (fps, name)]
            if not own:
                continue
            use = None
            if codebook_size is not None and codebook_size <= MAX_CODEBOOK:
                use = CodebookUse(codebook_size)
                counts = scored.counts.get(counts_key(name, fps), {})
                if counts:
                    use.counts[np.fromiter(counts, np.int64)] = np.fromiter(counts.values(), np.int64)
            found.append(
                Figures(
                    tokenizer=name,
                    fps=fps,
                    num_videos=len({row["video_id"] for row in own}),
                    num_clips=len(own),
                    num_frames=sum(len(row["psnr"]) for row in own),
                    means={measure: _means(own, measure) for measure in MEASURES if own[0][measure] is not None},
                    fvd=_fvd(own),
                    use=use,
                    worst=_worst(own),
                )
            )
    return found


def _means(rows: Sequence[Mapping[str, Any]], measure: str) -> dict[Average, float]:
    by_video: dict[str, list[float]] = {}
    for row in rows:
        by_video.setdefault(row["video_id"], []).extend(row[measure])
    return {
        "frames": _mean(value for row in rows for value in row[measure]),
        "clips": _mean(_mean(row[measure]) for row in rows),
        "videos": _mean(_mean(values) for values in by_video.values()),
    }


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)


def _fvd(rows: Sequence[Mapping[str, Any]]) -> float | None:
    if len(rows) < 2 or any(row["features_source"] is None for row in rows):
        return None
    real, fake = (_features(rows, name) for name in ("features_source", "features_reconstruction"))
    return frechet_distance(real, fake)


def _features(rows: Sequence[Mapping[str, Any]], name: str) -> npt.NDArray[np.float64]:
    return np.array([row[name] for row in rows], np.float64)


def _worst(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, float]]:
    by_psnr = sorted(rows, key=lambda row: (_mean(row["psnr"]), row["clip_id"]))
    return [(row["clip_id"], row["uri"], _mean(row["psnr"])) for row in by_psnr[:NUM_WORST]]
