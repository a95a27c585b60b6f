"""Spatial tiling: run a network tile by tile and blend the results, for frames too large for memory.

Tiles overlap and lie on the latent grid. Within an overlap, each tile's weight falls linearly towards its edge.
Encoding blends the encoder output before the head rounds it, and decoding blends frames. Memory holds one tile's pass
and the whole result.

Tiling is an approximation: a tile is padded with zeros at its edges, and `FrameAttention` sees the tile instead of the
whole frame. docs/performance.md gives the error. A frame that fits one tile gives the same bits as without tiling.

Only whole clips are tiled: a stream would have to keep the past of every tile.
"""

# B batch, C channels, T frames, H height, W width; a prime in text (T', H', W') is the latent grid

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from vidshard.models.vidtok.config import VidTokConfig
from vidshard.schemas.tokenizers import TokenizerConfig

DEFAULT_OVERLAP = 64
"""Default overlap in pixels, a multiple of every preset's space stride; docs/performance.md has its cost and gain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """Size and overlap of tiles, in pixels of the video; each side is a multiple of the model's space stride."""

    height: int
    width: int
    overlap: int = DEFAULT_OVERLAP
    """Rows or columns that neighbors share at least; more where the tiles do not divide the frame."""

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
        """Choose the largest square tiles whose float32 pass over one clip fits a budget, see `pass_bytes`.

        Raises:
            ValueError: for a budget below the smallest tile that the overlap allows, or an impossible overlap.
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
        """Check that the tiles lie on the model's latent grid.

        Raises:
            ValueError: they do not; the message names the nearest sizes that do. Or the model takes whole frames only.
        """
        if not config.takes_tiles:
            _, height, width = config.default_clip
            raise ValueError(f"{config.name} takes whole frames of {height}x{width} only, no tiles")
        stride = config.space_stride
        for name, pixels in (("tile height", self.height), ("tile width", self.width), ("overlap", self.overlap)):
            if pixels % stride:
                below = pixels // stride * stride
                nearest = " or ".join(str(n) for n in (below, below + stride) if n > 0 or name == "overlap")
                raise ValueError(
                    f"{config.name}: {name} must be divisible by {stride}, got {pixels}; nearest: {nearest}"
                )

    def fits(self, height: int, width: int) -> bool:
        """Tell whether a frame of this size fits one tile."""
        return height <= self.height and width <= self.width


PEAK_COPIES = 9
"""Upper bound on the peak memory of a pass, in copies of its largest map. Measured: 5.3 to 6.4 to encode and 6.7 to 8.9
to decode; most in small tiles, where some 130 MB independent of the tile count (python -m benchmarks.tiling
--memory)."""


def pass_bytes(config: VidTokConfig, num_frames: int, height: int, width: int) -> int:
    """Estimate the peak memory of encoding or decoding one float32 clip on a CPU, without weights, clip and result.

    It is `PEAK_COPIES` times the largest map of any level, with the frames that encoding adds to the first latent. For
    fsq_causal_488_32768 it is 4608 bytes for each pixel of the 20 frames that 17 become.
    """
    most_values, sides = 0.0, 2 if config.haar_bands else 1
    for level, multiplier in enumerate(config.width_multipliers):
        most_values = max(most_values, config.base_width * multiplier / sides**2)
        sides *= 2 if level in config.encoder_space_levels else 1
    num_encoded = config.latent_frames(num_frames) * config.time_stride
    return math.ceil(PEAK_COPIES * 4 * most_values * num_encoded * height * width)


def map_tiles(
    network: Callable[[Tensor], Tensor], x_BCTHW: Tensor, tiling: Tiling | None, *, cell_in: int, cell_out: int
) -> Tensor:
    """Run a network over the tiles of its input and blend the results; over the whole input if that is one tile.

    Args:
        network: takes (B, C, T, h, w) and gives the same patch at its own resolution, with any channels and frames.
        cell_in, cell_out: rows, and columns, of one latent in the network's input and output: the space stride and 1
            to encode, 1 and the stride to decode.

    Returns:
        The blended output, in the network's dtype; blending is in float32.
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
    """Place the tiles of one axis: as few as cover it, evenly spread, the last one ending at its end.

    Even spreading costs nothing and shares the surplus overlap among all pairs of neighbors; otherwise the last pair
    would have all of it.
    """
    if size <= tile:
        return [0]
    last = -(-(size - tile) // (tile - overlap))
    return [index * (size - tile) // last for index in range(last + 1)]


def tile_shares(starts: Sequence[int], tile: int, cell: int) -> Tensor:
    """Compute the blending weight of each tile at each of its positions along one axis; weights sum to 1 everywhere.

    A weight falls linearly over the overlap with a neighbor, and is divided by the sum over all tiles at the position,
    which matters where three overlap.

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
    """Slice of a tile, given in latents, on an axis with ``cell`` positions per latent."""
    return slice(start * cell, (start + tile) * cell)
