"""Ablations of the VidTok paper, as large as its table says, and networks of our own: tokenizers like any other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vidshard.models.tokenizer import Past
from vidshard.models.vidtok.autoencoder import ARCHITECTURES
from vidshard.models.vidtok.config import PRESETS, VidTokConfig
from vidshard.models.vidtok.convolutions import conv_over_time
from vidshard.models.vidtok.layers import TIME_RULES
from vidshard.models.vidtok.model import VidTok
from vidshard.models.vidtok.resampling import RepeatedTimeUp, TimeDown
from vidshard.models.weights import checkpoint_name, count_parameters, load_tokenizer, seeded_weights

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = PRESETS["tiny"]
OWN: dict[str, dict[str, object]] = {
    "haar": {"haar_bands": True},
    "shortcuts": {"shortcuts": True},
    "both": {"haar_bands": True, "shortcuts": True},
    "both-fully-3d": {"haar_bands": True, "shortcuts": True, "architecture": "fully-3d"},
}
NETWORKS = [*(name for name in ARCHITECTURES if name != "released"), *OWN]
CAUSAL = [
    (network, variant)
    for network in NETWORKS
    for variant in ("causal-v1.0", "causal-v1.1")
    if not ("shortcuts" in OWN.get(network, ()) and variant == "causal-v1.1")
]


def config_of(network: str, **changes: object) -> VidTokConfig:
    own = OWN.get(network, {"architecture": network})
    return VidTokConfig.model_validate(TINY.model_dump() | {"name": f"tiny_{network}"} | own | changes)


def clips(batch: int, num_frames: int, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(batch, 3, num_frames, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    ("name", "published", "millions"),
    [
        ("kl_causal_488_4chn", 157, 157.45),
        ("kl_causal_488_4chn_fully_3d", 245, 244.76),
        ("kl_causal_488_4chn_no_blend", 142, 141.72),
        ("kl_causal_488_4chn_no_3d", 126, 126.01),
    ],
)
def test_models_are_as_large_as_table_2_of_the_paper_says(name: str, published: int, millions: float) -> None:
    count = count_parameters(PRESETS[name]) / 1e6
    assert round(count) == published
    assert count == pytest.approx(millions, abs=0.01)


def test_a_config_written_before_there_were_ablations_is_of_the_released_architecture() -> None:
    before = {key: value for key, value in TINY.model_dump().items() if key != "architecture"}
    assert VidTokConfig.model_validate(before) == TINY


@pytest.mark.parametrize(("network", "variant"), [*CAUSAL, *((network, "non-causal") for network in NETWORKS)])
def test_every_network_gives_tokens_and_frames_in_every_variant(network: str, variant: str) -> None:
    config = config_of(network, variant=variant)
    num_frames, side = config.valid_frames(5), 2 * config.space_stride
    model = load_tokenizer(config, None, seed=0)
    encoded = model.encode(clips(2, num_frames, side, side))
    assert encoded.tokens is not None
    assert encoded.tokens.shape[1:] == config.latent_shape(num_frames, side, side)
    decoded = model.decode(encoded.tokens, num_frames)
    assert decoded.shape == (2, 3, num_frames, side, side)
    assert decoded.isfinite().all()
    alone = model.encode(clips(2, num_frames, side, side)[1:])
    assert alone.pre_quantized is not None
    assert encoded.pre_quantized is not None
    assert torch.equal(alone.pre_quantized, encoded.pre_quantized[1:])


@pytest.mark.parametrize(("network", "variant"), CAUSAL)
def test_every_network_gives_in_chunks_what_it_gives_for_the_whole(network: str, variant: str) -> None:
    model = load_tokenizer(config_of(network, variant=variant), None, seed=0)
    x_BCTHW = clips(2, 17)
    whole = model.encode(x_BCTHW)
    assert whole.tokens is not None
    latents, frames = [], []
    past: Past = ()
    for chunk in torch.tensor_split(x_BCTHW, [1, 9], dim=2):
        encoded, past = model.encode_stream(chunk, past)
        latents.append(encoded.pre_quantized)
    torch.testing.assert_close(
        torch.cat([z for z in latents if z is not None], 2), whole.pre_quantized, atol=1e-4, rtol=0
    )
    past = ()
    for index, tokens in enumerate(torch.tensor_split(whole.tokens, [1, 3], dim=1)):
        decoded, past = model.decode_stream(tokens, past, last=index == 2)
        frames.append(decoded)
    torch.testing.assert_close(torch.cat(frames, 2), model.decode(whole.tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("network", "variant"), CAUSAL)
def test_a_latent_of_a_network_sees_exactly_its_history(network: str, variant: str) -> None:
    config = config_of(network, variant=variant)
    model = load_tokenizer(config, None, seed=0)
    num_frames = 4 * (3 + math.ceil(config.history_frames / 4))
    side = config.space_stride
    x_BTHWC = clips(1, num_frames, side, side).permute(0, 2, 3, 4, 1).contiguous().requires_grad_()
    latents, _ = model.encoder(x_BTHWC)
    (gradient,) = torch.autograd.grad(latents[:, -1].sum(), x_BTHWC)
    seen = gradient.abs().amax(dim=(0, 2, 3, 4)).nonzero().flatten().tolist()
    assert seen == list(range(num_frames - 1 - config.history_frames, num_frames))


@pytest.mark.parametrize("network", NETWORKS)
def test_every_weight_of_a_network_takes_part_and_has_a_name_of_its_own(network: str) -> None:
    config = config_of(network, variant="non-causal")
    names = {checkpoint_name(name, config) for name in seeded_weights(config, 0)}
    model = VidTok(config)
    assert len(names) == len(model.state_dict())
    torch.autograd.backward(model.decode(model.encode(clips(1, 4)).latents).square().mean())
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_resampling_without_a_blend_convolves_each_position_over_time() -> None:
    rule = TIME_RULES["causal-v1.0"]
    down, up = TimeDown(4, rule, blend=False), RepeatedTimeUp(4, rule, blend=False)
    x_BTHWC = torch.randn(2, 6, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    for layer, doubled in ((down, x_BTHWC), (up, x_BTHWC.repeat_interleave(2, dim=1))):
        before = 1 if layer is down else 2
        joined = torch.cat([doubled.new_zeros(2, before, 3, 3, 4), doubled], dim=1)
        expected = conv_over_time(joined, layer.conv.conv.weight, layer.conv.conv.bias)
        expected = expected[:, ::2] if layer is down else expected
        torch.testing.assert_close(layer(x_BTHWC)[0], expected, atol=1e-5, rtol=0)
