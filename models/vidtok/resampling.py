"""Layers that resample in space and in time, with their blends and interpolations folded into convolutions."""

# B batch, T frames, H height, W width, C channels

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vidshard.models.vidtok import fused
from vidshard.models.vidtok.constants import constant
from vidshard.models.vidtok.convolutions import blocks, conv2d, conv3d
from vidshard.models.vidtok.layers import LayerPast, Map, Sum, TimeConv, TimeRule


class Folding(nn.Module):
    """Layer whose convolution is computed from its parameters: in every pass, or once by `fold`."""

    def __init__(self) -> None:
        super().__init__()
        self._folded: tuple[Tensor, Tensor | None] | None = None

    def folded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Compute weight and bias of the convolution, in a dtype."""
        raise NotImplementedError

    def fold(self, dtype: torch.dtype, stored: Callable[[Tensor], Tensor] | None = None) -> None:
        """Keep weight and bias of the convolution, in a dtype; later changes of the parameters' values are not seen.

        Loading parameters, moving and casting them end this.

        Args:
            stored: layout in which the weight is kept; None for that of `folded`.
        """
        weight, bias = self.folded(dtype)
        self._folded = (weight if stored is None else stored(weight)), bias

    def kernel(self, x_BTHWC: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the convolution for a map."""
        if self._folded is not None and self._folded[0].dtype == x_BTHWC.dtype:
            return self._folded
        return self.folded(x_BTHWC.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._folded = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        self._folded = None
        super()._load_from_state_dict(*arguments, **named)


class SpaceDown(nn.Module):
    """Halve height and width: 3x3 convolution of stride 2, with one zero row below and one zero column at the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3)

    def forward(self, x_BTHWC: Map, past: LayerPast = ()) -> tuple[Tensor, LayerPast]:
        if isinstance(x_BTHWC, Sum):
            B, T, H, W, C = x_BTHWC.branch.shape
            padded_BTHWC = x_BTHWC.branch.new_empty(B, T, H + 1, W + 1, C)
            padded_BTHWC[:, :, H:].zero_()
            padded_BTHWC[:, :, :H, W:].zero_()
            torch.add(*x_BTHWC, out=padded_BTHWC[:, :, :H, :W])
        else:
            padded_BTHWC = F.pad(x_BTHWC, (0, 0, 0, 1, 0, 1))
        return conv2d(padded_BTHWC, self.conv.weight, self.conv.bias, stride=2), past


class SpaceUp(Folding):
    """Double height and width: repeat each pixel, then apply a 3x3 convolution.

    The enlarged map is never built. Along each axis, two of the three taps always meet the same source pixel. Each of
    the four output phases is therefore a 2x2 convolution of the source with those taps summed: 16 instead of 36
    products per source pixel, equal up to rounding.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3)

    def folded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Compute the kernels of the four phases: (4 C, C, 2, 2) and (4 C)."""
        weight = torch.cat([fold_pair(rows, 3, p) for rows in fold_rows(self.conv.weight) for p in (0, 1)])
        bias = None if self.conv.bias is None else self.conv.bias.repeat(4)
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def forward(self, x_BTHWC: Tensor, past: LayerPast = ()) -> tuple[Tensor, LayerPast]:
        B, T, H, W, C = x_BTHWC.shape
        weight, bias = self.kernel(x_BTHWC)
        x_1FHWC = x_BTHWC.flatten(0, 1)[None]
        cuts = blocks(x_BTHWC, self.conv.weight, B * T, 4 * H * W * C)
        is_whole = len(cuts) == 1 and not fused.is_used(x_BTHWC, self.conv.weight)  # else each value is moved once
        y = torch.empty(0) if is_whole else x_BTHWC.new_empty(B * T, H, 2, W, 2, C)
        for cut in cuts:
            phases = conv2d(x_1FHWC[:, cut], weight, bias, padding=1).view(-1, H + 1, W + 1, 4, C).unbind(3)
            shifted = [phases[i][:, i // 2 : i // 2 + H, i % 2 : i % 2 + W] for i in range(4)]
            if is_whole:
                rows = [torch.stack(shifted[:2], dim=3), torch.stack(shifted[2:], dim=3)]
                y = torch.stack(rows, dim=2)
            else:
                for phase, pixels in enumerate(shifted):
                    y[cut, :, phase // 2, :, phase % 2] = pixels
        return y.view(B, T, 2 * H, 2 * W, C), past


class TimeBlend(Folding):
    """Base of resampling in time: a 3x3x3 convolution blended with a path that has no weights.

    Both paths are linear, so one convolution computes them: ``(1 - s)`` times the weights, plus ``s`` times the other
    path's weights for each channel, with ``s = sigmoid(mix_factor)``. With ``blend=False`` there is only a convolution
    of each position over three frames.
    """

    def __init__(self, channels: int, rule: TimeRule, *, blend: bool = True) -> None:
        super().__init__()
        self.conv = TimeConv(channels, channels, (3, 3, 3) if blend else (3,), rule)
        self.mix_factor = nn.Parameter(torch.tensor([2.0])) if blend else None
        self.rule = rule


class TimeDown(TimeBlend):
    """Halve the number of frames: a blend of averaging and convolving three frames, at stride 2.

    Output i sees the input frames 2i-1, 2i, 2i+1; if not causal, 2i, 2i+1, 2i+2.
    """

    def folded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Compute the blend as one kernel: (C, C, 3, 3, 3) and (C)."""
        weight, bias, mix = blended(self.conv.conv, self.mix_factor)
        weight[:, :, :, 1, 1] += mix / 3 * identity_like(weight)[:, :, None]
        return weight.to(dtype), bias.to(dtype)

    def forward(self, x_BTHWC: Tensor, past: LayerPast = (), *, keep_past: bool = True) -> tuple[Tensor, LayerPast]:
        """Halve a chunk with an even number of frames."""
        joined_BTHWC, past = self.rule.context(
            x_BTHWC, past, before=1 if self.rule.causal else 0, after=1, keep_past=keep_past
        )
        return conv3d(joined_BTHWC, *self.kernel(x_BTHWC), time_stride=2), past


