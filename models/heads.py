"""What turns an encoder's output into what is stored: FSQ tokens or KL latents.

Heads have no weights and no state; they compute in float32 whatever the encoder's dtype, since rounding
decides tokens. Training losses are not here.
"""

# B batch, K FSQ dimensions, C latent channels, T H W the latent grid; "..." any further axes

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Encoded:
    """What an encoder and its head make of a batch of clips."""

    latents: Tensor
    """float32 (B, C, T', H', W'): what decode takes. FSQ: the codes, in [-1, 1]. KL: the mean."""
    tokens: Tensor | None = None
    """FSQ: int32 (B, T', H', W') in [0, codebook_size)."""
    logvar: Tensor | None = None
    """KL: float32 like latents, in [-30, 20]."""
    pre_quantized: Tensor | None = None
    """FSQ: float32 like latents, the bounded value before rounding, in units of one level. A token may differ
    between machines only where this lies next to a half."""

    def __repr__(self) -> str:
        tokens = None if self.tokens is None else tuple(self.tokens.shape)
        return f"Encoded(latents={tuple(self.latents.shape)}, tokens={tokens})"


class Head(Protocol):
    """The border between an encoder and what is stored."""

    encoder_channels: int
    """Channels that the encoder must give."""
    latent_channels: int
    """Channels that the decoder takes."""
    codebook_size: int | None
    """Number of tokens; None where latents are continuous."""

    def quantize(self, z_BCTHW: Tensor) -> Encoded:
        """Turn encoder output (B, encoder_channels, T', H', W') into latents, the same each time."""
        ...

    def tokens_to_latents(self, tokens: Tensor) -> Tensor:
        """Turn integers (B, ...) into the float32 latents (B, latent_channels, ...) that they stand for.

        Raises:
            ValueError: for a token outside the codebook, or a head without tokens.
        """
        ...


class FSQ:
    """Finite scalar quantization: each channel is rounded to one of a few levels.

    Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", 2023, appendix A.1. One difference: the
    rounded value is clamped to its levels. The paper's margin of 0.1 % lets saturated channels round past the
    outermost level from about a thousand levels on; below that the clamp changes nothing.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        if not levels or min(levels) < 2:
            raise ValueError(f"FSQ needs at least one dimension and at least 2 levels in each, got {tuple(levels)}")
        if math.prod(levels) > 2**31 - 1:
            raise ValueError(f"FSQ levels {tuple(levels)} make {math.prod(levels)} tokens; int32 holds {2**31 - 1}")
        self.levels = tuple(levels)
        self.encoder_channels = self.latent_channels = len(levels)
        self.codebook_size: int | None = math.prod(levels)

    def __repr__(self) -> str:
        return f"FSQ(levels={self.levels})"

    def bound(self, z: Tensor) -> Tensor:
        """Squash (B, K, ...) so that rounding gives ``levels`` values per channel; float32, in units of one level.

        The limits are those of float32 `tanh`, 0.05 % beyond the outermost levels.
        """
        halves = [(level - 1) * (1 + 1e-3) / 2 for level in self.levels]
        offsets = [0.5 if level % 2 == 0 else 0.0 for level in self.levels]
        shifts = [math.atanh(offset / half) for offset, half in zip(offsets, halves, strict=True)]
        half, offset, shift = (_per_channel(values, z) for values in (halves, offsets, shifts))
        return torch.tanh(z.float() + shift) * half - offset

    def quantize(self, z_BCTHW: Tensor) -> Encoded:
        """Round to codes and tokens; gradients pass the rounding unchanged.

        Raises:
            ValueError: if the channels are not one for each dimension.
        """
        if z_BCTHW.shape[1] != self.encoder_channels:
            raise ValueError(f"{self} takes {self.encoder_channels} channels, got shape {tuple(z_BCTHW.shape)}")
        bounded = self.bound(z_BCTHW)
        lowest = _per_channel([-(level // 2) for level in self.levels], bounded)
        highest = _per_channel([(level - 1) // 2 for level in self.levels], bounded)
        rounded = bounded.detach().round().clamp(lowest, highest)
        # The difference is exactly zero, so the codes are exact, and its gradient is one.
        codes = (rounded + (bounded - bounded.detach())) / self._half_widths(bounded)
        return Encoded(latents=codes, tokens=self.codes_to_indices(codes.detach()), pre_quantized=bounded.detach())

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Number the codes: int32 (B, ...) from float32 (B, K, ...), the first channel least significant."""
        half_width = self._half_widths(codes)
        # Summed as integers: float32 would merge indices above 2**24.
        digits = ((codes.float() * half_width).round() + half_width).to(torch.int64)
        index = (digits * _per_channel(self._basis(), digits)).sum(dim=1)
        return index.to(torch.int32)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Give the codes of integers (B, ...): float32 (B, K, ...) in [-1, 1].

        Raises:
            ValueError: for floats, or an index outside [0, codebook_size).
        """
        assert self.codebook_size is not None
        if indices.dtype.is_floating_point or indices.dtype is torch.bool:
            raise ValueError(f"tokens must be integers, got {indices.dtype}")
        if indices.numel():
            low, high = (int(end) for end in torch.aminmax(indices))
            if low < 0 or high >= self.codebook_size:
                raise ValueError(
                    f"tokens must lie in 0 ... {self.codebook_size - 1}, got {low} ... {high}: "
                    "were they made by another tokenizer?"
                )
        expanded = indices.to(torch.int64).unsqueeze(1)
        digits = (expanded // _per_channel(self._basis(), expanded)) % _per_channel(self.levels, expanded)
        half_width = self._half_widths(digits)
        return (digits.float() - half_width) / half_width

    def tokens_to_latents(self, tokens: Tensor) -> Tensor:
        return self.indices_to_codes(tokens)

    def _half_widths(self, like: Tensor) -> Tensor:
        return _per_channel([level // 2 for level in self.levels], like, torch.float32)

    def _basis(self) -> list[int]:
        return [math.prod(self.levels[:i]) for i in range(len(self.levels))]


class KL:
    """A Gaussian posterior, stored as its mean. Sampling belongs to training."""

    codebook_size: int | None = None

    def __init__(self, latent_channels: int) -> None:
        if latent_channels < 1:
            raise ValueError(f"KL needs at least one latent channel, got {latent_channels}")
        self.latent_channels = latent_channels
        self.encoder_channels = 2 * latent_channels

    def __repr__(self) -> str:
        return f"KL(latent_channels={self.latent_channels})"

    def quantize(self, z_BCTHW: Tensor) -> Encoded:
        """Split mean and log variance, the latter clamped to [-30, 20].

        Raises:
            ValueError: if the channels are not twice `latent_channels`.
        """
        if z_BCTHW.shape[1] != self.encoder_channels:
            raise ValueError(f"{self} takes {self.encoder_channels} channels, got shape {tuple(z_BCTHW.shape)}")
        mean, logvar = z_BCTHW.float().chunk(2, dim=1)
        return Encoded(latents=mean, logvar=logvar.clamp(-30.0, 20.0))

    def tokens_to_latents(self, tokens: Tensor) -> Tensor:
        raise ValueError(f"a KL tokenizer has no tokens: decode takes its float latents, got {tokens.dtype}")


def _per_channel(values: Sequence[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """One value per channel, shaped to meet (B, K, ...)."""
    if dtype is None:
        dtype = torch.float32 if like.dtype.is_floating_point else torch.int64
    return torch.tensor(values, dtype=dtype, device=like.device).view(-1, *(1,) * (like.ndim - 2))
