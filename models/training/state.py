"""State of one training stage: networks, moving averages, optimizers, and how they begin, are stored and are restored.

No Ray, files or video here: `models.training.step` moves the state by a batch, `models.training.evaluation` measures
it. The caller decides where batches come from, where `TrainState.state_dict` goes, and which wrapper (DDP, FSDP2)
distributes the networks.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vidshard.models.checkpoint_parts import LossParts
from vidshard.models.tokenizer import parse_config
from vidshard.models.training.discriminator import Discriminator, LeCam
from vidshard.models.training.distributed import (
    copy_full_tensors,
    full_cpu_copy,
    load_full_optimizer_state,
    load_full_state,
    reshard,
)
from vidshard.models.training.generator import Generator
from vidshard.models.training.perceptual import Perceptual
from vidshard.models.training.start import (
    STATE_FORMAT,
    check_format,
    init_from_loss,
    init_from_stage,
    new_discriminator,
)
from vidshard.models.training.trainable import Trainable
from vidshard.models.weights import network_differences, weights_digest
from vidshard.schemas.fields import differences
from vidshard.schemas.tokenizers import TokenizerConfig
from vidshard.schemas.training import StageConfig

Wrap = Callable[[nn.Module], nn.Module]
"""Wrapper that distributes a network over workers: DDP, or `shard_generator` for FSDP2."""


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
    skipped_in_row: int = 0
    """Number of batches up to the last one that were skipped as not finite."""

    @property
    def tokenizer(self) -> nn.Module:
        """The network with the weights of the last step."""
        return self.bare_generator.tokenizer

    @property
    def trainable(self) -> Trainable:
        """Training interface of the network."""
        return self.bare_generator.trainable

    def __repr__(self) -> str:
        return f"TrainState({self.trainable.config.name}, {self.config.trainable}, step {self.step})"

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
            "tokenizer": self.trainable.config.model_dump_json(),
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

        A stage that had no discriminator, since it would have ended before ``gan_start``, and is longer now begins one.

        Raises:
            ValueError: the state belongs to another tokenizer or stage (the message names the differences), or has
                another format.
        """
        check_format(state)
        stored_tokenizer, own = parse_config(json.loads(state["tokenizer"])), self.trainable.config
        if differing := network_differences(stored_tokenizer, own):
            raise ValueError(f"the checkpoint is of {stored_tokenizer.name}, not {own.name} ({differing})")
        stored_stage = StageConfig.completed(json.loads(state["config"]))
        stage = json.loads(self.config.model_dump_json())
        if changed := differences({**stored_stage, "steps": 0}, {**stage, "steps": 0}):
            raise ValueError(f"the checkpoint is of another stage of training ({'; '.join(changed)})")
        load_full_state(self.bare_generator, state["generator"])
        copy_full_tensors(self.averages, state["averages"])
        if self.bare_discriminator is not None and state["discriminator"]:
            load_full_state(self.bare_discriminator, state["discriminator"])
        load_full_state(self.lecam, state["lecam"])
        load_full_optimizer_state(self.generator_optimizer, state["generator_optimizer"])
        if self.discriminator_optimizer is not None and state["discriminator_optimizer"]:
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
    def evaluating(self) -> Iterator[None]:
        """Put the tokenizer into evaluation mode inside the context: no dropout."""
        self.generator.eval()
        try:
            yield
        finally:
            self.generator.train()

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


# The beginning of a stage


def begin_stage(
    config: StageConfig,
    tokenizer: nn.Module,
    *,
    perceptual: Perceptual | None = None,
    device: str | torch.device = "cpu",
    wrap: Wrap = lambda network: network,
    previous: Mapping[str, Any] | None = None,
    averaged: bool = True,
    loss: LossParts | None = None,
) -> TrainState:
    """Make the state before a stage's first step.

    Args:
        tokenizer: network with the weights to start from, in float32; it is trained in place.
        perceptual: result of `load_perceptual`; needed where ``perceptual_weight`` is not 0.
        wrap: applied to the `Generator` and to the `Discriminator`, once they are on the device and before their
            optimizers are made. The discriminator must keep full weights.
        previous: state of an earlier stage; see `init_from_stage`. `tokenizer` then gives the architecture alone.
        averaged: take the previous stage's averaged weights, where it kept some.
        loss: trained parts of the loss from a released checkpoint; see `init_from_loss`.

    Raises:
        ValueError: clips that the tokenizer or the discriminator does not accept, LPIPS missing, weights that are not
            float32, a network that cannot be trained so, or a previous stage of another architecture.
    """
    generator = Generator(tokenizer, config)
    check_stage(config, generator.trainable.config)
    if config.perceptual_weight and perceptual is None:
        raise ValueError("LPIPS is missing: load it with load_perceptual, or set the perceptual weight to 0")
    if other := {parameter.dtype for parameter in tokenizer.parameters()} - {torch.float32}:
        raise ValueError(
            f"training keeps its weights in float32, got {', '.join(map(str, other))}; see the stage's precision"
        )
    device = torch.device(device)
    discriminator, lecam = new_discriminator(config), LeCam(config.lecam_decay)
    if previous is not None:
        init_from_stage(previous, generator, discriminator, lecam, averaged=averaged)
    elif loss is not None:
        init_from_loss(loss, generator, discriminator, config)
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


def check_stage(config: StageConfig, tokenizer: TokenizerConfig) -> None:
    """Refuse a stage whose clips the tokenizer, or the stage's discriminator, does not accept.

    Raises:
        ValueError: the message says which sizes would do.
    """
    tokenizer.payload(config.frames, *config.size)
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


def _adam(parameters: Iterable[nn.Parameter], config: StageConfig) -> torch.optim.Adam:
    learning = [p for p in parameters if p.requires_grad]
    # `train_step` sets the rate of each step. On a GPU one kernel updates many parameters; a CPU keeps its numbers.
    return torch.optim.Adam(
        learning,
        config.learning_rate,
        config.adam_betas,
        weight_decay=config.weight_decay,
        decoupled_weight_decay=config.optimizer == "adamw",
        fused=True if learning and all(p.device.type == "cuda" for p in learning) else None,
    )
