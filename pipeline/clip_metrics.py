"""Metrics of a reconstructed clip: PSNR, SSIM and LPIPS by frame, and the features that FVD compares."""

# C channels, T frames, H height, W width, F frames of a clip

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vidshard.models.frechet import I3D
from vidshard.models.metrics import SSIM_WINDOW, psnr, ssim
from vidshard.models.training.perceptual import Perceptual, load_perceptual
from vidshard.pipeline import storage


@dataclass(frozen=True, kw_only=True)
class MetricsSpec:
    """Metrics to take beside PSNR and SSIM."""

    lpips: bool
    vgg_weights: str | None
    """File with VGG16 for LPIPS; None for torchvision's download."""
    i3d: str | None
    """TorchScript of I3D; None without FVD."""


class Metrics:
    """The metric networks, loaded once; measures reconstructions of one clip at a time.

    A clip alone, so that its figures do not depend on the other clips of a batch.
    """

    def __init__(self, spec: MetricsSpec, device: str) -> None:
        self._device = device
        self._perceptual: Perceptual | None = None
        self._i3d: I3D | None = None
        if spec.lpips:
            with storage.local_copy(spec.vgg_weights) as path:
                self._perceptual = load_perceptual(path).to(device)
        if spec.i3d is not None:
            with storage.local_copy(spec.i3d) as path:
                assert path is not None
                self._i3d = I3D(path, device)

    @torch.no_grad()
    def features(self, clip_CTHW: Tensor) -> list[float] | None:
        """Features of a clip, float (3, T, H, W) in [-1, 1], for FVD; None without I3D."""
        return None if self._i3d is None else self._i3d.features(clip_CTHW[None])[0].tolist()

    @torch.no_grad()
    def measure(self, real_CTHW: Tensor, fake_CTHW: Tensor) -> dict[str, list[float] | None]:
        """Measure a reconstruction frame by frame.

        Args:
            real_CTHW: the clip, float32 (3, T, H, W) in [-1, 1].
            fake_CTHW: its reconstruction, of the same shape.

        Returns:
            psnr, ssim and lpips, one value a frame; None for those that are not measured.
        """
        real_FCHW, fake_FCHW = real_CTHW.movedim(1, 0).contiguous(), fake_CTHW.movedim(1, 0).clamp(-1, 1).contiguous()
        large_enough = min(real_FCHW.shape[-2:]) >= SSIM_WINDOW
        lpips = None if self._perceptual is None else self._perceptual(real_FCHW, fake_FCHW).float().tolist()
        return {
            "psnr": psnr(real_FCHW, fake_FCHW).tolist(),
            "ssim": ssim(real_FCHW, fake_FCHW).tolist() if large_enough else None,
            "lpips": lpips,
        }
