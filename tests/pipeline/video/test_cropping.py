"""Cropping that the container states: what is cut off, and the size, pixel shape and orientation that follow."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.decoding import SPEC, assert_same, decode, probe
from tests.support.matroska import CROP_BOTTOM, CROP_LEFT, CROP_RIGHT, CROP_TOP, with_video_elements
from tests.support.mp4 import with_clean_aperture
from tests.support.videos import Recipe, write_video

DISPLAY_WIDTH, DISPLAY_HEIGHT, DISPLAY_UNIT = 0x54B0, 0x54BA, 0x54B2


def write_square(path: Path, **recipe: Any) -> Path:
    return write_video(path, replace(Recipe(num_frames=20, width=96, height=96), **recipe))


def crop(path: Path, whole: Path, left: int, top: int, right: int, bottom: int, entry: bytes = b"avc1") -> Path:
    """Cut off rows and columns of a video of 96x96, by the means of its container."""
    if path.suffix == ".mkv":
        return with_video_elements(
            whole, path, {CROP_LEFT: left, CROP_TOP: top, CROP_RIGHT: right, CROP_BOTTOM: bottom}
        )
    # offsets of the center, in halves
    offsets = (left - right, 2, top - bottom, 2)
    return with_clean_aperture(whole, path, entry, (96 - left - right, 1, 96 - top - bottom, 1, *offsets))


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("sides", [(0, 16, 0, 16), (8, 0, 24, 0), (6, 10, 2, 30), (0, 0, 0, 2)])
def test_what_the_container_crops_is_not_shown(tmp_path: Path, suffix: str, sides: tuple[int, int, int, int]) -> None:
    whole = write_square(tmp_path / f"whole.{suffix}")
    left, top, right, bottom = sides
    cropped = crop(tmp_path / f"cropped.{suffix}", whole, *sides)
    source = probe(cropped).source
    width, height = 96 - left - right, 96 - top - bottom
    assert (source.width, source.height) == (width, height)
    spec = replace(SPEC, width=width, height=height)
    inside = [
        c.frames[:, top : 96 - bottom, left : 96 - right] for c in decode(whole, replace(SPEC, width=96, height=96))
    ]
    shown = decode(cropped, spec)
    assert shown[0].geometry.scaled_width == width
    for clip, expected in zip(shown, inside, strict=True):
        # the inside of the blocks; chroma at the new edge has no neighbor
        difference = np.abs(clip.frames[:, 2:-2, 2:-2].astype(int) - expected[:, 2:-2, 2:-2])
        assert difference.max() <= 2
    assert_same(decode(cropped, spec, clips_per_span=1), shown)


def test_a_crop_is_turned_with_the_picture(tmp_path: Path) -> None:
    whole = write_square(tmp_path / "whole.mp4", rotation_degrees=90)
    cropped = crop(tmp_path / "cropped.mp4", whole, 0, 16, 0, 16)
    assert (probe(cropped).source.width, probe(cropped).source.height) == (64, 96)
    upright = decode(whole, replace(SPEC, width=96, height=96))[0].frames[:, 2:-2, 18:78]
    shown = decode(cropped, replace(SPEC, width=64, height=96))[0].frames[:, 2:-2, 2:-2]
    assert np.abs(shown.astype(int) - upright).max() <= 2


def test_pixel_shape_counts_for_the_cropped_picture(tmp_path: Path) -> None:
    whole = write_square(tmp_path / "whole.mkv")
    sides = {CROP_TOP: 16, CROP_BOTTOM: 16, DISPLAY_WIDTH: 144, DISPLAY_HEIGHT: 64, DISPLAY_UNIT: 0}
    wide = with_video_elements(whole, tmp_path / "wide.mkv", sides)
    assert (probe(wide).source.width, probe(wide).source.height) == (144, 64)
    stated = write_square(tmp_path / "stated.mp4", pixel_aspect=Fraction(3, 2))
    cropped = crop(tmp_path / "cropped.mp4", stated, 0, 16, 0, 16)
    assert (probe(cropped).source.width, probe(cropped).source.height) == (144, 64)


def test_a_track_as_large_as_its_clean_aperture_has_square_pixels(tmp_path: Path) -> None:
    whole = write_square(tmp_path / "whole.mp4")
    cropped = crop(tmp_path / "cropped.mp4", whole, 0, 16, 0, 16)
    data = bytearray(cropped.read_bytes())
    at = data.index(b"tkhd") + 4 + 12 + 68  # the height of the track
    assert int.from_bytes(data[at : at + 4], "big") == 96 << 16
    data[at : at + 4] = (64 << 16).to_bytes(4, "big")
    cropped.write_bytes(data)
    assert (probe(cropped).source.width, probe(cropped).source.height) == (96, 64)


@pytest.mark.parametrize("sides", [(0, 60, 0, 60), (96, 0, 0, 0), (0, 96, 0, 0)])
def test_a_clean_aperture_that_leaves_nothing_is_none(tmp_path: Path, sides: tuple[int, int, int, int]) -> None:
    whole = write_square(tmp_path / "whole.mp4")
    left, top, right, bottom = sides
    values = (max(0, 96 - left - right), 1, max(0, 96 - top - bottom), 1, left - right, 2, top - bottom, 2)
    cropped = with_clean_aperture(whole, tmp_path / "cropped.mp4", b"avc1", values)
    assert (probe(cropped).source.width, probe(cropped).source.height) == (96, 96)
