"""Metrics: PSNR and SSIM of reconstructions, and the use of a codebook.

Tokens are counted as they arrive. Memory is one counter for each entry of the codebook, however many tokens there are.
"""

# F frames, C channels, H height, W width

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

MAX_CODEBOOK = 1 << 27
"""Largest codebook whose use is counted; the counters then take 1 GiB."""


class CodebookUse:
    """Running count of tokens.

    Args:
        codebook_size: tokens are below it; 8 bytes are kept for each.
    """

    def __init__(self, codebook_size: int) -> None:
        if not 1 <= codebook_size <= MAX_CODEBOOK:
            raise ValueError(f"the use of codebooks of 1 ... {MAX_CODEBOOK} tokens is counted, got {codebook_size}")
        self.codebook_size = codebook_size
        self.counts = np.zeros(codebook_size, np.int64)

    def update(self, tokens: npt.ArrayLike) -> None:
        """Count tokens: integers of any shape.

        Raises:
            ValueError: for other values, or a token outside the codebook; nothing is counted then.
        """
        flat = np.asarray(tokens).reshape(-1)
        if not flat.size:
            return
        if flat.dtype.kind not in "iu":
            raise ValueError(f"tokens must be integers, got {flat.dtype}")
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= self.counts.size:
            raise ValueError(f"tokens must lie in 0 ... {self.counts.size - 1}, got {low} ... {high}")
        # bincount ends at the largest token of this batch.
        counted = np.bincount(flat.astype(np.int64, copy=False))
        self.counts[: counted.size] += counted

    @property
    def num_tokens(self) -> int:
        """Number of tokens counted."""
        return int(self.counts.sum())

    @property
    def num_used(self) -> int:
        """Number of different tokens that occurred."""
        return int(np.count_nonzero(self.counts))

    @property
    def utilisation(self) -> float:
        """Share of the codebook that occurred, in [0, 1]."""
        return self.num_used / self.counts.size

    @property
    def ceiling(self) -> int:
        """Largest number of different tokens that could have occurred: tokens counted, at most the codebook."""
        return min(self.num_tokens, self.counts.size)

    @property
    def share_of_ceiling(self) -> float:
        """Share of `ceiling` that occurred, in [0, 1]; 0 before the first token.

        Few positions cannot use a large codebook: 72 tokens of 32,768 are 0.2 % of the codebook and all that could be.
        """
        return self.num_used / max(self.ceiling, 1)

    @property
    def entropy_bits(self) -> float:
        """Entropy of the token frequencies, in [0, log2 of the codebook size]; 0 before the first token."""
        counts = self.counts[self.counts > 0]
        share = counts / max(counts.sum(), 1)
        return float(max(0.0, -(share * np.log2(share)).sum()))

    @property
    def perplexity(self) -> float:
        """2 to the power of the entropy in bits: the number of equally frequent tokens with the same entropy."""
        return float(2.0**self.entropy_bits)


def psnr(real_FCHW: Tensor, fake_FCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB: float32 (F,).

    Frames are clamped to [-1, 1] and mapped to [0, 1]. As in VidTok's evaluation, 1e-8 is added to a frame's mean
    squared error, so 80 dB is the maximum.
    """
    errors = (_unit_range(real_FCHW) - _unit_range(fake_FCHW)).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(errors + 1e-8)


SSIM_WINDOW = 11
"""Width of the window of `ssim` in pixels; frames must not be smaller."""


def ssim(real_FCHW: Tensor, fake_FCHW: Tensor) -> Tensor:
    """Structural similarity of each frame, at most 1: float32 (F,).

    Wang et al., "Image Quality Assessment", 2004: Gaussian window of 11 x 11 and sigma 1.5, K1 0.01, K2 0.03, no
    padding, mean over colors. As in its authors' code and in VidTok's, blocks are first averaged until the shorter side
    is near 256. Frames are clamped to [-1, 1].

    Raises:
        ValueError: for frames smaller than the window.
    """
    real, fake = _unit_range(real_FCHW), _unit_range(fake_FCHW)
    shorter = min(real.shape[-2:])
    if shorter < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of at least {SSIM_WINDOW} x {SSIM_WINDOW}, got {tuple(real.shape[-2:])}")
    if (factor := max(1, round(shorter / 256))) > 1:
        real, fake = F.avg_pool2d(real, factor), F.avg_pool2d(fake, factor)
    offsets = torch.arange(SSIM_WINDOW, device=real.device, dtype=torch.float32) - SSIM_WINDOW // 2
    gaussian = torch.exp(-offsets.square() / (2 * 1.5**2))
    gaussian /= gaussian.sum()

    def blurred(x_FCHW: Tensor) -> Tensor:
        x = x_FCHW.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(x, gaussian[None, None, :, None]), gaussian[None, None, None])

    real_mean, fake_mean = blurred(real), blurred(fake)
    real_variance = blurred(real.square()) - real_mean.square()
    fake_variance = blurred(fake.square()) - fake_mean.square()
    covariance = blurred(real * fake) - real_mean * fake_mean
    luminance = (2 * real_mean * fake_mean + 0.01**2) / (real_mean.square() + fake_mean.square() + 0.01**2)
    contrast = (2 * covariance + 0.03**2) / (real_variance + fake_variance + 0.03**2)
    return (luminance * contrast).view(real.shape[0], -1).mean(dim=1)


def _unit_range(x: Tensor) -> Tensor:
    return (x.float().clamp(-1, 1) + 1) / 2
