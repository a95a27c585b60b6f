"""Encoder and decoder, assembled from the layers; quantization is left to the heads.

Both are lists of layers run in order; the past of each layer is passed beside the maps. Level 0 has the full
resolution, and the decoder runs from the last level to level 0.
"""

# B batch, T frames, H height, W width, C channels; a prime in text (T', H', W') is the latent grid

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidshard.models.vidtok import fused
from vidshard.models.vidtok.haar import BANDS, HaarIn, HaarOut
from vidshard.models.vidtok.layers import (
    ChannelNorm,
    FrameAttention,
    Layer,
    LayerPast,
    Map,
    Normed,
    SpatialUnit,
    Sum,
    TimeConv,
    TimeRule,
    TimeUnit,
    in_two_kernels,
    takes_two_kernels,
)
from vidshard.models.vidtok.resampling import LinearTimeUp, SpaceDown, SpaceUp, TimeBlend, TimeDown, time_up
from vidshard.models.vidtok.shortcuts import shortcut

Past = tuple[LayerPast, ...]
"""Past of every layer of an encoder or decoder, in order; empty at the start of a video."""

VOLUME = (3, 3, 3)
THROUGH_TIME = (3,)


def check_video(x_BCTHW: Tensor, name: str) -> None:
    """Raise ValueError for what is no batch of clips.

    Args:
        x_BCTHW: expected to be floating (B, 3, T, H, W) in [-1, 1], with at least one clip.
        name: name of the tokenizer, for the message.
    """
    if x_BCTHW.ndim != 5 or x_BCTHW.shape[1] != 3 or x_BCTHW.shape[0] < 1 or not x_BCTHW.is_floating_point():
        raise ValueError(
            f"{name}: encode takes floating (B, 3, T, H, W) in [-1, 1], got {x_BCTHW.dtype} "
            f"{tuple(x_BCTHW.shape)}; frames_to_input makes it from uint8 (B, T, H, W, 3)"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Choice of 3D convolutions, attention and blending: the differences between a model and its ablations."""

    level_volumes: bool = False
    """Each residual pair (within frames, then through time) is one 3D unit."""
    middle_volumes: bool = True
    """The middle units are 3D; otherwise each is a residual pair."""
    attention: bool = True
    """There is attention between the middle units."""
    blend: bool = True
    """Resampling in time blends a 3D convolution with a path without weights; otherwise it is a convolution over time
    alone."""


ARCHITECTURES = {
    "released": Architecture(),
    "fully-3d": Architecture(level_volumes=True, attention=False),
    "no-blend": Architecture(blend=False),
    "no-3d": Architecture(middle_volumes=False),
}
"""The released models and the ablations of Table 2 of Tang et al., "VidTok", 2024 (157, 245, 142 and 126 million
weights). The paper names the ablations but publishes no code for them. These structures are the ones whose number of
weights, with four latent channels, rounds to the table's: 157.45, 244.76, 141.72 and 126.01 million.

Structures that were rejected, in millions of weights:

* Fully 3D: 246.87 with attention; 245.98 (243.88 without attention) if 3D convolutions of stride 2 also replace the
  separate resampling in space and time. That the table's model has no attention is inferred from its size.
* No blend: 157.45 with the 3D convolution alone, as with the blend; 139.76 with the path without weights alone.
* No 3D: 119.70 with middle units within frames only; 110.28 if resampling also convolves over time only.
* 2D first and last convolutions change 0.12, which no rounding shows; they stay 3D.
"""


class Level(nn.Module):
    """Units of one resolution, and the resampling after them."""

    def __init__(self, units: list[nn.Module], *, downsample: nn.Module | None, upsample: nn.Module | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(units)
        self.downsample = downsample
        self.upsample = upsample

    def resampling(self) -> Iterator[Layer]:
        yield from (layer for layer in (self.downsample, self.upsample) if layer is not None)


class Middle(nn.Module):
    """Unit, attention, unit at the latent resolution; some architectures use pairs as units, or no attention."""

    def __init__(self, channels: int, rule: TimeRule, architecture: Architecture) -> None:
        super().__init__()
        volumes = architecture.middle_volumes
        self.block_1 = TimeUnit(channels, VOLUME, rule) if volumes else SpatialUnit(channels, channels)
        self.block_1_temporal = None if volumes else temporal_unit(channels, rule)
        self.attn_1 = FrameAttention(channels) if architecture.attention else None
        self.block_2 = TimeUnit(channels, VOLUME, rule) if volumes else SpatialUnit(channels, channels)
        self.block_2_temporal = None if volumes else temporal_unit(channels, rule)

    def layers(self) -> Iterator[Layer]:
        layers = (self.block_1, self.block_1_temporal, self.attn_1, self.block_2, self.block_2_temporal)
        yield from (layer for layer in layers if layer is not None)


class Encoder(nn.Module):
    """Network from frames to the input of the head.

    Args:
        widths: channels of each level.
        num_pairs: residual pairs (within frames, then through time) at each level.
        space_levels: levels after which height and width are halved.
        time_levels: those of them after which the frames are halved too.
        rule: temporal context of the layers.
        architecture: choice of 3D convolutions, attention and blending.
        bands: the first convolution is of the Haar bands of the frames, so level 0 has half of their sides.
        shortcuts: add to each resampling in space, with the unit after it, a shortcut without weights.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        num_pairs: int,
        space_levels: Sequence[int],
        time_levels: Sequence[int],
        out_channels: int,
        rule: TimeRule,
        architecture: Architecture,
        bands: bool = False,
        shortcuts: bool = False,
    ) -> None:
        super().__init__()
        self.fuses_convolutions = False
        """On a GPU, convolutions compute the norms after them (`models.vidtok.fused_convolution`)."""
        self.shortcuts = shortcuts
        self.conv_in = HaarIn(3 * BANDS, widths[0], VOLUME, rule) if bands else TimeConv(3, widths[0], VOLUME, rule)
        inputs = [widths[0], *widths[:-1]]
        self.down = nn.ModuleList(
            Level(
                level_units(before, width, num_pairs, rule, architecture),
                downsample=SpaceDown(width) if level in space_levels else None,
                upsample=None,
            )
            for level, (before, width) in enumerate(zip(inputs, widths, strict=True))
        )
        self.down_temporal = nn.ModuleList(
            Level(
                temporal_units(width, num_pairs, rule, architecture),
                downsample=TimeDown(width, rule, blend=architecture.blend) if level in time_levels else None,
                upsample=None,
            )
            for level, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], rule, architecture)
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = TimeConv(widths[-1], out_channels, VOLUME, rule)

    def layers(self) -> Iterator[Layer]:
        """Iterate over the layers before the output convolution, in order."""
        yield self.conv_in
        for spatial, temporal in zip(self.down, self.down_temporal, strict=True):
            yield from level_layers(spatial, temporal)
        yield from self.mid.layers()

    def forward(
        self, x_BTHWC: Tensor, past: Past = (), *, keep_past: bool = False, recompute: bool = False
    ) -> tuple[Tensor, Past]:
        """Encode a chunk whose number of frames the time stride divides.

        Args:
            recompute: recompute activations in the backward pass, see `run_to_features`.

        Returns:
            (B, T', H', W', out_channels), and the next chunk's past, empty unless `keep_past`.
        """
        return run_layers(self, x_BTHWC, past, keep_past=keep_past, last=True, recompute=recompute)


