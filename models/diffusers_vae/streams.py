"""Streams of the Wan autoencoder and of its copy in Qwen-Image: any chunking gives the result of one pass.

Both classes work latent by latent, the first one of one frame, and keep the last inputs of each convolution in a list
that they overwrite. Here that list is an argument and a result, so that streams are independent.
"""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

Caches = tuple[Any, ...]
"""Cached inputs of each convolution, in order; empty at the start of a video."""


def looks_back(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Number of frames that a latent, and of latents that a decoded frame, depends on before its own last one.

    Sums what each convolution over time sees: two frames at its own rate, or one where it halves the rate.

    Args:
        settings: all arguments of the class.
    """
    levels = len(settings["dim_mult"])
    blocks = settings["num_res_blocks"]
    halvings = [bool(value) for value in settings["temperal_downsample"]]
    reach, rate = 2, 1  # conv_in
    for level in range(levels):
        reach += blocks * 2 * 2 * rate
        if level < levels - 1 and halvings[level]:
            reach += rate
            rate *= 2
    frames = reach + (2 * 2 + 1) * 2 * rate + rate - 1  # two units of the middle and conv_out
    back, rate = Fraction(2 + 2 * 2 * 2), 1  # conv_in and the middle, in latents
    for level in range(levels):
        back += Fraction((blocks + 1) * 2 * 2, rate)
        if level < levels - 1 and halvings[::-1][level]:
            back += Fraction(2, rate)
            rate *= 2
    return frames, math.ceil(back + Fraction(2, rate)) + 1


def encode_chunk(vae: Any, x_BCTHW: Tensor, caches: Caches) -> tuple[Tensor, Caches]:
    """Encode the next frames of a video: moments (B, 2 C, T', H', W') and the caches of the next chunk.

    Args:
        x_BCTHW: 1 + a multiple of 4 frames at the start of a video, a multiple of 4 later.
        caches: caches of the chunk before; empty at the start.
    """
    patch = getattr(vae.config, "patch_size", None)
    if patch is not None:
        x_BCTHW = _patchify(x_BCTHW, patch)
    kept: list[Any] = list(caches) or [None] * _num_convolutions(vae.encoder)
    moments = []
    for piece in torch.split(x_BCTHW, _pieces(x_BCTHW.shape[2], caches), dim=2):
        # each latent by itself: a kernel may round otherwise for more of them
        moments.append(vae.quant_conv(vae.encoder(piece, feat_cache=kept, feat_idx=[0])))
    return torch.cat(moments, dim=2), tuple(kept)


def decode_chunk(vae: Any, z_BCTHW: Tensor, caches: Caches) -> tuple[Tensor, Caches]:
    """Decode the next latents of a video: frames in [-1, 1] and the caches of the next chunk."""
    kept: list[Any] = list(caches) or [None] * _num_convolutions(vae.decoder)
    frames = []
    for number, latent in enumerate(torch.split(z_BCTHW, 1, dim=2)):
        first = {"first_chunk": not caches and number == 0} if _knows_first(type(vae.decoder)) else {}
        frames.append(vae.decoder(vae.post_quant_conv(latent), feat_cache=kept, feat_idx=[0], **first))
    x_BCTHW = torch.cat(frames, dim=2)
    patch = getattr(vae.config, "patch_size", None)
    if patch is not None:
        x_BCTHW = _unpatchify(x_BCTHW, patch)
    return x_BCTHW.clamp(-1.0, 1.0), tuple(kept)


def _pieces(num_frames: int, caches: Caches) -> list[int]:
    """Frames of each latent.

    Raises:
        ValueError: the frames make no whole number of latents.
    """
    first = [] if caches else [1]
    left = num_frames - len(first)
    if left < 0 or left % 4:
        rule = "a multiple of 4" if caches else "1 + a multiple of 4"
        raise ValueError(f"a chunk has {rule} frames, got {num_frames}")
    return [*first, *[4] * (left // 4)]


def _num_convolutions(network: torch.nn.Module) -> int:
    return sum(type(module).__name__.endswith("CausalConv3d") for module in network.modules())


def _knows_first(decoder: type) -> bool:
    return "first_chunk" in inspect.signature(decoder.forward).parameters  # type: ignore[attr-defined]


def _patchify(x_BCTHW: Tensor, size: int) -> Tensor:
    """Move squares of pixels into channels, in the order of the class: channel, then column, then row."""
    num_clips, channels, num_frames, height, width = x_BCTHW.shape
    x = x_BCTHW.reshape(num_clips, channels, num_frames, height // size, size, width // size, size)
    x = x.permute(0, 1, 6, 4, 2, 3, 5).contiguous()
    return x.view(num_clips, channels * size * size, num_frames, height // size, width // size)


def _unpatchify(x_BCTHW: Tensor, size: int) -> Tensor:
    num_clips, patches, num_frames, height, width = x_BCTHW.shape
    x = x_BCTHW.reshape(num_clips, patches // (size * size), size, size, num_frames, height, width)
    x = x.permute(0, 1, 4, 5, 3, 6, 2).contiguous()
    return x.view(num_clips, -1, num_frames, height * size, width * size)
