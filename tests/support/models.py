"""Tokenizers with few channels, and what tests read of an encoding."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from vidshard.models.vidtok.config import PRESETS, VidTokConfig
from vidshard.models.vidtok.heads import Encoded
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import load_tokenizer

EACH_VARIANT = (
    "fsq_causal_488_262144",
    "kl_causal_288_8chn",
    "fsq_causal_41616_262144",
    "fsq_causal_488_32768_v1_1",
    "kl_causal_288_8chn_v1_1",
    "fsq_causal_888_32768_v1_1",
    "kl_causal_41616_16chn_v1_1",
    "fsq_noncausal_488_262144",
    "kl_noncausal_41616_4chn",
)
"""Released presets: each variant with each of its strides and of its topologies."""


def small(name: str) -> VidTokConfig:
    """The preset with few channels and units; else as released."""
    narrow = {"base_width": 4, "encoder_pairs": 1, "decoder_pairs": 1}
    return VidTokConfig.model_validate(PRESETS[name].model_dump() | narrow)


NARROW = VidTokConfig.model_validate(
    PRESETS["tiny"].model_dump() | {"name": "narrow", "base_width": 2, "width_multipliers": (1, 1, 1, 1)}
)
"""A tokenizer that takes half the time of ``tiny``, for tests of many frames."""


@lru_cache(maxsize=len(EACH_VARIANT))
def model_of(name: str) -> VidTok:
    """A `small` model with the random weights of seed 0, the same one for every caller: copy it before changing it."""
    return load_tokenizer(small(name), None, seed=0)


def stored(encoded: Encoded) -> Tensor:
    """The part of an encoding that a shard stores: tokens, or the latents of a model without a codebook."""
    return encoded.latents if encoded.tokens is None else encoded.tokens
