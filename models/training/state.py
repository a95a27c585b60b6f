"""State of one training stage: networks, moving averages, optimizers, and how they begin, are stored and are restored.

No Ray, files or video here: `models.training.step` moves the state by a batch, `models.training.evaluation` measures
it. The caller decides where batches come from, where `TrainState.state_dict` goes, and which wrapper (DDP, FSDP2)
distributes the networks.
"""

# B batch, C channels, T frames, H height, W width; a prime (T', H', W') is the latent grid

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from vidshard.models.training.discriminator import Discriminator, LeCam
from vidshard.models.training.distributed import (
    copy_full_tensors,
    full_cpu_copy,
    load_full_optimizer_state,
    load_full_state,
    mean_over_workers,
    reshard,
)
from vidshard.models.training.perceptual import Perceptual
from vidshard.models.vidtok.config import VidTokConfig
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import network_differences, weights_digest
from vidshard.schemas.fields import differences
from vidshard.schemas.training import StageConfig

Wrap = Callable[[nn.Module], nn.Module]
"""Wrapper that distributes a network over workers: DDP, or `shard_generator` for FSDP2."""

STATE_FORMAT = 1
"""Format version of `TrainState.state_dict`."""


# The network that is trained


def set_trainable(tokenizer: VidTok, trainable: str) -> VidTok:
    """Enable gradients for the weights that a stage trains: "all" of them, or the "decoder" alone."""
    tokenizer.requires_grad_(trainable == "all")
    tokenizer.decoder.requires_grad_(True)
    return tokenizer.train()


def start_tokenizer(config: VidTokConfig, seed: int) -> VidTok:
    """Build a tokenizer with initial weights: PyTorch's defaults, each unit through time an identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VidTok(config)


class Generator(nn.Module):
    """A tokenizer and the learned log variance of its loss, run in one forward pass.

    The encoder runs without gradients where it is not trained, so in stage 2 it costs a forward pass alone.
    """

    def __init__(self, tokenizer: VidTok, config: StageConfig) -> None:
        super().__init__()
        self.tokenizer = set_trainable(tokenizer, config.trainable)
        self.logvar = nn.Parameter(torch.zeros(1), requires_grad=config.learn_logvar)
        self.trains_encoder = config.trainable == "all"
        self.activation_checkpointing = config.activation_checkpointing

    def forward(self, x_BCTHW: Tensor, noise_BCTHW: Tensor | None = None) -> dict[str, Tensor]:
        """Encode, quantize in float32 and decode.

        Args:
            x_BCTHW: clips, (B, 3, T, H, W) in [-1, 1].
            noise_BCTHW: KL: N(0, 1), shaped like the latents; a sample is decoded in place of the mean.

        Returns:
            ``decoded_BTHWC``, the decoder's output with the leading frames that `video_of` cuts off;
            ``features_BTHWC``, the input of the decoder's last layer, without gradient; ``logvar``; ``tokens`` where
            the head makes some; and the head's regularization terms as ``term.<name>`` where the encoder learns.
        """
        tokenizer = self.tokenizer
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_encoder):
            z_BCTHW = tokenizer.encoder_output(x_BCTHW, recompute=self.activation_checkpointing and self.trains_encoder)
            # Rounding decides tokens, and bfloat16 products would blur entropies.
            with torch.autocast(z_BCTHW.device.type, enabled=False):
                encoded = tokenizer.head.quantize(z_BCTHW.float())
                terms: dict[str, Tensor] = {}
                if torch.is_grad_enabled():
                    terms = tokenizer.head.regularization(z_BCTHW.float(), encoded, mean_over_workers=mean_over_workers)
                latents_BCTHW = encoded.latents
                if noise_BCTHW is not None and encoded.logvar is not None:
                    latents_BCTHW = latents_BCTHW + torch.exp(0.5 * encoded.logvar) * noise_BCTHW
        latents_BTHWC = latents_BCTHW.permute(0, 2, 3, 4, 1).contiguous()
        features_BTHWC = tokenizer.decoder.features(latents_BTHWC, recompute=self.activation_checkpointing)
        decoded_BTHWC, _ = tokenizer.decoder.conv_out(features_BTHWC)
        made = {
            "decoded_BTHWC": decoded_BTHWC,
            "features_BTHWC": features_BTHWC.detach(),
            # through the graph, so that a wrapper sees all parameters used
            "logvar": self.logvar * 1.0,
        }
        if encoded.tokens is not None:
            made["tokens"] = encoded.tokens
        return made | {f"term.{name}": term for name, term in terms.items()}


def video_of(decoded_BTHWC: Tensor, num_frames: int) -> Tensor:
    """Cut the clip out of a decoder's output: float32 (B, 3, T, H, W)."""
    return decoded_BTHWC[:, -num_frames:].permute(0, 4, 1, 2, 3).float()


