"""One stage of training: what it keeps from step to step, and the step. No Ray, no files, no video.

`TrainState` holds the networks, their averages and optimizers; `train_step` moves it by one batch;
`models.training.evaluation` measures it. Who calls them decides where batches come from, where `TrainState.state_dict`
goes, and what the networks are wrapped in.

**The seam for several workers.** The losses' graph ends at the decoder's output: `train_step` takes the gradients of
all terms there, adds them up, and runs one backward pass through `Generator` with the sum. A wrapper sees one forward
and one backward pass, whatever the losses are, and the adaptive weight needs no access to wrapped parameters. What is
averaged over workers by ourselves, see `mean_over_workers`, are metrics, LeCam's scores, the two gradients behind the
adaptive weight, and the use of the codebook: a step of several workers is then the step of one with all their clips,
but for the statistics of batch norm.

Both networks learn from the same forward pass, and nothing is changed before every term and gradient is known to be
finite.
"""

# B batch, C channels, T frames, H height, W width; a prime (T', H', W') is the latent grid

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vidshard.models.config import TokenizerConfig
from vidshard.models.tokenizer import VideoTokenizer, frames_to_input
from vidshard.models.training.distributed import (
    fill,
    fill_all,
    fill_optimizer,
    gradients_reduced,
    mean_over_workers,
    shards_alone,
    whole,
)
from vidshard.models.training.losses import (
    Discriminator,
    LeCam,
    Perceptual,
    adaptive_weight,
    adversarial,
    fidelity,
    frames_of,
    hinge,
    last_layer_gradient,
    scores_without_trace,
    weighted_regularization,
)
from vidshard.models.weights import differences, weights_digest
from vidshard.schemas.training import StageConfig

Wrap = Callable[[nn.Module], nn.Module]
"""What makes a network one of several workers: DDP; or FSDP2's `fully_shard`, for a `Generator` alone."""

STATE_FORMAT = 1
"""Of `TrainState.state_dict`."""


_REMEDY = (
    "A new run --from this stage begins with the weights of its last checkpoint: give it a lower learning rate, more "
    "warm-up"
)


class NonFiniteError(ValueError):
    """A loss or gradient is not a number, or infinite. The step was not taken."""


class DivergedError(ValueError):
    """The reconstruction is worse than grey frames. The step was not taken."""


def set_trainable(tokenizer: VideoTokenizer, trainable: str) -> VideoTokenizer:
    """Let gradients reach what a stage trains, and nothing else: "all", or "decoder" alone."""
    tokenizer.requires_grad_(trainable == "all")
    tokenizer.decoder.requires_grad_(True)
    return tokenizer.train()


def start_tokenizer(config: TokenizerConfig, seed: int) -> VideoTokenizer:
    """A tokenizer with the initial weights of a training: PyTorch's own, each unit through time an identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VideoTokenizer(config)


class Generator(nn.Module):
    """A tokenizer as training runs it, in one forward pass.

    The encoder is not asked for gradients where it has none to take, so in stage 2 it costs a forward pass alone.
    """

    def __init__(self, tokenizer: VideoTokenizer, config: StageConfig) -> None:
        super().__init__()
        self.tokenizer = set_trainable(tokenizer, config.trainable)
        self.logvar = nn.Parameter(torch.zeros(1), requires_grad=config.learn_logvar)
        self.trains_encoder = config.trainable == "all"
        self.recompute = config.recompute

    def forward(self, x_BCTHW: Tensor, noise_BCTHW: Tensor | None = None) -> dict[str, Tensor]:
        """Encode, quantize in float32 and decode.

        Args:
            noise_BCTHW: KL: N(0, 1), shaped like the latents; decode a sample in place of the mean.

        Returns:
            ``decoded_BTHWC``, the decoder's output with the frames before the clip that `video_of` cuts, and
            ``features_BTHWC``, without gradient, what its last layer made it of; ``logvar``; ``tokens`` where there
            are such; and where the encoder learns its head's terms, as ``term.<name>``.
        """
        tokenizer = self.tokenizer
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_encoder):
            z_BCTHW = tokenizer.encoder_output(x_BCTHW, recompute=self.recompute and self.trains_encoder)
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
        features_BTHWC = tokenizer.decoder.features(latents_BTHWC, recompute=self.recompute)
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
    """The clip in a decoder's output: float32 (B, 3, T, H, W)."""
    return decoded_BTHWC[:, -num_frames:].permute(0, 4, 1, 2, 3).float()


