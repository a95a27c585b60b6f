"""Shortcuts around resampling, without weights: those of DC-AE (Chen et al., "Deep Compression Autoencoder", 2025).

Downwards, the pixels that become one, of all frames that become one, are its channels, averaged in groups. Upwards,
channels are repeated and become pixels and frames.
"""

# B batch, T frames, H height, W width, C channels

from __future__ import annotations

import math

import torch
from torch import Tensor


def shortcut(x_BTHWC: Tensor, shape: torch.Size) -> Tensor:
    """Resample a map without weights to the shape of another: half or double its sides, and its frames or as many."""
    B, T, H, W, C = shape
    if x_BTHWC.shape[2] > H:
        by_pixel = x_BTHWC.reshape(B, T, -1, H, 2, W, 2, x_BTHWC.shape[-1]).permute(0, 1, 3, 5, 7, 2, 4, 6)
        return regrouped(by_pixel.flatten(4), C)
    by_pixel = regrouped(x_BTHWC, T // x_BTHWC.shape[1] * 4 * C).view(*x_BTHWC.shape[:4], C, -1, 2, 2)
    return by_pixel.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(shape)


def regrouped(x_BTHWC: Tensor, channels: int) -> Tensor:
    """Average the channels in ``channels`` groups, or repeat each, or both where neither number divides the other."""
    common = math.gcd(x_BTHWC.shape[-1], channels)
    repeated = x_BTHWC.repeat_interleave(channels // common, dim=-1) if channels > common else x_BTHWC
    return repeated.reshape(*x_BTHWC.shape[:-1], channels, -1).mean(-1)
