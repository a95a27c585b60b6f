"""Frames too large for the memory at hand: tiles give the whole frame, nearly, and nothing is tiled that fits."""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.models import EACH_VARIANT, small, stored
from vidshard.models.vidtok.config import PRESETS
from vidshard.models.vidtok.model import VidTok
from vidshard.models.vidtok.tiling import Tiling, cut, map_tiles, pass_bytes, tile_shares, tile_starts
from vidshard.models.weights import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

AXES = st.integers(1, 12).flatmap(
    lambda tile: st.tuples(st.integers(1, 60), st.just(tile), st.integers(0, tile - 1), st.sampled_from([1, 2, 8]))
)
"""(size, tile, overlap) of one axis in latents, and positions of one latent."""


def smooth_video(num_frames: int, height: int, width: int) -> Tensor:
    """(1, 3, T, H, W): waves that drift, different in each channel."""
    t, y, x = torch.meshgrid(torch.arange(num_frames), torch.arange(height), torch.arange(width), indexing="ij")
    waves = [torch.sin(x / (5 + c) + t / 3) * torch.cos(y / (7 - c) - t / 5) for c in range(3)]
    return torch.stack(waves)[None]


# Where tiles lie and what they count


@given(axis=AXES)
def test_tiles_cover_every_position_with_the_overlap_asked_for(axis: tuple[int, int, int, int]) -> None:
    size, tile, overlap, _ = axis
    starts = tile_starts(size, tile, overlap)
    if size <= tile:
        assert starts == [0]
        return
    assert starts[0] == 0
    assert starts[-1] + tile == size
    assert all(overlap <= before + tile - after < tile for before, after in pairwise(starts))
    assert len(starts) == 1 or (len(starts) - 1) * (tile - overlap) + overlap < size  # one fewer would not do


@given(axis=AXES)
def test_the_shares_of_all_tiles_add_up_to_one(axis: tuple[int, int, int, int]) -> None:
    size, tile, overlap, cell = axis
    tile = min(tile, size)
    starts = tile_starts(size, tile, min(overlap, tile - 1))
    shares = tile_shares(starts, tile, cell)
    total = torch.zeros(size * cell)
    for start, share in zip(starts, shares, strict=True):
        total[cut(start, tile, cell)] += share
    assert (shares > 0).all()
    assert (total - 1).abs().max() < 1e-6


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    tile=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    overlap=st.integers(0, 8),
    cells=st.sampled_from([(4, 1), (1, 4), (2, 2)]),
)
@settings(deadline=None)
def test_a_network_that_sees_single_positions_is_tiled_without_a_trace(
    size: tuple[int, int], tile: tuple[int, int], overlap: int, cells: tuple[int, int]
) -> None:
    cell_in, cell_out = cells
    stride = max(cells)
    tiling = Tiling(height=tile[0] * stride, width=tile[1] * stride, overlap=min(overlap, min(tile) - 1) * stride)
    height, width = size[0] * cell_in, size[1] * cell_in
    ramp = torch.linspace(-3, 5, height)[:, None] + torch.linspace(2, -7, width)
    x_BCTHW = torch.stack([torch.ones_like(ramp), ramp])[None, :, None]
    shapes = set()

    def resize(patch_BCTHW: Tensor) -> Tensor:
        shapes.add(patch_BCTHW.shape)
        wide = patch_BCTHW.repeat_interleave(cell_out, 3).repeat_interleave(cell_out, 4)
        return wide[..., ::cell_in, ::cell_in]

    whole = resize(x_BCTHW)
    shapes.clear()
    tiled = map_tiles(resize, x_BCTHW, tiling, cell_in=cell_in, cell_out=cell_out)
    assert tiled.shape == whole.shape == (1, 2, 1, size[0] * cell_out, size[1] * cell_out)
    assert torch.allclose(tiled, whole, atol=1e-5)
    assert len(shapes) == 1  # kernels may choose by shape


def test_between_two_tiles_the_share_passes_linearly() -> None:
    shares = tile_shares([0, 4], 8, 1)
    assert shares[0].tolist() == [1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125]
    assert torch.equal(shares[1], shares[0].flip(0))


# The tokenizer


@pytest.mark.parametrize("name", ["fsq_causal_488_262144", "kl_causal_444_4chn", "fsq_noncausal_488_262144"])
def test_a_frame_that_fits_one_tile_is_not_tiled_to_the_bit(name: str) -> None:
    model = load_tokenizer(small(name), None, seed=0)
    x_BCTHW = smooth_video(8 if "noncausal" in name else 5, 32, 48)
    tiling = Tiling(height=32, width=64, overlap=16)
    whole, tiled = model.encode(x_BCTHW), model.encode(x_BCTHW, tiling=tiling)
    assert torch.equal(tiled.latents, whole.latents)
    assert torch.equal(model.decode(stored(whole), tiling=tiling), model.decode(stored(whole)))


