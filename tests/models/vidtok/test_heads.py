"""Heads number their codes one to one, whatever they are; KL gives the mean; and what training adds to the loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.shared import SHARED
from vidshard.models.vidtok import heads
from vidshard.models.vidtok.config import PRESETS
from vidshard.models.vidtok.heads import FSQ, KL, LFQ, VQ, Head
from vidshard.models.weights import load_tokenizer, weights_digest

GOLDEN = SHARED / "reference" / "golden"

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


@pytest.mark.parametrize("head", [FSQ([8, 8, 8]), KL(4), LFQ(4), VQ(16, 4)])
def test_the_wrong_number_of_channels_is_refused(head: Head) -> None:
    with pytest.raises(ValueError, match="channels"):
        head.quantize(torch.zeros(1, 5, 1, 1, 1))


def test_kl_has_no_tokens_to_decode() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        KL(4).tokens_to_latents(torch.zeros(1, 1, 1, 1, dtype=torch.int32))


# LFQ and VQ


def vq(codebook_size: int, channels: int) -> VQ:
    head = VQ(codebook_size, channels)
    with torch.no_grad():
        head.codebook.normal_(generator=torch.Generator().manual_seed(1))
    return head


def outputs(channels: int, batch: int = 2, grid: tuple[int, int, int] = (2, 3, 3)) -> torch.Tensor:
    return torch.randn(batch, channels, *grid, generator=torch.Generator().manual_seed(channels))


@given(bits=st.integers(1, 30), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=100)
def test_every_lfq_token_survives_the_round_trip(bits: int, seed: int) -> None:
    lfq = LFQ(bits)
    drawn = torch.randint(0, 2**bits, (2, 3, 2, 2), generator=torch.Generator().manual_seed(seed))
    drawn[0, 0, 0] = torch.tensor([0, 2**bits - 1])
    codes = lfq.tokens_to_latents(drawn.to(torch.int32))
    assert codes.dtype is torch.float32
    assert torch.equal(codes.abs(), torch.ones_like(codes))
    tokens = lfq.quantize(codes * 0.3).tokens
    assert tokens is not None
    assert tokens.dtype is torch.int32
    assert torch.equal(tokens, drawn.to(torch.int32))


def test_lfq_takes_zero_as_negative_and_the_first_channel_as_the_lowest_bit() -> None:
    z = torch.tensor([0.0, 0.1, -0.1, 5.0]).view(1, 4, 1, 1, 1)
    encoded = LFQ(4).quantize(z)
    assert encoded.latents.flatten().tolist() == [-1.0, 1.0, -1.0, 1.0]
    assert encoded.tokens is not None
    assert encoded.tokens.item() == 2 + 8


def test_vq_takes_the_nearest_entry_whoever_is_encoded_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    head = vq(50, 3)
    z = outputs(3, batch=4)
    distances = (z.movedim(1, -1).unsqueeze(-2) - head.codebook.detach()).square().sum(-1)
    monkeypatch.setattr(VQ, "BLOCK_VALUES", 50 * 7)
    tokens = head.quantize(z).tokens
    assert tokens is not None
    assert torch.equal(tokens, distances.argmin(-1).to(torch.int32))
    alone = head.quantize(z[2:3]).tokens
    assert alone is not None
    assert torch.equal(alone, tokens[2:3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_vq_codebook_stays_float32_whatever_dtype_the_model_gets(dtype: torch.dtype) -> None:
    config = PRESETS["tiny"].model_copy(
        update={"name": "tiny_vq", "head": "vq", "fsq_levels": (), "vq_codebook_size": 50, "latent_channels": 3}
    )
    tokenizer = load_tokenizer(config, None, seed=1)
    assert isinstance(tokenizer.head, VQ)
    digest, z = weights_digest(tokenizer.head.state_dict()), outputs(3, batch=4)
    expected = tokenizer.head.quantize(z)
    assert expected.tokens is not None
    tokenizer.to(dtype)
    assert tokenizer.dtype is dtype
    assert tokenizer.head.codebook.dtype is torch.float32
    assert weights_digest(tokenizer.head.state_dict()) == digest
    encoded = tokenizer.head.quantize(z)
    assert encoded.tokens is not None
    assert torch.equal(encoded.tokens, expected.tokens)
    assert torch.equal(encoded.latents, expected.latents)
    assert torch.equal(tokenizer.head.tokens_to_latents(encoded.tokens), expected.latents)
    assert tokenizer.decode(encoded.tokens).dtype is dtype


def test_a_vq_codebook_moves_between_devices() -> None:
    head = vq(50, 3).to("meta", torch.bfloat16)
    assert head.codebook.device.type == "meta"
    assert head.codebook.dtype is torch.float32


def test_vq_takes_the_nearest_entry_within_an_autocast_too() -> None:
    head, z = vq(4096, 3), outputs(3, batch=4)
    expected = head.quantize(z).tokens
    with torch.autocast("cpu", torch.bfloat16):
        tokens = head.quantize(z).tokens
    assert tokens is not None
    assert expected is not None
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("head", [FSQ([8, 5, 3]), LFQ(6), vq(40, 3)], ids=repr)
def test_latents_are_those_of_their_tokens_and_the_gradient_passes(head: Head) -> None:
    z = outputs(head.encoder_channels).requires_grad_()
    encoded = head.quantize(z)
    assert encoded.tokens is not None
    assert torch.equal(head.tokens_to_latents(encoded.tokens), encoded.latents)
    if not isinstance(head, FSQ):
        (gradient,) = torch.autograd.grad(encoded.latents.sum(), z)
        assert torch.equal(gradient, torch.ones_like(z))
    assert head.codebook_size is not None
    for wrong in (-1, head.codebook_size):
        with pytest.raises(ValueError, match="another tokenizer"):
            head.tokens_to_latents(torch.tensor([[wrong]]))


@pytest.mark.parametrize("bits", [0, 31])
def test_lfq_of_no_int32_codebook_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=r"1 \.\.\. 30"):
        LFQ(bits)


@pytest.mark.parametrize(("size", "channels"), [(1, 3), (2**31, 3), (8, 0)])
def test_vq_of_no_codebook_is_refused(size: int, channels: int) -> None:
    with pytest.raises(ValueError, match="VQ needs"):
        VQ(size, channels)


# What holds an encoder


@pytest.mark.parametrize("block", [heads.ENTROPY_BLOCK, 7])
@pytest.mark.parametrize("head", [FSQ([8, 5, 3]), FSQ([7]), FSQ([2, 9]), LFQ(1), LFQ(7)], ids=repr)
def test_entropies_and_their_gradients_are_those_of_the_whole_softmax(
    head: FSQ | LFQ, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "ENTROPY_BLOCK", block)
    assert head.codebook_size is not None
    z = (0.02 * outputs(head.encoder_channels)).requires_grad_()
    terms = head.regularization(z, head.quantize(z))
    codes = head.tokens_to_latents(torch.arange(head.codebook_size)[:, None])[..., 0]
    p = torch.softmax(200 * (z.movedim(1, -1).flatten(0, -2) @ codes.T), dim=1)
    naive = {"token_entropy": -(p * p.log()).sum(1).mean(), "codebook_entropy": -(p.mean(0) * p.mean(0).log()).sum()}
    for name, expected in naive.items():
        torch.testing.assert_close(terms[name], expected, atol=1e-5, rtol=1e-5)
        ours, theirs = (torch.autograd.grad(value, z, retain_graph=True)[0] for value in (terms[name], expected))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("levels", [[8, 5, 3], [7], [2, 9], [8] * 4], ids=repr)
@pytest.mark.parametrize("scale", [0.05, 0.5, 3.0])
def test_by_distance_entropies_are_those_of_the_nearest_level_and_by_dot_product_of_an_outermost_one(
    levels: list[int], scale: float
) -> None:
    head = FSQ(levels)
    assert head.codebook_size is not None
    z = (scale * outputs(head.encoder_channels)).requires_grad_()
    encoded = head.quantize(z)
    codes = head.tokens_to_latents(torch.arange(head.codebook_size)[:, None])[..., 0]
    half = torch.tensor([level // 2 for level in levels])
    bounded = head.bound(z).movedim(1, -1).flatten(0, -2) / half
    affinity = -(bounded[:, None] - codes).square().sum(-1)
    assert encoded.tokens is not None
    assert (affinity.argmax(dim=1) == encoded.tokens.flatten()).all()
    p = torch.softmax(100 * affinity, dim=1)
    entropy = torch.special.entr
    naive = {"token_entropy": entropy(p).sum(1).mean(), "codebook_entropy": entropy(p.mean(0)).sum()}
    terms = head.regularization(z, encoded, affinity="distance")
    for name, expected in naive.items():
        torch.testing.assert_close(terms[name], expected, atol=1e-4, rtol=1e-4)
    by_dot_product = 2 * z.movedim(1, -1).flatten(0, -2) @ codes.T
    highest = codes[by_dot_product.argmax(dim=1)]
    outermost = torch.stack([highest == codes.amin(dim=0), highest == codes.amax(dim=0)]).any(dim=0)
    assert outermost.all()


@pytest.mark.parametrize("head", [FSQ([8] * 6), LFQ(18), vq(64, 3), KL(4)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_terms_are_finite_float32_scalars_with_finite_gradients(head: Head, dtype: torch.dtype) -> None:
    z = (30 * outputs(head.encoder_channels)).to(dtype).requires_grad_()
    terms = head.regularization(z, head.quantize(z))
    assert len(terms) >= 1
    for name, term in terms.items():
        assert term.shape == ()
        assert term.dtype is torch.float32
        assert term.isfinite()
        if name != "codebook":
            (gradient,) = torch.autograd.grad(term, z, retain_graph=True)
            assert gradient.isfinite().all()


def test_commitment_moves_the_encoder_and_the_codebook_term_the_entries() -> None:
    head = vq(16, 3)
    z = outputs(3).requires_grad_()
    encoded = head.quantize(z)
    terms = head.regularization(z, encoded)
    expected = (z - encoded.latents).square().mean()
    assert terms["commitment"].item() == terms["codebook"].item() == pytest.approx(expected.item())
    to_encoder = torch.autograd.grad(terms["commitment"], [z, head.codebook], allow_unused=True)
    to_entries = torch.autograd.grad(terms["codebook"], [z, head.codebook], allow_unused=True)
    assert [gradient is None for gradient in to_encoder] == [False, True]
    assert [gradient is None for gradient in to_entries] == [True, False]


def test_kl_is_the_divergence_summed_over_a_clip() -> None:
    z = outputs(4)
    mean, logvar = z.chunk(2, dim=1)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum() / 2
    head = KL(2)
    assert head.regularization(z, head.quantize(z))["kl"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.shared
@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"reference values are not at {GOLDEN}")
@pytest.mark.parametrize("name", ["fsq_causal_488_262144", "fsq_causal_488_32768", "fsq_causal_488_4096"])
def test_the_loss_is_that_of_the_original(name: str) -> None:
    with np.load(GOLDEN / f"vidtok_{name}.npz") as arrays:
        z = torch.from_numpy(arrays["aux/enc"].astype(np.float32))
        losses = {step: float(arrays[f"aux/loss_nsteps_{step}"]) for step in (0, 1000, 2000)}
    head = FSQ([8] * z.shape[1])
    terms = head.regularization(z, head.quantize(z))
    entropy = terms["token_entropy"] - terms["codebook_entropy"]
    # The original cuts probabilities at 1e-5 within its logarithms.
    for step, weight in ((0, 0.3), (1000, 0.2), (2000, 0.1)):
        ours = weight * entropy + 0.25 * terms["commitment"]
        assert ours.item() == pytest.approx(losses[step], abs=1e-3)
    if name == "fsq_causal_488_262144":
        assert terms["token_entropy"].item() == pytest.approx(0.761475, abs=1e-6)