Between = tuple[int, int, float] | None
"""One frame of a doubled sequence: two source frames, and the interpolation weight of the second, in [0, 1]; None for
a frame of zeros."""


class TimeUp(TimeBlend):
    """Double the number of frames: a blend of interpolated frames and their convolution.

    The doubled sequence is never built. Convolution is linear, so each source frame is multiplied by each of the three
    taps once, and output frames are summed from these products: 3 products for two output frames in place of 6, equal
    up to rounding.
    """

    def folded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Compute the blend as one kernel in space, with the taps as further output channels: (3 C, C, 3, 3), (3 C)."""
        weight, bias, mix = blended(self.conv.conv, self.mix_factor)
        own_tap = 2 if self.rule.causal else 1
        weight[:, :, own_tap, 1, 1] += mix * identity_like(weight)
        by_tap = weight.permute(2, 0, 1, 3, 4).flatten(0, 1).to(dtype)
        C = bias.shape[0]
        return by_tap, F.pad(bias, (own_tap * C, (2 - own_tap) * C)).to(dtype)

    def convolved(self, chunks: Sequence[Tensor], doubled: Sequence[Between]) -> Tensor:
        """Convolve a doubled sequence.

        Args:
            chunks: source frames in consecutive maps, each (B, number of frames, H, W, C).
            doubled: the sequence with the kernel's context, two frames more than the output has.
        """
        B, _, H, W, C = chunks[0].shape
        by_tap, bias = self.kernel(chunks[0])
        frames = [frame for chunk in chunks for frame in single_frames(chunk)]
        if len(blocks(frames[0], self.conv.conv.weight, len(frames), 3 * H * W * C)) == 1:
            joined_BTHWC = chunks[0] if len(chunks) == 1 else torch.cat(list(chunks), dim=1)
            products_BTHWC = conv2d(joined_BTHWC, by_tap, bias, padding=1)
            if not fused.is_used(products_BTHWC, self.conv.conv.weight):
                return summed_at_once(products_BTHWC, doubled)
            first, second, shares = zip(*((-1, -1, 0.0) if one is None else one for one in doubled), strict=True)
            y_BTHWC: Tensor = fused.sum_taps(products_BTHWC, first, second, shares)
            return y_BTHWC
        products: dict[int, Tensor] = {}
        y_BTHWC = frames[0].new_empty(B, len(doubled) - 2, H, W, C)
        for number in range(y_BTHWC.shape[1]):
            seen = doubled[number : number + 3]
            needed = {index for between in seen if between for index in between[:2]}
            for index in needed - products.keys():
                products[index] = conv2d(frames[index], by_tap, bias, padding=1)
            y_BTHWC[:, number : number + 1] = summed(products, seen, C)
            products = {index: product for index, product in products.items() if index >= min(needed)}
        return y_BTHWC


class RepeatedTimeUp(TimeUp):
    """Double the number of frames by repeating each."""

    def forward(self, x_BTHWC: Tensor, past: LayerPast = (), *, keep_past: bool = True) -> tuple[Tensor, LayerPast]:
        """Double a chunk; if causal, ``past`` is the one input frame before it."""
        chunks = [*past, x_BTHWC]
        indices = range(len(past), len(past) + x_BTHWC.shape[1])
        doubled: list[Between] = [(index, index, 0.0) for index in indices for _ in range(2)]
        if not self.rule.causal:
            return self.convolved(chunks, [None, *doubled, None]), ()
        before: Between = (0, 0, 0.0) if past else None
        y_BTHWC = self.convolved(chunks, [before, before, *doubled])
        return y_BTHWC, (x_BTHWC[:, -1:].clone(),) if keep_past else ()


class LinearTimeUp(TimeUp):
    """Double the number of frames by linear interpolation.

    New frames lie a quarter before and a quarter after the old ones, clamped at both ends. The ``first_frames`` frames
    of the video's first latent are interpolated by themselves, and all later ones by themselves. The second new frame
    of a source frame needs the next source frame, so the last one of a chunk is emitted first by the next chunk.
    Streaming is exact and computes nothing twice.
    """

    def __init__(self, channels: int, rule: TimeRule, first_frames: int, *, blend: bool = True) -> None:
        super().__init__(channels, rule, blend=blend)
        self.first_frames = first_frames

    def forward(
        self, x_BTHWC: Tensor, past: LayerPast = (), *, keep_past: bool = True, last: bool = True
    ) -> tuple[Tensor, LayerPast]:
        """Double a chunk.

        Args:
            past: the last two interpolated frames, and the input frame still to be completed (none after the first
                latent).
            last: whether the video ends with this chunk, so that its last frame is emitted now.
        """
        doubled: list[Between]
        chunks = [chunk for chunk in (*past, x_BTHWC) if chunk.shape[1]]
        frames = [frame for chunk in chunks for frame in single_frames(chunk)]
        if past:
            first = past[0].shape[1]
            doubled = [(0, 0, 0.0), (1, 1, 0.0)]
            doubled += interpolated(range(first, len(frames)), starts=not past[1].shape[1], ends=last)
        else:
            first = min(self.first_frames, len(frames))
            doubled = [(0, 0, 0.0), (0, 0, 0.0)]
            doubled += interpolated(range(first), starts=True, ends=True)
            doubled += interpolated(range(first, len(frames)), starts=True, ends=last)
        y_BTHWC = self.convolved(chunks, doubled)
        if not keep_past:
            return y_BTHWC, ()
        before_BTHWC = torch.cat([frames[i].lerp(frames[j], w) for i, j, w in filter(None, doubled[-2:])], dim=1)
        waiting_BTHWC = frames[-1].clone() if len(frames) > first else x_BTHWC.new_empty(*x_BTHWC[:, :0].shape)
        return y_BTHWC, (before_BTHWC, waiting_BTHWC)


def time_up(channels: int, rule: TimeRule, first_frames: int, *, blend: bool = True) -> RepeatedTimeUp | LinearTimeUp:
    """Make the upsampler of a rule; ``first_frames`` is the number of frames of the first latent at this level."""
    if rule.upsampling == "linear":
        return LinearTimeUp(channels, rule, first_frames, blend=blend)
    return RepeatedTimeUp(channels, rule, blend=blend)


def single_frames(x_BTHWC: Tensor) -> list[Tensor]:
    """Split a map into frames, each (B, 1, H, W, C)."""
    return [x_BTHWC[:, index : index + 1] for index in range(x_BTHWC.shape[1])]


def interpolated(indices: range, *, starts: bool, ends: bool) -> list[Between]:
    """List the frames of a doubled sequence: two between each pair, a quarter from either, and one at each end."""
    between: list[Between] = [(i, i + 1, share) for i in indices[:-1] for share in (0.25, 0.75)]
    if indices and starts:
        between.insert(0, (indices[0], indices[0], 0.0))
    if indices and ends:
        between.append((indices[-1], indices[-1], 0.0))
    return between


def summed(products: Mapping[int, Tensor], seen: Sequence[Between], channels: int) -> Tensor:
    """Sum one output frame from the products of the source frames: three doubled frames, each with its own tap."""
    total: Tensor | None = None
    for tap, between in enumerate(seen):
        if between is None:
            continue
        first, second, share = between
        at = slice(tap * channels, (tap + 1) * channels)
        term = products[first][..., at]
        if second != first:
            term = term.lerp(products[second][..., at], share)
        total = term if total is None else total + term
    assert total is not None
    return total


def summed_at_once(products_BTHWC: Tensor, doubled: Sequence[Between]) -> Tensor:
    """Sum all output frames at once, with the same bits as `summed`.

    Training needs it: frame by frame, each gradient is a map of all frames and costs more than the convolutions.
    """
    T = products_BTHWC.shape[1]
    if None in doubled:
        products_BTHWC = F.pad(products_BTHWC, (0, 0, 0, 0, 0, 0, 0, 1))
    between = [(T, T, 0.0) if one is None else one for one in doubled]
    are_mixed = any(one[0] != one[1] for one in between)
    first, second, shares = zip(*between, strict=True)
    # Integers whatever the map's dtype: bfloat16 counts to 256 and float16 to 2048, and longer clips would take wrong
    # frames. Shares are quarters, which every dtype holds.
    device = products_BTHWC.device
    first_index, second_index = (constant(numbers, torch.int64, device) for numbers in (first, second))
    share = constant(shares, products_BTHWC.dtype, device)[:, None, None, None]
    total: Tensor | None = None
    for tap, product_BTHWC in enumerate(products_BTHWC.chunk(3, dim=-1)):
        seen = slice(tap, tap + len(doubled) - 2)
        term = product_BTHWC.index_select(1, first_index[seen])
        if are_mixed:
            term = term.lerp(product_BTHWC.index_select(1, second_index[seen]), share[seen])
        total = term if total is None else total + term
    assert total is not None
    return total


def blended(conv: nn.Module, mix_factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the convolution's part of a blend, in float32: ``(1 - s)`` times weight and bias, and ``s``.

    Without a mix factor s is 0 and the kernel over time is padded with zeros in space. Resampling then has one code
    path, and the models without a blend, which serve comparisons, multiply by zeros.
    """
    assert isinstance(conv, nn.Conv1d | nn.Conv3d)
    assert conv.bias is not None
    if mix_factor is None:
        weight = F.pad(conv.weight.float()[..., None, None], (1, 1, 1, 1))
        return weight, conv.bias.float(), weight.new_zeros(1)
    mix = torch.sigmoid(mix_factor.float())
    return (1 - mix) * conv.weight.float(), (1 - mix) * conv.bias.float(), mix


def identity_like(weight: Tensor) -> Tensor:
    """Make an (out, in) identity matrix of the weight's dtype and device."""
    return torch.eye(weight.shape[0], weight.shape[1], dtype=weight.dtype, device=weight.device)


def fold_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Fold an (out, in, 3, 3) kernel over doubled rows into two (out, in, 2, 3) kernels over single rows."""
    return fold_pair(weight, 2, 0), fold_pair(weight, 2, 1)


def fold_pair(weight: Tensor, axis: int, phase: int) -> Tensor:
    """Fold three taps, of which two meet the same repeated sample, into two: (0, 1+2) in phase 0, (0+1, 2) in 1."""
    first, middle, last = weight.unbind(axis)
    return torch.stack([first, middle + last] if phase == 0 else [first + middle, last], dim=axis)
