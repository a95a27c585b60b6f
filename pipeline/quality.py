"""Quality audit in the encoder: a seeded share of the clips is decoded again at once, and compared with its frames.

The stored payload is decoded, by the same weights, so the figures are those of what a reader of the shard gets, before
rounding to 8 bits. An audited clip costs a pass of the decoder. LPIPS is measured where VGG16 is at hand
on the machine; nothing is downloaded for it.
"""

# F frames, C channels, T frames, H height, W width

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vidshard.models.tokenizer import Tokenizer, frames_to_input
from vidshard.models.training.perceptual import cached_vgg_weights
from vidshard.models.vidtok.lengths import Padding, pad
from vidshard.models.vidtok.tiling import Tiling
from vidshard.pipeline.clip_metrics import Metrics, MetricsSpec
from vidshard.pipeline.decode_payload import clips_before, decode_in_sequence, to_tensors
from vidshard.pipeline.devices import free_caches, is_out_of_memory
from vidshard.pipeline.rows import clip_counts, frame_sizes, row_part
from vidshard.schemas.errors import one_line

log = logging.getLogger(__name__)

Scores = dict[str, Any]
"""Quality of a clip: an entry of ``pipeline.rows.QUALITY``."""

NOT_MEASURED: Scores = {"psnr": None, "ssim": None, "lpips": None, "moments": None}
"""Scores of a chosen clip that could not be decoded for want of memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityAudit:
    """Choice of the clips that are audited, and what is measured."""

    share: float
    """Share of the clips, in (0, 1]."""
    seed: str
    """Text that is the same for all runs of one output, so that a resumed run audits the same clips."""
    vgg_weights: str | None
    """File with VGG16 for LPIPS; None for torchvision's download, if it is there already."""

    def chooses(self, video: str, clip_index: int) -> bool:
        """Whether a clip is audited; this depends on the seed and the clip alone.

        Args:
            video: id of the video, with the suffix of its part.
        """
        digest = hashlib.sha256(f"{self.seed}|audit|{video}|{clip_index}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.share * 2**64


class QualityMeter:
    """Measures the audited clips of an encoder's rows."""

    def __init__(
        self,
        audit: QualityAudit,
        tokenizer: Tokenizer,
        *,
        num_frames: int,
        padding: Padding | None,
        tiling: Tiling | None,
        continuous: bool,
    ) -> None:
        """Prepare to measure; the network of LPIPS is loaded for the first audited clip.

        Args:
            num_frames: frames per clip.
            padding: placement of the frames that pad clips to a valid length; None if they are not padded.
            tiling: tiles in which frames were encoded; None for whole frames.
            continuous: whether the clips of a row form one stream.
        """
        self._audit, self._tokenizer = audit, tokenizer
        self._num_frames, self._padding, self._tiling = num_frames, padding, tiling
        self._continuous = continuous
        self._metrics: Metrics | None = None

    def measure(
        self,
        rows: pa.Table,
        spans: Sequence[Sequence[np.ndarray]],
        encoded: Sequence[Mapping[str, Sequence[np.ndarray]]],
    ) -> list[list[Scores | None]]:
        """Measure the audited clips of rows.

        Args:
            rows: rows after the encoder, whose failed rows have no clips left.
            spans: clips of each row, uint8 (T, H, W, 3), halo first.
            encoded: flat payload of each clip without the halo, by row and payload column.

        Returns:
            For each row the scores of each of its clips; None for clips that were not chosen.
        """
        names = ["video_id", "part_start_seconds", "part_end_seconds", "end_clip", "clips"]
        found: list[list[Scores | None]] = []
        sizes, counts = frame_sizes(rows), clip_counts(rows)
        for number, row in enumerate(rows.select(names).to_pylist()):
            video = f"{row['video_id']}{row_part(row).suffix}"
            chosen = [self._audit.chooses(video, clip["clip_index"]) for clip in row["clips"]]
            scores: list[Scores | None] = [None] * counts[number]
            if any(chosen):
                frames = spans[number][len(spans[number]) - counts[number] :]
                payloads = self._payloads(encoded[number], sizes[number], counts[number])
                for position, clip in enumerate(row["clips"]):
                    if chosen[position] and self._is_decodable(row, payloads, position):
                        scores[position] = self._scores(payloads, position, frames[position], clip, row)
            found.append(scores)
        return found

    def _payloads(
        self, encoded: Mapping[str, Sequence[np.ndarray]], size: tuple[int, int], count: int
    ) -> list[dict[str, np.ndarray]]:
        """Payload of each clip by column, in its shape and without log-variances."""
        config = self._tokenizer.config
        num_frames = config.valid_frames(self._num_frames) if self._padding is not None else self._num_frames
        if self._continuous:
            num_frames = config.decoded_frames(self._num_frames // config.time_stride)
        shapes = {column.name: column.shape for column in config.payload(num_frames, *size)}
        return [{name: encoded[name][clip].reshape(shape) for name, shape in shapes.items()} for clip in range(count)]

    def _is_decodable(self, row: Mapping[str, Any], payloads: Sequence[Mapping[str, np.ndarray]], at: int) -> bool:
        """Whether the row holds all clips of the sequence that this one's frames depend on."""
        if not self._continuous:
            return True
        first = at - clips_before(self._tokenizer.config, payloads[at])
        starts_with_video = row["clips"][0]["clip_index"] == 0
        ends_with_video = row["end_clip"] is None
        has_after = at + 1 < len(payloads) or ends_with_video or not self._tokenizer.config.lookahead_latents
        return (first >= 0 or starts_with_video) and has_after

    def _scores(
        self,
        payloads: Sequence[Mapping[str, np.ndarray]],
        at: int,
        frames_THWC: np.ndarray,
        clip: Mapping[str, Any],
        row: Mapping[str, Any],
    ) -> Scores:
        """Decode and measure a clip; a second time without cached memory if there was too little."""
        for is_last in (False, True):
            try:
                return self._measured(payloads, at, frames_THWC, clip)
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error, num_clips=1):
                    raise
                shortage = one_line(error, 300)
            free_caches()
            if is_last:
                name = f"clip {clip['clip_index']} of {row['video_id']}"
                log.warning("%s is not audited: out of memory (%s)", name, shortage)
        return dict(NOT_MEASURED)

    @torch.inference_mode()
    def _measured(
        self,
        payloads: Sequence[Mapping[str, np.ndarray]],
        at: int,
        frames_THWC: np.ndarray,
        clip: Mapping[str, Any],
    ) -> Scores:
        own, tokenizer = payloads[at], self._tokenizer
        num_frames = len(clip["frame_pts_seconds"])
        if self._continuous:
            before = payloads[max(0, at - clips_before(tokenizer.config, own)) : at]
            after = payloads[at + 1] if at + 1 < len(payloads) else None
            decoded = decode_in_sequence(before, own, after, tokenizer)
        else:
            no_pixels = torch.empty(1, 3, num_frames, 0, 0)  # only the lengths matter
            padded = pad(no_pixels, tokenizer.config, self._padding or Padding.REPEAT_LAST)
            decoded = padded.cut(
                tokenizer.decode_payload(to_tensors(own, tokenizer), padded.frames.shape[2], tiling=self._tiling)
            )
        valid = clip["num_valid_frames"]
        fake_CTHW = decoded[0, :, :valid].float().nan_to_num(0.0, 0.0, 0.0)
        source = np.array(frames_THWC[len(frames_THWC) - num_frames :][:valid])
        real_CTHW = frames_to_input(torch.from_numpy(source)[None].to(tokenizer.device))[0]
        if self._metrics is None:
            self._metrics = Metrics(self._metrics_spec(), str(tokenizer.device))
        scores = self._metrics.measure(real_CTHW, fake_CTHW)
        means = {name: None if values is None else math.fsum(values) / len(values) for name, values in scores.items()}
        return means | {"moments": moments_of(real_CTHW, fake_CTHW)}

    def _metrics_spec(self) -> MetricsSpec:
        given = self._audit.vgg_weights
        found = given or cached_vgg_weights()
        if found is None:
            log.info("LPIPS is not measured: no VGG16 on this machine, and --vgg-weights names none")
        return MetricsSpec(lpips=found is not None, vgg_weights=found, i3d=None)


def moments_of(real_CTHW: Tensor, fake_CTHW: Tensor) -> list[float]:
    """Sums over the values of a clip that tell a wrong order of colors or range of values from a poor reconstruction.

    Args:
        real_CTHW: the clip, float (3, T, H, W) in [-1, 1].
        fake_CTHW: its reconstruction, of the same shape, not clamped.

    Returns:
        Number of values, and sums of real, fake, real squared, real times fake, fake squared, and of the squared
        difference to the reconstruction with red and blue exchanged. They add up over clips.
    """
    real, fake = real_CTHW.double().flatten(1), fake_CTHW.double().flatten(1)
    sums = (real.sum(), fake.sum(), (real * real).sum(), (real * fake).sum(), (fake * fake).sum())
    exchanged = (real - fake.flip(0)).square().sum()
    return [float(real.numel()), *(float(value) for value in (*sums, exchanged))]
