"""Evaluation during training: reconstructions of held-out clips and their metrics. The training state is unchanged."""

# B batch, C channels, T frames, H height, W width, F frames of all clips

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vidshard.models.codebook_use import MAX_CODEBOOK, CodebookUse
from vidshard.models.metrics import SSIM_WINDOW, psnr, ssim
from vidshard.models.tokenizer import frames_to_input
from vidshard.models.training.losses import frames_of
from vidshard.models.training.state import TrainState


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evaluation:
    """Metrics summed over frames, and token counts; evaluations of several batches or workers can be added."""

    num_frames: int
    psnr: float
    """Sum of dB."""
    l1: float
    """Sum of mean absolute differences, each in [0, 2]."""
    ssim: float | None
    """Sum of SSIM; None for frames smaller than its window."""
    lpips: float | None
    """Sum of LPIPS; None where LPIPS was not loaded."""
    parts: dict[str, float]
    """Sum of dB of the reconstruction from each part of the latents alone, by name; empty without parts."""
    use: CodebookUse | None
    """Counts of tokens; None for KL, and where the codebook is too large to count."""

    def __add__(self, other: Evaluation) -> Evaluation:
        def summed(a: float | None, b: float | None) -> float | None:
            return None if a is None or b is None else a + b

        use = None
        if self.use is not None and other.use is not None:
            use = CodebookUse(self.use.counts.size)
            use.counts += self.use.counts + other.use.counts
        return Evaluation(
            num_frames=self.num_frames + other.num_frames,
            psnr=self.psnr + other.psnr,
            l1=self.l1 + other.l1,
            ssim=summed(self.ssim, other.ssim),
            lpips=summed(self.lpips, other.lpips),
            parts={name: total + other.parts[name] for name, total in self.parts.items()},
            use=use,
        )

    def metrics(self) -> dict[str, float]:
        """Means over frames, and codebook statistics, by name.

        Those that could be measured of psnr, l1, ssim, lpips, codebook_utilization, codebook_share_of_ceiling (the used
        part of what the counted tokens could use), codebook_entropy_bits and codebook_perplexity; and psnr_PART_only
        for each part of the latents.
        """
        sums = {"psnr": self.psnr, "l1": self.l1, "ssim": self.ssim, "lpips": self.lpips}
        sums |= {f"psnr_{name}_only": total for name, total in self.parts.items()}
        means = {name: value / max(self.num_frames, 1) for name, value in sums.items() if value is not None}
        if self.use is None:
            return means
        return means | {
            "codebook_utilization": self.use.utilization,
            "codebook_share_of_ceiling": self.use.share_of_ceiling,
            "codebook_entropy_bits": self.use.entropy_bits,
            "codebook_perplexity": self.use.perplexity,
        }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reconstruction:
    """Clips and their reconstruction, all float32 (B, 3, T, H, W) in about [-1, 1]."""

    clips: Tensor
    video: Tensor
    parts: dict[str, Tensor]
    """Reconstruction from each part of the latents alone, by name; empty for tokenizers whose latents have no parts."""
    tokens: Tensor | None


@torch.no_grad()
def reconstruct(state: TrainState, frames_BTHWC: Tensor) -> Reconstruction:
    """Encode and decode a batch, without dropout; of latents that training samples, the means are decoded.

    Args:
        frames_BTHWC: uint8 (B, T, H, W, 3), on any device.
    """
    x_BCTHW = frames_to_input(frames_BTHWC.to(state.device)).contiguous()
    with state.autocast(), state.evaluating():
        made = state.generator(x_BCTHW, with_parts=True)
    video = partial(state.trainable.video, num_frames=x_BCTHW.shape[2])
    return Reconstruction(
        clips=x_BCTHW,
        video=video(made["decoded"]),
        parts={name: video(decoded) for name, decoded in made.get("parts", {}).items()},
        tokens=made.get("tokens"),
    )


@torch.no_grad()
def evaluate_batch(state: TrainState, frames_BTHWC: Tensor) -> Evaluation:
    """Measure reconstructions of held-out clips; within `TrainState.averaged`, those of the averaged weights.

    Args:
        frames_BTHWC: uint8 (B, T, H, W, 3), on any device.
    """
    made = reconstruct(state, frames_BTHWC)
    real_FCHW, fake_FCHW = frames_of(made.clips), frames_of(made.video).clamp(-1, 1)
    use = None
    codebook_size = state.trainable.config.codebook_size
    if made.tokens is not None and codebook_size is not None and codebook_size <= MAX_CODEBOOK:
        use = CodebookUse(codebook_size)
        use.update(made.tokens.cpu().numpy())
    lpips = None
    if state.perceptual is not None:
        with state.autocast():
            lpips = float(state.perceptual(real_FCHW, fake_FCHW).float().sum())
    return Evaluation(
        num_frames=real_FCHW.shape[0],
        psnr=float(psnr(real_FCHW, fake_FCHW).sum()),
        l1=float((real_FCHW - fake_FCHW).abs().mean(dim=(1, 2, 3)).sum()),
        ssim=float(ssim(real_FCHW, fake_FCHW).sum()) if min(real_FCHW.shape[-2:]) >= SSIM_WINDOW else None,
        lpips=lpips,
        parts={name: float(psnr(real_FCHW, frames_of(video).clamp(-1, 1)).sum()) for name, video in made.parts.items()},
        use=use,
    )
