"""Frames too large for the memory at hand: run a network tile by tile in space and blend what it gives.

Tiles overlap and lie on the latent grid. Within an overlap each tile's share falls linearly towards its edge; encoding
blends the encoder's output before the head rounds it, so tokens come of blended latents, and decoding blends frames.
The memory is that of one tile and of the whole result. It is an approximation: a tile sees zeros beyond its edges, and
its attention only its own positions (`FrameAttention` looks at the whole frame). docs/performance.md gives the error.
A frame that fits one tile takes the same path as without tiling, to the bit.

Only whole clips are tiled. A stream would have to keep the past of every tile.
"""

# B batch, C channels, T frames, H height, W width; a prime in text (T', H', W') is the latent grid

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from vidshard.models.config import TokenizerConfig
from vidshard.models.vidtok.config import VidTokConfig

DEFAULT_OVERLAP = 64
"""Pixels; a multiple of every preset's space stride. What it costs and gains: docs/performance.md."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """Tiles of one size, in pixels of the video; each side a multiple of the model's space stride."""

    height: int
    width: int
    overlap: int = DEFAULT_OVERLAP
    """Neighbours share at least so many rows or columns; more where the tiles do not divide the frame."""

    def __post_init__(self) -> None:
        if self.overlap < 0 or min(self.height, self.width) <= self.overlap:
            raise ValueError(
                f"tiles must be larger than their overlap, and that at least 0: got {self.height}x{self.width} with an "
                f"overlap of {self.overlap}"
            )

    @classmethod
    def within(
        cls, budget_bytes: int, config: VidTokConfig, num_frames: int, *, overlap: int = DEFAULT_OVERLAP
    ) -> Tiling:
        """The largest square tiles that one clip's float32 pass fits a budget with, see `pass_bytes`.

        Raises:
            ValueError: for a budget below the smallest tile that the overlap allows, or an overlap that cannot be.
        """
        stride = config.space_stride
        side = overlap // stride * stride + stride
        needed = pass_bytes(config, num_frames, side, side)
        if needed > budget_bytes:
            raise ValueError(
                f"{config.name}: {budget_bytes} bytes are too few for {num_frames} frames of the smallest tile, "
                f"{side}x{side} pixels with an overlap of {overlap}: give {needed} or more, or fewer frames"
            )
        while pass_bytes(config, num_frames, side + stride, side + stride) <= budget_bytes:
            side += stride
        tiling = cls(height=side, width=side, overlap=overlap)
        tiling.check(config)
        return tiling

    def check(self, config: TokenizerConfig) -> None:
        """Refuse tiles that do not lie on the model's latent grid.

        Raises:
            ValueError: naming the nearest sizes that do.
        """
        stride = config.space_stride
        for name, pixels in (("tile height", self.height), ("tile width", self.width), ("overlap", self.overlap)):
            if pixels % stride:
                below = pixels // stride * stride
                nearest = " or ".join(str(n) for n in (below, below + stride) if n > 0 or name == "overlap")
                raise ValueError(
                    f"{config.name}: {name} must be divisible by {stride}, got {pixels}; nearest: {nearest}"
                )

    def fits(self, height: int, width: int) -> bool:
        """Whether a frame of this size is one tile."""
        return height <= self.height and width <= self.width


PEAK_COPIES = 9
"""Copies of its largest map that a pass holds at its peak, at most. Measured: 5.3 to 6.4 to encode and 6.7 to 8.9 to
decode, the most in small tiles, where some 130 MB that do not depend on the tile count (python -m benchmarks.tiling
--memory)."""


def pass_bytes(config: VidTokConfig, num_frames: int, height: int, width: int) -> int:
    """About what encoding or decoding one float32 clip on a CPU takes at its peak, without weights, clip and result.

    That is `PEAK_COPIES` of the map with the most values, of the levels of the network and with the frames that
    encoding adds to a first latent; for fsq_causal_488_32768 4608 bytes a pixel of each of 20 frames that 17 become.
    """
    most_values, sides = 0.0, 1
    for level, multiplier in enumerate(config.width_multipliers):
        most_values = max(most_values, config.base_width * multiplier / sides**2)
        sides *= 2 if level in config.encoder_space_levels else 1
    num_encoded = config.latent_frames(num_frames) * config.time_stride
    return math.ceil(PEAK_COPIES * 4 * most_values * num_encoded * height * width)


