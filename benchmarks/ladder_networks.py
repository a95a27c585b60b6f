"""Networks of `benchmarks.ladder`: VidTok with parts replaced, on the latent grid of the tokenizer in the package."""

# B batch, T frames, H height, W width, C channels

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from vidshard.models.cost import CostCounter
from vidshard.models.vidtok.autoencoder import ARCHITECTURES, VOLUME, Decoder, Encoder
from vidshard.models.vidtok.config import PRESETS
from vidshard.models.vidtok.layers import TIME_RULES, Layer, LayerPast, SpatialUnit, TimeConv
from vidshard.models.vidtok.model import VidTok
from vidshard.models.vidtok.resampling import SpaceDown, SpaceUp

CONFIG = PRESETS["fsq_causal_488_small"]
"""Tokenizer whose latent grid, quantizer and layers all variants have."""
TOLERANCE = 0.05
"""Largest difference in FLOPs from the baseline, as a share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """Architecture of one tokenizer of the ladder."""

    encoder: tuple[int, ...]
    """Channels of each level of the encoder, from the finest."""
    decoder: tuple[int, ...]
    haar: bool = False
    shortcuts: bool = False


VARIANTS = {
    "baseline": Variant(encoder=(8, 16, 32, 48), decoder=(8, 16, 32, 48)),
    "haar": Variant(encoder=(17, 34, 51), decoder=(17, 34, 51), haar=True),
    "shortcuts": Variant(encoder=(8, 16, 32, 48), decoder=(8, 16, 32, 48), shortcuts=True),
    "decoder-heavy": Variant(encoder=(6, 12, 24, 36), decoder=(9, 18, 36, 48)),
    "haar+shortcuts": Variant(encoder=(17, 34, 51), decoder=(17, 34, 51), haar=True, shortcuts=True),
}


def haar(x_BTHWC: Tensor) -> Tensor:
    """Orthonormal 2x2 Haar transform of each frame: (B, T, H / 2, W / 2, 4 C), band by band."""
    a, b, c, d = (x_BTHWC[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1))
    return torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], dim=-1) / 2


def inverse_haar(x_BTHWC: Tensor) -> Tensor:
    """Inverse of `haar`: (B, T, 2 H, 2 W, C / 4)."""
    a, b, c, d = x_BTHWC.chunk(4, dim=-1)
    top = torch.stack([a + b + c + d, a - b + c - d], dim=4).flatten(3, 4)
    bottom = torch.stack([a + b - c - d, a - b - c + d], dim=4).flatten(3, 4)
    return torch.stack([top, bottom], dim=3).flatten(2, 3) / 2


class HaarIn(TimeConv):
    """First convolution of an encoder, of the bands of the frames."""

    def forward(self, x_BTHWC: Tensor, past: LayerPast = (), *, keep_past: bool = True) -> tuple[Tensor, LayerPast]:
        """Transform and convolve a chunk."""
        return super().forward(haar(x_BTHWC), past, keep_past=keep_past)


class HaarOut(TimeConv):
    """Last convolution of a decoder, to the bands of the frames."""

    def convolved(self, joined_BTHWC: Tensor) -> Tensor:
        """Convolve a chunk and transform it back."""
        return inverse_haar(super().convolved(joined_BTHWC))


class WithShortcut:
    """Resampling, and the unit after it that changes the width, with a shortcut of DC-AE around both.

    Downwards, 2x2 pixels (of two frames where time is halved) become channels, which are averaged in groups. Upwards,
    channels are repeated and become pixels and frames. Whole clips only.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers

    def __call__(self, x_BTHWC: Tensor, past: LayerPast = ()) -> tuple[Tensor, LayerPast]:
        assert not past
        h = x_BTHWC
        for layer in self._layers:
            h, _ = layer(h)
        B, T, H, W, C = h.shape
        if x_BTHWC.shape[2] > H:
            x = x_BTHWC.reshape(B, T, -1, H, 2, W, 2, x_BTHWC.shape[-1]).permute(0, 1, 3, 5, 7, 2, 4, 6)
            return h + regrouped(x.flatten(4), C), ()
        x = regrouped(x_BTHWC, T // x_BTHWC.shape[1] * 4 * C).view(*x_BTHWC.shape[:4], C, -1, 2, 2)
        return h + x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(h.shape), ()


def regrouped(x_BTHWC: Tensor, channels: int) -> Tensor:
    """Average the channels in ``channels`` groups, or repeat each, or both where neither number divides the other."""
    common = math.gcd(x_BTHWC.shape[-1], channels)
    repeated = x_BTHWC.repeat_interleave(channels // common, dim=-1) if channels > common else x_BTHWC
    return repeated.view(*x_BTHWC.shape[:-1], channels, -1).mean(-1)


def with_shortcuts(layers: Iterator[Layer]) -> Iterator[Layer]:
    """Join each resampling in space with the layers up to the next unit."""
    joined: list[Layer] = []
    for layer in layers:
        if not joined and not isinstance(layer, SpaceDown | SpaceUp):
            yield layer
            continue
        joined.append(layer)
        if isinstance(layer, SpatialUnit):
            yield cast(Layer, WithShortcut(joined))
            joined = []
    assert not joined


class ShortcutEncoder(Encoder):
    """Encoder with shortcuts."""

    def layers(self) -> Iterator[Layer]:
        """Iterate over the layers before the output convolution, in order."""
        return with_shortcuts(super().layers())


class ShortcutDecoder(Decoder):
    """Decoder with shortcuts."""

    def layers(self) -> Iterator[Layer]:
        """Iterate over the layers before the output convolution, in order."""
        return with_shortcuts(super().layers())


def build(variant: Variant, seed: int) -> VidTok:
    """Build a network with the latent grid and the quantizer of the tokenizer in the package."""
    rule, architecture = TIME_RULES[CONFIG.variant], ARCHITECTURES[CONFIG.architecture]
    finest = int(variant.haar)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = VidTok(CONFIG)
        network.encoder = (ShortcutEncoder if variant.shortcuts else Encoder)(
            widths=variant.encoder,
            num_pairs=CONFIG.encoder_pairs,
            space_levels=[level - finest for level in CONFIG.encoder_space_levels if level >= finest],
            time_levels=[level - finest for level in CONFIG.encoder_time_levels],
            out_channels=CONFIG.latent_channels,
            rule=rule,
            architecture=architecture,
        )
        network.decoder = (ShortcutDecoder if variant.shortcuts else Decoder)(
            widths=variant.decoder,
            num_pairs=CONFIG.decoder_pairs,
            space_levels=[level - finest for level in CONFIG.decoder_space_levels if level > finest],
            # Level 1 has no doubling in space with Haar bands: both doublings of the frames come one level earlier.
            time_levels=CONFIG.decoder_time_levels,
            in_channels=CONFIG.latent_channels,
            rule=rule,
            architecture=architecture,
        )
        if variant.haar:
            network.encoder.conv_in = HaarIn(12, variant.encoder[0], VOLUME, rule)
            network.decoder.conv_out = HaarOut(variant.decoder[0], 12, VOLUME, rule)
    return network


def giga_flops(variant: Variant, frames: int, size: int) -> tuple[float, float]:
    """Count the GFLOP of encoding and of decoding a clip of square frames."""
    with torch.device("meta"):
        network = build(variant, 0).eval().requires_grad_(False)
    clip = torch.empty(1, 3, frames, size, size, device="meta")
    with torch.inference_mode():
        with CostCounter() as encoding:
            z_BCTHW = network.encoder_output(clip)
        with CostCounter() as decoding:
            network.decode(z_BCTHW)
    return encoding.cost().flops / 1e9, decoding.cost().flops / 1e9


def check(variant: Variant) -> None:
    """Assert that a variant keeps the latent grid, costs as much as the baseline within 5 %, and is causal."""
    own, baseline = (sum(giga_flops(each, 17, 64)) for each in (variant, VARIANTS["baseline"]))
    assert abs(own / baseline - 1) < TOLERANCE, f"{own:.2f} GFLOP, the baseline has {baseline:.2f}"
    network = build(variant, 0).eval()
    random = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for weight in network.parameters():  # units over time begin as identities
            weight.normal_(std=0.1, generator=random)
        clip = torch.rand(1, 3, 9, 16, 16, generator=random) * 2 - 1
        z_BCTHW = network.encoder_output(clip)
        assert z_BCTHW.shape == (1, CONFIG.latent_channels, *CONFIG.latent_shape(9, 16, 16))
        video = network.decode(z_BCTHW)
        assert video.shape == clip.shape
        for latent, frame in ((1, 1), (2, 5)):  # the first frame has a latent of its own, then four have one
            later = torch.arange(9)[:, None, None] >= frame
            changed = network.encoder_output(torch.where(later, -clip, clip)) != z_BCTHW
            assert changed[:, :, latent].any()
            assert not changed[:, :, :latent].any(), "the encoder is not causal"
            later = torch.arange(3)[:, None, None] >= latent
            changed = network.decode(torch.where(later, -z_BCTHW, z_BCTHW)) != video
            assert changed[:, :, frame].any()
            assert not changed[:, :, :frame].any(), "the decoder is not causal"
