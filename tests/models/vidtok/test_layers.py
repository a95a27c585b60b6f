"""Layers equal the plain formulas they abbreviate, cut anywhere in time; causal ones see no later frame."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vidshard.models.vidtok import convolutions, layers
from vidshard.models.vidtok.layers import (
    TIME_RULES,
    ChannelNorm,
    FrameAttention,
    SpatialUnit,
    TimeConv,
    TimeRule,
    TimeUnit,
)
from vidshard.models.vidtok.resampling import (
    LinearTimeUp,
    RepeatedTimeUp,
    SpaceDown,
    SpaceUp,
    TimeDown,
    TimeUp,
    interpolated,
    time_up,
)

CHANNELS = 6
V1_0, V1_1, NON_CAUSAL = (TIME_RULES[variant] for variant in ("causal-v1.0", "causal-v1.1", "non-causal"))


def made(rule: TimeRule) -> dict[str, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "conv over time": TimeConv(CHANNELS, 5, (3,), rule),
            "conv": TimeConv(CHANNELS, 5, (3, 3, 3), rule),
            "conv from few channels": TimeConv(CHANNELS, 24, (3, 3, 3), rule),
            "conv to few channels": TimeConv(CHANNELS, 2, (3, 3, 3), rule),
            "unit over time": TimeUnit(CHANNELS, (3,), rule),
            "unit": TimeUnit(CHANNELS, (3, 3, 3), rule),
            "spatial unit": SpatialUnit(CHANNELS, 4),
            "attention": FrameAttention(CHANNELS),
            "space down": SpaceDown(CHANNELS),
            "space up": SpaceUp(CHANNELS),
            "time down": TimeDown(CHANNELS, rule),
            "time up": time_up(CHANNELS, rule, 2),
        }


V1_1_LAYERS = {f"{name}, v1.1": layer for name, layer in made(V1_1).items()}
LINEAR = V1_1_LAYERS.pop("time up, v1.1")
"""Sees one frame ahead, and so has tests of its own."""
LAYERS = made(V1_0) | V1_1_LAYERS


def clip(num_frames: int, batch: int = 2, size: int = 4, channels: int = CHANNELS) -> Tensor:
    return torch.randn(batch, num_frames, size, size, channels, generator=torch.Generator().manual_seed(num_frames))


def as_BCTHW(x_BTHWC: Tensor) -> Tensor:  # noqa: N802
    return x_BTHWC.permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("name", [*LAYERS, "linear time up"])
@pytest.mark.parametrize("cuts", [(2,), (4,), (2, 4, 6)])
def test_a_clip_in_chunks_gives_what_the_whole_gives(name: str, cuts: tuple[int, ...]) -> None:
    layer, x = LAYERS.get(name, LINEAR), clip(8)
    whole, last_past = layer(x)
    parts, past = [], ()
    for index, chunk in enumerate(torch.tensor_split(x, cuts, dim=1)):
        part, past = layer(chunk, past, last=index == len(cuts)) if layer is LINEAR else layer(chunk, past)
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


@pytest.mark.parametrize("name", made(NON_CAUSAL))
def test_layers_that_are_not_causal_give_what_the_reversed_clip_gives_reversed_but_where_they_halve(name: str) -> None:
    layer, x = made(NON_CAUSAL)[name], clip(8)
    for parameter in layer.parameters():
        if parameter.ndim in (3, 5):  # kernels that look the same in both directions of time
            parameter.data += parameter.data.flip(2)
    forwards, past = layer(x)
    backwards = layer(x.flip(1))[0].flip(1)
    assert forwards.shape[1] == {"time down": 4, "time up": 16}.get(name, 8)
    assert all(tensor.shape == x.shape for tensor in past) or past == ()
    assert torch.allclose(forwards, backwards, atol=1e-5) == (name != "time down")


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


def before_and_after(x: Tensor, rule: TimeRule, *, before: int, after: int) -> Tensor:
    """(B, C, T, H, W) with what the rule puts at both ends of time, in words of PyTorch."""
    x = F.pad(x, (0, 0, 0, 0, 0, 0 if rule.causal else after))
    return F.pad(x, (0, 0, 0, 0, before, 0), mode="constant" if rule.start == "zeros" else "replicate")


@pytest.mark.parametrize("rule", TIME_RULES.values(), ids=TIME_RULES)
@pytest.mark.parametrize(("out_channels", "size"), [(5, 4), (24, 4), (2, 4), (5, 64)])
def test_a_convolution_over_time_is_one_after_padding_by_the_rule(out_channels: int, size: int, rule: TimeRule) -> None:
    # At 64 x 64 the map is larger than SMALL_MAP for both kinds.
    x = clip(60 if size == 64 else 3, batch=1, size=size)
    assert (x[0, :, :, 0].numel() > convolutions.SMALL_MAP) == (size == 64)
    padded = before_and_after(as_BCTHW(x), rule, before=2 if rule.causal else 1, after=1)
    for kernel in ((3,), (3, 3, 3)):
        layer = TimeConv(CHANNELS, out_channels, kernel, rule)
        weight = layer.conv.weight if len(kernel) == 3 else layer.conv.weight[..., None, None]
        space = len(kernel) // 3
        expected = F.conv3d(F.pad(padded, (space,) * 4), weight, layer.conv.bias)
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


@pytest.mark.parametrize("rule", TIME_RULES.values(), ids=TIME_RULES)
@pytest.mark.parametrize("mix_factor", [-1.0, 2.0])
def test_time_down_blends_an_average_with_a_convolution(mix_factor: float, rule: TimeRule) -> None:
    layer = TimeDown(CHANNELS, rule)
    assert layer.mix_factor is not None
    nn.init.constant_(layer.mix_factor, mix_factor)
    x = before_and_after(as_BCTHW(clip(6)), rule, before=1 if rule.causal else 0, after=1)
    average = F.avg_pool3d(x, (3, 1, 1), stride=(2, 1, 1))
    convolved = F.conv3d(x, layer.conv.conv.weight, layer.conv.conv.bias, (2, 1, 1), (0, 1, 1))
    expected = torch.lerp(convolved, average, torch.sigmoid(layer.mix_factor))
    torch.testing.assert_close(as_BCTHW(layer(clip(6))[0]), expected)


@pytest.mark.parametrize("rule", [V1_0, NON_CAUSAL], ids=["v1.0", "non-causal"])
@pytest.mark.parametrize("mix_factor", [-1.0, 2.0])
def test_time_up_blends_repeated_frames_with_their_convolution(mix_factor: float, rule: TimeRule) -> None:
    layer = RepeatedTimeUp(CHANNELS, rule)
    assert layer.mix_factor is not None
    nn.init.constant_(layer.mix_factor, mix_factor)
    repeated = as_BCTHW(clip(3)).repeat_interleave(2, dim=2)
    x = F.pad(before_and_after(repeated, rule, before=2 if rule.causal else 1, after=1), (1, 1, 1, 1))
    convolved = F.conv3d(x, layer.conv.conv.weight, layer.conv.conv.bias)
    expected = torch.lerp(convolved, repeated, torch.sigmoid(layer.mix_factor))
    torch.testing.assert_close(as_BCTHW(layer(clip(3))[0]), expected)


@pytest.mark.parametrize("first_frames", [1, 2, 4])
def test_linear_time_up_stretches_the_first_latent_and_the_others_apart(first_frames: int) -> None:
    layer, x = LinearTimeUp(CHANNELS, V1_1, first_frames), as_BCTHW(clip(7))
    groups = x[:, :, :first_frames], x[:, :, first_frames:]
    stretched = [F.interpolate(group, scale_factor=(2.0, 1.0, 1.0), mode="trilinear") for group in groups]
    between = torch.cat(stretched, dim=2)
    padded = F.pad(before_and_after(between, V1_1, before=2, after=0), (1, 1, 1, 1))
    convolved = F.conv3d(padded, layer.conv.conv.weight, layer.conv.conv.bias)
    assert layer.mix_factor is not None
    expected = torch.lerp(convolved, between, torch.sigmoid(layer.mix_factor))
    torch.testing.assert_close(as_BCTHW(layer(clip(7))[0]), expected)


def test_frames_between_frames_lie_a_quarter_from_either_and_are_held_at_the_ends() -> None:
    assert interpolated(range(2, 4), starts=True, ends=True) == [(2, 2, 0.0), (2, 3, 0.25), (2, 3, 0.75), (3, 3, 0.0)]
    assert interpolated(range(2, 4), starts=False, ends=False) == [(2, 3, 0.25), (2, 3, 0.75)]
    assert interpolated(range(0), starts=True, ends=True) == []


HALF_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def numbered(num_frames: int, dtype: torch.dtype) -> Tensor:
    """Frames of one pixel that carry their number as two digits of base 32, quarters of which every dtype holds."""
    numbers = torch.arange(num_frames)
    return torch.stack([numbers % 32, numbers // 32], dim=-1).to(dtype).view(1, num_frames, 1, 1, 2)


def passing_frames(layer: TimeUp, dtype: torch.dtype) -> TimeUp:
    """Give an upsampler the weights with which it gives the doubled sequence itself."""
    conv = layer.conv.conv
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.zero_()
        conv.weight[:, :, 2 if layer.rule.causal else 1, 1, 1] = torch.eye(2)
    return layer.to(dtype)


@given(num_frames=st.integers(1, 1000), dtype=st.sampled_from(HALF_DTYPES), rule=st.sampled_from([V1_0, NON_CAUSAL]))
@example(num_frames=1000, dtype=torch.bfloat16, rule=V1_0)
@example(num_frames=257, dtype=torch.bfloat16, rule=NON_CAUSAL)
@settings(deadline=None, max_examples=40)
def test_repeated_frames_are_the_right_ones_in_every_dtype(num_frames: int, dtype: torch.dtype, rule: TimeRule) -> None:
    layer = passing_frames(RepeatedTimeUp(2, rule), dtype)
    with torch.no_grad():
        doubled, _ = layer(numbered(num_frames, dtype))
    assert torch.equal(doubled, numbered(num_frames, dtype).repeat_interleave(2, dim=1))


@given(num_frames=st.integers(1, 1000), dtype=st.sampled_from(HALF_DTYPES), first_frames=st.sampled_from([1, 2, 4]))
@example(num_frames=1000, dtype=torch.bfloat16, first_frames=1)
@example(num_frames=1000, dtype=torch.float16, first_frames=4)
@settings(deadline=None, max_examples=40)
def test_interpolated_frames_are_the_right_ones_in_every_dtype(
    num_frames: int, dtype: torch.dtype, first_frames: int
) -> None:
    layer = passing_frames(LinearTimeUp(2, V1_1, first_frames), dtype)
    with torch.no_grad():
        doubled, _ = layer(numbered(num_frames, dtype))
    x = numbered(num_frames, torch.float32)
    groups = [group for group in (x[:, :first_frames], x[:, first_frames:]) if group.shape[1]]
    stretched = [
        F.interpolate(as_BCTHW(group), scale_factor=(2.0, 1.0, 1.0), mode="trilinear").permute(0, 2, 3, 4, 1)
        for group in groups
    ]
    assert torch.equal(doubled.float(), torch.cat(stretched, dim=1))


def test_attention_mixes_positions_but_not_frames() -> None:
    layer, x = LAYERS["attention"], clip(3)
    changed = x.clone()
    changed[:, 1, 0, 0] *= -1  # a constant would be taken away by the norm
    difference = (layer(x)[0] - layer(changed)[0]).abs().amax(dim=(0, 2, 3, 4))
    assert (difference > 0).tolist() == [False, True, False]
    far_corner = (layer(x)[0] - layer(changed)[0])[:, 1, -1, -1]
    assert far_corner.abs().max() > 0


def test_a_fresh_temporal_unit_passes_frames_through() -> None:
    unit = TimeUnit(CHANNELS, (3,), V1_0, starts_as_identity=True)
    assert torch.equal(unit(clip(3))[0], clip(3))


def test_a_norm_under_autocast_on_a_gpu_reads_and_writes_the_dtype_of_its_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "is_autocast_on_gpu", lambda x: True)
    norm = ChannelNorm(CHANNELS)
    torch.nn.init.normal_(norm.norm.weight)
    x = (10 + torch.randn(2, 3, 4, 4, CHANNELS)).to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x, silu=True)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    x32 = x.detach().float().requires_grad_()
    expected = torch.nn.functional.silu(norm.norm(x32))
    torch.testing.assert_close(y.float(), expected, atol=0.03, rtol=0.02)
    expected.square().sum().backward()  # type: ignore[no-untyped-call]
    assert norm.norm.weight.grad is not None
    assert norm.norm.weight.grad.dtype == torch.float32
