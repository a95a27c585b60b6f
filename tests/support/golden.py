"""Inputs of the reference values, and the measure by which results are compared with them."""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt
import torch

from vidshard.models.vidtwin.config import VidTwinConfig

TOLERANCE = 1e-4
"""Largest error over the values' root mean square; the original's own float32 noise is a tenth of it."""

FloatArray = npt.NDArray[np.floating]

TWIN_TINY_A = VidTwinConfig(
    name="vidtwin_tiny_a",
    num_frames=5,
    frame_size=80,
    width=32,
    depth=2,
    num_heads=4,
    num_queries=3,
    query_width=16,
    structure_width=16,
    structure_halvings=2,
    structure_channels=3,
    dynamics_halvings=2,
    dynamics_channels=5,
)
"""VidTwin of the reference values: an odd grid, so that restored structure images are cropped."""
TWIN_TINY_B = VidTwinConfig(
    name="vidtwin_tiny_b",
    num_frames=4,
    frame_size=64,
    width=64,
    depth=3,
    num_heads=2,
    num_queries=5,
    query_width=8,
    structure_width=16,
    structure_channels=6,
    dynamics_halvings=0,
    dynamics_channels=4,
)
"""VidTwin of the reference values: more queries than frames, and dynamics at every position."""


def video(num_frames: int, height: int, width: int, batch: int) -> torch.Tensor:
    """Moving waves with noise, (B, 3, T, H, W) in [-1, 1], the same on any machine."""
    clips = []
    for item in range(batch):
        random = np.random.RandomState(zlib.crc32(f"video:{num_frames}x{height}x{width}:{item}".encode()))
        noise = random.standard_normal((3, num_frames, height, width))
        c, t, y, x = np.indices(noise.shape).astype(np.float64)
        waves = 0.45 * np.sin(2 * np.pi * (2 * x / width + t / 8 + c / 3))
        waves += 0.30 * np.cos(2 * np.pi * (3 * y / height - t / 16 + c / 5))
        clips.append(np.clip(waves + 0.15 * noise, -1, 1).astype(np.float32))
    return torch.from_numpy(np.stack(clips))


def relative_error(ours: torch.Tensor, theirs: FloatArray) -> float:
    """Largest error over the root mean square of the reference values."""
    assert tuple(ours.shape) == theirs.shape
    return float(np.abs(ours.numpy() - theirs).max() / np.sqrt(np.mean(np.square(theirs))))
