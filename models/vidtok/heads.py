"""Heads: encoder output to stored values, which are tokens (FSQ, LFQ, VQ) or latents (KL).

Heads are stateless and compute in float32 whatever the encoder's dtype, since rounding decides tokens. Only VQ has
weights, its codebook. Each head returns its regularization terms unweighted; training weighs and adds those it wants.
"""

# B batch, K FSQ dimensions, C latent channels, T H W the latent grid; N = B * T * H * W positions; "..." further axes

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidshard.models.vidtok.constants import constant


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Encoded:
    """Result of encoding a batch of clips."""

    latents: Tensor
    """float32 (B, C, T', H', W'), the input of decode. FSQ: codes in [-1, 1]; LFQ: -1 or 1; VQ: entries of the
    codebook; KL: the mean."""
    tokens: Tensor | None = None
    """int32 (B, T', H', W') in [0, codebook_size); None for KL."""
    logvar: Tensor | None = None
    """KL: float32 like latents, in [-30, 20]."""
    pre_quantized: Tensor | None = None
    """float32 like latents. FSQ: the bounded value before rounding, in units of one level; a token may differ between
    machines only where this lies next to a half. LFQ, VQ: the encoder output."""
    is_finite: Tensor | None = None
    """bool (B,): whether every value of a clip's encoder output is finite. A quantizer turns NaN and infinity into
    ordinary tokens."""

    @property
    def payload(self) -> dict[str, Tensor]:
        """Columns of a shard: ``tokens``, or ``latents`` and ``latents_logvar``."""
        if self.tokens is not None:
            return {"tokens": self.tokens}
        logvar = {} if self.logvar is None else {"latents_logvar": self.logvar}
        return {"latents": self.latents, **logvar}

    def near_ties(self, tolerance: float) -> dict[str, Tensor]:
        """For ``tokens``, if they are rounded values: bool (B, T', H', W'), where one lies this near to a tie.

        Args:
            tolerance: in units of one level.
        """
        if self.tokens is None or self.pre_quantized is None:
            return {}
        from_tie = (self.pre_quantized - self.pre_quantized.floor() - 0.5).abs()
        return {"tokens": (from_tie < tolerance).any(dim=1)}

    def __repr__(self) -> str:
        tokens = None if self.tokens is None else tuple(self.tokens.shape)
        return f"Encoded(latents={tuple(self.latents.shape)}, tokens={tokens})"


MeanOverWorkers = Callable[[Tensor], Tensor]
"""Function that averages a tensor without gradient over all workers; every worker must call it equally often."""


Affinity = Literal["dot", "distance"]
"""Affinity of an encoder output to an FSQ code in the entropies. "dot" is VidTok's: twice the dot product of the
unbounded output with the code. Its softmax peaks at an outermost level, since codes differ in length. "distance" is
minus the squared distance of the bounded output from the code, and peaks at the level of the token."""


def alone(value: Tensor) -> Tensor:
    """Return the value itself: the mean over a single worker."""
    return value


class Head(Protocol):
    """Conversion between encoder output and stored values."""

    encoder_channels: int
    """Channels of the encoder output."""
    latent_channels: int
    """Channels of the decoder input."""
    codebook_size: int | None
    """Number of tokens; None where latents are continuous."""

    def quantize(self, z_BCTHW: Tensor) -> Encoded:
        """Turn encoder output (B, encoder_channels, T', H', W') into latents and tokens, deterministically."""
        ...

    def tokens_to_latents(self, tokens: Tensor) -> Tensor:
        """Turn integers (B, ...) into the float32 latents (B, latent_channels, ...) that they stand for.

        Raises:
            ValueError: for a token outside the codebook, or a head without tokens.
        """
        ...

    def regularization(
        self,
        z_BCTHW: Tensor,
        encoded: Encoded,
        *,
        mean_over_workers: MeanOverWorkers = alone,
        affinity: Affinity = "dot",
    ) -> dict[str, Tensor]:
        """Compute the head's terms of a training loss, by name.

        Args:
            z_BCTHW: the encoder output.
            encoded: the result of `quantize` for it.
            mean_over_workers: averages a tensor over workers that each hold a part of the batch. Only
                ``codebook_entropy`` needs it: the other terms are means, which workers average themselves.
            affinity: affinity of the entropies of FSQ. For LFQ both give the same, and other heads have no entropies.

        Returns:
            float32 scalars with gradients, unweighted. Training maximizes ``codebook_entropy`` and minimizes the
            others.
        """
        ...


