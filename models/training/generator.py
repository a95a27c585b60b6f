"""Generator: the network that is trained, together with the learned scale of its loss, as one module to wrap."""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vidshard.models.tokenizer import FAMILIES
from vidshard.models.training.families import trainable_of
from vidshard.models.training.trainable import Made
from vidshard.models.vidtok.config import VidTokConfig
from vidshard.models.vidtok.model import VidTok
from vidshard.schemas.tokenizers import TokenizerConfig
from vidshard.schemas.training import StageConfig


@overload
def start_tokenizer(config: VidTokConfig, seed: int) -> VidTok: ...


@overload
def start_tokenizer(config: TokenizerConfig, seed: int) -> nn.Module: ...


def start_tokenizer(config: TokenizerConfig, seed: int) -> nn.Module:
    """Build a network with the initial weights of its family, which its constructor draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[config.family].build(config)


class GeneratorOutput(Made):
    """Result of a forward pass of the `Generator`."""

    logvar: Tensor
    """The learned log variance of the reconstruction loss, (1,)."""


class Generator(nn.Module):
    """A tokenizer and the learned log variance of its loss, run in one forward pass."""

    def __init__(self, tokenizer: nn.Module, config: StageConfig) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.trainable = trainable_of(tokenizer, config.trainable, config.entropy_affinity)
        self.logvar = nn.Parameter(torch.zeros(1), requires_grad=config.learn_logvar)
        self.activation_checkpointing = config.activation_checkpointing

    def forward(
        self, x_BCTHW: Tensor, noise: Mapping[str, Tensor] | None = None, *, with_parts: bool = False
    ) -> GeneratorOutput:
        """Encode and decode clips, see `Trainable.forward`.

        Args:
            x_BCTHW: clips, (B, 3, T, H, W) in [-1, 1].
            noise: N(0, 1) by latent; None to decode the means.
            with_parts: decode the parts of the latents too.
        """
        made = self.trainable.forward(
            x_BCTHW, noise or {}, recompute=self.activation_checkpointing, with_parts=with_parts
        )
        # through the graph, so that a wrapper sees all parameters used
        return {**made, "logvar": self.logvar * 1.0}


def shard_generator(network: nn.Module, **settings: Any) -> nn.Module:
    """Wrap a network for FSDP2: each layer of the tokenizer is sharded by itself; the small discriminator uses DDP.

    Args:
        network: a `Generator` or a `Discriminator`.
        settings: keyword arguments of `fully_shard`, such as a mesh.
    """
    if not isinstance(network, Generator):
        return DistributedDataParallel(network)
    from torch.distributed.fsdp import fully_shard

    # No layer overwrites its input where gradients are wanted, so the view is harmless.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    for layer in network.trainable.layers():
        fully_shard(layer, **settings)
    fully_shard(network, **settings)
    return network
