"""Training of the VidTok family: `Trainable` for its networks.

Tang et al., "VidTok: A Versatile and Open-Source Video Tokenizer", 2024. Two stages: all weights, then the decoder
alone, whose stage leaves encoder and head, and so all tokens, as they are.
"""

# B batch, C channels, T frames, H height, W width; a prime (T', H', W') is the latent grid

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from vidshard.models.training.discriminator import last_layer_gradient
from vidshard.models.training.distributed import mean_over_workers
from vidshard.models.training.trainable import Made
from vidshard.models.vidtok.config import VidTokConfig
from vidshard.models.vidtok.heads import Affinity
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import network_differences

LATENTS = "latents"
"""Name of the noise of KL latents."""


class VidTokTraining:
    """Training interface of a VidTok network, see `Trainable`.

    The encoder runs without gradients where it is not trained, so in stage 2 it costs a forward pass alone.
    """

    trains_in_stages = True
    part_names: tuple[str, ...] = ()

    def __init__(self, network: VidTok, trainable: str, affinity: Affinity = "dot") -> None:
        self.network = network
        self.trains_encoder = trainable == "all"
        self.affinity = affinity

    @property
    def config(self) -> VidTokConfig:
        """Configuration of the network."""
        return self.network.config

    @property
    def term_kinds(self) -> Mapping[str, str]:
        """Terms of the heads, each its own kind."""
        return {name: name for name in ("kl", "token_entropy", "codebook_entropy", "commitment", "codebook")}

    @staticmethod
    def start_differences(there: VidTokConfig, here: VidTokConfig) -> str:
        """Differences other than the version: v1.1 was fine-tuned from weights of v1.0."""
        return network_differences(there, here.model_copy(update={"variant": there.variant}))

    def parameters_to_train(self) -> Iterator[nn.Parameter]:
        """Iterate over all parameters, or those of the decoder."""
        yield from (self.network if self.trains_encoder else self.network.decoder).parameters()

    def layers(self) -> Iterator[nn.Module]:
        """Iterate over the layers of encoder and decoder."""
        for part in (self.network.encoder, self.network.decoder):
            for layer in part.layers():
                assert isinstance(layer, nn.Module)
                yield layer

    def noise_shapes(self, num_frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Shape of KL latents; other heads draw nothing."""
        return {LATENTS: self.config.latent_shape(num_frames, height, width)} if self.config.head == "kl" else {}

    def forward(
        self,
        x_BCTHW: Tensor,
        noise: Mapping[str, Tensor],
        *,
        recompute: bool = False,
        with_parts: bool = False,  # noqa: ARG002  there are none
    ) -> Made:
        """Encode, quantize in float32 and decode; the decoder's output still has the leading frames of `video`."""
        network = self.network
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_encoder):
            z_BCTHW = network.encoder_output(x_BCTHW, recompute=recompute and self.trains_encoder)
            # Rounding decides tokens, and bfloat16 products would blur entropies.
            with torch.autocast(z_BCTHW.device.type, enabled=False):
                encoded = network.head.quantize(z_BCTHW.float())
                terms: dict[str, Tensor] = {}
                if torch.is_grad_enabled():
                    terms = network.head.regularization(
                        z_BCTHW.float(), encoded, mean_over_workers=mean_over_workers, affinity=self.affinity
                    )
                latents_BCTHW = encoded.latents
                if LATENTS in noise and encoded.logvar is not None:
                    latents_BCTHW = latents_BCTHW + torch.exp(0.5 * encoded.logvar) * noise[LATENTS]
        latents_BTHWC = latents_BCTHW.permute(0, 2, 3, 4, 1).contiguous()
        features_BTHWC = network.decoder.features(latents_BTHWC, recompute=recompute)
        decoded_BTHWC, _ = network.decoder.conv_out(features_BTHWC)
        made: Made = {"decoded": decoded_BTHWC, "features": features_BTHWC.detach(), "terms": terms}
        if encoded.tokens is not None:
            made["tokens"] = encoded.tokens
        return made

    def video(self, decoded: Tensor, num_frames: int) -> Tensor:
        """Cut the clip out of the decoder's output (B, T, H, W, 3): float32 (B, 3, T, H, W)."""
        return decoded[:, -num_frames:].permute(0, 4, 1, 2, 3).float()

    def last_layer_gradient(self, features: Tensor, output_gradient: Tensor) -> Tensor:
        """Gradient at the kernel of the output convolution."""
        return last_layer_gradient(self.network.decoder.conv_out, features, output_gradient)
