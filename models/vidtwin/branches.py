"""Branches of VidTwin: tokens to the moments of the structure and dynamics latents, and latents back to tokens.

Each branch has two directions. ``moments`` reduces the encoder's tokens to mean and log-variance, concatenated along
the last axis. ``align`` turns latents into tokens for the decoder, which gets the sum over the branches.

The alternatives in the second half are the ablations of the paper's Table 3. Their code was never published, so what
replaces the left-out part is our choice. Parameter names of the others are those of the released checkpoint.
"""

# B batch, T frames, S positions of a frame (row by row), C channels; Q queries, D their channels; H height, W width of
# a grid of patches or of a latent; N batches times queries, or batches times positions

from __future__ import annotations

from itertools import pairwise
from typing import Protocol, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vidshard.models.vidtwin.config import VidTwinConfig
from vidshard.models.vidtwin.qformer import QFormer


class Branch(Protocol):
    """One way from tokens to latents and back."""

    def moments(self, z_BTSC: Tensor) -> dict[str, Tensor]:
        """Compute mean and log-variance of each latent by column: (B, *shape), their channels concatenated."""
        ...

    def align(self, latents: dict[str, Tensor]) -> Tensor:
        """Turn latents (B, *shape) by column into tokens (B, T, S, C)."""
        ...


def branches(config: VidTwinConfig) -> dict[str, nn.Module]:
    """Make the branches of an architecture by the name of their part, each a `Branch`."""
    dynamics = {"dynamics": Dynamics(config)}
    match config.architecture:
        case "no-disentanglement":
            return {"structure": FrameStructure(config)}
        case "no-dynamics-average":
            return {"structure": QueryStructure(config), "dynamics": QueryDynamics(config)}
        case "no-structure-qformer":
            return {"structure": MixedStructure(config), **dynamics}
        case "no-moved-positions":
            return {"structure": FlatStructure(config), **dynamics}
        case _:
            return {"structure": QueryStructure(config), **dynamics}


# Structure


class Structure(nn.Module):
    """Base of structure branches whose queries are small images, which convolutions reduce.

    A subclass says how the frames become queries, at each position by itself.
    """

    def __init__(self, config: VidTwinConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.structure_width << level for level in range(config.structure_halvings + 1)]
        channels, query_width = config.structure_channels, config.query_width
        self.conv_in = nn.Conv2d(query_width, widths[0], 3, padding=1)
        self.content_downsample_blocks = halvings(widths)
        self.bottle_down = nn.Conv2d(widths[-1], 2 * channels, 3, padding=1)
        self.bottle_up = nn.Sequential(nn.Conv2d(channels, widths[-1], 3, padding=1), nn.ReLU())
        doublings: list[nn.Module] = []
        for above, below in pairwise(reversed(widths)):
            doublings += [nn.Conv2d(above, below, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2)]
        self.content_upsample_blocks = nn.Sequential(*doublings)
        self.conv_out = nn.Conv2d(widths[0], query_width, 3, padding=1)
        self.cont_emb = nn.Sequential(
            nn.Linear(query_width, config.width),
            nn.ReLU(),
            nn.Conv1d(config.num_queries, config.num_frames, 1),
        )

    def queries(self, z_BTSC: Tensor) -> Tensor:
        """Reduce the frames of each position: (B, Q, S, D)."""
        raise NotImplementedError

    def moments(self, z_BTSC: Tensor) -> dict[str, Tensor]:
        config = self.config
        q_BQSD = self.queries(z_BTSC)
        image_NDHW = q_BQSD.reshape(-1, config.grid, config.grid, config.query_width).permute(0, 3, 1, 2)
        h: Tensor = self.bottle_down(self.content_downsample_blocks(self.conv_in(image_NDHW)))
        return {"structure": split_axis(h.permute(0, 2, 3, 1), 0, config.num_queries)}

    def align(self, latents: dict[str, Tensor]) -> Tensor:
        config = self.config
        latent_NCHW = latents["structure"].flatten(0, 1).permute(0, 3, 1, 2)
        image_NDHW = self.conv_out(self.content_upsample_blocks(self.bottle_up(latent_NCHW)))
        first = (image_NDHW.shape[2] - config.grid) // 2  # halving rounds up, so the image can be larger than the grid
        cut = slice(first, first + config.grid)
        q_NSD = image_NDHW[:, :, cut, cut].permute(0, 2, 3, 1).flatten(1, 2)
        q_BQSC = split_axis(F.relu(self.cont_emb[0](q_NSD)), 0, config.num_queries)
        return F.relu(mixed(q_BQSC, cast(nn.Conv1d, self.cont_emb[2])))