@dataclass(kw_only=True, slots=True, eq=False)
class TrainState:
    """Everything that a stage of training keeps from step to step; made by `begin_stage`."""

    config: StageConfig
    generator: nn.Module
    """A `Generator`, wrapped."""
    bare_generator: Generator
    """The same one without its wrapping."""
    discriminator: nn.Module | None
    """A `Discriminator`, wrapped; None where no adversary ever is."""
    bare_discriminator: Discriminator | None
    lecam: LeCam
    perceptual: Perceptual | None
    generator_optimizer: torch.optim.Adam
    discriminator_optimizer: torch.optim.Adam | None
    averages: dict[str, Tensor]
    """Moving averages of the weights that learn, by their names in the tokenizer; empty without EMA."""
    device: torch.device
    step: int = 0
    """Steps done, so the number of the next one."""
    average_l1: float = 0.0
    """Moving average over some 50 steps, by which divergence is seen."""

    @property
    def tokenizer(self) -> VideoTokenizer:
        """The network with the weights of the last step."""
        return self.bare_generator.tokenizer

    def __repr__(self) -> str:
        return f"TrainState({self.tokenizer.config.name}, {self.config.trainable}, step {self.step})"

    def autocast(self) -> torch.autocast:
        """The precision that networks compute in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    # What is kept

    def state_dict(self) -> dict[str, Any]:
        """All of the state: whole tensors on the CPU, plain numbers and text, readable with ``weights_only``.

        Every worker must call it where weights are sharded, and gets the same but for random numbers.
        """
        return {
            "format": STATE_FORMAT,
            "config": self.config.model_dump_json(),
            "tokenizer": self.tokenizer.config.model_dump_json(),
            "step": self.step,
            "average_l1": self.average_l1,
            "generator": whole(self.bare_generator.state_dict()),
            "averages": whole(self.averages),
            "discriminator": whole(self.bare_discriminator.state_dict()) if self.bare_discriminator else {},
            "lecam": whole(self.lecam.state_dict()),
            "generator_optimizer": whole(self.generator_optimizer.state_dict()),
            "discriminator_optimizer": (
                whole(self.discriminator_optimizer.state_dict()) if self.discriminator_optimizer else {}
            ),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a `state_dict` of the same stage stopped; only the number of ``steps`` may be another.

        Raises:
            ValueError: for a state of another tokenizer or stage, naming the differences, or of another format.
        """
        check_format(state)
        stored_tokenizer = TokenizerConfig.model_validate_json(state["tokenizer"])
        if differing := differences(stored_tokenizer, self.tokenizer.config):
            raise ValueError(
                f"the checkpoint is of {stored_tokenizer.name}, not {self.tokenizer.config.name} ({differing})"
            )
        ours = json.loads(self.config.model_dump_json(exclude={"steps"}))
        theirs = json.loads(state["config"])
        if differing := "; ".join(
            f"{key}: {theirs.get(key)} there, {ours[key]} here" for key in ours if theirs.get(key) != ours[key]
        ):
            raise ValueError(f"the checkpoint is of another stage of training ({differing})")
        fill(self.bare_generator, state["generator"])
        fill_all(self.averages, state["averages"])
        if self.bare_discriminator is not None:
            fill(self.bare_discriminator, state["discriminator"])
        fill(self.lecam, state["lecam"])
        fill_optimizer(self.generator_optimizer, state["generator_optimizer"])
        if self.discriminator_optimizer is not None:
            fill_optimizer(self.discriminator_optimizer, state["discriminator_optimizer"])
        self.step = state["step"]
        self.average_l1 = state["average_l1"]
        torch.set_rng_state(state["rng"].cpu())
        if self.device.type == "cuda" and state["rng_cuda"] is not None:
            torch.cuda.set_rng_state(state["rng_cuda"].cpu(), self.device)

    def weights(self, *, averaged: bool) -> dict[str, Tensor]:
        """The tokenizer's weights, or their averages, as `models.weights.load_weights` gives them.

        Whole tensors on the CPU; every worker must call it where weights are sharded. What does not learn is its own
        average.

        Raises:
            ValueError: for averages where none are kept.
        """
        if averaged and not self.averages:
            raise ValueError("no averages are kept: ema_decay is 0")
        weights = self.tokenizer.state_dict() | (self.averages if averaged else {})
        return {name: tensor.clone() for name, tensor in whole(weights).items()}

    def frozen_digest(self) -> str:
        """Of the tokenizer's weights that don't learn, see `weights_digest`; the same at both ends of a stage.

        Every worker must call it where weights are sharded.
        """
        shards_alone(self.generator)
        frozen = {name: weight for name, weight in self.tokenizer.named_parameters() if not weight.requires_grad}
        return weights_digest(whole(frozen))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averages take the weights' place for the time being, to be evaluated; nothing without averages."""
        shards_alone(self.generator)
        parameters = dict(self.tokenizer.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in self.averages}
        with torch.no_grad():
            for name, average in self.averages.items():
                parameters[name].copy_(average)
        try:
            yield
        finally:
            shards_alone(self.generator)
            with torch.no_grad():
                for name, weight in kept.items():
                    parameters[name].copy_(weight)