class FSQ:
    """Finite scalar quantization: each channel is rounded to one of a few levels.

    Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", 2023, appendix A.1. One difference: the
    rounded value is clamped to its levels. With the paper's margin of 0.1 %, saturated channels of about a thousand
    levels or more round past the outermost level; with fewer levels the clamp changes nothing.
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
        """Round to codes and tokens; gradients pass through the rounding unchanged.

        Raises:
            ValueError: if the channels are not one for each dimension.
        """
        _check_channels(self, z_BCTHW)
        bounded = self.bound(z_BCTHW)
        lowest = _per_channel([-(level // 2) for level in self.levels], bounded)
        highest = _per_channel([(level - 1) // 2 for level in self.levels], bounded)
        rounded = bounded.detach().round().clamp(lowest, highest)
        # Straight-through gradient: the difference is exactly zero, so the codes are exact, and its gradient is one.
        codes = (rounded + (bounded - bounded.detach())) / self._half_widths(bounded)
        return Encoded(
            latents=codes,
            tokens=self.codes_to_indices(codes.detach()),
            pre_quantized=bounded.detach(),
            is_finite=finite_clips(z_BCTHW),
        )

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Convert codes, float32 (B, K, ...), to indices, int32 (B, ...); the first channel is least significant."""
        half_width = self._half_widths(codes)
        # Summed as integers: float32 cannot tell indices above 2**24 apart.
        digits = ((codes.float() * half_width).round() + half_width).to(torch.int64)
        index = (digits * _per_channel(self._basis(), digits)).sum(dim=1)
        return index.to(torch.int32)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Convert indices, integers (B, ...), to codes, float32 (B, K, ...) in [-1, 1].

        Raises:
            ValueError: for floats, or an index outside [0, codebook_size).
        """
        assert self.codebook_size is not None
        _check_tokens(indices, self.codebook_size)
        expanded = indices.to(torch.int64).unsqueeze(1)
        digits = (expanded // _per_channel(self._basis(), expanded)) % _per_channel(self.levels, expanded)
        half_width = self._half_widths(digits)
        return (digits.float() - half_width) / half_width

    def tokens_to_latents(self, tokens: Tensor) -> Tensor:
        return self.indices_to_codes(tokens)

    def regularization(
        self,
        z_BCTHW: Tensor,
        encoded: Encoded,
        *,
        mean_over_workers: MeanOverWorkers = alone,
        affinity: Affinity = "dot",
    ) -> dict[str, Tensor]:
        """Compute ``token_entropy``, ``codebook_entropy`` and ``commitment`` of the unbounded encoder output."""
        values = [[(digit - level // 2) / (level // 2) for digit in range(level)] for level in self.levels]
        by_distance = affinity == "distance"
        compared = self.bound(z_BCTHW) / self._half_widths(z_BCTHW) if by_distance else z_BCTHW
        entropies = _entropies(compared, values, mean_over_workers, by_distance=by_distance)
        return entropies | {"commitment": _commitment(z_BCTHW, encoded)}

    def _half_widths(self, like: Tensor) -> Tensor:
        return _per_channel([level // 2 for level in self.levels], like, torch.float32)

    def _basis(self) -> list[int]:
        return [math.prod(self.levels[:i]) for i in range(len(self.levels))]


class LFQ:
    """Lookup-free quantization: the sign of each channel is one bit, so K channels give 2**K tokens.

    Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation", 2023, section 3.1. The first
    channel is the least significant bit; zero counts as negative.
    """

    def __init__(self, latent_channels: int) -> None:
        if not 1 <= latent_channels <= 30:
            raise ValueError(
                f"LFQ has 2**latent_channels tokens, which int32 holds for 1 ... 30 latent channels, "
                f"got {latent_channels}"
            )
        self.encoder_channels = self.latent_channels = latent_channels
        self.codebook_size: int | None = 2**latent_channels

    def __repr__(self) -> str:
        return f"LFQ(latent_channels={self.latent_channels})"

    def quantize(self, z_BCTHW: Tensor) -> Encoded:
        """Take the signs; gradients pass through unchanged.

        Raises:
            ValueError: if the channels are not one for each bit.
        """
        _check_channels(self, z_BCTHW)
        z_BCTHW = z_BCTHW.float()
        bits = (z_BCTHW > 0).to(torch.int32)
        weights = _per_channel([1 << bit for bit in range(self.latent_channels)], bits, torch.int32)
        return Encoded(
            latents=(2.0 * bits.float() - 1.0) + (z_BCTHW - z_BCTHW.detach()),
            tokens=(bits * weights).sum(dim=1, dtype=torch.int32),
            pre_quantized=z_BCTHW.detach(),
            is_finite=finite_clips(z_BCTHW),
        )

    def tokens_to_latents(self, tokens: Tensor) -> Tensor:
        assert self.codebook_size is not None
        _check_tokens(tokens, self.codebook_size)
        expanded = tokens.to(torch.int64).unsqueeze(1)
        shifts = _per_channel(range(self.latent_channels), expanded)
        return 2.0 * ((expanded >> shifts) & 1).float() - 1.0

    def regularization(
        self,
        z_BCTHW: Tensor,
        encoded: Encoded,
        *,
        mean_over_workers: MeanOverWorkers = alone,
        affinity: Affinity = "dot",  # noqa: ARG002 - all codes have one length, so both are the same
    ) -> dict[str, Tensor]:
        """Compute ``token_entropy``, ``codebook_entropy`` and ``commitment`` as FSQ does, with codes -1 and 1."""
        values = [[-1.0, 1.0]] * self.latent_channels
        return _entropies(z_BCTHW, values, mean_over_workers) | {"commitment": _commitment(z_BCTHW, encoded)}


class VQ(nn.Module):
    """Vector quantization: the nearest entry of a learned codebook.

    van den Oord et al., "Neural Discrete Representation Learning", 2017, sections 3.1 and 3.2. The codebook learns by
    its own loss term, not by moving averages. `vector-quantize-pytorch` is not used: its state dict holds flags, counts
    and uninitialized averages beside the codebook, which belong neither in a weights file nor in a digest of weights,
    and it brings five more packages.
    """

    BLOCK_VALUES = 1 << 24
    """Number of distances computed at a time: 64 MiB in float32."""

    def __init__(self, codebook_size: int, latent_channels: int) -> None:
        super().__init__()
        if not 2 <= codebook_size <= 2**31 - 1 or latent_channels < 1:
            raise ValueError(
                f"VQ needs 2 ... {2**31 - 1} tokens and at least one latent channel, "
                f"got {codebook_size} and {latent_channels}"
            )
        self.encoder_channels = self.latent_channels = latent_channels
        self.codebook_size: int | None = codebook_size
        self.codebook = nn.Parameter(torch.empty(codebook_size, latent_channels, dtype=torch.float32))
        nn.init.uniform_(self.codebook, -1.0, 1.0)

    def __repr__(self) -> str:
        return f"VQ(codebook_size={self.codebook_size}, latent_channels={self.latent_channels})"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the codebook between devices but keep it float32, whatever dtype ``Module.to`` or ``half`` asks for.

        A rounded codebook is another codebook: encoders would write other tokens under the same name.
        """

        def moved(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype is tensor.dtype else tensor.to(changed.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def quantize(self, z_BCTHW: Tensor) -> Encoded:
        """Take the nearest entries; gradients pass through unchanged, and none reaches the codebook.

        Raises:
            ValueError: if the channels are not those of the entries.
        """
        _check_channels(self, z_BCTHW)
        z_BCTHW = z_BCTHW.float()
        tokens = self._nearest(z_BCTHW.detach().movedim(1, -1).reshape(-1, self.latent_channels))
        tokens = tokens.view(z_BCTHW.shape[0], *z_BCTHW.shape[2:])
        latents = self._entries(tokens).detach() + (z_BCTHW - z_BCTHW.detach())
        return Encoded(latents=latents, tokens=tokens, pre_quantized=z_BCTHW.detach(), is_finite=finite_clips(z_BCTHW))

    def _nearest(self, z_NC: Tensor) -> Tensor:
        """Find the index of the nearest entry, the first of equally near ones: int32 (N,)."""
        codebook = self.codebook.detach().float()
        half_squares = codebook.square().sum(dim=1) / 2
        rows = max(1, self.BLOCK_VALUES // codebook.shape[0])
        nearest = []
        # An enclosing autocast would take the products in bfloat16, and near entries would change places.
        device = z_NC.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            for start in range(0, z_NC.shape[0], rows):
                block = z_NC[start : start + rows]
                # Always as many rows: otherwise the order of summation, and with it a near tie, would depend on the
                # other clips of the batch.
                filled = F.pad(block, (0, 0, 0, rows - block.shape[0]))
                nearest.append((half_squares - filled @ codebook.T).argmin(dim=1)[: block.shape[0]])
        return torch.cat(nearest).to(torch.int32)

    def _entries(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.codebook.float()).movedim(-1, 1)

    def tokens_to_latents(self, tokens: Tensor) -> Tensor:
        assert self.codebook_size is not None
        _check_tokens(tokens, self.codebook_size)
        return self._entries(tokens.to(torch.int64))

    def regularization(
        self,
        z_BCTHW: Tensor,
        encoded: Encoded,
        *,
        mean_over_workers: MeanOverWorkers = alone,  # noqa: ARG002 - only entropies need it
        affinity: Affinity = "dot",  # noqa: ARG002 - only entropies need it
    ) -> dict[str, Tensor]:
        """Compute ``commitment``, which pulls the encoder to the entries, and ``codebook``, which pulls the entries."""
        assert encoded.tokens is not None
        codebook = (self._entries(encoded.tokens) - z_BCTHW.detach().float()).square().mean()
        return {"commitment": _commitment(z_BCTHW, encoded), "codebook": codebook}


class KL:
    """Gaussian posterior, stored as its mean; only training samples from it."""

    codebook_size: int | None = None

    def __init__(self, latent_channels: int) -> None:
        if latent_channels < 1:
            raise ValueError(f"KL needs at least one latent channel, got {latent_channels}")
        self.latent_channels = latent_channels
        self.encoder_channels = 2 * latent_channels

    def __repr__(self) -> str:
        return f"KL(latent_channels={self.latent_channels})"

    def quantize(self, z_BCTHW: Tensor) -> Encoded:
        """Split the channels into mean and log-variance, the latter clamped to [-30, 20].

        Raises:
            ValueError: if the channels are not twice `latent_channels`.
        """
        _check_channels(self, z_BCTHW)
        mean, logvar = z_BCTHW.float().chunk(2, dim=1)
        return Encoded(latents=mean, logvar=logvar.clamp(-30.0, 20.0), is_finite=finite_clips(z_BCTHW))

    def tokens_to_latents(self, tokens: Tensor) -> Tensor:
        raise ValueError(f"a KL tokenizer has no tokens: decode takes its float latents, got {tokens.dtype}")

    def regularization(
        self,
        z_BCTHW: Tensor,
        encoded: Encoded,
        *,
        mean_over_workers: MeanOverWorkers = alone,  # noqa: ARG002 - only entropies need it
        affinity: Affinity = "dot",  # noqa: ARG002 - only entropies need it
    ) -> dict[str, Tensor]:
        """Compute ``kl``: the divergence from N(0, 1), in nats per clip."""
        assert encoded.logvar is not None
        mean, logvar = encoded.latents, encoded.logvar
        return {"kl": 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / z_BCTHW.shape[0]}


INVERSE_TEMPERATURE = 100.0
"""Inverse temperature of the softmax over codes in `_entropies`."""


def _entropies(
    z_BCTHW: Tensor,
    values: Sequence[Sequence[float]],
    mean_over_workers: MeanOverWorkers,
    *,
    by_distance: bool = False,
) -> dict[str, Tensor]:
    """Compute entropies in nats: the mean over the positions' soft assignments, and that of the mean assignment.

    The affinity to a code is twice the dot product with it, or minus the squared distance from it, and the softmax over
    the codes runs at `INVERSE_TEMPERATURE`, as in VidTok's training. The codebook is a product of the channels' values,
    so the softmax is a product of one softmax a channel. Entropies of positions then add up over channels, and the mean
    over positions of the joint probability is a matrix product of two halves of the channels: no array of positions x
    codes is built. For 5120 positions and 262,144 codes, value and gradient take 0.6 s and 60 MiB on two cores; one
    such array alone has 5.4 GB.

    VidTok clamps probabilities at 1e-5 within the logarithm, which limits its codebook entropy to 11.5 nats; 262,144
    codes have 12.5. We do not clamp.

    Args:
        values: the possible values of each channel.
        mean_over_workers: averages the assignment over all workers' positions. Where gradients are averaged over
            workers, the result is the gradient of the whole batch, unlike in VidTok.
        by_distance: take the squared distance; otherwise the dot product.
    """
    z_NC = z_BCTHW.float().movedim(1, -1).reshape(-1, len(values))
    # Products of probabilities need half the memory for gradients of an outer sum of logarithms.
    by_channel: list[Tensor] = []
    token_entropy = z_NC.new_zeros(())
    for channel, codes in enumerate(values):
        own_N1, codes_L = z_NC[:, channel, None], constant(tuple(codes), z_NC.dtype, z_NC.device)
        affinity = -(own_N1 - codes_L).square() if by_distance else 2 * own_N1 * codes_L
        log_p = torch.log_softmax(INVERSE_TEMPERATURE * affinity, dim=1)
        by_channel.append(log_p.exp())
        token_entropy = token_entropy - (by_channel[-1] * log_p).sum(dim=1).mean()
    sizes = [len(codes) for codes in values]
    cut = min(range(1, len(sizes) + 1), key=lambda cut: max(math.prod(sizes[:cut]), math.prod(sizes[cut:])))
    first_NA, second_NB = (_joint(group, z_NC) for group in (by_channel[:cut], by_channel[cut:]))
    block = max(1, ENTROPY_BLOCK // second_NB.shape[1])
    codebook_entropy = z_NC.new_zeros(())
    for start in range(0, first_NA.shape[1], block):
        part_NA = first_NA[:, start : start + block]
        codebook_entropy = codebook_entropy + (
            _entropy_of_mean(part_NA, second_NB, mean_over_workers)
            if first_NA.shape[1] <= block
            else checkpoint(_entropy_of_mean, part_NA, second_NB, mean_over_workers, use_reentrant=False)
        )
    return {"token_entropy": token_entropy, "codebook_entropy": codebook_entropy}


ENTROPY_BLOCK = 1 << 22
"""Number of codes whose mean probabilities exist at a time; with more codes, the backward pass computes them again."""


def _joint(by_channel: Sequence[Tensor], like: Tensor) -> Tensor:
    """Compute joint probabilities of all combinations of some channels' values: (N, product of their numbers)."""
    joint = like.new_ones(like.shape[0], 1)
    for p in by_channel:
        joint = (p[:, :, None] * joint[:, None, :]).flatten(1)
    return joint


def _entropy_of_mean(first_NA: Tensor, second_NB: Tensor, mean_over_workers: MeanOverWorkers) -> Tensor:
    mean_AB = first_NA.T @ second_NB / first_NA.shape[0]
    # The value is that of all workers, the gradient that of this worker's part in it.
    mean_AB = mean_AB + (mean_over_workers(mean_AB.detach()) - mean_AB.detach())
    # Codes whose probability underflows add nothing; without the clamp their infinite slope makes gradients NaN.
    return -(mean_AB * mean_AB.clamp_min(torch.finfo(mean_AB.dtype).tiny).log()).sum()


def _commitment(z_BCTHW: Tensor, encoded: Encoded) -> Tensor:
    """Compute the mean squared distance of the encoder output from the codes, which get no gradient."""
    return (z_BCTHW.float() - encoded.latents.detach()).square().mean()


def finite_clips(z_BCTHW: Tensor) -> Tensor:
    """Tell of each clip whether all its values are finite: bool (B,)."""
    return torch.isfinite(z_BCTHW.detach()).flatten(1).all(dim=1)


def _check_channels(head: Head, z_BCTHW: Tensor) -> None:
    if z_BCTHW.shape[1] != head.encoder_channels:
        raise ValueError(f"{head} takes {head.encoder_channels} channels, got shape {tuple(z_BCTHW.shape)}")


def _check_tokens(tokens: Tensor, codebook_size: int) -> None:
    if tokens.dtype.is_floating_point or tokens.dtype is torch.bool:
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    if tokens.numel():
        low, high = (int(end) for end in torch.aminmax(tokens))
        if low < 0 or high >= codebook_size:
            raise ValueError(
                f"tokens must lie in 0 ... {codebook_size - 1}, got {low} ... {high}: "
                "were they made by another tokenizer?"
            )


def _per_channel(values: Sequence[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Make a tensor of one value per channel that broadcasts with (B, K, ...)."""
    if dtype is None:
        dtype = torch.float32 if like.dtype.is_floating_point else torch.int64
    return constant(tuple(values), dtype, like.device).view(-1, *(1,) * (like.ndim - 2))
