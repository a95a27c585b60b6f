"""Haar bands: convolutions at the ends of a network that see each 2x2 pixels as one position of four bands."""

# B batch, T frames, H height, W width, C channels

from __future__ import annotations

import torch
from torch import Tensor

from vidshard.models.vidtok.layers import LayerPast, TimeConv

BANDS = 4
"""Bands of a 2x2 transform: the mean, and the differences along width, along height and along both."""


def haar(x_BTHWC: Tensor) -> Tensor:
    """Orthonormal 2x2 Haar transform of each frame: (B, T, H / 2, W / 2, 4 C), band by band."""
    a, b, c, d = (x_BTHWC[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1))
    return torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], dim=-1) / 2


def inverse_haar(x_BTHWC: Tensor) -> Tensor:
    """Inverse of `haar`: (B, T, 2 H, 2 W, C / 4)."""
    a, b, c, d = x_BTHWC.chunk(BANDS, dim=-1)
    top = torch.stack([a + b + c + d, a - b + c - d], dim=4).flatten(3, 4)
    bottom = torch.stack([a + b - c - d, a - b - c + d], dim=4).flatten(3, 4)
    return torch.stack([top, bottom], dim=3).flatten(2, 3) / 2


class HaarIn(TimeConv):
    """First convolution of an encoder, of the bands of the frames."""

    def forward(self, x_BTHWC: Tensor, past: LayerPast = (), *, keep_past: bool = True) -> tuple[Tensor, LayerPast]:
        """Transform and convolve a chunk; the past holds bands."""
        return super().forward(haar(x_BTHWC), past, keep_past=keep_past)


class HaarOut(TimeConv):
    """Last convolution of a decoder, to the bands of the frames."""

    def convolved(self, joined_BTHWC: Tensor) -> Tensor:
        """Convolve a chunk that has its context already, and transform it back."""
        return inverse_haar(super().convolved(joined_BTHWC))
