"""Grid times of all frames of a video at once, as one would write it down: what sampling frame by frame must equal."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vidshard.pipeline.video.sampling import Grid


def frame_indices(pts: npt.NDArray[np.int64], end_pts: int, grid: Grid) -> npt.NDArray[np.int64]:
    """The frame on screen at each grid time: the one with the largest presentation time not after it.

    The last of several frames with the same time counts, as it is the one that stays on screen.

    Args:
        pts: int64 (N,), ticks, non-decreasing; the first not after the grid's start.
        end_pts: end of the last frame's display interval, exclusive.
        grid: the sampling times.

    Returns:
        int64 (M,), non-decreasing, an index into ``pts`` for each grid time before ``end_pts``.

    Raises:
        ValueError: no frames, times that run backwards, or a grid that starts before the first frame.
    """
    if pts.ndim != 1 or len(pts) == 0:
        raise ValueError(f"pts must be int64 (N,) with at least one frame, got shape {pts.shape}")
    if np.any(pts[1:] < pts[:-1]):
        raise ValueError("pts must be non-decreasing: sort frames by presentation time first")
    if pts[0] > grid.start_pts:
        raise ValueError(f"the grid starts at {grid.start_pts}, before the first frame at {pts[0]}")
    # Python's integers: a 90 kHz clock times a rate such as 30000/1001 leaves int64 within a day
    first = np.array([grid.first_index_at(int(p)) for p in pts], dtype=np.int64)
    num_times = grid.first_index_at(end_pts)
    return np.searchsorted(first, np.arange(num_times, dtype=np.int64), side="right") - 1
