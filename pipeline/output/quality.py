"""Figures of the quality audit of an output: kept in the metadata of each shard, and added up over all shards.

A shard that a run with ``--audit`` wrote states the figures of its audited clips, and how often each token occurs.
So the figures of an output are read from the ends of its files, whoever wrote them, in one run or in several.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vidshard.models.codebook_use import MAX_CODEBOOK, CodebookUse
from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import AUDIT_KEY, TOKEN_COUNTS_KEY
from vidshard.pipeline.output.parquet import named_if_damaged
from vidshard.pipeline.rows import QUALITY
from vidshard.schemas.tokens import Payload, parse_json

NUM_WORST = 20
"""Number of clips with the lowest PSNR that are kept, at most one of each video."""
NUM_MOMENTS = 7
_READERS = 16
"""Files read at once: on an object store each is a request or two."""


@dataclass(frozen=True, order=True, kw_only=True, slots=True)
class PoorClip:
    """Audited clip with a low PSNR."""

    psnr: float
    clip_id: str
    uri: str
    """Location of its video, without credentials."""


@dataclass(kw_only=True, slots=True)
class AuditFigures:
    """Figures of audited clips, which add up."""

    num_clips: int = 0
    """Number of audited clips that could be measured."""
    num_failed: int = 0
    """Number of chosen clips that could not be decoded for want of memory."""
    sums: dict[str, float] = field(default_factory=dict)
    """Sum of the clips' means by metric: psnr, ssim, lpips."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of clips for which each metric was taken."""
    moments: list[float] = field(default_factory=lambda: [0.0] * NUM_MOMENTS)
    """As `pipeline.quality.moments_of`."""
    psnr_histogram: dict[str, int] = field(default_factory=dict)
    """Number of clips by whole dB of PSNR, rounded down."""
    worst: list[PoorClip] = field(default_factory=list)
    """Clips with the lowest PSNR, one of each video, the worst first."""

    def take(self, scores: Mapping[str, Any], clip_id: str, uri: str) -> None:
        """Count an audited clip.

        Args:
            scores: entry of ``pipeline.rows.QUALITY``.
            uri: location of its video, without credentials.
        """
        if scores["psnr"] is None:
            self.num_failed += 1
            return
        self.num_clips += 1
        for name in ("psnr", "ssim", "lpips"):
            if scores[name] is not None:
                self.sums[name] = self.sums.get(name, 0.0) + scores[name]
                self.counts[name] = self.counts.get(name, 0) + 1
        self.moments = [math.fsum(pair) for pair in zip(self.moments, scores["moments"], strict=True)]
        decibel = str(math.floor(scores["psnr"]))
        self.psnr_histogram[decibel] = self.psnr_histogram.get(decibel, 0) + 1
        self.worst = _worst([*self.worst, PoorClip(psnr=scores["psnr"], clip_id=clip_id, uri=uri)])

    def add(self, other: AuditFigures) -> None:
        """Add the figures of other clips."""
        self.num_clips += other.num_clips
        self.num_failed += other.num_failed
        self.moments = [math.fsum(pair) for pair in zip(self.moments, other.moments, strict=True)]
        self.sums = {n: self.sums.get(n, 0.0) + other.sums.get(n, 0.0) for n in {*self.sums, *other.sums}}
        self.counts = dict(Counter(self.counts) + Counter(other.counts))
        self.psnr_histogram = dict(Counter(self.psnr_histogram) + Counter(other.psnr_histogram))
        self.worst = _worst([*self.worst, *other.worst])

    def mean(self, name: str) -> float | None:
        """Mean of a metric over the clips for which it was taken; None without one."""
        return self.sums[name] / self.counts[name] if self.counts.get(name) else None

    @classmethod
    def parse(cls, record: Any) -> AuditFigures:
        """Figures from the JSON values of `asdict`.

        Raises:
            ValueError: the values are not such figures.
        """
        try:
            figures = cls(**{**record, "worst": [PoorClip(**clip) for clip in record["worst"]]})
            numbers = [figures.num_clips, figures.num_failed, *figures.counts.values()]
            numbers += figures.psnr_histogram.values()
            reals = [*figures.sums.values(), *figures.moments, *(clip.psnr for clip in figures.worst)]
            is_right = all(type(n) is int and n >= 0 for n in numbers) and all(math.isfinite(x) for x in reals)
            texts = [text for clip in figures.worst for text in (clip.clip_id, clip.uri)]
            is_right = is_right and len(figures.moments) == NUM_MOMENTS and all(isinstance(t, str) for t in texts)
        except (TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"its metadata '{AUDIT_KEY}' holds no figures of an audit: {error!r:.200}") from error
        if not is_right:
            raise ValueError(f"its metadata '{AUDIT_KEY}' holds impossible figures")
        return figures


def _worst(clips: Iterable[PoorClip]) -> list[PoorClip]:
    by_video: dict[str, PoorClip] = {}
    for clip in sorted(clips):
        by_video.setdefault(clip.uri, clip)
    return list(by_video.values())[:NUM_WORST]


