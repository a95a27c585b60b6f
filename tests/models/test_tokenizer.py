"""Tokenizers: the rules for lengths and sizes, determinism, causality."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from tests.support.shared import SHARED
from vidshard.models.tokenizer import Past, frames_to_input, get_preset, output_to_frames
from vidshard.models.vidtok.config import PRESETS, VidTokConfig
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import checkpoint_name, count_parameters, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

NAME_TABLES = SHARED / "reference" / "state_dict"
TINY = PRESETS["tiny"]
TINY_KL = TINY.model_copy(update={"name": "tiny_kl", "head": "kl", "latent_channels": 3, "fsq_levels": ()})

TINY_LFQ = TINY.model_copy(update={"name": "tiny_lfq", "head": "lfq", "latent_channels": 10, "fsq_levels": ()})
TINY_VQ = TINY.model_copy(update={"name": "tiny_vq", "head": "vq", "fsq_levels": (), "vq_codebook_size": 500})
RELEASED = [
    name
    for name, config in PRESETS.items()
    if config.base_width == 128 and config.architecture == "released" and config.head in ("fsq", "kl")
]


def clips(batch: int, num_frames: int, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, num_frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Configurations


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_every_preset_survives_json(config: VidTokConfig) -> None:
    assert VidTokConfig.model_validate_json(config.model_dump_json()) == config
    assert get_preset(config.name) is config


def test_an_unknown_preset_is_answered_with_the_nearest_and_with_all() -> None:
    with pytest.raises(ValueError, match="did you mean fsq_causal_488_4096") as error:
        get_preset("fsq_causal_488_4069")
    assert all(name in str(error.value) for name in PRESETS)


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1},
        {"fsq_levels": (8, 8)},
        {"head": "kl"},
        {"head": "lfq"},
        {"head": "vq", "fsq_levels": ()},
        {"head": "lfq", "fsq_levels": (), "latent_channels": 31},
        {"head": "vq", "fsq_levels": (), "vq_codebook_size": 1},
        {"vq_codebook_size": 64},
        {"encoder_time_levels": (3,)},
        {"encoder_space_levels": (0, 0, 1)},
        {"decoder_space_levels": (0, 1, 2)},
        {"decoder_time_levels": (2,)},
        {"width_multipliers": ()},
    ],
)
def test_a_config_that_describes_no_model_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        VidTokConfig.model_validate(TINY.model_dump() | change)


def test_a_config_written_before_there_were_variants_is_one_of_v1_0() -> None:
    before = {key: value for key, value in TINY.model_dump().items() if key != "variant"}
    assert VidTokConfig.model_validate(before) == TINY


@pytest.mark.parametrize(
    ("name", "time_stride", "space_stride", "codebook_size", "latent_channels"),
    [
        ("tiny", 4, 8, 32768, 5),
        ("fsq_causal_488_262144", 4, 8, 262144, 6),
        ("fsq_causal_488_4096", 4, 8, 4096, 4),
        ("fsq_causal_41616_262144", 4, 16, 262144, 6),
        ("lfq_causal_488_262144", 4, 8, 262144, 18),
        ("vq_causal_488_262144", 4, 8, 262144, 6),
        ("kl_causal_488_16chn", 4, 8, None, 16),
        ("kl_causal_444_4chn", 4, 4, None, 4),
        ("kl_causal_288_8chn", 2, 8, None, 8),
        ("fsq_causal_888_32768_v1_1", 8, 8, 32768, 5),
        ("kl_noncausal_41616_16chn", 4, 16, None, 16),
    ],
)
def test_presets_compress_as_their_names_say(
    name: str, time_stride: int, space_stride: int, codebook_size: int | None, latent_channels: int
) -> None:
    config = PRESETS[name]
    assert (config.time_stride, config.space_stride) == (time_stride, space_stride)
    assert (config.codebook_size, config.latent_channels) == (codebook_size, latent_channels)
    assert config.token_bits == (None if codebook_size is None else math.log2(codebook_size))
    assert config.is_causal == ("noncausal" not in name)


@pytest.mark.parametrize(
    ("name", "entries", "millions"),
    [
        ("fsq_causal_488_262144", 416, 157.45),
        ("fsq_causal_41616_262144", 500, 198.97),
        ("kl_causal_444_4chn", 412, 154.94),
        ("kl_causal_288_8chn", 410, 148.77),
        ("fsq_causal_888_32768_v1_1", 422, 164.94),
        ("fsq_noncausal_488_262144", 416, 157.45),
    ],
)
def test_models_have_the_published_number_of_weights(name: str, entries: int, millions: float) -> None:
    assert count_parameters(PRESETS[name]) / 1e6 == pytest.approx(millions, abs=0.02)
    with torch.device("meta"):
        assert len(VidTok(PRESETS[name]).state_dict()) == entries


@pytest.mark.shared
@pytest.mark.skipif(not NAME_TABLES.is_dir(), reason=f"tables of released names are not at {NAME_TABLES}")
@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_are_those_of_the_released_checkpoints(name: str) -> None:
    table = json.loads((NAME_TABLES / f"vidtok_{name}.json").read_text())
    config = PRESETS[name]
    with torch.device("meta"):
        entries = VidTok(config).state_dict().items()
    ours = {checkpoint_name(key, config): list(tensor.shape) for key, tensor in entries}
    assert ours == {key: shape for key, shape in table.items() if not key.startswith("loss.")}


# Lengths and sizes


@pytest.mark.parametrize("num_frames", range(1, 41))
@pytest.mark.parametrize("name", ["tiny", "kl_causal_288_8chn"])
def test_a_length_is_one_plus_a_multiple_of_the_stride_or_refused(name: str, num_frames: int) -> None:
    config = PRESETS[name]
    if num_frames % config.time_stride == 1:
        assert config.latent_frames(num_frames) == 1 + num_frames // config.time_stride
    else:
        with pytest.raises(ValueError, match=f"got {num_frames}; nearest: ") as error:
            config.latent_frames(num_frames)
        for nearest in str(error.value).rsplit("nearest: ", maxsplit=1)[1].split(" or "):
            assert abs(int(nearest) - num_frames) < config.time_stride
            config.latent_frames(int(nearest))


@pytest.mark.parametrize("num_frames", [0, -3])
def test_a_length_below_one_is_refused(num_frames: int) -> None:
    with pytest.raises(ValueError, match=r"nearest: 1$"):
        TINY.latent_frames(num_frames)


def test_a_wrong_size_is_named_with_what_would_do() -> None:
    with pytest.raises(ValueError, match="width must be divisible by 8, got 130; nearest: 128 or 136"):
        TINY.latent_shape(17, 128, 130)
    with pytest.raises(ValueError, match="height must be divisible by 8, got 5; nearest: 8"):
        TINY.latent_shape(17, 5, 128)
    assert TINY.latent_shape(17, 128, 64) == (5, 16, 8)
    assert TINY_KL.latent_shape(17, 128, 64) == (3, 5, 16, 8)


@pytest.mark.parametrize("num_frames", [1, 5, 9, 17])
def test_a_clip_comes_back_as_long_and_large_as_it_went_in(tiny: VidTok, num_frames: int) -> None:
    x_BCTHW = clips(2, num_frames, 16, 24)
    encoded = tiny.encode(x_BCTHW)
    assert encoded.tokens is not None
    assert encoded.tokens.shape[1:] == TINY.latent_shape(num_frames, 16, 24)
    assert encoded.tokens.dtype is torch.int32
    assert encoded.latents.shape == (2, 5, *encoded.tokens.shape[1:])
    assert tiny.decode(encoded.tokens).shape == x_BCTHW.shape
    assert torch.equal(tiny.decode(encoded.tokens), tiny.decode(encoded.latents))


def test_a_kl_tokenizer_gives_means_and_decodes_them() -> None:
    model = load_tokenizer(TINY_KL, None, seed=0)
    encoded = model.encode(clips(1, 5))
    assert encoded.tokens is None
    assert encoded.logvar is not None
    assert encoded.latents.shape[1:] == encoded.logvar.shape[1:] == TINY_KL.latent_shape(5, 32, 32)
    assert torch.equal(model.encode(clips(1, 5)).latents, encoded.latents)
    assert model.decode(encoded.latents).shape == (1, 3, 5, 32, 32)
    with pytest.raises(ValueError, match="no tokens"):
        model.decode(torch.zeros(1, 1, 4, 4, dtype=torch.int32))


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 3, 16, 32, 32), "num_frames"),
        (torch.zeros(1, 3, 17, 32, 36), "width"),
        (torch.zeros(1, 17, 32, 32, 3), "frames_to_input"),
        (torch.zeros(3, 17, 32, 32), "frames_to_input"),
        (torch.zeros(1, 3, 17, 32, 32, dtype=torch.uint8), "frames_to_input"),
    ],
)
def test_encode_refuses_what_it_cannot_encode(tiny: VidTok, video: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.encode(video)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(1, 4, 2, 4, 4), "latents must be"),
        (torch.zeros(5, 2, 4, 4), "latents must be"),
        (torch.zeros(2, 4, 4, dtype=torch.int32), "tokens must be"),
        (torch.full((1, 2, 4, 4), 32768), "another tokenizer"),
    ],
)
def test_decode_refuses_what_it_cannot_decode(tiny: VidTok, given: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.decode(given)


def test_frames_survive_the_way_to_the_model_and_back() -> None:
    frames = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 2, 8, 16, 3)
    x_BCTHW = frames_to_input(frames)
    assert x_BCTHW.shape == (1, 3, 2, 8, 16)
    assert (x_BCTHW.min().item(), x_BCTHW.max().item()) == (-1.0, 1.0)
    assert torch.equal(output_to_frames(x_BCTHW), frames)
    assert output_to_frames(torch.full((1, 3, 1, 1, 1), 1.5)).flatten().tolist() == [255] * 3
    assert output_to_frames(torch.full((1, 3, 1, 1, 1), -1.5)).flatten().tolist() == [0] * 3


def test_frames_that_are_not_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        frames_to_input(torch.zeros(1, 5, 8, 8, 3))


# Determinism and causality


def test_a_clip_is_encoded_and_decoded_alike_in_any_company(tiny: VidTok) -> None:
    x_BCTHW = clips(4, 9, 40, 24)
    whole = tiny.encode(x_BCTHW)
    assert whole.tokens is not None
    assert whole.pre_quantized is not None
    decoded = tiny.decode(whole.tokens)
    for order in ([2, 0, 3, 1], [3, 3], [1]):
        part = tiny.encode(x_BCTHW[order])
        assert part.pre_quantized is not None
        assert torch.equal(part.pre_quantized, whole.pre_quantized[order])
        assert torch.equal(tiny.decode(whole.tokens[order]), decoded[order])


def test_the_past_does_not_see_the_future(tiny: VidTok) -> None:
    x_BCTHW = clips(1, 13)
    whole = tiny.encode(x_BCTHW).pre_quantized
    assert whole is not None
    for frame in range(1, 13):
        changed = x_BCTHW.clone()
        changed[:, :, frame] *= -1
        latents = tiny.encode(changed).pre_quantized
        assert latents is not None
        first_that_sees = 1 + (frame - 1) // 4
        assert torch.equal(latents[:, :, :first_that_sees], whole[:, :, :first_that_sees])
        assert not torch.equal(latents[:, :, first_that_sees], whole[:, :, first_that_sees])


def test_decoded_frames_do_not_see_later_latents(tiny: VidTok) -> None:
    tokens = torch.arange(64, dtype=torch.int32).view(1, 4, 4, 4) * 500
    changed = tokens.clone()
    changed[:, 2] += 1
    assert torch.equal(tiny.decode(tokens)[:, :, :5], tiny.decode(changed)[:, :, :5])


@given(cuts=st.sets(st.integers(0, 5)))
@settings(deadline=None, max_examples=12)
def test_a_video_in_chunks_gives_what_the_whole_gives(tiny: VidTok, cuts: set[int]) -> None:
    x_BCTHW = clips(2, 25, 16, 16)
    whole = tiny.encode(x_BCTHW)
    latents, tokens, frames = [], [], []
    past: Past = ()
    decoder_past: Past = ()
    for chunk in torch.tensor_split(x_BCTHW, [1 + 4 * cut for cut in sorted(cuts)], dim=2):
        encoded, past = tiny.encode_stream(chunk, past)
        assert encoded.tokens is not None
        assert encoded.pre_quantized is not None
        decoded, decoder_past = tiny.decode_stream(encoded.tokens, decoder_past)
        latents.append(encoded.pre_quantized)
        tokens.append(encoded.tokens)
        frames.append(decoded)
    torch.testing.assert_close(torch.cat(latents, dim=2), whole.pre_quantized, atol=1e-4, rtol=0)
    assert whole.tokens is not None
    assert torch.equal(torch.cat(tokens, dim=1), whole.tokens)
    torch.testing.assert_close(torch.cat(frames, dim=2), tiny.decode(whole.tokens), atol=1e-4, rtol=0)


def test_chunks_that_would_tear_a_latent_are_refused(tiny: VidTok) -> None:
    with pytest.raises(ValueError, match="num_frames must be 1"):
        tiny.encode_stream(clips(1, 4))
    past = tiny.encode_stream(clips(1, 5))[1]
    with pytest.raises(ValueError, match="multiple of 4 frames, got 5"):
        tiny.encode_stream(clips(1, 5), past)


def test_a_latent_sees_exactly_its_history(tiny: VidTok) -> None:
    # Gradients tell which frames count at all, where values may differ by less than float32 shows.
    num_frames = 1 + 4 * (2 + TINY.history_frames // 4)
    x_BCTHW = clips(1, num_frames, 8, 8).requires_grad_()
    latents, _ = tiny.encoder(torch.cat([x_BCTHW[:, :, :1]] * 3 + [x_BCTHW], dim=2).permute(0, 2, 3, 4, 1))
    (gradient,) = torch.autograd.grad(latents[:, -1].sum(), x_BCTHW)
    seen = gradient.abs().amax(dim=(0, 1, 3, 4)).nonzero().flatten().tolist()
    assert seen == list(range(num_frames - 1 - TINY.history_frames, num_frames))


def test_a_span_with_its_history_has_the_tokens_of_the_whole_video(tiny: VidTok) -> None:
    halo_latents = math.ceil(TINY.history_frames / 4)
    start = 8
    x_BCTHW = clips(1, 1 + 4 * (start + halo_latents + 2), 16, 16)
    whole = tiny.encode(x_BCTHW).pre_quantized
    span = tiny.encode(x_BCTHW[:, :, 4 * start :]).pre_quantized
    assert whole is not None
    assert span is not None
    torch.testing.assert_close(span[:, :, halo_latents:], whole[:, :, start + halo_latents :], atol=1e-5, rtol=0)


def test_the_toy_model_uses_much_of_its_codebook(tiny: VidTok) -> None:
    tokens = tiny.encode(clips(2, 17, 64, 64)).tokens
    assert tokens is not None
    assert len({*tokens.flatten().tolist()}) > tokens.numel() / 2


def test_encoding_and_decoding_are_differentiable() -> None:
    model = VidTok(TINY)
    loss = model.decode(model.encode(clips(1, 5, 16, 16)).latents).square().mean()
    torch.autograd.backward(loss)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_reduced_precision_model_keeps_its_head_in_float32() -> None:
    model = load_tokenizer(TINY, None, seed=0, dtype=torch.bfloat16)
    encoded = model.encode(clips(1, 5))
    assert encoded.latents.dtype is torch.float32
    assert encoded.tokens is not None
    assert model.decode(encoded.tokens).dtype is torch.bfloat16
