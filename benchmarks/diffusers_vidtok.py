"""``AutoencoderVidTok`` of Hugging Face diffusers on our weights: an independent implementation to compare with.

It serves as an oracle for tests and as the baseline of `benchmarks.encode`, and comes with the ``dev`` extra. It
differs from the original in these points (diffusers 0.42):

* It implements the rules of v1.1 only, so causal v1.0 weights give other latents.
* Its callers put the copies before a clip themselves.
* Not causal, it decodes multiples of four latents and silently drops the rest.
* In chunks (``enable_tiling``) both take sixteen frames after the first latent's and interpolate inexactly where the
  second chunk begins. Diffusers joins a short last chunk to the one before; the original repeats frames in the middle
  of the stream. Of 49 frames, frames 1 to 13 decode differently in chunks, by up to 0.08. Our streaming decoder equals
  the whole pass within 1e-5.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from vidshard.models.libraries.torchvision_operators import declare_torchvision_operators
from vidshard.models.vidtok.config import VidTokConfig
from vidshard.models.weights import checkpoint_name

with suppress(ImportError):  # diffusers imports torchvision where it is installed
    declare_torchvision_operators()

from diffusers import AutoencoderVidTok


def diffusers_model(config: VidTokConfig, weights: Mapping[str, Tensor] | None) -> Any:
    """Their model of our configuration.

    Args:
        config: with one decoder pair more than encoder pairs, the only proportion that they know.
        weights: as `models.weights` gives them; None for a model without storage, on the meta device.
    """
    assert config.decoder_pairs == config.encoder_pairs + 1
    with torch.device("meta" if weights is None else "cpu"):
        model = AutoencoderVidTok(
            ch=config.base_width,
            ch_mult=list(config.width_multipliers),
            z_channels=config.latent_channels,
            double_z=config.head == "kl",
            num_res_blocks=config.encoder_pairs,
            spatial_ds=list(config.encoder_space_levels),
            spatial_us=list(config.decoder_space_levels),
            tempo_ds=list(config.encoder_time_levels),
            tempo_us=list(config.decoder_time_levels),
            # their quantizer fills its codebook when it is made, which it cannot on the meta device
            regularizer="kl" if weights is None else config.head,
            codebook_size=config.codebook_size or 262144,
            is_causal=config.is_causal,
        )
    if weights is None:
        model.to("meta")  # their blend factors come into being on the CPU all the same
    else:
        model.load_state_dict({checkpoint_name(name, config): tensor for name, tensor in weights.items()})
    return model.eval().requires_grad_(False)


def diffusers_encode(model: Any, x_BCTHW: Tensor) -> tuple[Tensor, Tensor | None]:
    """Latents (the mean for KL) and, for FSQ, tokens of clips of any length that our model takes too."""
    if model.is_causal:
        first_BCTHW = x_BCTHW[:, :, :1].expand(-1, -1, -x_BCTHW.shape[2] % model.temporal_compression_ratio, -1, -1)
        x_BCTHW = torch.cat([first_BCTHW, x_BCTHW], dim=2)
    if model.regularizer == "kl":
        return model.encode(x_BCTHW).latent_dist.mode(), None
    latents, tokens = model.encode(x_BCTHW)
    return latents, tokens


def diffusers_decode(model: Any, latents: Tensor) -> Tensor:
    """Frames of latents; for a causal model 1 + a multiple of its time stride."""
    frames: Tensor = model.decode(latents)
    return frames
