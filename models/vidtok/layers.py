"""Layers of a video autoencoder: residual units, attention, and resampling in space and in time.

Every map is a contiguous ``x_BTHWC``. Layer norms, 1x1 convolutions and channels-last convolutions all read that
layout, so nothing is copied between layers.

Layers are stateless. A layer that looks back in time takes the frames before its chunk as ``past`` and returns the
``past`` of the next chunk; ``()`` means the start of a video. Any chunking therefore gives the same result as one
pass. A `TimeRule` says what lies beyond the ends of a video and whether layers look ahead; if they do, they take whole
videos only.

On a GPU without gradients the sum at the end of a residual unit is left to the first kernel of the next layer (`Sum`,
`models.vidtok.fused`).

On a CPU without gradients, a large map passes through a layer in blocks that fit the cache (`blocks`): whole frames
where the layer works within frames, rows of all frames where it works through time.

Parameter names are those of the released VidTok checkpoints, hence their ``conv`` and ``norm`` levels.
"""

# B batch, T frames, H height, W width, C channels; F = B * T; N = H * W positions of one frame

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, Self, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vidshard.models.vidtok import fused, fused_convolution
from vidshard.models.vidtok.constants import constant

LayerPast = tuple[Tensor, ...]
"""Maps that one layer keeps from the frames before a chunk; empty at the start of a video."""


class Sum(NamedTuple):
    """Sum at the end of a residual unit that is not computed yet: the next layer's first kernel does it.

    A layer that takes one computes the sum exactly once, which writes it into ``branch``.
    """

    branch: Tensor
    """Result of the unit's last convolution, (B, T, H, W, C)."""
    residual: Tensor
    """Input of the unit, or its 1x1 convolution where the width changes, (B, T, H, W, C)."""

    def total(self) -> Tensor:
        """Compute the sum by itself."""
        return self.branch.add_(self.residual)


class Normed(NamedTuple):
    """Result of a residual unit whose last convolution computed the norm and SiLU that open the next unit too."""

    total: Tensor
    """The result, (B, T, H, W, C)."""
    opened: Tensor
    """Norm and SiLU of it by the next unit's first norm."""