@dataclass(kw_only=True, slots=True)
class OutputQuality:
    """Quality of an output, from the metadata of its shards."""

    figures: AuditFigures = field(default_factory=AuditFigures)
    codebooks: dict[str, CodebookUse] = field(default_factory=dict)
    """Use of the codebook by payload column with tokens."""
    num_shards: int = 0
    num_without: int = 0
    """Number of shards that state no figures: a run without ``--audit`` wrote them, or a repair took clips out."""


def figures_of(rows: pa.Table, clip_ids: Sequence[str]) -> AuditFigures:
    """Figures of the audited clips of encoded rows (one per span).

    Args:
        rows: rows with the column ``QUALITY``; ``uri`` is without credentials.
        clip_ids: id of each clip, in order.
    """
    figures, ids = AuditFigures(), iter(clip_ids)
    for row in rows.select(["uri", QUALITY.name]).to_pylist():
        for scores in row[QUALITY.name]:
            clip_id = next(ids)
            if scores is not None:
                figures.take(scores, clip_id, row["uri"])
    return figures


def audit_metadata(rows: pa.Table, clip_ids: Sequence[str], table: pa.Table, payload: Payload) -> dict[str, str]:
    """Metadata of a shard that a run with ``--audit`` writes.

    Args:
        rows: its rows as they came from the encoder.
        clip_ids: id of each of their clips, in order.
        table: the shard.
        payload: payload columns of the shard.
    """
    counts = {}
    for column in payload:
        if column.codebook_size is not None and column.codebook_size <= MAX_CODEBOOK:
            tokens = table[column.name].combine_chunks().flatten().to_numpy()
            different, numbers = np.unique(tokens, return_counts=True)
            counts[column.name] = _packed(different, numbers)
    return {
        AUDIT_KEY: json.dumps(asdict(figures_of(rows, clip_ids))),
        TOKEN_COUNTS_KEY: json.dumps(counts),
    }


def without_figures(metadata: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Metadata of a shard without its figures, as clips were taken out of it."""
    return {key: value for key, value in metadata.items() if key.decode() not in (AUDIT_KEY, TOKEN_COUNTS_KEY)}


def read_quality(paths: Sequence[str], payload: Payload) -> OutputQuality:
    """Add up the figures that shards state; only the ends of the files are read.

    Args:
        payload: payload columns of the shards, of any frame size.

    Raises:
        ShardError: a shard is damaged.
        storage.StorageError: a shard could not be read.
    """
    quality = OutputQuality(num_shards=len(paths))
    quality.codebooks = {
        column.name: CodebookUse(column.codebook_size)
        for column in payload
        if column.codebook_size is not None and column.codebook_size <= MAX_CODEBOOK
    }
    with ThreadPoolExecutor(_READERS) as pool:
        for path, metadata in zip(paths, pool.map(_metadata, paths), strict=True):
            if AUDIT_KEY.encode() not in metadata:
                quality.num_without += 1
                continue
            with named_if_damaged(path):
                quality.figures.add(AuditFigures.parse(parse_json(metadata[AUDIT_KEY.encode()], AUDIT_KEY)))
                counts = parse_json(metadata.get(TOKEN_COUNTS_KEY.encode(), b"{}"), TOKEN_COUNTS_KEY)
                for name, use in quality.codebooks.items():
                    if name in counts:
                        _count(use, counts[name])
    return quality


def _metadata(path: str) -> Mapping[bytes, bytes]:
    with named_if_damaged(path), storage.open_binary(path) as file:
        return pq.read_metadata(file).metadata or {}


def _packed(tokens: np.ndarray, counts: np.ndarray) -> str:
    pairs = np.stack([tokens.astype("<i8"), counts.astype("<i8")], axis=1)
    return base64.b64encode(zlib.compress(pairs.tobytes())).decode()


def _count(use: CodebookUse, packed: str) -> None:
    """Add packed counts.

    Raises:
        ValueError: they are no counts of tokens of this codebook.
    """
    try:
        limit = 16 * use.codebook_size
        unpacked = zlib.decompressobj().decompress(base64.b64decode(packed, validate=True), limit + 1)
        pairs = np.frombuffer(unpacked, "<i8").reshape(-1, 2)
    except (ValueError, TypeError, zlib.error) as error:
        raise ValueError(f"its metadata '{TOKEN_COUNTS_KEY}' holds no counts: {error!r:.200}") from error
    tokens, counts = pairs[:, 0], pairs[:, 1]
    if len(unpacked) > limit or (pairs.size and (tokens.min() < 0 or tokens.max() >= use.codebook_size)):
        raise ValueError(f"its metadata '{TOKEN_COUNTS_KEY}' counts a token outside the codebook")
    if pairs.size and (counts.min() < 1 or len(np.unique(tokens)) < len(tokens)):
        raise ValueError(f"its metadata '{TOKEN_COUNTS_KEY}' holds impossible counts")
    use.counts[tokens] += counts
