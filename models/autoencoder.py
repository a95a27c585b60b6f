"""Encoder and decoder, assembled from the layers; shapes in, shapes out, no quantisation.

Both are a list of layers run in order, and each layer's past travels beside the maps. Level 0 has the full
resolution; the decoder runs from the last level to level 0.
"""

# B batch, T frames, H height, W width, C channels; a prime in text (T', H', W') is the latent grid

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from models.layers import (
    ChannelNorm,
    FrameAttention,
    Layer,
    LayerPast,
    LinearTimeUp,
    SpaceDown,
    SpaceUp,
    SpatialUnit,
    TimeConv,
    TimeDown,
    TimeRule,
    TimeUnit,
    time_up,
)

Past = tuple[LayerPast, ...]
"""What an encoder or decoder needs of the frames before a chunk, layer by layer; empty at the start of a video."""

VOLUME = (3, 3, 3)
THROUGH_TIME = (3,)


class Level(nn.Module):
    """The units of one resolution and what changes the resolution after them."""

    def __init__(self, units: list[nn.Module], *, downsample: nn.Module | None, upsample: nn.Module | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(units)
        self.downsample = downsample
        self.upsample = upsample

    def resampling(self) -> Iterator[Layer]:
        yield from (layer for layer in (self.downsample, self.upsample) if layer is not None)


class Middle(nn.Module):
    """Unit, attention, unit at the latent resolution."""

    def __init__(self, channels: int, rule: TimeRule) -> None:
        super().__init__()
        self.block_1 = TimeUnit(channels, VOLUME, rule)
        self.attn_1 = FrameAttention(channels)
        self.block_2 = TimeUnit(channels, VOLUME, rule)

    def layers(self) -> Iterator[Layer]:
        yield from (self.block_1, self.attn_1, self.block_2)


class Encoder(nn.Module):
    """Frames to what the head takes.

    Args:
        widths: channels of each level.
        num_pairs: residual pairs (within frames, then through time) at each level.
        space_levels: levels after which height and width are halved.
        time_levels: those of them after which the frames are halved too.
        rule: what the layers see around a frame and beyond the ends of a video.
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
    ) -> None:
        super().__init__()
        self.conv_in = TimeConv(3, widths[0], VOLUME, rule)
        inputs = [widths[0], *widths[:-1]]
        self.down = nn.ModuleList(
            Level(
                spatial_units(before, width, num_pairs),
                downsample=SpaceDown(width) if level in space_levels else None,
                upsample=None,
            )
            for level, (before, width) in enumerate(zip(inputs, widths, strict=True))
        )
        self.down_temporal = nn.ModuleList(
            Level(
                temporal_units(width, num_pairs, rule),
                downsample=TimeDown(width, rule) if level in time_levels else None,
                upsample=None,
            )
            for level, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], rule)
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = TimeConv(widths[-1], out_channels, VOLUME, rule)

    def layers(self) -> Iterator[Layer]:
        """Everything before the output convolution, in the order in which it runs."""
        yield self.conv_in
        for spatial, temporal in zip(self.down, self.down_temporal, strict=True):
            yield from level_layers(spatial, temporal)
        yield from self.mid.layers()

    def forward(self, x_BTHWC: Tensor, past: Past = (), *, keep_past: bool = False) -> tuple[Tensor, Past]:
        """Encode a chunk whose number of frames the time stride divides.

        Returns:
            (B, T', H', W', out_channels), and the next chunk's past, empty unless `keep_past`.
        """
        return run_layers(self, x_BTHWC, past, keep_past=keep_past, last=True)


class Decoder(nn.Module):
    """Latents to frames, time_stride of them for each latent; arguments as in `Encoder`.

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
    ) -> None:
        super().__init__()
        self.conv_in = TimeConv(in_channels, widths[-1], VOLUME, rule)
        self.mid = Middle(widths[-1], rule)
        inputs = [*widths[1:], widths[-1]]
        first_frames = {level: 1 << i for i, level in enumerate(sorted(time_levels, reverse=True))}
        self.up = nn.ModuleList(
            Level(
                spatial_units(before, width, num_pairs),
                downsample=None,
                upsample=SpaceUp(width) if level in space_levels else None,
            )
            for level, (before, width) in enumerate(zip(inputs, widths, strict=True))
        )
        self.up_temporal = nn.ModuleList(
            Level(
                temporal_units(width, num_pairs, rule),
                downsample=None,
                upsample=time_up(width, rule, first_frames[level]) if level in time_levels else None,
            )
            for level, width in enumerate(widths)
        )
        self.norm_out = ChannelNorm(widths[0])
        self.conv_out = TimeConv(widths[0], 3, VOLUME, rule)

    def layers(self) -> Iterator[Layer]:
        """Everything before the output convolution, in the order in which it runs."""
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
            (B, time_stride * T', H, W, 3) where nothing waits, and the next chunk's past, empty unless `keep_past`.
        """
        return run_layers(self, z_BTHWC, past, keep_past=keep_past, last=last)


def spatial_units(in_channels: int, channels: int, count: int) -> list[nn.Module]:
    return [SpatialUnit(in_channels if i == 0 else channels, channels) for i in range(count)]


def temporal_units(channels: int, count: int, rule: TimeRule) -> list[nn.Module]:
    return [TimeUnit(channels, THROUGH_TIME, rule, starts_as_identity=True) for _ in range(count)]


def level_layers(spatial: nn.Module, temporal: nn.Module) -> Iterator[Layer]:
    """A level's pairs, then its resampling: space first, then time on the map of the new size."""
    assert isinstance(spatial, Level)
    assert isinstance(temporal, Level)
    for pair in zip(spatial.block, temporal.block, strict=True):
        yield from pair
    yield from spatial.resampling()
    yield from temporal.resampling()


def run_layers(
    network: Encoder | Decoder, x_BTHWC: Tensor, past: Past, *, keep_past: bool, last: bool
) -> tuple[Tensor, Past]:
    """Run a network over a chunk and collect what each layer needs for the next one."""
    next_past: list[LayerPast] = []
    for index, layer in enumerate(network.layers()):
        layer_past = past[index] if past else ()
        if isinstance(layer, LinearTimeUp):
            x_BTHWC, kept = layer(x_BTHWC, layer_past, last=last)
        elif isinstance(layer, (SpatialUnit, TimeUnit)):
            # Every map but the first, which is the caller's, was made here for the next layer alone. A large map stays
            # where it is: 17 x 256 x 256 takes 1.9 GB to encode in place of 3.9.
            x_BTHWC, kept = layer(x_BTHWC, layer_past, overwrite=index > 0)
        else:
            x_BTHWC, kept = layer(x_BTHWC, layer_past)
        # Dropped at once where nobody asks: at 17 x 256 x 256 all layers' pasts together are some 0.45 GB.
        next_past.append(kept if keep_past else ())
    x_BTHWC = network.norm_out(x_BTHWC, silu=True)
    x_BTHWC, kept = network.conv_out(x_BTHWC, past[-1] if past else ())
    return x_BTHWC, (*next_past, kept) if keep_past else ()
