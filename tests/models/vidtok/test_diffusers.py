"""A second, independent implementation of the same networks: that of diffusers, where it is installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vidshard.models.vidtok.config import PRESETS, VidTokConfig
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import load_tokenizer, seeded_weights

pytest.importorskip("diffusers", reason="diffusers is not installed (pip install -e '.[dev]')")

CASES = {
    "kl_causal_488_4chn_v1_1": (1, 5, 17, 18),
    "fsq_causal_888_32768_v1_1": (1, 9, 17),
    "kl_causal_288_8chn_v1_1": (3, 17),
    "fsq_causal_41616_262144_v1_1": (17,),
    "kl_noncausal_488_4chn": (16, 32),
    "fsq_noncausal_488_262144": (16,),
    "kl_noncausal_41616_16chn": (16,),
}
"""Lengths to compare. Not causal, theirs decodes multiples of four latents only."""


def narrow(name: str) -> VidTokConfig:
    """A released topology with few channels."""
    return PRESETS[name].model_copy(update={"base_width": 16})


def video(config: VidTokConfig, num_frames: int) -> Tensor:
    """Noise; the same each time."""
    side = 2 * config.space_stride
    random = torch.Generator().manual_seed(num_frames)
    return torch.rand(2, 3, num_frames, side, 2 * side, generator=random) * 2 - 1


@pytest.mark.parametrize(("name", "num_frames"), [(name, n) for name, lengths in CASES.items() for n in lengths])
def test_both_implementations_give_the_same_latents_tokens_and_frames(name: str, num_frames: int) -> None:
    # a second, of each process of `make test` if above
    from benchmarks.diffusers_vidtok import diffusers_decode, diffusers_encode, diffusers_model

    config = narrow(name)
    ours = load_tokenizer(config, None, seed=0)
    theirs = diffusers_model(config, seeded_weights(config, 0))
    x_BCTHW = video(config, num_frames)
    encoded = ours.encode(x_BCTHW)
    latents, tokens = diffusers_encode(theirs, x_BCTHW)
    if encoded.tokens is not None:
        assert encoded.pre_quantized is not None
        assert tokens is not None
        near_a_tie = ((encoded.pre_quantized - encoded.pre_quantized.floor() - 0.5).abs() < 1e-4).any(dim=1)
        assert torch.equal(encoded.tokens[~near_a_tie], tokens[~near_a_tie])
        assert near_a_tie.float().mean() < 0.01
    else:
        torch.testing.assert_close(encoded.latents, latents, rtol=1e-4, atol=1e-4)
    decoded = ours.decode(encoded.latents)
    torch.testing.assert_close(decoded, diffusers_decode(theirs, encoded.latents), rtol=1e-4, atol=1e-4)


def test_v1_0_weights_need_the_rules_of_v1_0_which_theirs_does_not_have() -> None:
    from benchmarks.diffusers_vidtok import diffusers_encode, diffusers_model

    config = narrow("kl_causal_488_4chn")
    ours: VidTok = load_tokenizer(config, None, seed=0)
    theirs = diffusers_model(config, seeded_weights(config, 0))
    x_BCTHW = video(config, 17)
    difference = (ours.encode(x_BCTHW).latents - diffusers_encode(theirs, x_BCTHW)[0]).abs()
    assert difference.max() > 0.1