class QueryStructure(Structure):
    """Released structure branch: at each position, a Q-Former summarizes the frames."""

    def __init__(self, config: VidTwinConfig) -> None:
        super().__init__(config)
        self.temporal_qformer = qformer(config, config.num_queries)

    def queries(self, z_BTSC: Tensor) -> Tensor:
        q_NQD = self.temporal_qformer(z_BTSC.transpose(1, 2).flatten(0, 1))
        return split_axis(q_NQD, 0, self.config.num_positions).transpose(1, 2)


# Dynamics


class Dynamics(nn.Module):
    """Released dynamics branch: means over the rows (``dynamics_x``) and over the columns (``dynamics_y``).

    ``dynamics_x`` is indexed by column, ``dynamics_y`` by row. All weights are shared by the two.
    """

    def __init__(self, config: VidTwinConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.motion_head = nn.Conv2d(width, 2 * config.dynamics_channels, 3, padding=1)
        self.motion_emb = nn.Sequential(
            nn.Linear(config.dynamics_channels, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.downsample_motion_module: nn.Module | None = None
        self.up_motion: nn.Module | None = None
        if config.dynamics_halvings:
            self.downsample_motion_module = halvings([width] * (config.dynamics_halvings + 1))
            self.up_motion = nn.Sequential(
                nn.Linear(config.dynamics_size, config.grid), nn.ReLU(), nn.Linear(config.grid, config.grid), nn.ReLU()
            )

    def moments(self, z_BTSC: Tensor) -> dict[str, Tensor]:
        z_BTHWC = halved_frames(z_BTSC, self.config, self.downsample_motion_module)
        by_axis = torch.cat([z_BTHWC.mean(dim=2), z_BTHWC.mean(dim=3)])
        moments: Tensor = self.motion_head(by_axis.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x, y = moments.chunk(2)
        return {"dynamics_x": x, "dynamics_y": y}

    def align(self, latents: dict[str, Tensor]) -> Tensor:
        u: Tensor = self.motion_emb(torch.cat([latents["dynamics_x"], latents["dynamics_y"]]))
        if self.up_motion is not None:
            u = self.up_motion(u.transpose(2, 3)).transpose(2, 3)
        x_BTWC, y_BTHC = u.chunk(2)
        return (x_BTWC[:, :, None] + y_BTHC[:, :, :, None]).flatten(2, 3)


# Ablations of Table 3


class FrameStructure(Structure):
    """Ablation (a), no disentanglement: each frame is a query, and there is no dynamics branch."""

    def __init__(self, config: VidTwinConfig) -> None:
        super().__init__(config)
        self.frame_emb = nn.Linear(config.width, config.query_width)

    def queries(self, z_BTSC: Tensor) -> Tensor:
        q_BTSD: Tensor = self.frame_emb(z_BTSC)
        return q_BTSD


class MixedStructure(Structure):
    """Ablation (c), no Q-Former: a linear layer and a convolution across the frames, the mirror of ``cont_emb``."""

    def __init__(self, config: VidTwinConfig) -> None:
        super().__init__(config)
        self.frame_emb = nn.Sequential(
            nn.Linear(config.width, config.query_width), nn.ReLU(), nn.Conv1d(config.num_frames, config.num_queries, 1)
        )

    def queries(self, z_BTSC: Tensor) -> Tensor:
        return mixed(F.relu(self.frame_emb[0](z_BTSC)), cast(nn.Conv1d, self.frame_emb[2]))


class FlatStructure(nn.Module):
    """Ablation (d): a Q-Former over whole frames, whose positions lie in the channels instead of the batch."""

    TOKEN_WIDTH = 32

    def __init__(self, config: VidTwinConfig) -> None:
        super().__init__()
        self.config = config
        width, query_width, frame_width = config.width, config.query_width, config.num_positions * self.TOKEN_WIDTH
        self.token_emb = nn.Linear(width, self.TOKEN_WIDTH)
        self.frame_emb = nn.Linear(frame_width, width)
        self.temporal_qformer = qformer(config, config.num_queries)
        self.bottle_down = nn.Linear(query_width, 2 * query_width)
        self.cont_emb = nn.Sequential(
            nn.Linear(query_width, width),
            nn.ReLU(),
            nn.Linear(width, frame_width),
            nn.ReLU(),
            nn.Conv1d(config.num_queries, config.num_frames, 1),
        )
        self.token_out = nn.Linear(self.TOKEN_WIDTH, width)

    def moments(self, z_BTSC: Tensor) -> dict[str, Tensor]:
        frames_BTC = F.relu(self.frame_emb(self.token_emb(z_BTSC).flatten(2)))
        return {"structure": self.bottle_down(self.temporal_qformer(frames_BTC))}

    def align(self, latents: dict[str, Tensor]) -> Tensor:
        frames_BTP = F.relu(self.cont_emb(latents["structure"]))
        tokens: Tensor = self.token_out(split_axis(frames_BTP, 2, self.config.num_positions).transpose(2, 3))
        return tokens


class QueryDynamics(nn.Module):
    """Ablation (b), no average: in each frame, a Q-Former summarizes the positions."""

    def __init__(self, config: VidTwinConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.downsample_motion_module = halvings([width] * (config.dynamics_halvings + 1))
        self.spatial_qformer = qformer(config, config.dynamics_queries)
        self.motion_head = nn.Linear(config.query_width, 2 * config.dynamics_channels)
        self.motion_emb = nn.Sequential(
            nn.Linear(config.dynamics_channels, width),
            nn.ReLU(),
            nn.Conv1d(config.dynamics_queries, config.num_positions, 1),
            nn.ReLU(),
        )

    def moments(self, z_BTSC: Tensor) -> dict[str, Tensor]:
        z_BTHWC = halved_frames(z_BTSC, self.config, self.downsample_motion_module)
        q_NQD = self.spatial_qformer(z_BTHWC.flatten(2, 3).flatten(0, 1))
        return {"dynamics": split_axis(self.motion_head(q_NQD), 0, self.config.num_frames)}

    def align(self, latents: dict[str, Tensor]) -> Tensor:
        return split_axis(self.motion_emb(latents["dynamics"].flatten(0, 1)), 0, self.config.num_frames)


# Parts


def qformer(config: VidTwinConfig, num_queries: int) -> QFormer:
    """Make a Q-Former that reads the encoder's tokens."""
    return QFormer(
        num_queries=num_queries,
        query_width=config.query_width,
        token_width=config.width,
        mlp_width=config.qformer_mlp_width,
        num_layers=config.qformer_layers,
    )


def halvings(widths: list[int]) -> nn.Sequential:
    """Make convolutions that halve height and width, one between each pair of widths, each followed by a ReLU."""
    layers: list[nn.Module] = []
    for above, below in pairwise(widths):
        layers += [nn.Conv2d(above, below, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def halved_frames(z_BTSC: Tensor, config: VidTwinConfig, module: nn.Module | None) -> Tensor:
    """Apply convolutions to the patches of each frame: (B, T, H, W, C)."""
    z_BTHWC = split_axis(z_BTSC, 2, config.grid)
    if module is None:
        return z_BTHWC
    halved: Tensor = module(z_BTHWC.flatten(0, 1).permute(0, 3, 1, 2))
    return split_axis(halved.permute(0, 2, 3, 1), 0, config.num_frames)


def mixed(x_BQSC: Tensor, conv: nn.Conv1d) -> Tensor:
    """Mix the second axis by a convolution of kernel 1, as a matrix product."""
    assert conv.bias is not None
    h = torch.matmul(conv.weight.flatten(1), x_BQSC.flatten(2)) + conv.bias[:, None]
    return h.view(x_BQSC.shape[0], -1, *x_BQSC.shape[2:])


def split_axis(x: Tensor, axis: int, inner: int) -> Tensor:
    """Split an axis into two, the second of a given size."""
    return torch.unflatten(x, axis, (x.shape[axis] // inner, inner))