class Decoder(nn.Module):
    """Network from latents to frames, time_stride of them for each latent; arguments as in `Encoder`.

    ``space_levels`` and ``time_levels`` name the levels after which the map is doubled.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        num_pairs: int,
        space_levels: Sequence[int],
        time_levels: Sequence[int],
        in_channels: int,
        rule: TimeRule,
        architecture: Architecture,
        bands: bool = False,
        shortcuts: bool = False,
    ) -> None:
        super().__init__()
        self.fuses_convolutions = False
        """As `Encoder.fuses_convolutions`."""
        self.shortcuts = shortcuts
        self.conv_in = TimeConv(in_channels, widths[-1], VOLUME, rule)
        self.mid = Middle(widths[-1], rule, architecture)
        inputs = [*widths[1:], widths[-1]]
        first_frames = {level: 1 << i for i, level in enumerate(sorted(time_levels, reverse=True))}
        self.up = nn.ModuleList(
            Level(
                level_units(before, width, num_pairs, rule, architecture),
                downsample=None,
                upsample=SpaceUp(width) if level in space_levels else None,
            )
            for level, (before, width) in enumerate(zip(inputs, widths, strict=True))
        )
        self.up_temporal = nn.ModuleList(
            Level(
                temporal_units(width, num_pairs, rule, architecture),
                downsample=None,
                upsample=(
                    time_up(width, rule, first_frames[level], blend=architecture.blend)
                    if level in time_levels
                    else None
                ),
            )
            for level, width in enumerate(widths)
        )
        self.norm_out = ChannelNorm(widths[0])
        self.conv_out = HaarOut(widths[0], 3 * BANDS, VOLUME, rule) if bands else TimeConv(widths[0], 3, VOLUME, rule)

    def layers(self) -> Iterator[Layer]:
        """Iterate over the layers before the output convolution, in order."""
        yield self.conv_in
        yield from self.mid.layers()
        for spatial, temporal in reversed(list(zip(self.up, self.up_temporal, strict=True))):
            yield from level_layers(spatial, temporal)

    def forward(
        self, z_BTHWC: Tensor, past: Past = (), *, keep_past: bool = False, last: bool = True
    ) -> tuple[Tensor, Past]:
        """Decode a chunk of latents (B, T', H', W', in_channels).

        Args:
            last: whether the video ends with the chunk. If not, linear interpolation leaves time_stride - 1 frames
                to the next chunk, except after the video's first latent.

        Returns:
            (B, time_stride * T', H, W, 3), less the frames left to the next chunk, and the next chunk's past, empty
            unless `keep_past`.
        """
        return run_layers(self, z_BTHWC, past, keep_past=keep_past, last=last)

    def features(self, z_BTHWC: Tensor, *, recompute: bool = False) -> Tensor:
        """Compute the input of the output convolution for a whole clip: (B, time_stride * T', H, W, widths[0])."""
        return run_to_features(self, z_BTHWC, (), keep_past=False, last=True, recompute=recompute)[0]


def level_units(
    in_channels: int, channels: int, count: int, rule: TimeRule, architecture: Architecture
) -> list[nn.Module]:
    """Make the units that see space; the first one changes the width."""
    widths = [(in_channels if i == 0 else channels) for i in range(count)]
    if architecture.level_volumes:
        return [TimeUnit(width, VOLUME, rule, out_channels=channels) for width in widths]
    return [SpatialUnit(width, channels) for width in widths]


def temporal_units(channels: int, count: int, rule: TimeRule, architecture: Architecture) -> list[nn.Module]:
    """Make the units over time alone, one for each spatial unit; none where those are 3D."""
    return [] if architecture.level_volumes else [temporal_unit(channels, rule) for _ in range(count)]


def temporal_unit(channels: int, rule: TimeRule) -> TimeUnit:
    return TimeUnit(channels, THROUGH_TIME, rule, starts_as_identity=True)


def level_layers(spatial: nn.Module, temporal: nn.Module) -> Iterator[Layer]:
    """Iterate over a level's pairs or 3D units, then its resampling: space first, then time on the resized map."""
    assert isinstance(spatial, Level)
    assert isinstance(temporal, Level)
    for index, unit in enumerate(spatial.block):
        yield unit
        yield from temporal.block[index : index + 1]
    yield from spatial.resampling()
    yield from temporal.resampling()


def run_layers(
    network: Encoder | Decoder,
    x_BTHWC: Tensor,
    past: Past,
    *,
    keep_past: bool,
    last: bool,
    recompute: bool = False,
) -> tuple[Tensor, Past]:
    """Run a network over a chunk and collect the past of each layer for the next one."""
    h, next_past = _run(network, x_BTHWC, past, keep_past=keep_past, last=last, recompute=recompute)
    rule = network.conv_out.rule
    joined_BTHWC, kept = network.norm_out.in_context(h, past[-1] if past else (), rule, keep_past=keep_past)
    return network.conv_out.convolved(joined_BTHWC), (*next_past, kept) if keep_past else ()


def run_to_features(
    network: Encoder | Decoder,
    x_BTHWC: Tensor,
    past: Past,
    *,
    keep_past: bool,
    last: bool,
    recompute: bool = False,
) -> tuple[Tensor, Past]:
    """Run a network up to the input of its output convolution.

    Args:
        recompute: keep only each layer's input, and compute its activations again in the backward pass. Training
            then holds one layer's maps at a time, for a third more work.
    """
    h, next_past = _run(network, x_BTHWC, past, keep_past=keep_past, last=last, recompute=recompute)
    return network.norm_out(h, silu=True), next_past


def _run(
    network: Encoder | Decoder, x_BTHWC: Tensor, past: Past, *, keep_past: bool, last: bool, recompute: bool
) -> tuple[Map, Past]:
    """Run the layers before the output's norm."""
    next_past: list[LayerPast] = []
    h: Map | Normed = x_BTHWC
    defer_sum = not recompute and fused.is_used(x_BTHWC, network.norm_out.norm.weight)
    # The kernels of units fill in what lies before a clip, read no past, and leave no place for a shortcut's sum.
    two_kernels = defer_sum and network.fuses_convolutions and not past and not keep_past and not network.shortcuts
    around: Tensor | None = None  # the map before a resampling, until the unit after it
    layers = list(network.layers())
    for index, layer in enumerate(layers):
        if two_kernels and isinstance(layer, (SpatialUnit, TimeUnit)) and takes_two_kernels(layer, h):
            following = layers[index + 1] if index + 1 < len(layers) else None
            next_norm: ChannelNorm | None = None
            if isinstance(following, (SpatialUnit, TimeUnit)) and takes_two_kernels(following, h):
                next_norm = following.norm1
            h = in_two_kernels(layer, h, next_norm)
            next_past.append(())
            continue
        assert not isinstance(h, Normed)  # only a unit that takes one is given one
        layer_past = past[index] if past else ()
        options: dict[str, bool] = {}
        # Every map but the first, which is the caller's, has no other reader and may be overwritten: encoding
        # 17 x 256 x 256 then takes 1.9 GB in place of 3.9.
        if isinstance(layer, (SpatialUnit, TimeUnit)):
            options["overwrite"] = index > 0
        # Nothing is kept of a whole clip: at 17 x 256 x 256 the pasts of all layers together are some 0.45 GB.
        if isinstance(layer, (TimeConv, TimeUnit, TimeBlend)):
            options["keep_past"] = keep_past
        if isinstance(layer, (SpatialUnit, TimeUnit, FrameAttention)):
            options["defer_sum"] = defer_sum
        elif isinstance(h, Sum) and (network.shortcuts or not isinstance(layer, SpaceDown)):
            h = h.total()
        if network.shortcuts and isinstance(layer, (SpaceDown, SpaceUp)):
            around = cast(Tensor, h)
        if isinstance(layer, LinearTimeUp):
            options["last"] = last
        run: Callable[..., tuple[Map, LayerPast]] = partial(cast(Any, layer), **options)
        h, kept = checkpoint(run, h, layer_past, use_reentrant=False) if recompute else run(h, layer_past)
        if around is not None and isinstance(layer, (SpatialUnit, TimeUnit)):
            h = h.total() if isinstance(h, Sum) else h
            h, around = h + shortcut(around, h.shape), None
        next_past.append(kept if keep_past else ())
    assert not isinstance(h, Normed)
    return h, tuple(next_past)
