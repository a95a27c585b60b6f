"""Networks of `benchmarks.ladder`: VidTok with parts replaced, on the latent grid of ``fsq_causal_488_small``."""

# B batch, T frames, H height, W width, C channels

from __future__ import annotations

from dataclasses import dataclass

import torch

from vidshard.models.cost import CostCounter
from vidshard.models.vidtok.autoencoder import ARCHITECTURES, VOLUME, Decoder, Encoder
from vidshard.models.vidtok.config import PRESETS
from vidshard.models.vidtok.haar import BANDS, HaarIn, HaarOut
from vidshard.models.vidtok.layers import TIME_RULES
from vidshard.models.vidtok.model import VidTok

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


def build(variant: Variant, seed: int) -> VidTok:
    """Build a network with the latent grid and the quantizer of ``fsq_causal_488_small``."""
    rule, architecture = TIME_RULES[CONFIG.variant], ARCHITECTURES[CONFIG.architecture]
    finest = int(variant.haar)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = VidTok(CONFIG)
        network.encoder = Encoder(
            widths=variant.encoder,
            num_pairs=CONFIG.encoder_pairs,
            space_levels=[level - finest for level in CONFIG.encoder_space_levels if level >= finest],
            time_levels=[level - finest for level in CONFIG.encoder_time_levels],
            out_channels=CONFIG.latent_channels,
            rule=rule,
            architecture=architecture,
            shortcuts=variant.shortcuts,
        )
        network.decoder = Decoder(
            widths=variant.decoder,
            num_pairs=CONFIG.decoder_pairs,
            space_levels=[level - finest for level in CONFIG.decoder_space_levels if level > finest],
            # Level 1 has no doubling in space with Haar bands: both doublings of the frames come one level earlier.
            time_levels=CONFIG.decoder_time_levels,
            in_channels=CONFIG.latent_channels,
            rule=rule,
            architecture=architecture,
            shortcuts=variant.shortcuts,
        )
        if variant.haar:  # the last ones, so that all other weights are those without bands
            network.encoder.conv_in = HaarIn(3 * BANDS, variant.encoder[0], VOLUME, rule)
            network.decoder.conv_out = HaarOut(variant.decoder[0], 3 * BANDS, VOLUME, rule)
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
