"""Layers of a video autoencoder: residual units and attention. `models.vidtok.resampling` has those that resample.

Every map is a contiguous ``x_BTHWC``. Layer norms, 1x1 convolutions and channels-last convolutions all read that
layout, so nothing is copied between layers.

Layers are stateless. A layer that looks back in time takes the frames before its chunk as ``past`` and returns the
``past`` of the next chunk; ``()`` means the start of a video. Any chunking therefore gives the same result as one
pass. A `TimeRule` says what lies beyond the ends of a video and whether layers look ahead; if they do, they take whole
videos only.

On a GPU without gradients the sum at the end of a residual unit is left to the first kernel of the next layer (`Sum`,
`models.vidtok.fused`).

Parameter names are those of the released VidTok checkpoints, hence their ``conv`` and ``norm`` levels.
"""

# B batch, T frames, H height, W width, C channels; F = B * T; N = H * W positions of one frame

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vidshard.models.vidtok import fused, fused_convolution
from vidshard.models.vidtok.convolutions import blocks, conv2d, conv3d, conv_over_time, matrix_product

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

    ``kernel`` (3,) sees one position, (3, 3, 3) its neighbors too; only the latter may change the width to
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
        self.sees_neighbors = len(kernel) > 1
        out_channels = out_channels or channels
        assert self.sees_neighbors or out_channels == channels
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
        if len(cuts) == 1 or self.sees_neighbors:
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