def map_tiles(
    network: Callable[[Tensor], Tensor], x_BCTHW: Tensor, tiling: Tiling | None, *, cell_in: int, cell_out: int
) -> Tensor:
    """Run a network over the tiles of its input and blend what it gives; over the whole where that is one tile.

    Args:
        network: takes (B, C, T, h, w) and gives the same patch at its own resolution, with any channels and frames.
        cell_in, cell_out: rows, and columns, of one latent in the network's input and output: the space stride and 1
            to encode, 1 and the stride to decode.

    Returns:
        What the network gives, in its dtype; blended in float32.
    """
    stride = max(cell_in, cell_out)
    rows, columns = (size // cell_in for size in x_BCTHW.shape[3:])
    if tiling is None or tiling.fits(rows * stride, columns * stride):
        return network(x_BCTHW)
    tile_rows, tile_columns = min(tiling.height // stride, rows), min(tiling.width // stride, columns)
    tops = tile_starts(rows, tile_rows, tiling.overlap // stride)
    lefts = tile_starts(columns, tile_columns, tiling.overlap // stride)
    top_shares, left_shares = tile_shares(tops, tile_rows, cell_out), tile_shares(lefts, tile_columns, cell_out)
    blended_BCTHW: Tensor | None = None
    for (top, top_share), (left, left_share) in product(
        zip(tops, top_shares, strict=True), zip(lefts, left_shares, strict=True)
    ):
        tile_BCTHW = network(x_BCTHW[..., cut(top, tile_rows, cell_in), cut(left, tile_columns, cell_in)])
        if blended_BCTHW is None:
            dtype, size = tile_BCTHW.dtype, (rows * cell_out, columns * cell_out)
            blended_BCTHW = tile_BCTHW.new_zeros(*tile_BCTHW.shape[:3], *size, dtype=torch.float32)
        share_HW = (top_share[:, None] * left_share).to(tile_BCTHW.device)
        blended_BCTHW[..., cut(top, tile_rows, cell_out), cut(left, tile_columns, cell_out)] += share_HW * tile_BCTHW
    assert blended_BCTHW is not None
    return blended_BCTHW.to(dtype)


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles of one axis begin: as few as cover it, spread evenly, the last one ending where it ends.

    Spreading costs nothing and gives every pair of neighbours the overlap that a last tile shifted inwards would have
    for itself.
    """
    if size <= tile:
        return [0]
    last = -(-(size - tile) // (tile - overlap))
    return [index * (size - tile) // last for index in range(last + 1)]


def tile_shares(starts: Sequence[int], tile: int, cell: int) -> Tensor:
    """How much each tile counts at each of its positions along one axis; at every position the shares add up to 1.

    A share falls linearly over what a tile has in common with its neighbour, and is divided by the sum over all
    tiles there, which matters where three meet.

    Args:
        cell: positions of one latent.

    Returns:
        float32 (tiles, tile * cell).
    """
    length = tile * cell
    middles = torch.arange(length, dtype=torch.float64) + 0.5
    shares = torch.ones(len(starts), length, dtype=torch.float64)
    for index, (start, next_start) in enumerate(pairwise(starts)):
        shared = (start + tile - next_start) * cell
        if shared > 0:
            shares[index] = shares[index].minimum((length - middles) / shared)
            shares[index + 1] = shares[index + 1].minimum(middles / shared)
    total = torch.zeros((starts[-1] + tile) * cell, dtype=torch.float64)
    for start, share in zip(starts, shares, strict=True):
        total[cut(start, tile, cell)] += share
    return torch.stack([s / total[cut(at, tile, cell)] for at, s in zip(starts, shares, strict=True)]).float()


def cut(start: int, tile: int, cell: int) -> slice:
    """The positions of a tile, given in latents, on an axis with ``cell`` positions for each."""
    return slice(start * cell, (start + tile) * cell)
