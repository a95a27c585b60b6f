"""Geometry of a frame: orientation, pixel aspect ratio, scale and crop, from the stored picture to the clip's.

Pure arithmetic and array views: no video is opened here. Sizes are computed in whole numbers, so that every
machine cuts the same pixels.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from vidshard.schemas.video import ClipSpec, Geometry

MAX_SCALED_PIXELS = 1 << 26
"""Largest scaled frame before it is cut, in pixels (200 MB of RGB): only absurd aspect ratios exceed it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Orientation:
    """Orientation of the stored picture, as the steps to the displayed one: first transpose, then mirror."""

    transpose: bool = False
    flip_x: bool = False
    """Mirror left and right, after the transposition."""
    flip_y: bool = False
    """Mirror top and bottom, after the transposition."""

    @classmethod
    def from_display_matrix(cls, matrix: bytes) -> Orientation:
        """Read a container's display matrix: nine int32, native order, rows ``a b u, c d v, x y w``.

        A stored point (x, y) is shown at (a·x + c·y, b·x + d·y), x to the right and y down. Angles between quarter
        turns count as the nearest quarter turn, as in players without a canvas.
        """
        if len(matrix) < 36:
            return cls()
        a, b, _, c, d, *_ = struct.unpack("=9i", matrix[:36])
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(transpose=True, flip_x=c < 0, flip_y=b < 0)
        return cls(flip_x=a < 0, flip_y=d < 0)

    @property
    def rotation_degrees(self) -> int:
        """Clockwise turn: 0, 90, 180 or 270. For a mirrored picture, the turn before mirroring left and right."""
        mirrored = self.flip_x ^ self.flip_y ^ self.transpose
        if self.transpose:
            return 270 if self.flip_y else 90
        return 180 if self.flip_x ^ mirrored else 0

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Displayed (width, height) of a stored size, and the reverse: both are the same swap."""
        return (height, width) if self.transpose else (width, height)

    def apply(self, frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """A view of a stored frame, uint8 (H, W, C), as displayed."""
        if self.transpose:
            frame = frame.transpose(1, 0, 2)
        return frame[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]


def display_size(width: int, height: int, pixel_aspect: Fraction | None, orientation: Orientation) -> tuple[int, int]:
    """Width and height as a player shows a stored frame.

    Non-square pixels change the stored width and keep the height, as players that state a size do; an aspect
    of None or 0 is a square pixel.
    """
    if pixel_aspect is not None and pixel_aspect > 0:
        width = max(1, round(width * pixel_aspect))
    return orientation.size(width, height)


def nearest_bucket(width: int, height: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket (height, width) whose aspect ratio is nearest to a displayed size's, measured as a factor.

    Buckets of the same ratio compare by area, also as a factor; the first of equals is taken.
    """

    def distance(bucket: tuple[int, int]) -> tuple[float, float]:
        aspect = abs(math.log(bucket[1] * height / (bucket[0] * width)))
        return round(aspect, 9), abs(math.log(bucket[0] * bucket[1] / (width * height)))

    return min(buckets, key=distance)


@lru_cache(maxsize=64)
def plan_geometry(width: int, height: int, spec: ClipSpec) -> Geometry:
    """Plan the scaling and cutting of frames of a displayed size to the clip's size.

    Raises:
        ValueError: an aspect ratio so extreme that the scaled frame would not fit into memory.
    """
    if spec.resize == "stretch":
        return Geometry(policy="stretch", scaled_width=spec.width, scaled_height=spec.height, left=0, top=0)
    fit = min if spec.resize == "pad" else max
    scale = fit(Fraction(spec.width, width), Fraction(spec.height, height))
    if spec.resize == "native":
        scale = max(scale, Fraction(1))
    scaled_width, scaled_height = max(1, round(width * scale)), max(1, round(height * scale))
    if scaled_width * scaled_height > MAX_SCALED_PIXELS:
        raise ValueError(f"a frame displayed as {width}x{height} would be scaled to {scaled_width}x{scaled_height}")
    if spec.resize == "native":
        return Geometry(
            policy="native",
            scaled_width=scaled_width,
            scaled_height=scaled_height,
            left=math.floor(spec.cut_place[0] * (scaled_width - spec.width + 1)),
            top=math.floor(spec.cut_place[1] * (scaled_height - spec.height + 1)),
        )
    return Geometry(
        policy=spec.resize,
        scaled_width=scaled_width,
        scaled_height=scaled_height,
        left=-((spec.width - scaled_width) // 2) if spec.resize == "pad" else (scaled_width - spec.width) // 2,
        top=-((spec.height - scaled_height) // 2) if spec.resize == "pad" else (scaled_height - spec.height) // 2,
    )


def paste(scaled: npt.NDArray[np.uint8], geometry: Geometry, out: npt.NDArray[np.uint8]) -> None:
    """Write a scaled frame into a clip's frame: its center, or all of it between black bars.

    Args:
        scaled: uint8 (scaled_height, scaled_width, C).
        geometry: position of the cut, or of the bars.
        out: uint8 (H, W, C), overwritten.
    """
    height, width = out.shape[:2]
    top, left = max(0, geometry.top), max(0, geometry.left)
    bar_top, bar_left = max(0, -geometry.top), max(0, -geometry.left)
    picture = scaled[top : top + height - bar_top, left : left + width - bar_left]
    if picture.shape != out.shape:
        out[:] = 0
    out[bar_top : bar_top + picture.shape[0], bar_left : bar_left + picture.shape[1]] = picture
