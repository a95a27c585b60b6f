"""Layers equal the plain formulas they abbreviate, cut anywhere in time, and see no later frame."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from models import layers
from models.layers import CausalConv, CausalUnit, FrameAttention, SpaceDown, SpaceUp, SpatialUnit, TimeDown, TimeUp

CHANNELS = 6
LAYERS: dict[str, nn.Module] = {}
with torch.random.fork_rng():
    torch.manual_seed(0)
    LAYERS = {
        "conv over time": CausalConv(CHANNELS, 5, (3,)),
        "conv": CausalConv(CHANNELS, 5, (3, 3, 3)),
        "conv from few channels": CausalConv(CHANNELS, 24, (3, 3, 3)),
        "conv to few channels": CausalConv(CHANNELS, 2, (3, 3, 3)),
        "unit over time": CausalUnit(CHANNELS, (3,)),
        "unit": CausalUnit(CHANNELS, (3, 3, 3)),
        "spatial unit": SpatialUnit(CHANNELS, 4),
        "attention": FrameAttention(CHANNELS),
        "space down": SpaceDown(CHANNELS),
        "space up": SpaceUp(CHANNELS),
        "time down": TimeDown(CHANNELS),
        "time up": TimeUp(CHANNELS),
    }


def clip(num_frames: int, batch: int = 2, size: int = 4, channels: int = CHANNELS) -> Tensor:
    return torch.randn(batch, num_frames, size, size, channels, generator=torch.Generator().manual_seed(num_frames))


def as_BCTHW(x_BTHWC: Tensor) -> Tensor:  # noqa: N802
    return x_BTHWC.permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cuts", [(2,), (4,), (2, 4, 6)])
def test_a_clip_in_chunks_gives_what_the_whole_gives(name: str, cuts: tuple[int, ...]) -> None:
    layer, x = LAYERS[name], clip(8)
    whole, last_past = layer(x)
    parts, past = [], ()
    for chunk in torch.tensor_split(x, cuts, dim=1):
        part, past = layer(chunk, past)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert len(past) == len(last_past)


@pytest.mark.parametrize("name", LAYERS)
def test_a_frame_does_not_change_earlier_outputs(name: str) -> None:
    layer, x = LAYERS[name], clip(8)
    changed = x.clone()
    changed[:, 5:] += 1
    before, after = layer(x)[0], layer(changed)[0]
    unaffected = before.shape[1] * 4 // 8  # outputs of the frames 0 to 3
    assert torch.equal(before[:, :unaffected], after[:, :unaffected])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("name", LAYERS)
def test_every_weight_and_the_input_get_a_gradient(name: str) -> None:
    layer, x = copy.deepcopy(LAYERS[name]), clip(4).requires_grad_()
    layer(x)[0].square().sum().backward()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


@pytest.mark.parametrize("name", LAYERS)
def test_the_past_does_not_keep_the_chunk_alive(name: str) -> None:
    for tensor in LAYERS[name](clip(8))[1]:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert tensor.shape[1] <= 2


@pytest.mark.parametrize(("out_channels", "size"), [(5, 4), (24, 4), (2, 4), (5, 64)])
def test_a_causal_convolution_is_a_3d_convolution_after_two_zero_frames(out_channels: int, size: int) -> None:
    # At 64 x 64 the map is larger than SMALL_MAP for both kinds.
    x = clip(60 if size == 64 else 3, batch=1, size=size)
    assert (x[0, :, :, 0].numel() > layers.SMALL_MAP) == (size == 64)
    for kernel in ((3,), (3, 3, 3)):
        layer = CausalConv(CHANNELS, out_channels, kernel)
        weight = layer.conv.weight if len(kernel) == 3 else layer.conv.weight[..., None, None]
        space = len(kernel) // 3
        expected = F.conv3d(F.pad(as_BCTHW(x), (space,) * 4 + (2, 0)), weight, layer.conv.bias)
        torch.testing.assert_close(as_BCTHW(layer(x)[0]), expected, atol=1e-5, rtol=1e-5)


def test_space_down_pads_below_and_to_the_right() -> None:
    layer = SpaceDown(CHANNELS)
    frames = as_BCTHW(clip(1))[:, :, 0]
    expected = layer.conv.forward(F.pad(frames, (0, 1, 0, 1)))[:, :, ::2, ::2]
    torch.testing.assert_close(as_BCTHW(layer(clip(1))[0])[:, :, 0], expected)


def test_space_up_is_a_convolution_of_repeated_pixels() -> None:
    layer = SpaceUp(CHANNELS)
    frames = as_BCTHW(clip(1))[:, :, 0]
    expected = F.conv2d(F.interpolate(frames, scale_factor=2.0), layer.conv.weight, layer.conv.bias, padding=1)
    torch.testing.assert_close(as_BCTHW(layer(clip(1))[0])[:, :, 0], expected)


@pytest.mark.parametrize("mix_factor", [-1.0, 2.0])
def test_time_down_blends_an_average_with_a_convolution(mix_factor: float) -> None:
    layer = TimeDown(CHANNELS)
    nn.init.constant_(layer.mix_factor, mix_factor)
    x = F.pad(as_BCTHW(clip(6)), (0, 0, 0, 0, 1, 0))
    average = F.avg_pool3d(x, (3, 1, 1), stride=(2, 1, 1))
    convolved = F.conv3d(x, layer.conv.conv.weight, layer.conv.conv.bias, (2, 1, 1), (0, 1, 1))
    expected = torch.lerp(convolved, average, torch.sigmoid(layer.mix_factor))
    torch.testing.assert_close(as_BCTHW(layer(clip(6))[0]), expected)


@pytest.mark.parametrize("mix_factor", [-1.0, 2.0])
def test_time_up_blends_repeated_frames_with_their_convolution(mix_factor: float) -> None:
    layer = TimeUp(CHANNELS)
    nn.init.constant_(layer.mix_factor, mix_factor)
    repeated = as_BCTHW(clip(3)).repeat_interleave(2, dim=2)
    convolved = F.conv3d(F.pad(repeated, (1, 1, 1, 1, 2, 0)), layer.conv.conv.weight, layer.conv.conv.bias)
    expected = torch.lerp(convolved, repeated, torch.sigmoid(layer.mix_factor))
    torch.testing.assert_close(as_BCTHW(layer(clip(3))[0]), expected)


def test_attention_mixes_positions_but_not_frames() -> None:
    layer, x = LAYERS["attention"], clip(3)
    changed = x.clone()
    changed[:, 1, 0, 0] += 1
    difference = (layer(x)[0] - layer(changed)[0]).abs().amax(dim=(0, 2, 3, 4))
    assert (difference > 0).tolist() == [False, True, False]
    far_corner = (layer(x)[0] - layer(changed)[0])[:, 1, -1, -1]
    assert far_corner.abs().max() > 0


def test_a_fresh_temporal_unit_passes_frames_through() -> None:
    unit = CausalUnit(CHANNELS, (3,), starts_as_identity=True)
    assert torch.equal(unit(clip(3))[0], clip(3))
