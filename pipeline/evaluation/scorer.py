"""Scoring stage: rows of decoded spans in, their scores out, for several tokenizers over the same frames."""

# B batch, C channels, T frames, H height, W width, F frames of a clip

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from vidshard.models.codebook_use import MAX_CODEBOOK
from vidshard.models.tokenizer import Tokenizer, frames_to_input
from vidshard.models.vidtok.lengths import Padding, pad
from vidshard.models.vidtok.tiling import Tiling
from vidshard.pipeline import storage
from vidshard.pipeline.clip_metrics import Metrics, MetricsSpec
from vidshard.pipeline.devices import GpuFaultError, examine_gpu, make_reproducible
from vidshard.pipeline.evaluation.scores import ScoredSpans, counts_key
from vidshard.pipeline.rows import clip_frames, refuse, row_part
from vidshard.pipeline.tokenizer_source import PRECISIONS, TokenizerSource
from vidshard.schemas.rejections import Reason, Stage, VideoError
from vidshard.schemas.video import ClipSpec

SCORED_SCHEMA = pa.schema([("span_id", pa.string()), ("scored", pa.string())])
"""A span on its way to the driver: its scores as JSON, see `ScoredSpans`."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A tokenizer that is measured."""

    label: str
    """Name in the tables; no two have the same."""
    source: TokenizerSource
    padding: Padding | None
    """Placement of the frames that pad clips to a valid length; None if their length is valid."""
    tiling: Tiling | None = None
    notice: str | None = None
    """Warning for readers of its figures, such as that its weights are random."""


@dataclass(frozen=True, kw_only=True)
class ScoredGroup:
    """Tokenizers that are measured on clips of one kind."""

    spec: ClipSpec
    tokenizers: tuple[Measured, ...]


@dataclass(frozen=True, kw_only=True)
class ScorerSpec:
    """Settings of a scorer, small enough to send to every actor."""

    groups: tuple[ScoredGroup, ...]
    """Groups by the column ``group`` of the rows."""
    metrics: MetricsSpec
    precision: str
    device: str
    batch_size: int
    num_threads: int


class NotFiniteOutputError(FloatingPointError):
    """A network gave a value that is not finite for the clip of this number."""


@torch.inference_mode()
def reconstruct_clips(
    tokenizer: Tokenizer,
    clips: Sequence[npt.NDArray[np.uint8]],
    *,
    batch_size: int,
    padding: Padding | None,
    tiling: Tiling | None = None,
) -> tuple[list[Tensor], list[npt.NDArray[np.int64]]]:
    """Encode and decode clips of one shape; of continuous latents the mean is decoded.

    Args:
        clips: each uint8 (T, H, W, 3).
        batch_size: clips in a pass; the last batch is filled up, so that every pass has one shape.

    Returns:
        The reconstructions, float32 (3, T, H, W) each, and the tokens of each clip, flat; no tokens for latents.

    Raises:
        NotFiniteOutputError: a network gave a value that is not finite.
    """
    videos: list[Tensor] = []
    tokens: list[npt.NDArray[np.int64]] = []
    for start in range(0, len(clips), batch_size):
        numbers = [min(start + slot, len(clips) - 1) for slot in range(batch_size)]
        frames = torch.from_numpy(np.stack([clips[number] for number in numbers])).to(tokenizer.device)
        x_BCTHW = frames_to_input(frames, tokenizer.dtype)
        padded = pad(x_BCTHW, tokenizer.config, padding) if padding is not None else None
        whole = x_BCTHW if padded is None else padded.frames
        encoded = tokenizer.encode(whole, tiling=tiling)
        payload = {name: value for name, value in encoded.payload.items() if not name.endswith("logvar")}
        decoded = tokenizer.decode_payload(payload, whole.shape[2], tiling=tiling).float()
        decoded = decoded if padded is None else padded.cut(decoded)
        for slot in range(min(batch_size, len(clips) - start)):
            finite = encoded.is_finite is None or bool(encoded.is_finite[slot].all())
            if not finite or not bool(torch.isfinite(decoded[slot]).all()):
                raise NotFiniteOutputError(start + slot)
            videos.append(decoded[slot])
            if tokenizer.config.codebook_size is not None:
                tokens.append(
                    np.concatenate([v[slot].flatten().cpu().numpy().astype(np.int64) for v in payload.values()])
                )
    return videos, tokens