def begin_stage(
    config: StageConfig,
    tokenizer: VideoTokenizer,
    *,
    perceptual: Perceptual | None = None,
    device: str | torch.device = "cpu",
    wrap: Wrap = lambda network: network,
    previous: Mapping[str, Any] | None = None,
    averaged: bool = True,
) -> TrainState:
    """The state before a stage's first step.

    Args:
        tokenizer: with the weights to start from, float32; it is trained in place.
        perceptual: what `load_perceptual` gives, if its weight is not 0.
        wrap: applied to the `Generator` and to the `Discriminator`, once they are on the device and before their
            optimizers are made. The discriminator must keep whole weights.
        previous: the state of an earlier stage, whose tokenizer, discriminator, LeCam's averages and learned logvar
            this one starts with; `tokenizer` gives the architecture then. Optimizers, steps and weights' averages
            begin anew. As released, the adversary rests again until its start.
        averaged: take the previous stage's averaged weights, where it kept some.

    Raises:
        ValueError: for clips that the tokenizer or discriminator do not take, LPIPS missing, or a previous stage of
            another architecture.
    """
    check_stage(config, tokenizer.config)
    if config.perceptual_weight and perceptual is None:
        raise ValueError("LPIPS is missing: load it with load_perceptual, or set the perceptual weight to 0")
    if tokenizer.dtype is not torch.float32:
        raise ValueError(f"training keeps its weights in float32, got {tokenizer.dtype}; see the stage's precision")
    device = torch.device(device)
    generator = Generator(tokenizer, config)
    discriminator: Discriminator | None = None
    if config.has_adversary:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            discriminator = Discriminator(config.discriminator, config.discriminator_width)
    lecam = LeCam(config.lecam_decay)
    if previous is not None:
        start_from(previous, generator, discriminator, lecam, averaged=averaged)
    generator.to(device)
    lecam.to(device)
    wrapped_generator = wrap(generator)
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
        generator_optimizer=torch.optim.Adam(
            [p for p in generator.parameters() if p.requires_grad], config.learning_rate, config.adam_betas
        ),
        discriminator_optimizer=(
            None
            if discriminator is None
            else torch.optim.Adam(discriminator.parameters(), config.learning_rate, config.adam_betas)
        ),
        averages={n: p.detach().clone() for n, p in learning.items()} if config.ema_decay else {},
        device=device,
    )


