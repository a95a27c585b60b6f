"""Any clip comes back as long as it went in, whole or in pieces, from every kind of model."""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.models import EACH_VARIANT, model_of, small, stored
from vidshard.models.tokenizer import Past
from vidshard.models.vidtok.config import VidTokConfig
from vidshard.models.vidtok.heads import Encoded
from vidshard.models.vidtok.lengths import PaddedClips, Padding, pad
from vidshard.models.vidtok.model import VidTok

pytestmark = pytest.mark.usefixtures("one_thread")

CAUSAL = tuple(name for name in EACH_VARIANT if "noncausal" not in name)
TOLERANCE = 1e-5
"""As a share of a rounding unit before the quantizer, or of a decoded video's largest value (not clamped: 2 to 5)."""


def clips(config: VidTokConfig, num_frames: int, batch: int = 1) -> Tensor:
    shape = (batch, 3, num_frames, config.space_stride, 2 * config.space_stride)
    return torch.rand(shape, generator=torch.Generator().manual_seed(num_frames)) * 2 - 1


@pytest.mark.parametrize("name", EACH_VARIANT)
def test_every_length_is_taken_or_refused_with_its_valid_neighbors(name: str) -> None:
    config = small(name)
    stride = config.time_stride
    for num_frames in range(1, 41):
        valid = {"causal-v1.0": num_frames % stride == 1, "causal-v1.1": True, "non-causal": num_frames % stride == 0}
        if valid[config.variant]:
            latent_frames = config.latent_frames(num_frames)
            assert latent_frames == stored(model_of(name).encode(clips(config, num_frames))).shape[-3]
            assert config.valid_frames(num_frames) == num_frames
            continue
        with pytest.raises(ValueError, match=rf"{name}: num_frames must be .*, got {num_frames}; nearest: ") as error:
            model_of(name).encode(clips(config, num_frames))
        nearest = [int(n) for n in str(error.value).rsplit("nearest: ", maxsplit=1)[1].split(" or ")]
        assert nearest == sorted(n for n in nearest if abs(n - num_frames) < stride and config.latent_frames(n))
        assert config.valid_frames(num_frames) == nearest[-1]


