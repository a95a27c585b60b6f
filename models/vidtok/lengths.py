"""Clips made as long as a model takes them, and cut back after decoding.

`TokenizerConfig.latent_frames` knows which lengths a model takes and refuses the others. Here is what a caller can do
with such a clip, under a name that it can store, and with the number of frames that are real.
"""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from vidshard.models.config import TokenizerConfig


class Padding(StrEnum):
    """Where copies go when a clip must become longer."""

    REPEAT_LAST = "repeat-last"
    """Copies of the last frame after it: no real frame changes its latent's place in time."""
    REPEAT_FIRST = "repeat-first"
    """Copies of the first frame before it: the clip's end is seen as in a longer video."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PaddedClips:
    """Clips of a valid length, and which of their frames are real."""

    frames: Tensor
    """(B, 3, T, H, W), as given but for the copies."""
    first_valid_frame: int
    num_valid_frames: int

    def __post_init__(self) -> None:
        if not 0 <= self.first_valid_frame <= self.frames.shape[2] - self.num_valid_frames:
            raise ValueError(
                f"{self.num_valid_frames} frames from frame {self.first_valid_frame} on do not lie within "
                f"{self.frames.shape[2]}"
            )

    def cut(self, x_BCTHW: Tensor) -> Tensor:
        """Keep the real frames of what was decoded from these clips.

        Raises:
            ValueError: for another number of frames than the padded clips have.
        """
        if x_BCTHW.shape[2] != self.frames.shape[2]:
            raise ValueError(f"the padded clips have {self.frames.shape[2]} frames, got {x_BCTHW.shape[2]}")
        return x_BCTHW[:, :, self.first_valid_frame :][:, :, : self.num_valid_frames]


def pad(x_BCTHW: Tensor, config: TokenizerConfig, padding: Padding = Padding.REPEAT_LAST) -> PaddedClips:
    """Make clips as long as the model takes, by the smallest number of copies of a frame.

    ``decode(tokens, padded.frames.shape[2])`` and then `PaddedClips.cut` give as many frames as there were.

    Args:
        x_BCTHW: (B, 3, T, H, W) with at least one frame.

    Raises:
        ValueError: for clips without frames.
    """
    num_frames = x_BCTHW.shape[2]
    num_copies = config.valid_frames(num_frames) - num_frames
    at_the_end = padding is Padding.REPEAT_LAST
    copies = (x_BCTHW[:, :, -1:] if at_the_end else x_BCTHW[:, :, :1]).expand(-1, -1, num_copies, -1, -1)
    return PaddedClips(
        frames=torch.cat([x_BCTHW, copies] if at_the_end else [copies, x_BCTHW], dim=2),
        first_valid_frame=0 if at_the_end else num_copies,
        num_valid_frames=num_frames,
    )
