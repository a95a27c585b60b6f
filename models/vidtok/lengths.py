"""Padding of clips to a length that the model takes, and cropping after decoding.

`TokenizerConfig.latent_frames` defines which lengths a model takes and refuses the others. `pad` makes any clip long
enough, by a method whose name can be stored, and records which frames are real.
"""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from vidshard.schemas.tokenizers import TokenizerConfig


class Padding(StrEnum):
    """Place of the copies that make a clip longer."""

    REPEAT_LAST = "repeat-last"
    """Copies of the last frame at the end: real frames keep their position in time."""
    REPEAT_FIRST = "repeat-first"
    """Copies of the first frame at the beginning: the clip's end is encoded as in a longer video."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PaddedClips:
    """Clips of a valid length, with the range of their real frames."""

    frames: Tensor
    """(B, 3, T, H, W): the given frames and the copies."""
    first_valid_frame: int
    num_valid_frames: int

    def __post_init__(self) -> None:
        if not 0 <= self.first_valid_frame <= self.frames.shape[2] - self.num_valid_frames:
            raise ValueError(
                f"{self.num_valid_frames} frames from frame {self.first_valid_frame} on do not lie within "
                f"{self.frames.shape[2]}"
            )

    def cut(self, x_BCTHW: Tensor) -> Tensor:
        """Crop frames decoded from these clips to the real ones.

        Raises:
            ValueError: for another number of frames than the padded clips have.
        """
        if x_BCTHW.shape[2] != self.frames.shape[2]:
            raise ValueError(f"the padded clips have {self.frames.shape[2]} frames, got {x_BCTHW.shape[2]}")
        return x_BCTHW[:, :, self.first_valid_frame :][:, :, : self.num_valid_frames]


def pad(x_BCTHW: Tensor, config: TokenizerConfig, padding: Padding = Padding.REPEAT_LAST) -> PaddedClips:
    """Pad clips to the next length that the model takes, with copies of a frame.

    ``decode(tokens, padded.frames.shape[2])`` followed by `PaddedClips.cut` gives as many frames as ``x`` has.

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