Map = Tensor | Sum
"""Input of a layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeRule:
    """Temporal context of the layers: the frames they see, and the padding at the ends of a video."""

    causal: bool
    """Convolutions look back only; otherwise as far ahead as back, with zeros after the end."""
    start: Literal["zeros", "first frame"]
    """Padding before a video."""
    upsampling: Literal["repeated", "linear"]
    """Method of upsampling in time."""

    def context(
        self, x_BTHWC: Tensor, past: LayerPast, *, before: int, after: int, keep_past: bool = True
    ) -> tuple[Tensor, LayerPast]:
        """Concatenate the frames before a chunk with it and, unless causal, zeros after it.

        Returns:
            The longer map, and its last ``before`` frames for the next chunk: a copy, so that a past does not keep
            its chunk alive. The past is empty unless causal and kept.
        """
        B, _, H, W, C = x_BTHWC.shape
        if past:
            before_BTHWC = past[0]
        elif self.start == "zeros":
            before_BTHWC = x_BTHWC.new_zeros(B, before, H, W, C)
        else:
            before_BTHWC = x_BTHWC[:, :1].expand(B, before, H, W, C)
        if not self.causal:
            return torch.cat([before_BTHWC, x_BTHWC, x_BTHWC.new_zeros(B, after, H, W, C)], dim=1), ()
        joined_BTHWC = torch.cat([before_BTHWC, x_BTHWC], dim=1)
        return joined_BTHWC, (joined_BTHWC[:, -before:].clone(),) if keep_past else ()


TIME_RULES = {
    "causal-v1.0": TimeRule(causal=True, start="zeros", upsampling="repeated"),
    "causal-v1.1": TimeRule(causal=True, start="first frame", upsampling="linear"),
    "non-causal": TimeRule(causal=False, start="zeros", upsampling="repeated"),
}
"""Time rules by the variant of a released model."""


class Layer(Protocol):
    """One layer of an encoder or decoder."""

    def __call__(self, x_BTHWC: Tensor, past: LayerPast = ()) -> tuple[Tensor, LayerPast]:
        """Return the chunk's output and the ``past`` of the next chunk."""
        ...


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each position, followed by SiLU where the caller asks for it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x_BTHWC: Map | Normed, *, silu: bool = False) -> Tensor:
        if isinstance(x_BTHWC, Normed):
            assert silu
            return x_BTHWC.opened
        if isinstance(x_BTHWC, Sum) or fused.is_used(x_BTHWC, self.norm.weight):
            return self._fused(x_BTHWC, silu=silu, lead=0)
        h = self._in_own_dtype(x_BTHWC) if is_autocast_on_gpu(x_BTHWC) else self.norm(x_BTHWC)
        # The norm's output is a new tensor, so without a graph it can be overwritten.
        return F.silu(h, inplace=not h.requires_grad) if silu else h

    def in_context(
        self, x_BTHWC: Map, past: LayerPast, rule: TimeRule, *, keep_past: bool = True
    ) -> tuple[Tensor, LayerPast]:
        """Norm and SiLU of a chunk, behind the two frames before it, and the past of the next chunk.

        The result is that of `forward` and `TimeRule.context` for a causal convolution over three frames.
        """
        is_fused = isinstance(x_BTHWC, Sum) or fused.is_used(x_BTHWC, self.norm.weight)
        if not is_fused or not rule.causal:
            before = 2 if rule.causal else 1
            return rule.context(self(x_BTHWC, silu=True), past, before=before, after=1, keep_past=keep_past)
        joined_BTHWC = self._fused(x_BTHWC, silu=True, lead=2, repeat_first=not past and rule.start == "first frame")
        if past:
            joined_BTHWC[:, :2] = past[0]
        return joined_BTHWC, (joined_BTHWC[:, -2:].clone(),) if keep_past else ()

    def _in_own_dtype(self, x_BTHWC: Tensor) -> Tensor:
        """Compute the norm in the map's dtype, with statistics in float32.

        Autocast would compute it in float32, so that a map of two bytes a value is read and written with four.
        """
        with torch.autocast(x_BTHWC.device.type, enabled=False):
            weight, bias = (parameter.to(x_BTHWC.dtype) for parameter in (self.norm.weight, self.norm.bias))
            return F.layer_norm(x_BTHWC, self.norm.normalized_shape, weight, bias, self.norm.eps)

    def _fused(self, x_BTHWC: Tensor | Sum, *, silu: bool, lead: int, repeat_first: bool = False) -> Tensor:
        settings = (self.norm.weight, self.norm.bias, self.norm.eps, silu, lead, repeat_first)
        y_BTHWC: Tensor = (
            fused.add_norm_silu(*x_BTHWC, *settings)
            if isinstance(x_BTHWC, Sum)
            else fused.norm_silu(x_BTHWC, *settings)
        )
        return y_BTHWC


class TimeConv(nn.Module):
    """Convolution over three frames, or over 3 x 3 x 3 positions, with time stride 1.

    ``kernel`` is (3,) or (3, 3, 3). Space is padded with zeros to keep its size.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int] | tuple[int, int, int], rule: TimeRule
    ) -> None:
        super().__init__()
        self.conv: nn.Conv1d | nn.Conv3d
        if len(kernel) == 1:
            self.conv = nn.Conv1d(in_channels, out_channels, kernel)
        else:
            self.conv = nn.Conv3d(in_channels, out_channels, kernel)
        self.rule = rule

    def forward(self, x_BTHWC: Tensor, past: LayerPast = (), *, keep_past: bool = True) -> tuple[Tensor, LayerPast]:
        """Convolve a chunk; a causal one is given the two input frames before it as ``past``.

        Returns:
            A map with as many frames as ``x``, and the last two input frames.
        """
        joined_BTHWC, past = self.rule.context(
            x_BTHWC, past, before=2 if self.rule.causal else 1, after=1, keep_past=keep_past
        )
        return self.convolved(joined_BTHWC), past

    def convolved(self, joined_BTHWC: Tensor) -> Tensor:
        """Convolve a chunk that has its context already."""
        if isinstance(self.conv, nn.Conv3d):
            return conv3d(joined_BTHWC, self.conv.weight, self.conv.bias)
        return conv_over_time(joined_BTHWC, self.conv.weight, self.conv.bias)


class PointConv(nn.Module):
    """A 1x1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        return matrix_product(x_BTHWC, self.conv.weight.flatten(1), self.conv.bias)


