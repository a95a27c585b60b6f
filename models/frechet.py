"""Fréchet video distance: features of clips from a given I3D, and the distance of two sets of them."""

# N clips, D features, B batch, C channels, T frames, H height, W width

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vidshard.schemas.errors import first_line

I3D_SIZE = 224
"""Height and width of the frames that I3D takes."""


def frechet_distance(real_ND: npt.NDArray[np.floating], fake_ND: npt.NDArray[np.floating]) -> float:
    """Squared Fréchet distance of two Gaussians with the means and covariances of two sets of features.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", 2017, section 4:
    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``, in float64, with the unbiased covariances of numpy.cov. The trace
    of the root is the sum of the roots of the eigenvalues of the symmetric ``C1^(1/2) C2 C1^(1/2)``, so no imaginary
    parts have to be dropped. The sums run in the order of the rows: equal rows in equal order give an equal result.

    Args:
        real_ND: features, at least two rows.
        fake_ND: features of the other set, of the same width.

    Raises:
        ValueError: fewer than two rows, another width, or values that are not finite.
    """
    real, fake = np.asarray(real_ND, np.float64), np.asarray(fake_ND, np.float64)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1] or min(len(real), len(fake)) < 2:
        raise ValueError(f"two sets of at least two clips are needed, got shapes {real.shape} and {fake.shape}")
    if not (np.isfinite(real).all() and np.isfinite(fake).all()):
        raise ValueError("the features hold values that are not finite")
    (real_mean, real_covariance), (fake_mean, fake_covariance) = _moments(real), _moments(fake)
    root = _root(real_covariance)
    roots = np.sqrt(np.clip(np.linalg.eigvalsh(root @ fake_covariance @ root), 0, None))
    difference = real_mean - fake_mean
    distance = difference @ difference + np.trace(real_covariance) + np.trace(fake_covariance) - 2 * roots.sum()
    return float(max(0.0, distance))


def _moments(features_ND: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and covariance, taken a thousand rows at a time around the first row."""
    count, width = features_ND.shape
    origin = features_ND[0]
    total, products = np.zeros(width), np.zeros((width, width))
    for at in range(0, count, 1000):
        part = features_ND[at : at + 1000] - origin
        total += part.sum(axis=0)
        products += part.T @ part
    mean = total / count
    covariance = (products - count * np.outer(mean, mean)) / (count - 1)
    return origin + mean, covariance


def _root(covariance_DD: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    values, vectors = np.linalg.eigh(covariance_DD)
    root: npt.NDArray[np.float64] = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root


class I3D:
    """I3D as a TorchScript program, as StyleGAN-V and others publish it; the program in the file is executed."""

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        """Load the program.

        Raises:
            ValueError: the file is no TorchScript.
        """
        try:
            self._program = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"{path} is no TorchScript program: {first_line(error, 200)}") from error
        self._device = torch.device(device)

    @torch.no_grad()
    def features(self, x_BCTHW: Tensor) -> Tensor:
        """Compute features of clips: float32 (B, D).

        Frames are resized to 224 x 224 (bilinear, antialiased) here, so that programs agree.

        Args:
            x_BCTHW: (B, 3, T, H, W) in [-1, 1].

        Raises:
            ValueError: the program takes other arguments, or gives no features (B, D).
        """
        frames = x_BCTHW.to(self._device, torch.float32).clamp(-1, 1)
        if frames.shape[-2:] != (I3D_SIZE, I3D_SIZE):
            flat = frames.movedim(2, 1).flatten(0, 1)
            flat = F.interpolate(flat, (I3D_SIZE, I3D_SIZE), mode="bilinear", align_corners=False, antialias=True)
            frames = flat.reshape(frames.shape[0], frames.shape[2], *flat.shape[1:]).movedim(1, 2)
        try:
            found = self._program(frames, rescale=False, resize=False, return_features=True)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                "the I3D program does not take (clips, rescale, resize, return_features) or these clips: "
                f"{str(error).strip().splitlines()[-1][:200]}"
            ) from error
        if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[0] != x_BCTHW.shape[0]:
            raise ValueError("the I3D program gives no features of shape (clips, features)")
        return found.float().cpu()