class ClipScorer:
    """Scoring stage. The networks are loaded by the first call, so that a crash while loading counts as an attempt."""

    def __init__(self, spec: ScorerSpec) -> None:
        self._spec = spec
        self._loaded: tuple[dict[str, Tokenizer], Metrics] | None = None

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Score the clips of rows with every tokenizer: one row of ``SCORED_SCHEMA`` for each row.

        A span for which a network gives a value that is not finite is rejected, so that all are measured by the same
        clips.
        """
        tokenizers, metrics = self._networks()
        records = rows.drop_columns(["frames"]).to_pylist()
        scored = []
        for number, row in enumerate(records):
            group = self._spec.groups[row["group"]]
            [clips] = clip_frames(rows.slice(number, 1), group.spec.num_frames)
            try:
                scored.append(self._score(row, clips[len(clips) - len(row["clips"]) :], group, tokenizers, metrics))
            except VideoError as error:
                refused = refuse(rows.slice(number, 1).drop_columns(["frames"]), {0: error}, Stage.ENCODE)
                span = span_key(group.spec, row["span_id"])
                scored.append(ScoredSpans(spans=[span], rejections=[refused["rejection"][0].as_py()]))
        ids = [row["span_id"] for row in records]
        return pa.table({"span_id": ids, "scored": [dump(part) for part in scored]}, schema=SCORED_SCHEMA)

    def _networks(self) -> tuple[dict[str, Tokenizer], Metrics]:
        """Tokenizers by label, each loaded once, and the metrics."""
        if self._loaded is None:
            spec = self._spec
            if spec.device == "cuda" and not torch.cuda.is_available():
                raise GpuFaultError(f"the GPU of this scorer is gone: {examine_gpu().versions}")
            make_reproducible(spec.device, spec.num_threads, spec.precision)
            measured = {one.label: one for group in spec.groups for one in group.tokenizers}
            precision = PRECISIONS[spec.precision]
            tokenizers = {label: one.source.load(spec.device, precision) for label, one in measured.items()}
            self._loaded = tokenizers, Metrics(spec.metrics, spec.device)
        return self._loaded

    def _score(
        self,
        row: dict[str, Any],
        clips: Sequence[npt.NDArray[np.uint8]],
        group: ScoredGroup,
        tokenizers: Mapping[str, Tokenizer],
        metrics: Metrics,
    ) -> ScoredSpans:
        spec = self._spec
        result = ScoredSpans(spans=[span_key(group.spec, row["span_id"])])
        if row["rejection"] is not None:
            result.rejections.append(row["rejection"])
        if not clips:
            return result
        about = [clip_record(row, clip, group.spec) for clip in row["clips"]]
        real = [frames_to_input(torch.from_numpy(np.array(clip))[None].to(spec.device))[0] for clip in clips]
        features = [metrics.features(clip) for clip in real]
        for measured in group.tokenizers:
            try:
                videos, tokens = reconstruct_clips(
                    tokenizers[measured.label],
                    clips,
                    batch_size=spec.batch_size,
                    padding=measured.padding,
                    tiling=measured.tiling,
                )
            except NotFiniteOutputError as error:
                clip = about[error.args[0]]["clip_index"]
                detail = f"clip {clip} in {spec.precision}: {measured.label} gives values that are not finite"
                raise VideoError(Reason.NOT_FINITE, detail) from error
            for number, video in enumerate(videos):
                scores = {
                    **about[number],
                    "tokenizer": measured.label,
                    **metrics.measure(real[number], video),
                    "features_source": features[number],
                    "features_reconstruction": metrics.features(video.clamp(-1, 1)),
                }
                own = tokens[number] if tokens else None
                result.rows.append(scores | count_tokens(result, measured, float(group.spec.fps), own))
        return result


def span_key(spec: ClipSpec, span_id: str) -> str:
    """Id of a span at clips of one kind: spans of two frame rates have the same ``span_id``."""
    return f"{spec.digest()} {span_id}"


def clip_record(row: dict[str, Any], clip: dict[str, Any], spec: ClipSpec) -> dict[str, Any]:
    """Columns of a score that say which clip it is of."""
    return {
        "clip_id": spec.clip_id(row["video_id"], clip["clip_index"], row_part(row)),
        "fps": float(spec.fps),
        "span_id": row["span_id"],
        "video_id": row["video_id"],
        "uri": storage.public_uri(row["uri"]),
        "clip_index": clip["clip_index"],
        "start_seconds": clip["start_seconds"],
    }


def count_tokens(
    result: ScoredSpans, measured: Measured, fps: float, tokens: npt.NDArray[np.int64] | None
) -> dict[str, int | None]:
    """Add a clip's tokens to the counts of its tokenizer, and return their numbers as columns of its score."""
    size = measured.source.config.codebook_size
    if tokens is None or size is None or size > MAX_CODEBOOK:
        return {"num_tokens": None, "num_codes": None}
    different, counts = np.unique(tokens, return_counts=True)
    own = result.counts.setdefault(counts_key(measured.label, fps), {})
    for token, count in zip(different.tolist(), counts.tolist(), strict=True):
        own[token] = own.get(token, 0) + count
    return {"num_tokens": int(tokens.size), "num_codes": int(different.size)}


def dump(scored: ScoredSpans) -> str:
    """Scores as JSON, in which float32 values keep their digits."""
    counts = {name: [list(found), list(found.values())] for name, found in scored.counts.items()}
    return json.dumps([scored.rows, scored.spans, scored.rejections, counts])


def load(text: str) -> ScoredSpans:
    """Scores from the JSON of `dump`."""
    rows, spans, rejections, counts = json.loads(text)
    return ScoredSpans(
        rows=rows,
        spans=spans,
        rejections=rejections,
        counts={name: dict(zip(tokens, numbers, strict=True)) for name, (tokens, numbers) in counts.items()},
    )