class SpatialUnit(nn.Module):
    """Residual unit within each frame: norm, SiLU and 3x3 convolution, twice."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3)
        self.norm2 = ChannelNorm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(
        self, x_BTHWC: Map, past: LayerPast = (), *, overwrite: bool = False, defer_sum: bool = False
    ) -> tuple[Map, LayerPast]:
        """Apply the unit; the number of frames stays.

        Args:
            overwrite: allow writing the result into ``x``.
            defer_sum: leave the sum to the next layer.
        """
        if defer_sum or isinstance(x_BTHWC, Sum):
            result = self._deferred(x_BTHWC)
            return result if defer_sum else result.total(), past
        B, T, H, W, C = x_BTHWC.shape
        out_channels = self.conv1.out_channels
        cuts = blocks(x_BTHWC, self.conv1.weight, B * T, H * W * max(C, out_channels))
        if len(cuts) == 1:
            return self._within_frames(x_BTHWC), past
        x_1FHWC = x_BTHWC.flatten(0, 1)[None]
        in_place = overwrite and out_channels == C
        y_1FHWC = x_1FHWC if in_place else x_1FHWC.new_empty(1, B * T, H, W, out_channels)
        for cut in cuts:
            self._within_frames(x_1FHWC[:, cut], out=y_1FHWC[:, cut])
        return y_1FHWC.view(B, T, H, W, out_channels), past

    def shortcut(self, x_BTHWC: Map | Normed) -> Tensor:
        """Compute what the unit adds to its branch, after its first norm has read the map."""
        x_BTHWC = computed(x_BTHWC)
        if self.nin_shortcut is None:
            return x_BTHWC
        return matrix_product(x_BTHWC, self.nin_shortcut.weight.flatten(1), self.nin_shortcut.bias)

    def _within_frames(self, x_BTHWC: Tensor, out: Tensor | None = None) -> Tensor:
        h, x_BTHWC = self._deferred(x_BTHWC)
        return h.add_(x_BTHWC) if out is None else torch.add(h, x_BTHWC, out=out)

    def _deferred(self, x_BTHWC: Map) -> Sum:
        h = conv2d(self.norm1(x_BTHWC, silu=True), self.conv1.weight, self.conv1.bias, padding=1)
        h = conv2d(self.norm2(h, silu=True), self.conv2.weight, self.conv2.bias, padding=1)
        return Sum(h, self.shortcut(x_BTHWC))


class TimeUnit(nn.Module):
    """Residual unit through time: norm, SiLU and convolution, twice.

    ``kernel`` (3,) sees one position, (3, 3, 3) its neighbours too; only the latter may change the width to
    ``out_channels``. ``starts_as_identity`` initializes the second convolution to zero, so that an untrained model
    treats frames independently.
    """

    def __init__(
        self,
        channels: int,
        kernel: tuple[int] | tuple[int, int, int],
        rule: TimeRule,
        *,
        out_channels: int | None = None,
        starts_as_identity: bool = False,
    ) -> None:
        super().__init__()
        self.sees_neighbours = len(kernel) > 1
        out_channels = out_channels or channels
        assert self.sees_neighbours or out_channels == channels
        self.norm1 = ChannelNorm(channels)
        self.conv1 = TimeConv(channels, out_channels, kernel, rule)
        self.norm2 = ChannelNorm(out_channels)
        self.conv2 = TimeConv(out_channels, out_channels, kernel, rule)
        self.nin_shortcut = PointConv(channels, out_channels) if out_channels != channels else None
        if starts_as_identity:
            for parameter in self.conv2.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self,
        x_BTHWC: Map,
        past: LayerPast = (),
        *,
        overwrite: bool = False,
        keep_past: bool = True,
        defer_sum: bool = False,
    ) -> tuple[Map, LayerPast]:
        """Apply the unit; the number of frames stays.

        Args:
            overwrite: allow writing the result into ``x``.
            keep_past: return the past of the next chunk; otherwise an empty one.
            defer_sum: leave the sum to the next layer.
        """
        if defer_sum or isinstance(x_BTHWC, Sum):
            result, kept = self._deferred(x_BTHWC, past, keep_past=keep_past)
            return result if defer_sum else result.total(), kept
        B, T, H, W, C = x_BTHWC.shape
        cuts = blocks(x_BTHWC, self.conv1.conv.weight, H, T * W * C)
        if len(cuts) == 1 or self.sees_neighbours:
            return self._through_time(x_BTHWC, past, keep_past=keep_past)
        y_BTHWC = x_BTHWC if overwrite else torch.empty_like(x_BTHWC)
        pasts: list[LayerPast] = []
        for clip in range(B):
            at = slice(clip, clip + 1)
            pieces = [
                self._through_time(
                    x_BTHWC[at, :, cut],
                    tuple(frames[at, :, cut] for frames in past),
                    out=y_BTHWC[at, :, cut],
                    keep_past=keep_past,
                )[1]
                for cut in cuts
            ]
            pasts.append(tuple(torch.cat(rows, dim=2) for rows in zip(*pieces, strict=True)))
        return y_BTHWC, tuple(torch.cat(clips) for clips in zip(*pasts, strict=True))

    def shortcut(self, x_BTHWC: Map | Normed) -> Tensor:
        """Compute what the unit adds to its branch, after its first norm has read the map."""
        x_BTHWC = computed(x_BTHWC)
        return x_BTHWC if self.nin_shortcut is None else cast(Tensor, self.nin_shortcut(x_BTHWC))

    def _through_time(
        self, x_BTHWC: Tensor, past: LayerPast, out: Tensor | None = None, *, keep_past: bool
    ) -> tuple[Tensor, LayerPast]:
        (h, x_BTHWC), kept = self._deferred(x_BTHWC, past, keep_past=keep_past)
        return h.add_(x_BTHWC) if out is None else torch.add(h, x_BTHWC, out=out), kept

    def _deferred(self, x_BTHWC: Map, past: LayerPast, *, keep_past: bool) -> tuple[Sum, LayerPast]:
        joined_BTHWC, past1 = self.norm1.in_context(x_BTHWC, past[:1], self.conv1.rule, keep_past=keep_past)
        h = self.conv1.convolved(joined_BTHWC)
        joined_BTHWC, past2 = self.norm2.in_context(h, past[1:], self.conv2.rule, keep_past=keep_past)
        h = self.conv2.convolved(joined_BTHWC)
        return Sum(h, self.shortcut(x_BTHWC)), (*past1, *past2)


class FrameAttention(nn.Module):
    """Residual single-head self-attention over the positions of each frame; none across time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.q = PointConv(channels, channels)
        self.k = PointConv(channels, channels)
        self.v = PointConv(channels, channels)
        self.proj_out = PointConv(channels, channels)

    def forward(self, x_BTHWC: Map, past: LayerPast = (), *, defer_sum: bool = False) -> tuple[Map, LayerPast]:
        """Apply the attention; ``defer_sum`` leaves the residual sum to the next layer."""
        h = self.norm(x_BTHWC)
        x_BTHWC = computed(x_BTHWC)
        B, T, H, W, C = x_BTHWC.shape
        q_F1NC, k_F1NC, v_F1NC = (project(h).view(B * T, 1, H * W, C) for project in (self.q, self.k, self.v))
        h_F1NC = F.scaled_dot_product_attention(q_F1NC, k_F1NC, v_F1NC)
        result = Sum(self.proj_out(h_F1NC.reshape(B, T, H, W, C)), x_BTHWC)
        return result if defer_sum else result.total(), past