def check_stage(config: StageConfig, tokenizer: TokenizerConfig) -> None:
    """Refuse a stage whose clips a tokenizer, or the stage's discriminator, does not take.

    Raises:
        ValueError: saying which sizes would do.
    """
    tokenizer.latent_shape(config.frames, *config.size)
    smallest = Discriminator.MIN_SIZE
    if config.has_adversary and config.discriminator == "3d" and config.frames <= 4 and max(config.size) <= 8:
        # what the last of its layers see of a clip is a single value, which batch norm of one clip cannot take
        raise ValueError(
            f"a 3d discriminator needs clips of more than 4 frames, or frames larger than 8 x 8, got {config.frames} "
            f"of {config.size}: take larger ones, or gan_weight 0"
        )
    if config.has_adversary and config.discriminator == "2d" and min(config.size) < smallest:
        raise ValueError(
            f"a 2d discriminator needs frames of at least {smallest} x {smallest}, got {config.size}: take larger "
            "frames, the 3d one, or gan_weight 0"
        )


def check_format(state: Mapping[str, Any]) -> None:
    if state.get("format") != STATE_FORMAT:
        raise ValueError(f"a training state of format {STATE_FORMAT} is needed, got {state.get('format')!r}")


def start_from(
    previous: Mapping[str, Any],
    generator: Generator,
    discriminator: Discriminator | None,
    lecam: LeCam,
    *,
    averaged: bool,
) -> None:
    """Take over what an earlier stage learned.

    Raises:
        ValueError: where that was another architecture.
    """
    check_format(previous)
    there, here = TokenizerConfig.model_validate_json(previous["tokenizer"]), generator.tokenizer.config
    if differing := differences(there, here):
        raise ValueError(
            f"a stage goes on with the tokenizer of the one before it, which is {there.name}, not {here.name} "
            f"({differing})"
        )
    weights = dict(previous["generator"])
    if averaged:
        weights |= {f"tokenizer.{name}": average for name, average in previous["averages"].items()}
    fill(generator, weights)
    stage = StageConfig.model_validate_json(previous["config"])
    if discriminator is not None and previous["discriminator"] and stage.discriminator == discriminator.kind:
        own = {name: value.shape for name, value in discriminator.state_dict().items()}
        if own == {name: value.shape for name, value in previous["discriminator"].items()}:
            fill(discriminator, previous["discriminator"])
            fill(lecam, previous["lecam"])


# The step


def train_step(state: TrainState, frames_BTHWC: Tensor) -> dict[str, float]:
    """Move a state by one batch: both networks, averages, and the number of the step.

    Args:
        frames_BTHWC: uint8 (B, T, H, W, 3), this worker's part of the batch, on any device; every worker gets equally
            many clips.

    Returns:
        The batch's losses by term, unweighted, the norms of the gradients before they were cut, and the rates; means
        over all workers.

    Raises:
        NonFiniteError, DivergedError: naming the terms, on all workers at once. No weight has changed then.
        ValueError: for a batch that does not divide into ``accumulate`` pieces, or frames of another kind.
    """
    config = state.config
    if frames_BTHWC.shape[0] == 0 or frames_BTHWC.shape[0] % config.accumulate:
        raise ValueError(
            f"a worker's part of a batch must be a multiple of accumulate, {config.accumulate}, "
            f"got {frames_BTHWC.shape[0]} clips"
        )
    adversary = state.discriminator if state.step >= config.gan_start else None
    state.generator_optimizer.zero_grad()
    if state.discriminator_optimizer is not None:
        state.discriminator_optimizer.zero_grad()
    sums: dict[str, Tensor] = {}
    for piece, part_BTHWC in enumerate(frames_BTHWC.chunk(config.accumulate)):
        last = piece == config.accumulate - 1
        x_BCTHW = frames_to_input(part_BTHWC.to(state.device)).contiguous()
        with gradients_reduced(state.generator, last):
            video_BCTHW, terms = _generator_gradients(state, x_BCTHW, piece, adversary is not None)
        if adversary is not None:
            with gradients_reduced(adversary, last):
                terms |= _discriminator_gradients(state, adversary, x_BCTHW, video_BCTHW)
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + term.detach().float() / config.accumulate
    values = mean_over_workers(torch.stack(list(sums.values())))
    norms = {"grad_norm_generator": _clipped(state.generator_optimizer, config.clip_norm)}
    if adversary is not None:
        assert state.discriminator_optimizer is not None
        norms["grad_norm_discriminator"] = _clipped(state.discriminator_optimizer, config.clip_norm)
    # The one place where the CPU waits for the device.
    numbers = torch.cat([values, torch.stack(list(norms.values()))]).tolist()
    metrics = dict(zip([*sums, *norms], numbers, strict=True))
    average_l1 = metrics["l1"] if state.step == 0 else 0.98 * state.average_l1 + 0.02 * metrics["l1"]
    _check_sane(state, metrics, average_l1)

    metrics["learning_rate"] = learning_rate(config, state.step)
    _step(state.generator_optimizer, metrics["learning_rate"])
    if adversary is not None:
        assert state.discriminator_optimizer is not None
        rate = learning_rate(config, state.step, discriminator=True)
        metrics["learning_rate_discriminator"] = rate
        _step(state.discriminator_optimizer, rate)
        by_name = dict(zip(sums, values, strict=True))
        state.lecam.update(by_name["score_real"], by_name["score_fake"])
    _average(state)
    state.step += 1
    state.average_l1 = average_l1
    return metrics