def shard_generator(network: nn.Module, **settings: Any) -> nn.Module:
    """Wrap a network for FSDP2: each layer of the tokenizer is sharded by itself; the small discriminator uses DDP.

    Args:
        network: a `Generator` or a `Discriminator`.
        settings: keyword arguments of `fully_shard`, such as a mesh.
    """
    if not isinstance(network, Generator):
        return DistributedDataParallel(network)
    # No layer overwrites its input where gradients are wanted, so the view is harmless.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    tokenizer = network.tokenizer
    for part in (tokenizer.encoder, tokenizer.decoder):
        for layer in part.layers():
            assert isinstance(layer, nn.Module)
            fully_shard(layer, **settings)
    fully_shard(network, **settings)
    return network


# The state


@dataclass(kw_only=True, slots=True, eq=False)
class TrainState:
    """Everything that one training stage keeps from step to step; `begin_stage` makes it."""

    config: StageConfig
    generator: nn.Module
    """A `Generator`, wrapped."""
    bare_generator: Generator
    """The same generator without its wrapper."""
    discriminator: nn.Module | None
    """A `Discriminator`, wrapped; None where the stage never uses one."""
    bare_discriminator: Discriminator | None
    """The same discriminator without its wrapper."""
    lecam: LeCam
    perceptual: Perceptual | None
    generator_optimizer: torch.optim.Adam
    discriminator_optimizer: torch.optim.Adam | None
    averages: dict[str, Tensor]
    """Moving averages (EMA) of the trained weights, by their names in the tokenizer; empty without EMA."""
    device: torch.device
    step: int = 0
    """Number of steps done, which is the number of the next step."""
    average_l1: float = 0.0
    """Moving average of L1 over about 50 steps, by which divergence is noticed."""

    @property
    def tokenizer(self) -> VidTok:
        """The network with the weights of the last step."""
        return self.bare_generator.tokenizer

    def __repr__(self) -> str:
        return f"TrainState({self.tokenizer.config.name}, {self.config.trainable}, step {self.step})"

    def autocast(self) -> torch.autocast:
        """Autocast to the stage's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    # Storing and restoring

    def state_dict(self) -> dict[str, Any]:
        """Export the state as full tensors on the CPU, numbers and text, readable with ``weights_only``.

        Every worker must call it where weights are sharded. The result is the same on all workers except for the
        states of random generators.
        """
        return {
            "format": STATE_FORMAT,
            "config": self.config.model_dump_json(),
            "tokenizer": self.tokenizer.config.model_dump_json(),
            "step": self.step,
            "average_l1": self.average_l1,
            "generator": full_cpu_copy(self.bare_generator.state_dict()),
            "averages": full_cpu_copy(self.averages),
            "discriminator": full_cpu_copy(self.bare_discriminator.state_dict()) if self.bare_discriminator else {},
            "lecam": full_cpu_copy(self.lecam.state_dict()),
            "generator_optimizer": full_cpu_copy(self.generator_optimizer.state_dict()),
            "discriminator_optimizer": (
                full_cpu_copy(self.discriminator_optimizer.state_dict()) if self.discriminator_optimizer else {}
            ),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict` of the same stage; only the number of ``steps`` may differ.

        Raises:
            ValueError: the state belongs to another tokenizer or stage (the message names the differences), or has
                another format.
        """
        check_format(state)
        stored_tokenizer = VidTokConfig.model_validate_json(state["tokenizer"])
        if differing := network_differences(stored_tokenizer, self.tokenizer.config):
            raise ValueError(
                f"the checkpoint is of {stored_tokenizer.name}, not {self.tokenizer.config.name} ({differing})"
            )
        stored_stage = StageConfig.current_names(json.loads(state["config"]))
        stage = json.loads(self.config.model_dump_json())
        if changed := differences({**stored_stage, "steps": 0}, {**stage, "steps": 0}):
            raise ValueError(f"the checkpoint is of another stage of training ({'; '.join(changed)})")
        load_full_state(self.bare_generator, state["generator"])
        copy_full_tensors(self.averages, state["averages"])
        if self.bare_discriminator is not None:
            load_full_state(self.bare_discriminator, state["discriminator"])
        load_full_state(self.lecam, state["lecam"])
        load_full_optimizer_state(self.generator_optimizer, state["generator_optimizer"])
        if self.discriminator_optimizer is not None:
            load_full_optimizer_state(self.discriminator_optimizer, state["discriminator_optimizer"])
        self.step = state["step"]
        self.average_l1 = state["average_l1"]
        torch.set_rng_state(state["rng"].cpu())
        if self.device.type == "cuda" and state["rng_cuda"] is not None:
            torch.cuda.set_rng_state(state["rng_cuda"].cpu(), self.device)

    def weights(self, *, averaged: bool) -> dict[str, Tensor]:
        """Full weights of the tokenizer on the CPU, or their averages, named as `models.weights.load_weights` does.

        Every worker must call it where weights are sharded. Weights that are not trained are their own average.

        Raises:
            ValueError: averages are asked for and none are kept.
        """
        if averaged and not self.averages:
            raise ValueError("no averages are kept: ema_decay is 0")
        weights = self.tokenizer.state_dict() | (self.averages if averaged else {})
        return {name: tensor.clone() for name, tensor in full_cpu_copy(weights).items()}

    def frozen_digest(self) -> str:
        """Digest of the tokenizer's untrained weights (`weights_digest`), which no step may change.

        Every worker must call it where weights are sharded.
        """
        reshard(self.generator)
        frozen = {name: weight for name, weight in self.tokenizer.named_parameters() if not weight.requires_grad}
        return weights_digest(full_cpu_copy(frozen))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the averaged weights inside the context; no effect where none are kept."""
        reshard(self.generator)
        parameters = dict(self.tokenizer.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in self.averages}
        with torch.no_grad():
            for name, average in self.averages.items():
                parameters[name].copy_(average)
        try:
            yield
        finally:
            reshard(self.generator)
            with torch.no_grad():
                for name, weight in kept.items():
                    parameters[name].copy_(weight)


def check_format(state: Mapping[str, Any]) -> None:
    """Refuse a stored state of another format version.

    Raises:
        ValueError: its format is not ``STATE_FORMAT``.
    """
    if state.get("format") != STATE_FORMAT:
        raise ValueError(f"a training state of format {STATE_FORMAT} is needed, got {state.get('format')!r}")


# The beginning of a stage


def begin_stage(
    config: StageConfig,
    tokenizer: VidTok,
    *,
    perceptual: Perceptual | None = None,
    device: str | torch.device = "cpu",
    wrap: Wrap = lambda network: network,
    previous: Mapping[str, Any] | None = None,
    averaged: bool = True,
) -> TrainState:
    """Make the state before a stage's first step.

    Args:
        tokenizer: network with the weights to start from, in float32; it is trained in place.
        perceptual: result of `load_perceptual`; needed where ``perceptual_weight`` is not 0.
        wrap: applied to the `Generator` and to the `Discriminator`, once they are on the device and before their
            optimizers are made. The discriminator must keep full weights.
        previous: state of an earlier stage; see `init_from_stage`. `tokenizer` then gives the architecture alone.
        averaged: take the previous stage's averaged weights, where it kept some.

    Raises:
        ValueError: clips that the tokenizer or the discriminator does not accept, LPIPS missing, weights that are not
            float32, or a previous stage of another architecture.
    """
    check_stage(config, tokenizer.config)
    if config.perceptual_weight and perceptual is None:
        raise ValueError("LPIPS is missing: load it with load_perceptual, or set the perceptual weight to 0")
    if tokenizer.dtype is not torch.float32:
        raise ValueError(f"training keeps its weights in float32, got {tokenizer.dtype}; see the stage's precision")
    device = torch.device(device)
    generator, discriminator, lecam = (
        Generator(tokenizer, config),
        _new_discriminator(config),
        LeCam(config.lecam_decay),
    )
    if previous is not None:
        init_from_stage(previous, generator, discriminator, lecam, averaged=averaged)
    lecam.to(device)
    wrapped_generator = wrap(generator.to(device))
    wrapped_discriminator = None if discriminator is None else wrap(discriminator.to(device))
    learning = {n: p for n, p in generator.tokenizer.named_parameters() if p.requires_grad}
    return TrainState(
        config=config,
        generator=wrapped_generator,
        bare_generator=generator,
        discriminator=wrapped_discriminator,
        bare_discriminator=discriminator,
        lecam=lecam,
        perceptual=perceptual.to(device) if perceptual is not None and config.perceptual_weight else None,
        generator_optimizer=_adam(generator.parameters(), config),
        discriminator_optimizer=None if discriminator is None else _adam(discriminator.parameters(), config),
        averages={n: p.detach().clone() for n, p in learning.items()} if config.ema_decay else {},
        device=device,
    )


def check_stage(config: StageConfig, tokenizer: VidTokConfig) -> None:
    """Refuse a stage whose clips the tokenizer, or the stage's discriminator, does not accept.

    Raises:
        ValueError: the message says which sizes would do.
    """
    tokenizer.latent_shape(config.frames, *config.size)
    smallest = Discriminator.MIN_SIZE
    if config.has_discriminator and config.discriminator == "3d" and config.frames <= 4 and max(config.size) <= 8:
        # The last layers would see a single value per clip, and batch norm of one clip needs more.
        raise ValueError(
            f"a 3d discriminator needs clips of more than 4 frames, or frames larger than 8 x 8, got {config.frames} "
            f"of {config.size}: take larger ones, or gan_weight 0"
        )
    if config.has_discriminator and config.discriminator == "2d" and min(config.size) < smallest:
        raise ValueError(
            f"a 2d discriminator needs frames of at least {smallest} x {smallest}, got {config.size}: take larger "
            "frames, the 3d one, or gan_weight 0"
        )


def init_from_stage(
    previous: Mapping[str, Any],
    generator: Generator,
    discriminator: Discriminator | None,
    lecam: LeCam,
    *,
    averaged: bool,
) -> None:
    """Copy what an earlier stage learned: tokenizer, log variance, and the discriminator with LeCam if it is the same.

    Optimizers, steps and moving averages begin anew. As in the released code, the discriminator rests again until
    ``gan_start``.

    Args:
        previous: the earlier stage's `TrainState.state_dict`.
        averaged: copy averaged weights where the stage kept some.

    Raises:
        ValueError: the earlier stage trained another architecture.
    """
    check_format(previous)
    there, here = VidTokConfig.model_validate_json(previous["tokenizer"]), generator.tokenizer.config
    if differing := network_differences(there, here):
        raise ValueError(
            f"a stage goes on with the tokenizer of the one before it, which is {there.name}, not {here.name} "
            f"({differing})"
        )
    weights = dict(previous["generator"])
    if averaged:
        weights |= {f"tokenizer.{name}": average for name, average in previous["averages"].items()}
    load_full_state(generator, weights)
    stage = StageConfig.model_validate_json(previous["config"])
    if discriminator is not None and previous["discriminator"] and stage.discriminator == discriminator.kind:
        own = {name: value.shape for name, value in discriminator.state_dict().items()}
        if own == {name: value.shape for name, value in previous["discriminator"].items()}:
            load_full_state(discriminator, previous["discriminator"])
            load_full_state(lecam, previous["lecam"])


def _new_discriminator(config: StageConfig) -> Discriminator | None:
    if not config.has_discriminator:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Discriminator(config.discriminator, config.discriminator_width)


def _adam(parameters: Iterable[nn.Parameter], config: StageConfig) -> torch.optim.Adam:
    # `train_step` sets the rate of each step.
    return torch.optim.Adam([p for p in parameters if p.requires_grad], config.learning_rate, config.adam_betas)
