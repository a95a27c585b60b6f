"""Training of the VidTwin family: `Trainable` for its networks.

Wang et al., "VidTwin: Video VAE with Decoupled Structure and Dynamics", CVPR 2025. One stage that trains all weights.
The blocks of encoder and decoder follow the autocast; branches, latents and the last layer are float32, as in the
released code. Parts of the network that are in the weights but compute nothing are buffers, so no optimizer sees them.
"""

# B batch, T frames, S positions of a frame, C channels, P pixel values of a patch; H height, W width

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from vidshard.models.training.discriminator import last_layer_gradient
from vidshard.models.training.trainable import Made
from vidshard.models.vidtok.heads import Affinity
from vidshard.models.vidtwin.branches import Branch
from vidshard.models.vidtwin.config import VidTwinConfig
from vidshard.models.vidtwin.model import Moments, VidTwin, sum_of
from vidshard.models.vidtwin.qformer import QFormer
from vidshard.models.weights import network_differences


class VidTwinTraining:
    """Training interface of a VidTwin network, see `Trainable`. Latents are sampled, one noise for each of them."""

    trains_in_stages = False

    def __init__(self, network: VidTwin, trainable: str, affinity: Affinity = "dot") -> None:  # noqa: ARG002
        if trainable != "all":
            raise ValueError(f"{network.config.name}: all weights train together, not the {trainable} alone")
        self.network = network

    @property
    def config(self) -> VidTwinConfig:
        """Configuration of the network."""
        return self.network.config

    @property
    def term_kinds(self) -> Mapping[str, str]:
        """One KL term for each latent."""
        return {f"kl_{name}": "kl" for name in self.config.latent_shapes}

    @property
    def part_names(self) -> tuple[str, ...]:
        """Structure and dynamics; none for an ablation whose latent has no parts."""
        parts = tuple(self.config.parts)
        return parts if len(parts) > 1 else ()

    @staticmethod
    def start_differences(there: VidTwinConfig, here: VidTwinConfig) -> str:
        """All differences: a network starts from weights of the same network."""
        return network_differences(there, here)

    def parameters_to_train(self) -> Iterator[nn.Parameter]:
        """Iterate over all parameters."""
        yield from self.network.parameters()

    def layers(self) -> Iterator[nn.Module]:
        """Iterate over the blocks of encoder and decoder, and the layers of the Q-Formers."""
        yield from self.network.encoder.blocks
        for module in self.network.branches.modules():
            if isinstance(module, QFormer):
                yield from module.layers
        yield from self.network.decoder.blocks

    def noise_shapes(self, num_frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the latents, in the order structure, dynamics by column, dynamics by row."""
        self.config.check_clip(num_frames, height, width)
        return self.config.latent_shapes

    def forward(
        self, x_BCTHW: Tensor, noise: Mapping[str, Tensor], *, recompute: bool = False, with_parts: bool = False
    ) -> Made:
        """Encode, sample and decode; the decoder's output are patches (B, T, S, P), see `video`."""
        network = self.network
        z_BTSC = network.encoder(x_BCTHW, recompute=recompute)
        with torch.autocast(x_BCTHW.device.type, enabled=False):
            z_BTSC = z_BTSC.float()
            moments: dict[str, Moments] = {}
            for branch in network.branches.values():
                made = cast(Branch, branch).moments(z_BTSC)
                moments |= {name: Moments.of(value) for name, value in made.items()}
            terms = {f"kl_{name}": latent.kl() for name, latent in moments.items()} if torch.is_grad_enabled() else {}
            latents = {
                name: latent.sample(noise[name]) if name in noise else latent.mean for name, latent in moments.items()
            }
            aligned = network.aligned(latents)
        features, decoded = self._decode(sum_of(aligned), recompute)
        result: Made = {"decoded": decoded, "features": features.detach(), "terms": terms}
        if with_parts:
            result["parts"] = {name: self._decode(aligned[name], recompute)[1] for name in self.part_names}
        return result

    def _decode(self, u_BTSC: Tensor, recompute: bool) -> tuple[Tensor, Tensor]:
        """Compute input and output of the decoder's last layer, both float32."""
        features_BTSC = self.network.decoder.features(u_BTSC, recompute=recompute).float()
        with torch.autocast(u_BTSC.device.type, enabled=False):
            return features_BTSC, self.network.decoder.final_layer.linear(features_BTSC)

    def video(self, decoded: Tensor, num_frames: int) -> Tensor:  # noqa: ARG002  all clips are equally long
        """Put the patches together: float32 (B, 3, T, H, W)."""
        grid, patch = self.config.grid, self.config.patch_size
        # the values of a patch are ordered (row, column, color)
        cells = decoded.float().view(*decoded.shape[:2], grid, grid, patch, patch, 3)
        return cells.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def last_layer_gradient(self, features: Tensor, output_gradient: Tensor) -> Tensor:
        """Gradient at the weight of the last linear layer."""
        layer = self.network.decoder.final_layer.linear
        with torch.autocast(features.device.type, enabled=False):
            return last_layer_gradient(layer, features, output_gradient, weight="weight")