def _generator_gradients(
    state: TrainState, x_BCTHW: Tensor, piece: int, adversary: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add a piece's gradients to the generator's; gives the reconstruction, without gradient, and the terms."""
    config = state.config
    share = 1 / config.accumulate
    with state.autocast():
        made = state.generator(x_BCTHW, _noise(state, x_BCTHW, piece))
        decoded_BTHWC = made["decoded_BTHWC"].detach().requires_grad_()
        logvar = made["logvar"].detach().requires_grad_()
        video_BCTHW = video_of(decoded_BTHWC, x_BCTHW.shape[2])
        real_FCHW, fake_FCHW = frames_of(x_BCTHW), frames_of(video_BCTHW)
        perceptual_F = None
        if state.perceptual is not None:
            at_once = x_BCTHW.shape[2] if config.recompute else None
            perceptual_F = state.perceptual(real_FCHW, fake_FCHW, frames_at_once=at_once)
    nll, l1, perceptual = fidelity(
        real_FCHW,
        fake_FCHW,
        perceptual_F,
        logvar.squeeze(),
        l1_weight=config.l1_weight,
        perceptual_weight=config.perceptual_weight,
    )
    terms = {"nll": nll, "l1": l1, "logvar": logvar.detach().squeeze()}
    if perceptual is not None:
        terms["perceptual"] = perceptual
    gradient_BTHWC, logvar_gradient = torch.autograd.grad(nll, [decoded_BTHWC, logvar])

    if adversary:
        assert state.bare_discriminator is not None
        with state.autocast():
            scores_FP = scores_without_trace(state.bare_discriminator, video_BCTHW)
        terms["gan"] = adversarial(scores_FP, config.gan_loss)
        (gan_gradient_BTHWC,) = torch.autograd.grad(terms["gan"], decoded_BTHWC)
        with state.autocast():
            at_last_layer = [
                mean_over_workers(
                    last_layer_gradient(state.tokenizer.decoder.conv_out, made["features_BTHWC"], gradient)
                )
                for gradient in (gradient_BTHWC, gan_gradient_BTHWC)
            ]
        terms["adaptive_weight"] = adaptive_weight(*at_last_layer)
        gradient_BTHWC = gradient_BTHWC + config.gan_weight * terms["adaptive_weight"] * gan_gradient_BTHWC

    ends, gradients = [made["decoded_BTHWC"]], [gradient_BTHWC.to(decoded_BTHWC.dtype) * share]
    if config.learn_logvar:
        ends.append(made["logvar"])
        gradients.append(logvar_gradient * share)
    if regularizers := {name.removeprefix("term."): made[name] for name in made if name.startswith("term.")}:
        regularization = weighted_regularization(regularizers, config, state.step)
        ends.append(regularization)
        gradients.append(torch.full_like(regularization, share))
        terms |= regularizers | {"regularization": regularization}
    torch.autograd.backward(ends, gradients)
    return video_BCTHW.detach(), terms


def _discriminator_gradients(
    state: TrainState, adversary: nn.Module, x_BCTHW: Tensor, video_BCTHW: Tensor
) -> dict[str, Tensor]:
    """Add a piece's gradients to the discriminator's; gives the terms."""
    config = state.config
    with state.autocast():
        real_FP, fake_FP = adversary(x_BCTHW, video_BCTHW)
    terms = {"hinge": hinge(real_FP, fake_FP), "lecam": state.lecam.penalty(real_FP, fake_FP)}
    ((terms["hinge"] + config.lecam_weight * terms["lecam"]) / config.accumulate).backward()  # type: ignore[no-untyped-call]
    return terms | {"score_real": real_FP.mean(), "score_fake": fake_FP.mean()}


def _check_sane(state: TrainState, metrics: Mapping[str, float], average_l1: float) -> None:
    bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if bad:
        named = ", ".join(f"{name} is {value}" for name, value in bad.items())
        raise NonFiniteError(
            f"step {state.step}: {named}. The step was not taken. {_REMEDY}, or less weight on that term"
        )
    if state.step >= state.config.divergence_after and average_l1 > state.config.divergence_l1:
        raise DivergedError(
            f"step {state.step}: l1 has been {average_l1:.3g} on average, worse than grey frames (at most 1): training "
            f"diverges. The step was not taken; {', '.join(f'{name} {value:.3g}' for name, value in metrics.items())}. "
            f"{_REMEDY}"
        )


def learning_rate(config: StageConfig, step: int, *, discriminator: bool = False) -> float:
    """Adam's rate at a step: a linear rise, then a constant or half a cosine down to the last step.

    The discriminator's rise begins when it does; the cosine is the same.
    """
    rate, begun = config.learning_rate, 0
    if discriminator:
        rate, begun = config.discriminator_learning_rate or rate, config.gan_start
    if config.warmup_steps:
        rate *= min(1.0, (step - begun + 1) / config.warmup_steps)
    if config.schedule == "cosine":
        progress = min(max(step - config.warmup_steps, 0) / (config.steps - config.warmup_steps), 1.0)
        final = config.final_rate_share
        rate *= final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    return rate


def average_decay(config: StageConfig, step: int) -> float:
    """How much of an average stays at a step: little at first, so that initial weights are soon forgotten.

    ``min(decay, (1 + n) / (10 + n))`` at the n-th update, as the reference has it where it is switched on.
    """
    return min(config.ema_decay, (2 + step) / (11 + step))


def _step(optimizer: torch.optim.Adam, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


@torch.no_grad()
def _average(state: TrainState) -> None:
    decay = average_decay(state.config, state.step)
    parameters = dict(state.tokenizer.named_parameters())
    for name, average in state.averages.items():
        average.lerp_(parameters[name].detach(), 1 - decay)


def _clipped(optimizer: torch.optim.Adam, longest: float) -> Tensor:
    """Cut a network's gradients to a norm, and give the norm that they had."""
    parameters: Iterable[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    norm: Tensor = torch.nn.utils.clip_grad_norm_(parameters, longest)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _noise(state: TrainState, x_BCTHW: Tensor, piece: int) -> Tensor | None:
    """What KL samples with, from nothing but the stage's seed, the step, the piece and the worker."""
    config = state.tokenizer.config
    if config.head != "kl":
        return None
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    entropy = np.random.SeedSequence([state.config.seed, state.step, piece, rank])
    generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))
    shape = config.latent_shape(*x_BCTHW.shape[2:])
    return torch.randn(x_BCTHW.shape[0], *shape, generator=generator).to(state.device)


def shard_generator(network: nn.Module, **settings: Any) -> nn.Module:
    """Wrap a state's networks for FSDP2: each layer of the tokenizer by itself; the small discriminator by DDP.

    Args:
        settings: of `fully_shard`, such as a mesh.
    """
    if not isinstance(network, Generator):
        return DistributedDataParallel(network)
    # Where gradients are wanted no layer writes into what another gave it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    tokenizer = network.tokenizer
    for part in (tokenizer.encoder, tokenizer.decoder):
        for layer in part.layers():
            assert isinstance(layer, nn.Module)
            fully_shard(layer, **settings)
    fully_shard(network, **settings)
    return network