@pytest.mark.parametrize("name", EACH_VARIANT)
def test_a_model_takes_no_clip_without_frames(name: str) -> None:
    with pytest.raises(ValueError, match=r"num_frames must be .*, got 0; nearest: "):
        small(name).latent_frames(0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        pad(torch.zeros(1, 3, 0, 8, 8), small(name))


@pytest.mark.parametrize("name", EACH_VARIANT)
def test_what_comes_out_of_decode_is_as_long_as_what_went_in(name: str) -> None:
    model = model_of(name)
    for num_frames in range(1, 41):
        x_BCTHW = clips(model.config, num_frames)
        last, first = (pad(x_BCTHW, model.config, padding) for padding in Padding)
        decoded = model.decode(stored(model.encode(last.frames)), last.frames.shape[2])
        for padded in (last, first):
            assert padded.num_valid_frames == num_frames
            assert torch.equal(padded.cut(padded.frames), x_BCTHW)
            assert decoded.shape[2] == padded.frames.shape[2] < num_frames + model.config.time_stride
            assert padded.cut(decoded).shape == x_BCTHW.shape


def test_copies_are_of_the_frame_at_the_edge() -> None:
    x_BCTHW = torch.arange(4.0).view(1, 1, 4, 1, 1)
    config = small("fsq_causal_488_262144")
    assert pad(x_BCTHW, config, Padding.REPEAT_LAST).frames.flatten().tolist() == [0, 1, 2, 3, 3]
    assert pad(x_BCTHW, config, Padding.REPEAT_FIRST).frames.flatten().tolist() == [0, 0, 1, 2, 3]


def test_padding_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not lie within 5"):
        PaddedClips(frames=torch.zeros(1, 3, 5, 8, 8), first_valid_frame=3, num_valid_frames=3)
    with pytest.raises(ValueError, match="have 5 frames, got 4"):
        pad(torch.zeros(1, 3, 5, 8, 8), small("kl_causal_288_8chn")).cut(torch.zeros(1, 3, 4, 8, 8))


@pytest.mark.parametrize("name", EACH_VARIANT)
def test_decode_refuses_a_length_that_the_latents_do_not_have(name: str) -> None:
    model = model_of(name)
    longest = 3 * model.config.time_stride
    latents = model.encode(clips(model.config, model.config.decoded_frames(3))).latents
    assert model.decode(latents).shape[2] == model.config.decoded_frames(3)
    with pytest.raises(ValueError, match=r"frames make 4 latent frames, got 3|num_frames must be"):
        model.decode(latents, longest + 1)


# Pieces


@pytest.mark.parametrize("name", CAUSAL)
@given(data=st.data())
@settings(deadline=None, max_examples=12)
def test_a_video_in_chunks_gives_what_the_whole_gives(name: str, data: st.DataObject) -> None:
    model = model_of(name)
    stride = model.config.time_stride
    first = data.draw(st.integers(1, stride) if model.config.variant == "causal-v1.1" else st.just(1), label="first")
    num_latents = 7
    encoder_cuts = data.draw(st.sets(st.integers(0, num_latents - 2)), label="encoder cuts")
    x_BCTHW = clips(model.config, first + (num_latents - 1) * stride, batch=2)
    whole = model.encode(x_BCTHW)

    parts: list[Encoded] = []
    past: Past = ()
    for chunk in torch.tensor_split(x_BCTHW, [first + stride * cut for cut in sorted(encoder_cuts)], dim=2):
        encoded, past = model.encode_stream(chunk, past)
        parts.append(encoded)
    continuous = torch.cat([continuous_values(part) for part in parts], dim=2)
    assert (continuous - continuous_values(whole)).abs().max() < TOLERANCE
    if whole.tokens is not None:
        near_tie = ((continuous - continuous.floor() - 0.5).abs() < TOLERANCE).any(dim=1)
        assert ((torch.cat([stored(part) for part in parts], dim=1) == whole.tokens) | near_tie).all()

    decoder_cuts = data.draw(st.sets(st.integers(1, num_latents - 1)), label="decoder cuts")
    # In float32 the rounding of a random decoder can grow to 1.3e-5, which says nothing of the cuts; these give 1e-14.
    exact = copy.deepcopy(model).double()
    latents = whole.latents.double()
    frames = torch.cat(decoded_in_chunks(exact, latents, sorted(decoder_cuts), first), dim=2)
    expected = exact.decode(latents, x_BCTHW.shape[2])
    assert frames.shape == expected.shape == x_BCTHW.shape
    assert (frames - expected).abs().max() < 1e-10 * expected.abs().max()


def continuous_values(encoded: Encoded) -> Tensor:
    return encoded.latents if encoded.pre_quantized is None else encoded.pre_quantized


def decoded_in_chunks(model: VidTok, latents: Tensor, cuts: Sequence[int], first_frames: int) -> list[Tensor]:
    frames: list[Tensor] = []
    past: Past = ()
    for index, chunk in enumerate(torch.tensor_split(latents, list(cuts), dim=2)):
        decoded, past = model.decode_stream(chunk, past, last=index == len(cuts), first_frames=first_frames)
        frames.append(decoded)
    return frames


@pytest.mark.parametrize("name", CAUSAL)
def test_only_interpolating_models_hold_frames_back_and_less_than_a_latent_of_them(name: str) -> None:
    model = model_of(name)
    stride = model.config.time_stride
    latents = model.encode(clips(model.config, 1 + 3 * stride)).latents
    lengths = [part.shape[2] for part in decoded_in_chunks(model, latents, (1, 2, 3), 1)]
    if model.config.variant == "causal-v1.1":
        assert lengths == [1, 1, stride, 2 * stride - 1]
    else:
        assert lengths == [1, stride, stride, stride]


@pytest.mark.parametrize("name", CAUSAL)
def test_what_is_kept_between_chunks_does_not_grow(name: str) -> None:
    model = model_of(name)
    encoder_past: Past = ()
    decoder_past: Past = ()
    sizes = set()
    for index in range(6):
        frames = clips(model.config, model.config.time_stride if index else 1)
        encoded, encoder_past = model.encode_stream(frames, encoder_past)
        _, decoder_past = model.decode_stream(encoded.latents, decoder_past)
        kept = [tensor for layer in (*encoder_past, *decoder_past) for tensor in layer]
        assert all(tensor.untyped_storage().nbytes() == 4 * tensor.numel() for tensor in kept)
        sizes.add(sum(tensor.numel() for tensor in kept) if index else None)
    assert len(sizes) == 2


@pytest.mark.parametrize("name", [name for name in EACH_VARIANT if name not in CAUSAL])
def test_a_model_that_looks_ahead_is_refused_for_streaming(name: str) -> None:
    model = model_of(name)
    x_BCTHW = clips(model.config, 8)
    with pytest.raises(ValueError, match=f"{name} is not causal"):
        model.encode_stream(x_BCTHW)
    with pytest.raises(ValueError, match=f"{name} is not causal"):
        model.decode_stream(model.encode(x_BCTHW).latents)


@pytest.mark.parametrize(
    ("name", "first_frames"), [("kl_causal_288_8chn", 2), ("kl_causal_288_8chn_v1_1", 3), ("kl_causal_288_8chn", 0)]
)
def test_a_first_latent_that_stands_for_more_frames_than_it_can_is_refused(name: str, first_frames: int) -> None:
    model = model_of(name)
    with pytest.raises(ValueError, match=r"first_frames must be 1 \.\.\. |num_frames must be"):
        model.decode_stream(torch.zeros(1, 8, 1, 1, 2), first_frames=first_frames)


# What a latent sees


@pytest.mark.parametrize("name", EACH_VARIANT)
def test_a_latent_sees_exactly_the_frames_that_the_layers_add_up_to(name: str) -> None:
    # Gradients tell which frames count at all, where values may differ by less than float32 shows.
    model = model_of(name)
    config, stride = model.config, model.config.time_stride
    middle = -(-config.history_frames // stride) + 1
    num_latents = middle + 2 + -(-config.future_frames // stride)
    x_BCTHW = clips(config, num_latents * stride)[..., : config.space_stride].requires_grad_()
    latents, _ = model.encoder(x_BCTHW.permute(0, 2, 3, 4, 1))
    (gradient,) = torch.autograd.grad(latents[:, middle].sum(), x_BCTHW)
    seen = gradient.abs().amax(dim=(0, 1, 3, 4)).nonzero().flatten().tolist()
    own_last = (middle + 1) * stride - 1
    assert seen == list(range(own_last - config.history_frames, own_last + config.future_frames + 1))
