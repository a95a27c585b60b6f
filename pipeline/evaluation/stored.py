"""Scoring stage for tokens that are stored: rows of an output in, their scores out, without encoding again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from vidshard.models.tokenizer import frames_to_input
from vidshard.pipeline.clip_metrics import Metrics, MetricsSpec
from vidshard.pipeline.evaluation.scorer import (
    SCORED_SCHEMA,
    Measured,
    count_tokens,
    dump,
)
from vidshard.pipeline.evaluation.scores import ScoredSpans
from vidshard.pipeline.output.shard_reader import StoredClip, read_clips
from vidshard.pipeline.reconstruct import ClipDecoder, source_frames
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.row_errors import row_error
from vidshard.pipeline.rows import rejection_row
from vidshard.schemas.rejections import Rejection, Stage

STORED_SCHEMA = pa.schema([("span_id", pa.string()), ("path", pa.string())])
"""A row of an output as work: its clip id, and the path of its shard."""


@dataclass(frozen=True, kw_only=True)
class StoredSpec:
    """Settings of a `StoredScorer`."""

    measured: Measured
    resolved: ResolvedRun
    paths: tuple[str, ...]
    """Shards of the output, as clips of a continuous sequence are decoded with those around them."""
    metrics: MetricsSpec
    device: str


class StoredScorer:
    """Scoring stage for stored clips. A clip whose source is gone or was replaced is a rejection."""

    def __init__(self, spec: StoredSpec) -> None:
        self._spec = spec
        self._loaded: tuple[ClipDecoder, Metrics] | None = None

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Score clips: one row of ``SCORED_SCHEMA`` for each row of ``STORED_SCHEMA``."""
        if self._loaded is None:
            spec = self._spec
            decoder = ClipDecoder(spec.resolved, spec.paths, tiling=spec.resolved.tiling)
            self._loaded = decoder, Metrics(spec.metrics, spec.device)
        scored = [self._score(row["path"], row["span_id"]) for row in rows.to_pylist()]
        return pa.table({"span_id": rows["span_id"], "scored": [dump(part) for part in scored]}, schema=SCORED_SCHEMA)

    def _score(self, path: str, clip_id: str) -> ScoredSpans:
        assert self._loaded is not None
        decoder, metrics = self._loaded
        clip = next(read_clips(path, clip_id))
        values = clip.values
        result = ScoredSpans(spans=[clip_id])
        try:
            source = source_frames(clip, self._spec.resolved)
        except Exception as error:  # noqa: BLE001  whatever one file does, it is this clip's error
            refused = row_error(error, values["uri"])
            result.rejections.append(
                rejection_row(
                    Rejection(
                        uri=values["uri"],
                        video_id=values["video_id"],
                        span_id=clip_id,
                        start_seconds=values["start_seconds"],
                        stage=Stage.DECODE,
                        reason=refused.reason,
                        detail=refused.detail,
                    )
                )
            )
            return result
        num_frames = values["num_valid_frames"]
        made = decoder.decode(clip)[:num_frames]
        real, fake = (self._tensor(frames) for frames in (source[:num_frames], made))
        about = {name: values[name] for name in ("fps", "video_id", "uri", "clip_index", "start_seconds")}
        scores = {
            "clip_id": clip_id,
            "span_id": clip_id,
            **about,
            "tokenizer": self._spec.measured.label,
            **metrics.measure(real, fake),
            "features_source": metrics.features(real),
            "features_reconstruction": metrics.features(fake),
        }
        result.rows.append(scores | count_tokens(result, self._spec.measured, values["fps"], tokens_of(clip)))
        return result

    def _tensor(self, frames_THWC: npt.NDArray[np.uint8]) -> Tensor:
        """Frames as the metrics take them: float32 (3, T, H, W) in [-1, 1]."""
        return frames_to_input(torch.from_numpy(np.array(frames_THWC))[None].to(self._spec.device))[0]


def tokens_of(clip: StoredClip) -> npt.NDArray[np.int64] | None:
    """Tokens of a stored clip, flat; None for latents."""
    values = [values for values in clip.payload.values() if values.dtype.kind == "u"]
    return np.concatenate([v.astype(np.int64).reshape(-1) for v in values]) if values else None
