"""Losses of the tokenizer: reconstruction and regularization. Each term is a plain function.

Section 3.3 of Tang et al., "VidTok", 2024, as the released code computes it. The adversarial terms stand in
`discriminator`, LPIPS in `perceptual`. The regularization terms of the latents come from the family (`trainable`) and
are only weighted here.

Frames are in [-1, 1] throughout. Everything is float32 except what an enclosing autocast lowers.
"""

# B batch, C channels, T frames, H height, W width; F = B * T frames

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vidshard.schemas.training import StageConfig


def frames_of(x_BCTHW: Tensor) -> Tensor:
    """Merge clips and time into one axis of frames: (B, C, T, H, W) to (F, C, H, W)."""
    return x_BCTHW.movedim(2, 1).flatten(0, 1)


class ReconstructionLoss(NamedTuple):
    """The reconstruction loss and its terms; scalars with gradients."""

    nll: Tensor
    """Negative log likelihood per frame, which is minimized."""
    l1: Tensor
    """Mean absolute difference, in [0, 2] for reconstructions in [-1, 1]."""
    perceptual: Tensor | None
    """Mean LPIPS; None where LPIPS is off."""


def reconstruction_loss(
    real_FCHW: Tensor,
    fake_FCHW: Tensor,
    perceptual_F: Tensor | None,
    logvar: Tensor,
    *,
    l1_weight: float,
    perceptual_weight: float,
) -> ReconstructionLoss:
    """Negative log likelihood of frames, with a learned scale ``exp(logvar)`` of their differences.

    A pixel's difference is its weighted L1 plus the weighted LPIPS of its frame; ``difference / exp(logvar) + logvar``
    is summed over a frame and averaged over frames. This is the Laplace density up to a constant, as in the code of
    Esser et al., "Taming Transformers", 2021.

    Args:
        real_FCHW: frames, (F, C, H, W) in [-1, 1].
        fake_FCHW: their reconstruction, of the same shape.
        perceptual_F: LPIPS of each frame, (F,); None leaves the term out.
        logvar: scalar.
    """
    values = fake_FCHW[0].numel()
    l1 = (fake_FCHW.float() - real_FCHW.float()).abs().mean()
    difference = l1_weight * l1
    perceptual = None if perceptual_F is None else perceptual_F.float().mean()
    if perceptual is not None:
        difference = difference + perceptual_weight * perceptual
    return ReconstructionLoss(nll=values * (difference * torch.exp(-logvar) + logvar), l1=l1, perceptual=perceptual)


def regularization_weights(config: StageConfig, step: int) -> dict[str, float]:
    """Weight of each kind of regularization term at a step, counted in batches.

    The weight of both entropies of FSQ and LFQ falls linearly from ``entropy_start_factor * entropy_weight`` to
    ``entropy_weight`` over ``entropy_anneal_steps``. The codebook's entropy is maximized, so it counts negative.
    """
    progress = min(step / config.entropy_anneal_steps, 1.0) if config.entropy_anneal_steps else 1.0
    entropy = config.entropy_weight * (config.entropy_start_factor + (1 - config.entropy_start_factor) * progress)
    return {
        "kl": config.kl_weight,
        "token_entropy": entropy,
        "codebook_entropy": -entropy * config.codebook_entropy_share,
        "commitment": config.commitment_weight,
        "codebook": config.codebook_weight,
    }


def weighted_regularization(
    terms: Mapping[str, Tensor], config: StageConfig, step: int, kinds: Mapping[str, str] | None = None
) -> Tensor:
    """Weighted sum of the regularization terms of the latents.

    Args:
        terms: scalars by name.
        kinds: kind of each term by its name, see `regularization_weights`; None where names are kinds.
    """
    weights = regularization_weights(config, step)
    return torch.stack([weights[kinds[name] if kinds else name] * term for name, term in terms.items()]).sum()
