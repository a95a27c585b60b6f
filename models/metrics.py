"""Metrics: PSNR and SSIM of reconstructions."""

# F frames, C channels, H height, W width

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


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