@pytest.mark.parametrize("name", EACH_VARIANT)
def test_every_model_takes_tiles_at_every_size(name: str) -> None:
    model = load_tokenizer(small(name), None, seed=0)
    stride = model.config.space_stride
    tiling = Tiling(height=3 * stride, width=2 * stride, overlap=stride)
    num_frames = model.config.valid_frames(6)
    for rows, columns in ((1, 3), (4, 2), (3, 5), (7, 1)):
        x_BCTHW = smooth_video(num_frames, rows * stride, columns * stride).expand(2, -1, -1, -1, -1)
        encoded = model.encode(x_BCTHW, tiling=tiling)
        assert encoded.latents.shape[2:] == (model.config.latent_frames(num_frames), rows, columns)
        assert torch.equal(encoded.latents[0], encoded.latents[1])
        decoded = model.decode(stored(encoded), num_frames, tiling=tiling)
        assert decoded.shape == x_BCTHW.shape
        assert decoded.dtype == model.dtype


def test_more_overlap_is_nearer_to_the_whole(tiny: VidTok) -> None:
    x_BCTHW = smooth_video(5, 192, 192)
    whole = tiny.encode(x_BCTHW)
    assert whole.tokens is not None
    frames = tiny.decode(whole.latents)
    differing, errors = [], []
    for side, overlap in ((96, 0), (112, 32), (144, 96)):  # 2 x 2 tiles each
        tiling = Tiling(height=side, width=side, overlap=overlap)
        tokens = tiny.encode(x_BCTHW, tiling=tiling).tokens
        assert tokens is not None
        differing.append((tokens != whole.tokens).float().mean().item())
        errors.append((tiny.decode(whole.latents, tiling=tiling) - frames).square().mean().sqrt().item())
    assert differing == sorted(differing, reverse=True)
    assert errors == sorted(errors, reverse=True)
    assert differing[-1] < 0.5 * differing[0]
    assert errors[-1] < 0.5 * errors[0]


def test_bfloat16_stays_bfloat16(tiny: VidTok) -> None:
    half = load_tokenizer(PRESETS["tiny"], None, seed=0, dtype=torch.bfloat16)
    tiling = Tiling(height=32, width=32, overlap=16)
    encoded = half.encode(smooth_video(5, 64, 64), tiling=tiling)
    assert half.decode(encoded.latents, tiling=tiling).dtype is torch.bfloat16


# What is refused


@pytest.mark.parametrize(
    ("tiling", "words"),
    [
        ({"height": 64, "width": 64, "overlap": 64}, "larger than their overlap"),
        ({"height": 64, "width": 64, "overlap": -8}, "larger than their overlap"),
        ({"height": 0, "width": 64, "overlap": 0}, "larger than their overlap"),
        (
            {"height": 100, "width": 64, "overlap": 32},
            "tile height must be divisible by 8, got 100; nearest: 96 or 104",
        ),
        ({"height": 64, "width": 7, "overlap": 0}, "tile width must be divisible by 8, got 7; nearest: 8"),
        ({"height": 64, "width": 64, "overlap": 4}, "overlap must be divisible by 8, got 4; nearest: 0 or 8"),
    ],
)
def test_tiles_that_cannot_be_are_refused_by_name(tiny: VidTok, tiling: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny.encode(smooth_video(1, 64, 64), tiling=Tiling(**tiling))
    with pytest.raises(ValueError, match=words):
        tiny.decode(torch.zeros(1, 5, 1, 8, 8), tiling=Tiling(**tiling))


# Memory


@pytest.mark.parametrize("name", ["fsq_causal_488_32768", "kl_causal_444_4chn", "fsq_causal_41616_262144"])
def test_tiles_within_a_budget_are_the_largest_that_are(name: str) -> None:
    config = PRESETS[name]
    tiling = Tiling.within(4 << 30, config, 17)
    tiling.check(config)
    side = tiling.height
    assert side == tiling.width > tiling.overlap
    assert pass_bytes(config, 17, side, side) <= 4 << 30
    assert pass_bytes(config, 17, side + config.space_stride, side + config.space_stride) > 4 << 30
    with pytest.raises(ValueError, match=rf"{name}: 1000 bytes are too few for 17 frames of the smallest tile"):
        Tiling.within(1000, config, 17)


def peak_bytes(arguments: str) -> int:
    """By how much encoding and decoding raise the memory of a fresh process."""
    code = f"""
import torch
from pathlib import Path
from vidshard.models.vidtok.tiling import Tiling
from vidshard.models.vidtok.config import PRESETS
from vidshard.models.weights import load_tokenizer
torch.set_num_threads(1)
model = load_tokenizer(PRESETS["tiny"], None, seed=0)
model.decode(model.encode(torch.zeros(1, 3, 1, 8, 8)).latents)
x = torch.zeros(1, 3, 5, 384, 384)
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
with torch.inference_mode():
    model.decode(model.encode(x, {arguments}).latents, {arguments})
print(1024 * (peak() - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tiles_take_a_fraction_of_the_memory() -> None:
    assert peak_bytes("tiling=Tiling(height=112, width=112, overlap=16)") < 0.4 * peak_bytes("tiling=None")
