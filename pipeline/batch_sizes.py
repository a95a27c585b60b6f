"""Batch sizes by frame size: halved when memory runs out, and raised again after a while.

Memory may run out for a moment only, as where processes share a GPU. After `PATIENCE` full batches the next larger size
is tried. If it fails at once, the next trial comes after twice as many, so that trials cost nothing in the long run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PATIENCE = 200
"""Number of batches at a reduced size before the next larger one is tried."""

FrameSize = tuple[int, int]


@dataclass(kw_only=True, slots=True)
class _Reduced:
    clips: int
    patience: int
    """Number of batches before a larger size is tried."""
    num_batches: int = 0
    """Number of batches since the size was set."""
    is_trial: bool = False
    """Whether the size was raised and no batch of it has succeeded yet."""


class BatchSizes:
    """Clips per forward pass of each frame size (height, width)."""

    def __init__(self, batch_size: int, most_clips: Mapping[FrameSize, int]) -> None:
        """Start every frame size at its limit.

        Args:
            batch_size: largest batch of any frame size.
            most_clips: largest batch by frame size, where it is smaller.
        """
        self._batch_size = batch_size
        self._most = most_clips
        self._reduced: dict[FrameSize, _Reduced] = {}

    def limit(self, size: FrameSize) -> int:
        """Largest batch of a frame size."""
        return max(1, min(self._batch_size, self._most.get(size, self._batch_size)))

    def of(self, size: FrameSize) -> int:
        """Present batch of a frame size."""
        reduced = self._reduced.get(size)
        return self.limit(size) if reduced is None else reduced.clips

    def halve(self, size: FrameSize) -> int:
        """Halve the batch of a frame size, as memory ran out; returns the new one."""
        reduced = self._reduced.setdefault(size, _Reduced(clips=self.limit(size), patience=PATIENCE))
        if reduced.is_trial:
            reduced.patience *= 2
        reduced.clips = max(1, reduced.clips // 2)
        reduced.num_batches, reduced.is_trial = 0, False
        return reduced.clips

    def succeeded(self, size: FrameSize, num_batches: int) -> bool:
        """Count batches that fit; returns whether the batch of this frame size was raised."""
        reduced = self._reduced.get(size)
        if reduced is None:
            return False
        if reduced.is_trial:
            reduced.is_trial, reduced.patience = False, PATIENCE
            if reduced.clips >= self.limit(size):
                del self._reduced[size]
                return False
        reduced.num_batches += num_batches
        if reduced.num_batches < reduced.patience:
            return False
        reduced.clips = min(2 * reduced.clips, self.limit(size))
        reduced.num_batches, reduced.is_trial = 0, True
        return True
