"""FSQ numbers its codes one to one, whatever the levels; KL gives the mean."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.heads import FSQ, KL

LEVELS = st.lists(
    st.one_of(st.integers(2, 16), st.sampled_from([255, 1001, 1002, 4097, 65537])), min_size=1, max_size=6
)


@given(levels=LEVELS.filter(lambda levels: math.prod(levels) < 2**31), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=200)
def test_every_token_survives_the_round_trip(levels: list[int], seed: int) -> None:
    fsq = FSQ(levels)
    assert fsq.codebook_size is not None
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, fsq.codebook_size, (2, 3, 2, 2), generator=generator, dtype=torch.int64)
    drawn[0, 0, 0] = torch.tensor([0, fsq.codebook_size - 1])
    codes = fsq.indices_to_codes(drawn.to(torch.int32))
    assert codes.dtype is torch.float32
    assert codes.abs().max() <= 1
    assert torch.equal(fsq.codes_to_indices(codes), drawn.to(torch.int32))


@given(levels=LEVELS.filter(lambda levels: math.prod(levels) < 2**31), scale=st.sampled_from([0.1, 1.0, 10.0, 1e4]))
@settings(deadline=None, max_examples=200)
def test_whatever_the_encoder_says_is_a_code_of_the_codebook(levels: list[int], scale: float) -> None:
    fsq = FSQ(levels)
    assert fsq.codebook_size is not None
    z_BCTHW = scale * torch.randn(2, len(levels), 2, 3, 3, generator=torch.Generator().manual_seed(len(levels)))
    encoded = fsq.quantize(z_BCTHW)
    assert encoded.tokens is not None
    assert encoded.tokens.dtype is torch.int32
    assert 0 <= encoded.tokens.min() <= encoded.tokens.max() < fsq.codebook_size
    assert torch.equal(fsq.indices_to_codes(encoded.tokens), encoded.latents)


def test_small_codebooks_are_used_to_the_last_code() -> None:
    fsq = FSQ([2, 3, 8, 5])
    axes = torch.linspace(-6, 6, 101)
    tokens = fsq.quantize(axes.view(1, 1, -1).expand(1, 4, -1)).tokens
    assert tokens is not None
    for channel, level in enumerate(fsq.levels):
        digits = {(int(token) // math.prod(fsq.levels[:channel])) % level for token in tokens.flatten()}
        assert digits == set(range(level))


@pytest.mark.parametrize("level", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("value", [-3.0, -0.4, 0.0, 0.7, 5.0])
def test_bounding_follows_the_papers_formula(level: int, value: float) -> None:
    half = (level - 1) * 1.001 / 2
    offset = 0.5 if level % 2 == 0 else 0.0
    expected = math.tanh(value + math.atanh(offset / half)) * half - offset
    bounded = FSQ([level]).bound(torch.tensor([[value]]))
    assert bounded.item() == pytest.approx(expected, abs=1e-5)


def test_the_first_channel_is_the_least_significant_digit() -> None:
    codes = torch.tensor([[-0.75, -1.0, -1.0], [-1.0, -0.75, -1.0], [0.75, 0.75, 0.75]])
    assert FSQ([8, 8, 8]).codes_to_indices(codes).tolist() == [1, 8, 511]


def test_half_way_values_round_to_even() -> None:
    fsq = FSQ([5])
    middle = torch.tensor([[math.atanh(0.5 / 2.002)]])
    bounded = fsq.quantize(middle).pre_quantized
    assert bounded is not None
    assert torch.equal(fsq.quantize(middle).latents * 2, bounded.round())


def test_rounding_is_in_float32_even_for_bfloat16_inputs() -> None:
    z = torch.linspace(-2, 2, 64).view(1, 1, -1).expand(1, 5, -1).to(torch.bfloat16)
    fsq = FSQ([8] * 5)
    low, full = fsq.quantize(z), fsq.quantize(z.float())
    assert low.latents.dtype is torch.float32
    assert low.tokens is not None
    assert full.tokens is not None
    assert torch.equal(low.tokens, full.tokens)


def test_gradients_pass_the_rounding_as_if_it_were_not_there() -> None:
    z = torch.randn(1, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    fsq = FSQ([8, 5])
    (gradient,) = torch.autograd.grad(fsq.quantize(z).latents.sum(), z)
    scale = torch.tensor([4.0, 2.0]).view(1, 2, 1, 1, 1)
    (unrounded,) = torch.autograd.grad((fsq.bound(z) / scale).sum(), z)
    assert torch.equal(gradient, unrounded)


@pytest.mark.parametrize("levels", [[], [1], [8, 0], [2**16, 2**15]])
def test_levels_that_make_no_int32_codebook_are_refused(levels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"levels|dimension"):
        FSQ(levels)


@pytest.mark.parametrize("token", [-1, 8**2])
def test_tokens_outside_the_codebook_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match=r"0 \.\.\. 63"):
        FSQ([8, 8]).indices_to_codes(torch.tensor([[0, token]]))


def test_float_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="integers"):
        FSQ([8]).indices_to_codes(torch.zeros(1, 2))


def test_kl_gives_the_mean_and_a_clamped_log_variance() -> None:
    z = torch.tensor([1.0, -2.0, -100.0, 100.0]).view(1, 4, 1, 1, 1)
    encoded = KL(2).quantize(z)
    assert encoded.tokens is None
    assert encoded.latents.flatten().tolist() == [1.0, -2.0]
    assert encoded.logvar is not None
    assert encoded.logvar.flatten().tolist() == [-30.0, 20.0]


@pytest.mark.parametrize("head", [FSQ([8, 8, 8]), KL(4)])
def test_the_wrong_number_of_channels_is_refused(head: FSQ | KL) -> None:
    with pytest.raises(ValueError, match="channels"):
        head.quantize(torch.zeros(1, 5, 1, 1, 1))


def test_kl_has_no_tokens_to_decode() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        KL(4).tokens_to_latents(torch.zeros(1, 1, 1, 1, dtype=torch.int32))