Unit = SpatialUnit | TimeUnit
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def takes_two_kernels(unit: Unit, x_BTHWC: Map | Normed) -> bool:
    """Whether `in_two_kernels` computes a unit for a map."""
    conv = unit.conv1 if isinstance(unit, SpatialUnit) else unit.conv1.conv
    return fused_convolution.takes(computed(x_BTHWC), conv.weight)


def in_two_kernels(unit: Unit, x_BTHWC: Map | Normed, next_norm: ChannelNorm | None) -> Tensor | Normed:
    """Apply a residual unit to whole clips, by two convolutions that compute the norms after them.

    Args:
        next_norm: norm, with SiLU, that opens the next unit; None if another layer follows.
    """
    conv1: Convolution
    conv2: Convolution
    if isinstance(unit, SpatialUnit):
        conv1, conv2, before, repeat_first = unit.conv1, unit.conv2, 0, False
    else:
        conv1, conv2, rule = unit.conv1.conv, unit.conv2.conv, unit.conv1.rule
        before, repeat_first = 2 if rule.causal else 1, rule.start == "first frame"

    def convolve(h: Tensor, conv: Convolution, norm: ChannelNorm | None, residual: Tensor | None) -> list[Tensor]:
        assert conv.bias is not None
        weights = (None, None, 0.0) if norm is None else (norm.norm.weight, norm.norm.bias, norm.norm.eps)
        kept = residual is not None
        outputs: list[Tensor] = fused_convolution.conv_norm_silu(
            h, conv.weight, conv.bias, residual, *weights, before, repeat_first, kept
        )
        return outputs

    h = unit.norm1(x_BTHWC, silu=True)
    residual_BTHWC = unit.shortcut(x_BTHWC)
    (h,) = convolve(h, conv1, unit.norm2, None)
    outputs = convolve(h, conv2, next_norm, residual_BTHWC)
    return outputs[0] if next_norm is None else Normed(outputs[1], outputs[0])


