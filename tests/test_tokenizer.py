"""Tokenizers: the rules for lengths and sizes, determinism, causality, and weight files that fit or are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from models.tokenizer import (
    PRESETS,
    Past,
    TokenizerConfig,
    VideoTokenizer,
    frames_to_input,
    get_preset,
    output_to_frames,
)
from models.weights import (
    checkpoint_name,
    count_parameters,
    load_tokenizer,
    load_weights,
    save_tokenizer,
    seeded_weights,
    weights_digest,
)

NAME_TABLES = Path(__file__).parents[2] / "shared" / "reference" / "state_dict"
TINY = get_preset("tiny")
TINY_KL = TINY.model_copy(update={"name": "tiny_kl", "head": "kl", "latent_channels": 3, "fsq_levels": ()})

TINY_LFQ = TINY.model_copy(update={"name": "tiny_lfq", "head": "lfq", "latent_channels": 10, "fsq_levels": ()})
TINY_VQ = TINY.model_copy(update={"name": "tiny_vq", "head": "vq", "fsq_levels": (), "vq_codebook_size": 500})
RELEASED = [
    name
    for name, config in PRESETS.items()
    if not name.startswith("tiny") and config.architecture == "released" and config.head in ("fsq", "kl")
]
NON_CAUSAL = TINY.model_copy(update={"name": "tiny_non_causal", "variant": "non-causal"})


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On busy cores two threads that wait for each other take 0.4 s for a clip for which one takes 4 ms."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny() -> VideoTokenizer:
    return load_tokenizer(TINY, None, seed=0)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return seeded_weights(TINY, 0)


def clips(batch: int, num_frames: int, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, num_frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Configurations


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_every_preset_survives_json(config: TokenizerConfig) -> None:
    assert TokenizerConfig.model_validate_json(config.model_dump_json()) == config
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
        TokenizerConfig.model_validate(TINY.model_dump() | change)


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
    config = get_preset(name)
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
    assert count_parameters(get_preset(name)) / 1e6 == pytest.approx(millions, abs=0.02)
    with torch.device("meta"):
        assert len(VideoTokenizer(get_preset(name)).state_dict()) == entries


@pytest.mark.shared
@pytest.mark.skipif(not NAME_TABLES.is_dir(), reason=f"tables of released names are not at {NAME_TABLES}")
@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_are_those_of_the_released_checkpoints(name: str) -> None:
    table = json.loads((NAME_TABLES / f"vidtok_{name}.json").read_text())
    config = get_preset(name)
    with torch.device("meta"):
        entries = VideoTokenizer(config).state_dict().items()
    ours = {checkpoint_name(key, config): list(tensor.shape) for key, tensor in entries}
    assert ours == {key: shape for key, shape in table.items() if not key.startswith("loss.")}


# Lengths and sizes


@pytest.mark.parametrize("num_frames", range(1, 41))
@pytest.mark.parametrize("name", ["tiny", "kl_causal_288_8chn"])
def test_a_length_is_one_plus_a_multiple_of_the_stride_or_refused(name: str, num_frames: int) -> None:
    config = get_preset(name)
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
def test_a_clip_comes_back_as_long_and_large_as_it_went_in(tiny: VideoTokenizer, num_frames: int) -> None:
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
def test_encode_refuses_what_it_cannot_encode(tiny: VideoTokenizer, video: Tensor, message: str) -> None:
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
def test_decode_refuses_what_it_cannot_decode(tiny: VideoTokenizer, given: Tensor, message: str) -> None:
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


def test_a_clip_is_encoded_and_decoded_alike_in_any_company(tiny: VideoTokenizer) -> None:
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


def test_the_past_does_not_see_the_future(tiny: VideoTokenizer) -> None:
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


def test_decoded_frames_do_not_see_later_latents(tiny: VideoTokenizer) -> None:
    tokens = torch.arange(64, dtype=torch.int32).view(1, 4, 4, 4) * 500
    changed = tokens.clone()
    changed[:, 2] += 1
    assert torch.equal(tiny.decode(tokens)[:, :, :5], tiny.decode(changed)[:, :, :5])


@given(cuts=st.sets(st.integers(0, 5)))
@settings(deadline=None, max_examples=12)
def test_a_video_in_chunks_gives_what_the_whole_gives(tiny: VideoTokenizer, cuts: set[int]) -> None:
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


def test_chunks_that_would_tear_a_latent_are_refused(tiny: VideoTokenizer) -> None:
    with pytest.raises(ValueError, match="num_frames must be 1"):
        tiny.encode_stream(clips(1, 4))
    past = tiny.encode_stream(clips(1, 5))[1]
    with pytest.raises(ValueError, match="multiple of 4 frames, got 5"):
        tiny.encode_stream(clips(1, 5), past)


def test_a_latent_sees_exactly_its_history(tiny: VideoTokenizer) -> None:
    # Gradients tell which frames count at all, where values may differ by less than float32 shows.
    num_frames = 1 + 4 * (2 + TINY.history_frames // 4)
    x_BCTHW = clips(1, num_frames, 8, 8).requires_grad_()
    latents, _ = tiny.encoder(torch.cat([x_BCTHW[:, :, :1]] * 3 + [x_BCTHW], dim=2).permute(0, 2, 3, 4, 1))
    (gradient,) = torch.autograd.grad(latents[:, -1].sum(), x_BCTHW)
    seen = gradient.abs().amax(dim=(0, 1, 3, 4)).nonzero().flatten().tolist()
    assert seen == list(range(num_frames - 1 - TINY.history_frames, num_frames))


def test_a_span_with_its_history_has_the_tokens_of_the_whole_video(tiny: VideoTokenizer) -> None:
    halo_latents = math.ceil(TINY.history_frames / 4)
    start = 8
    x_BCTHW = clips(1, 1 + 4 * (start + halo_latents + 2), 16, 16)
    whole = tiny.encode(x_BCTHW).pre_quantized
    span = tiny.encode(x_BCTHW[:, :, 4 * start :]).pre_quantized
    assert whole is not None
    assert span is not None
    torch.testing.assert_close(span[:, :, halo_latents:], whole[:, :, start + halo_latents :], atol=1e-5, rtol=0)


def test_two_models_of_one_seed_are_the_same_whatever_torch_drew_before() -> None:
    digests = []
    for torch_seed in (1, 2):
        torch.manual_seed(torch_seed)
        digests.append(weights_digest(seeded_weights(TINY, 5)))
    assert digests[0] == digests[1]
    assert weights_digest(seeded_weights(TINY, 6)) != digests[0]


def test_seeded_weights_never_change() -> None:
    weights = seeded_weights(get_preset("tiny"), 0)
    # Copied from the run that made them.
    assert weights_digest(weights) == "bd98ed518a5b5edab816324cc8d71402a7df3eed293dcadfb8979c668098137c"


def test_the_toy_model_uses_much_of_its_codebook(tiny: VideoTokenizer) -> None:
    tokens = tiny.encode(clips(2, 17, 64, 64)).tokens
    assert tokens is not None
    assert len({*tokens.flatten().tolist()}) > tokens.numel() / 2


def test_encoding_and_decoding_are_differentiable() -> None:
    model = VideoTokenizer(TINY)
    loss = model.decode(model.encode(clips(1, 5, 16, 16)).latents).square().mean()
    torch.autograd.backward(loss)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


# Weight files


def written(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_a_tokenizer_is_saved_with_its_config_and_read_back(tiny: VideoTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    save_tokenizer(path, tiny)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.safetensors"]
    config, weights = load_weights(path)
    assert config == TINY
    assert weights_digest(weights) == weights_digest(tiny.state_dict())
    again = load_tokenizer(TINY, path)
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(again.encode(clips(1, 5)).latents, tiny.encode(clips(1, 5)).latents)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "global_step": 3},
        lambda weights: {"state_dict": weights | {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.tensor(1)}},
        lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()},
        lambda weights: {name.replace("coder.", "coder._orig_mod."): tensor for name, tensor in weights.items()},
    ],
    ids=["bare", "wrapped", "with training leftovers", "module.", "_orig_mod."],
)
def test_checkpoints_of_any_wrapping_have_the_digest_of_the_safetensors(
    wrap: Callable[[dict[str, Tensor]], object], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
    plain = load_weights(tmp_path / "weights.safetensors", TINY)[1]
    wrapped = load_weights(written(tmp_path / "weights.ckpt", wrap(weights)), TINY)[1]
    assert weights_digest(plain) == weights_digest(wrapped) == weights_digest(weights)


def test_files_of_models_that_are_not_causal_have_their_shorter_names(tmp_path: Path) -> None:
    model = load_tokenizer(NON_CAUSAL, None, seed=0)
    save_tokenizer(tmp_path / "weights.safetensors", model)
    stored = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    assert {"encoder.conv_in.weight", "encoder.mid.attn_1.q.weight", "decoder.up.1.upsample.conv.weight"} <= {*stored}
    assert "decoder.up_temporal.1.upsample.conv.weight" in stored
    assert not any(".conv.conv." in name or "conv_in.conv" in name for name in stored)
    again = load_tokenizer(NON_CAUSAL, tmp_path / "weights.safetensors")
    assert weights_digest(again.state_dict()) == weights_digest(model.state_dict())
    with pytest.raises(ValueError, match=r"variant: non-causal there, causal-v1\.0 here"):
        load_weights(tmp_path / "weights.safetensors", TINY)
    with pytest.raises(ValueError, match=r"missing: encoder\.conv_in\.conv\.weight"):
        load_weights(written(tmp_path / "weights.ckpt", stored), TINY)


def with_averages(config: TokenizerConfig, compiled: str = "") -> dict[str, Tensor]:
    """Weights of seed 0 and averages of seed 1, as training stores both."""
    last, averages = ({checkpoint_name(n, config): w for n, w in seeded_weights(config, s).items()} for s in (0, 1))
    joined = {name.replace("coder.", f"coder.{compiled}", 1).replace(".", ""): w for name, w in averages.items()}
    return {
        **last,
        **{f"model_ema.{name}": weight for name, weight in joined.items()},
        "model_ema.losslogvar": torch.zeros(()),
        "model_ema.decay": torch.tensor(0.99),
        "model_ema.num_updates": torch.tensor(7),
    }


@pytest.mark.parametrize("compiled", ["", "_orig_mod."])
@pytest.mark.parametrize("config", [TINY, NON_CAUSAL], ids=["causal", "non-causal"])
def test_averaged_weights_are_taken_where_they_are_asked_for(
    config: TokenizerConfig, compiled: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "weights.ckpt", {"state_dict": with_averages(config, compiled)})
    for ema in (False, True):
        digest = weights_digest(load_tokenizer(config, path, ema=ema).state_dict())
        assert digest == weights_digest(seeded_weights(config, int(ema)))


def test_averages_that_are_missing_or_incomplete_are_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no averaged"):
        load_weights(written(tmp_path / "plain.ckpt", weights), TINY, ema=True)
    partly = with_averages(TINY)
    del partly["model_ema.encoderconv_inconvweight"]
    partly["model_ema.encodersurprise"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"1 missing: encoder\.conv_in\.conv\.weight; 1 foreign: model_ema"):
        load_weights(written(tmp_path / "partly.ckpt", partly), TINY, ema=True)
    with pytest.raises(ValueError, match="come from a file"):
        load_tokenizer(TINY, None, seed=0, ema=True)


@pytest.mark.parametrize("config", [TINY_LFQ, TINY_VQ], ids=["lfq", "vq"])
def test_tokenizers_with_other_heads_are_tokenizers_too(config: TokenizerConfig, tmp_path: Path) -> None:
    assert TokenizerConfig.model_validate_json(config.model_dump_json()) == config
    model = load_tokenizer(config, None, seed=0)
    x_BCTHW = clips(2, 9)
    encoded = model.encode(x_BCTHW)
    assert encoded.tokens is not None
    assert encoded.tokens.shape[1:] == config.latent_shape(9, 32, 32)
    assert len({*encoded.tokens.flatten().tolist()}) > 30
    decoded = model.decode(encoded.tokens)
    assert decoded.shape == x_BCTHW.shape
    assert torch.equal(decoded, model.decode(encoded.latents))
    alone = model.encode(x_BCTHW[1:]).tokens
    assert alone is not None
    assert torch.equal(alone, encoded.tokens[1:])
    save_tokenizer(tmp_path / "weights.safetensors", model)
    stored_config, stored = load_weights(tmp_path / "weights.safetensors")
    assert stored_config == config
    assert ("head.codebook" in stored) == (config.head == "vq")
    assert weights_digest(stored) == weights_digest(model.state_dict())
    again = load_tokenizer(config, tmp_path / "weights.safetensors").encode(x_BCTHW).tokens
    assert again is not None
    assert torch.equal(again, encoded.tokens)


def test_a_learned_codebook_stays_in_float32_and_counts_in_the_digest(tmp_path: Path) -> None:
    model = load_tokenizer(TINY_VQ, None, seed=0, dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16
    before = weights_digest(seeded_weights(TINY_VQ, 0))
    changed = seeded_weights(TINY_VQ, 0)
    assert torch.equal(model.state_dict()["head.codebook"], changed["head.codebook"])
    assert model.encode(clips(1, 5)).latents.dtype is torch.float32
    changed["head.codebook"][7, 0] += 1
    assert weights_digest(changed) != before
    del changed["head.codebook"]
    with pytest.raises(ValueError, match=r"missing: head\.codebook"):
        load_weights(written(tmp_path / "weights.pt", changed), TINY_VQ)


def test_a_config_written_before_there_were_variants_is_one_of_v1_0() -> None:
    before = {key: value for key, value in TINY.model_dump().items() if key != "variant"}
    assert TokenizerConfig.model_validate(before) == TINY


def test_weights_that_do_not_fit_are_listed(weights: dict[str, Tensor], tmp_path: Path) -> None:
    names = list(weights)
    changed = {name: weights[name] for name in names[12:]} | {"encoder.extra.weight": torch.zeros(1)}
    changed["decoder.conv_out.conv.bias"] = torch.zeros(4)
    with pytest.raises(ValueError, match="another preset") as error:
        load_weights(written(tmp_path / "weights.pt", changed), TINY)
    text = str(error.value)
    assert "12 missing: encoder.conv_in.conv.weight" in text
    assert "and 2 more" in text
    assert "1 foreign: encoder.extra.weight" in text
    assert "1 mis-shaped: decoder.conv_out.conv.bias (4,) instead of (3,)" in text


def test_weights_of_another_preset_are_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mis-shaped.*encoder.conv_out"):
        load_weights(written(tmp_path / "weights.pt", weights), TINY_KL)


def test_a_file_that_states_another_network_is_refused_even_if_the_shapes_fit(
    tiny: VideoTokenizer, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path / "tiny.safetensors", tiny)
    other = TINY.model_copy(update={"fsq_levels": (8, 8, 8, 8, 7)})
    with pytest.raises(ValueError, match="fsq_levels"):
        load_weights(tmp_path / "tiny.safetensors", other)
    assert load_weights(tmp_path / "tiny.safetensors", TINY.model_copy(update={"name": "mine"}))[0].name == "mine"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(weights: dict[str, Tensor], tmp_path: Path, value: float) -> None:
    changed = weights | {"encoder.conv_in.conv.bias": torch.full((TINY.base_width,), value)}
    with pytest.raises(ValueError, match=r"not finite: encoder\.conv_in\.conv\.bias"):
        load_weights(written(tmp_path / "weights.pt", changed), TINY)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_a_checkpoint_that_would_execute_code_is_refused_and_does_not(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    mark = tmp_path / "executed"
    path = written(tmp_path / "weights.ckpt", {"state_dict": weights, "callbacks": Bomb(mark)})
    with pytest.raises(ValueError, match="would execute code"):
        load_weights(path, TINY)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.ckpt", "weights.gz"])
def test_files_that_hold_no_weights_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not weights at all, merely some text")
    with pytest.raises(ValueError, match=name):
        load_weights(tmp_path / name, TINY)


@pytest.mark.parametrize("content", [[1, 2], {"encoder.conv_in.conv.bias": 3}, {"encoder.x": torch.zeros(2).int()}])
def test_checkpoints_of_other_things_are_refused(content: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tensors"):
        load_weights(written(tmp_path / "weights.pt", content), TINY)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights file at .*nowhere\.ckpt"):
        load_tokenizer(TINY, tmp_path / "nowhere.ckpt")


def test_a_file_without_a_config_needs_one(weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a preset"):
        load_weights(written(tmp_path / "weights.pt", weights))


@pytest.mark.parametrize(("path", "seed"), [(None, None), ("weights.ckpt", 0)])
def test_weights_come_from_a_file_or_a_seed(path: str | None, seed: int | None, tmp_path: Path) -> None:
    source = None if path is None else written(tmp_path / path, seeded_weights(TINY, 0))
    with pytest.raises(ValueError, match="either a weights file or a seed"):
        load_tokenizer(TINY, source, seed=seed)


def test_a_reduced_precision_model_keeps_its_head_in_float32() -> None:
    model = load_tokenizer(TINY, None, seed=0, dtype=torch.bfloat16)
    encoded = model.encode(clips(1, 5))
    assert encoded.latents.dtype is torch.float32
    assert encoded.tokens is not None
    assert model.decode(encoded.tokens).dtype is torch.bfloat16