def is_autocast_on_gpu(x_BTHWC: Tensor) -> bool:
    """Whether a map is of a GPU whose operators autocast, as in training."""
    return x_BTHWC.device.type == "cuda" and torch.is_autocast_enabled("cuda")


def computed(x_BTHWC: Map | Normed) -> Tensor:
    """Return the value of a map after a norm has read it, which adds up a sum."""
    if isinstance(x_BTHWC, Normed):
        return x_BTHWC.total
    return x_BTHWC.branch if isinstance(x_BTHWC, Sum) else x_BTHWC


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


def conv2d(x_BTHWC: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1, padding: int = 0) -> Tensor:
    """Apply a 2D convolution to each frame."""
    B, T = x_BTHWC.shape[:2]
    y_FCHW = F.conv2d(x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2), weight, bias, stride, padding)
    y_FHWC = y_FCHW.permute(0, 2, 3, 1).contiguous()
    return y_FHWC.view(B, T, *y_FHWC.shape[1:])


def conv_over_time(x_BTHWC: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a 1D convolution along time at each position, without padding; ``weight`` is (out, in, time)."""
    B, _, H, W, _ = x_BTHWC.shape
    if x_BTHWC[0].numel() <= SMALL_MAP:
        return F.linear(stack_taps(x_BTHWC, weight.shape[2]), weight.transpose(1, 2).flatten(1), bias)
    # As a (time, 1) convolution over an image of T rows and H * W columns: at 20 frames of 128 x 128 x 128 channels
    # 0.26 s on two cores, as fast as three matrix products or a 3D convolution, and 1.9 times faster at 512 channels.
    y_BCTN = F.conv2d(x_BTHWC.flatten(2, 3).permute(0, 3, 1, 2), weight.unsqueeze(-1), bias)
    y_BTNC = y_BCTN.permute(0, 2, 3, 1).contiguous()
    return y_BTNC.view(B, y_BTNC.shape[1], H, W, y_BTNC.shape[3])


def conv3d(x_BTHWC: Tensor, weight: Tensor, bias: Tensor | None, *, time_stride: int = 1) -> Tensor:
    """Apply a 3D convolution without padding in time, and with zero padding that keeps the size in space."""
    B, T, H, W, C = x_BTHWC.shape
    out_channels, _, taps = weight.shape[:3]
    num_frames = (T - taps) // time_stride + 1
    cuts = blocks(x_BTHWC, weight, num_frames, H * W * max(C, out_channels))
    if len(cuts) == 1:
        return _conv3d(x_BTHWC, weight, bias, time_stride)
    y_BTHWC = x_BTHWC.new_empty(B, num_frames, H, W, out_channels)
    for clip in range(B):
        for cut in cuts:
            seen = slice(cut.start * time_stride, (cut.stop - 1) * time_stride + taps)
            y_BTHWC[clip, cut] = _conv3d(x_BTHWC[clip : clip + 1, seen], weight, bias, time_stride)[0]
    return y_BTHWC


def _conv3d(x_BTHWC: Tensor, weight: Tensor, bias: Tensor | None, time_stride: int) -> Tensor:
    out_channels, in_channels, taps = weight.shape[:3]
    # The first and last layers have few channels, where 3D convolutions are slow: on two cores at 20 frames of
    # 128 x 128, 3 to 128 channels take 237 ms, 128 to 3 take 131 ms. As 2D convolutions with the taps as additional
    # input or output channels they take 88 and 49 ms.
    if time_stride == 1 and taps * out_channels <= in_channels:
        y = conv2d(x_BTHWC, weight.permute(2, 0, 1, 3, 4).flatten(0, 1), None, padding=1)
        num_frames = x_BTHWC.shape[1] - taps + 1
        by_tap = [part[:, tap : tap + num_frames] for tap, part in enumerate(y.chunk(taps, dim=-1))]
        total = torch.stack(by_tap).sum(0)
        return total if bias is None else total + bias
    if taps * in_channels <= out_channels or x_BTHWC[0, :, :, 0].numel() <= SMALL_MAP:
        stacked = stack_taps(x_BTHWC, taps, time_stride)
        return conv2d(stacked, weight.transpose(1, 2).flatten(1, 2), bias, padding=1)
    y_BCTHW = F.conv3d(x_BTHWC.permute(0, 4, 1, 2, 3), weight, bias, (time_stride, 1, 1), (0, 1, 1))
    return y_BCTHW.permute(0, 2, 3, 4, 1).contiguous()


def matrix_product(x_BTHWC: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply the channels of each position by an (out, in) matrix."""
    _, T, H, _, _ = x_BTHWC.shape
    if x_BTHWC.device.type != "cpu" or x_BTHWC[0].numel() <= SMALL_MAP or T * H < 16:
        return F.linear(x_BTHWC, weight, bias)
    # PyTorch multiplies with MKL and convolves with oneDNN: on an AMD processor with AVX-512, a product of 512 channels
    # runs at 186 GFLOP/s with the former and at 424 with the latter. The convolution's batch is rows, not frames: on a
    # single thread a batch below 16 does not reach oneDNN.
    y_RC1W = F.conv2d(x_BTHWC.flatten(0, 2)[:, None].permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    return y_RC1W.permute(0, 2, 3, 1).reshape(*x_BTHWC.shape[:-1], weight.shape[0])


BLOCK_VALUES = 2 << 20
"""Number of values in a block. On two cores in float32, a `TimeUnit` takes 780 ms for 20 frames of 128 x 128 x 128
channels without blocks, and 275, 320 and 650 ms in blocks of 1.3, 2.6 and 5.2 million values; at 256 x 256, 3.4 s
without and 1.0 s with blocks. A `SpatialUnit` takes 0.75 s without and 0.57 s with them."""


def blocks(x: Tensor, weight: Tensor, count: int, values: int) -> list[slice]:
    """Cut ``count`` frames or rows of ``values`` values each into blocks for a layer with this weight.

    Returns:
        Consecutive ranges; a single one on a GPU, and where gradients are recorded.
    """
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    size = count if x.device.type != "cpu" or recorded else max(1, BLOCK_VALUES // values)
    return [slice(start, min(start + size, count)) for start in range(0, count, max(size, 1))]


# Values of a map up to which PyTorch's CPU convolutions take another path for a batch of one (5D: the first three
# sizes after the batch; 4D: the whole map). That path is slower and gives other bits than larger batches do: a clip's
# latents would depend on its batch, by 1e-5. Maps this small are computed as 2D convolutions over B * T frames, or as
# matrix products, whatever the batch. The exception left is a batch of one clip of one such frame.
SMALL_MAP = 20480


def stack_taps(x_BTHWC: Tensor, taps: int, time_stride: int = 1) -> Tensor:
    """Concatenate, along the channels, the frames that each output frame of a convolution over time sees."""
    last = x_BTHWC.shape[1] - taps + 1
    return torch.cat([x_BTHWC[:, tap : tap + last : time_stride] for tap in range(taps)], dim=-1)


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
