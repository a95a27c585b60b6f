"""One training step: both networks learn from one batch.

**How several workers share a step.** The graph of the losses ends at the decoder's output: `train_step` takes the
gradient of every term there, adds them up, and runs one backward pass through `Generator` with the sum. A wrapper
(DDP, FSDP2) therefore sees one forward and one backward pass, and the adaptive weight needs no access to wrapped
parameters. `mean_over_workers` averages the rest: metrics, LeCam's scores, the two gradients behind the adaptive
weight, and the use of the codebook. A step of several workers then equals the step of one worker with all their clips,
except for the statistics of batch norm.

Both networks learn from the same forward pass. No weight changes before every term and gradient is known to be finite.
"""

# B batch, C channels, T frames, H height, W width; F = B * T frames; P patches of a frame

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from vidshard.models.tokenizer import frames_to_input
from vidshard.models.training.discriminator import adaptive_weight, adversarial_loss, hinge_loss, scores_for_generator
from vidshard.models.training.distributed import gradient_sync, is_sharded, mean_over_workers
from vidshard.models.training.losses import frames_of, reconstruction_loss, weighted_regularization
from vidshard.models.training.state import TrainState
from vidshard.schemas.training import StageConfig

_REMEDY = (
    "A new run with --init-from this stage begins with the weights of its last checkpoint: give it a lower learning "
    "rate, more warm-up"
)


class NonFiniteError(ValueError):
    """A loss or gradient is not a number, or infinite. The step was not taken."""


class DivergedError(ValueError):
    """The reconstruction is worse than gray frames. The step was not taken."""


def train_step(state: TrainState, frames_BTHWC: Tensor) -> dict[str, float]:
    """Train on one batch: updates both networks, the averages and the step number.

    Args:
        frames_BTHWC: this worker's part of the batch, uint8 (B, T, H, W, 3) on any device; B is a multiple of
            ``gradient_accumulation`` and the same on all workers.

    Returns:
        Unweighted losses by term, gradient norms before clipping, and learning rates; means over all workers. Of a
        batch that was skipped, as one of these is not finite, only ``skipped_batches``, which is 1.

    Raises:
        NonFiniteError, DivergedError: on all workers at once, naming the terms. No weight has changed.
        ValueError: the batch does not divide into micro-batches, or its frames have another shape.
    """
    config = state.config
    discriminator = state.discriminator if state.step >= config.gan_start else None
    buffers = _copied_buffers(state) if config.max_skipped_batches else []
    terms = _accumulate_gradients(state, discriminator, frames_BTHWC)
    values = mean_over_workers(torch.stack(list(terms.values())))
    norms = {"grad_norm_generator": _clip_gradients(state.generator_optimizer, config.max_grad_norm)}
    if discriminator is not None:
        assert state.discriminator_optimizer is not None
        norms["grad_norm_discriminator"] = _clip_gradients(state.discriminator_optimizer, config.max_grad_norm)
    # The one place where the CPU waits for the device.
    numbers = torch.cat([values, torch.stack(list(norms.values()))]).tolist()
    metrics = dict(zip([*terms, *norms], numbers, strict=True))
    if not all(map(math.isfinite, metrics.values())):
        for buffer, value in buffers:  # statistics of batch norm saw the batch too
            buffer.copy_(value)
        if state.skipped_in_row < config.max_skipped_batches:
            state.skipped_in_row += 1
            state.step += 1
            return {"skipped_batches": 1.0}
    average_l1 = metrics["l1"] if state.step == 0 else 0.98 * state.average_l1 + 0.02 * metrics["l1"]
    _check_sane(state, metrics, average_l1)

    metrics["learning_rate"] = learning_rate(config, state.step)
    _optimizer_step(state.generator_optimizer, metrics["learning_rate"])
    if discriminator is not None:
        assert state.discriminator_optimizer is not None
        rate = learning_rate(config, state.step, discriminator=True)
        metrics["learning_rate_discriminator"] = rate
        _optimizer_step(state.discriminator_optimizer, rate)
        by_name = dict(zip(terms, values, strict=True))
        state.lecam.update(by_name["score_real"], by_name["score_fake"])
    _update_averages(state)
    state.step += 1
    state.average_l1 = average_l1
    state.skipped_in_row = 0
    return metrics


def _copied_buffers(state: TrainState) -> list[tuple[Tensor, Tensor]]:
    """Buffers of both networks, each with a copy of its present values."""
    networks = [state.tokenizer, *([] if state.bare_discriminator is None else [state.bare_discriminator])]
    return [(buffer, buffer.detach().clone()) for network in networks for buffer in network.buffers()]


# Gradients


def _accumulate_gradients(
    state: TrainState, discriminator: nn.Module | None, frames_BTHWC: Tensor
) -> dict[str, Tensor]:
    """Compute the gradients of a batch, one micro-batch after the other.

    Args:
        discriminator: None while it rests.

    Returns:
        This worker's mean of each term, without gradient; scalars.
    """
    config = state.config
    if frames_BTHWC.shape[0] == 0 or frames_BTHWC.shape[0] % config.gradient_accumulation:
        raise ValueError(
            f"a worker's part of a batch must be a multiple of gradient_accumulation, {config.gradient_accumulation}, "
            f"got {frames_BTHWC.shape[0]} clips"
        )
    state.generator_optimizer.zero_grad()
    if state.discriminator_optimizer is not None:
        state.discriminator_optimizer.zero_grad()
    sums: dict[str, Tensor] = {}
    for micro_batch, part_BTHWC in enumerate(frames_BTHWC.chunk(config.gradient_accumulation)):
        is_last = micro_batch == config.gradient_accumulation - 1
        x_BCTHW = frames_to_input(part_BTHWC.to(state.device)).contiguous()
        with gradient_sync(state.generator, is_last):
            video_BCTHW, terms = _generator_gradients(state, x_BCTHW, micro_batch, discriminator is not None)
        if discriminator is not None:
            with gradient_sync(discriminator, is_last):
                terms |= _discriminator_gradients(state, discriminator, x_BCTHW, video_BCTHW)
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + term.detach().float() / config.gradient_accumulation
    return sums


def _generator_gradients(
    state: TrainState, x_BCTHW: Tensor, micro_batch: int, adversarial: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add a micro-batch's gradients to the generator's.

    Returns:
        The reconstruction, float32 (B, 3, T, H, W) without gradient, and the terms.
    """
    config = state.config
    share = 1 / config.gradient_accumulation
    noise_seed, dropout_seed = _seeds(state, micro_batch)
    with state.autocast():
        with _random_numbers(state.device, dropout_seed):
            made = state.generator(x_BCTHW, _noise(state, x_BCTHW, noise_seed))
        decoded = made["decoded"].detach().requires_grad_()
        logvar = made["logvar"].detach().requires_grad_()
        video_BCTHW = state.trainable.video(decoded, x_BCTHW.shape[2])
        real_FCHW, fake_FCHW = frames_of(x_BCTHW), frames_of(video_BCTHW)
        perceptual_F = None
        if state.perceptual is not None:
            at_once = x_BCTHW.shape[2] if config.activation_checkpointing else None
            perceptual_F = state.perceptual(real_FCHW, fake_FCHW, frames_at_once=at_once)
    nll, l1, perceptual = reconstruction_loss(
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
    gradient, logvar_gradient = torch.autograd.grad(nll, [decoded, logvar])

    if adversarial:
        assert state.bare_discriminator is not None
        with state.autocast():
            scores_FP = scores_for_generator(state.bare_discriminator, video_BCTHW)
        terms["gan"] = adversarial_loss(scores_FP, config.gan_loss)
        (gan_gradient,) = torch.autograd.grad(terms["gan"], decoded)
        terms["adaptive_weight"] = _adaptive_weight(state, made["features"], gradient, gan_gradient)
        gradient = gradient + config.gan_weight * terms["adaptive_weight"] * gan_gradient

    ends, gradients = [made["decoded"]], [gradient.to(decoded.dtype) * share]
    if config.learn_logvar:
        ends.append(made["logvar"])
        gradients.append(logvar_gradient * share)
    if made["terms"]:
        regularization = weighted_regularization(made["terms"], config, state.step, state.trainable.term_kinds)
        ends.append(regularization)
        gradients.append(torch.full_like(regularization, share))
        terms |= made["terms"] | {"regularization": regularization}
    torch.autograd.backward(ends, gradients)
    return video_BCTHW.detach(), terms


def _adaptive_weight(state: TrainState, features: Tensor, gradient: Tensor, gan_gradient: Tensor) -> Tensor:
    """Adaptive weight of the adversarial term, from the gradients at the decoder's last layer of all workers."""
    with state.autocast():
        at_last_layer = [
            mean_over_workers(state.trainable.last_layer_gradient(features, at_output))
            for at_output in (gradient, gan_gradient)
        ]
    return adaptive_weight(*at_last_layer)


def _discriminator_gradients(
    state: TrainState, discriminator: nn.Module, x_BCTHW: Tensor, video_BCTHW: Tensor
) -> dict[str, Tensor]:
    """Add a micro-batch's gradients to the discriminator's, and return the terms."""
    config = state.config
    with state.autocast():
        real_FP, fake_FP = discriminator(x_BCTHW, video_BCTHW)
    terms = {"hinge": hinge_loss(real_FP, fake_FP), "lecam": state.lecam.penalty(real_FP, fake_FP)}
    ((terms["hinge"] + config.lecam_weight * terms["lecam"]) / config.gradient_accumulation).backward()  # type: ignore[no-untyped-call]
    return terms | {"score_real": real_FP.mean(), "score_fake": fake_FP.mean()}


def _clip_gradients(optimizer: torch.optim.Adam, max_norm: float) -> Tensor:
    """Clip a network's gradients to a norm unless that is 0, and return the norm before."""
    parameters: Iterable[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    norm: Tensor = torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    return norm.full_tensor() if is_sharded(norm) else norm


def _seeds(state: TrainState, micro_batch: int) -> tuple[int, int]:
    """Seeds of a micro-batch's noise and of its dropout, from the stage's seed, the step and the worker alone."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    entropy = np.random.SeedSequence([state.config.seed, state.step, micro_batch, rank])
    noise, dropout = (int(word >> np.uint64(1)) for word in entropy.generate_state(2, np.uint64))
    return noise, dropout


def _noise(state: TrainState, x_BCTHW: Tensor, seed: int) -> dict[str, Tensor]:
    """Noise of the latents that are sampled, N(0, 1), drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(x_BCTHW.shape[0], *shape, generator=generator).to(state.device)
        for name, shape in state.trainable.noise_shapes(*x_BCTHW.shape[2:]).items()
    }


@contextlib.contextmanager
def _random_numbers(device: torch.device, seed: int) -> Iterator[None]:
    """Draw dropout inside the context from a seed; the random generators are as before after it."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


# Checks and updates


def _check_sane(state: TrainState, metrics: Mapping[str, float], average_l1: float) -> None:
    bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if bad:
        named = ", ".join(f"{name} is {value}" for name, value in bad.items())
        raise NonFiniteError(
            f"step {state.step}: {named}. The step was not taken. {_REMEDY}, or less weight on that term"
        )
    if state.step >= state.config.divergence_after and average_l1 > state.config.divergence_l1:
        raise DivergedError(
            f"step {state.step}: l1 has been {average_l1:.3g} on average, worse than gray frames (at most 1): training "
            f"diverges. The step was not taken; {', '.join(f'{name} {value:.3g}' for name, value in metrics.items())}. "
            f"{_REMEDY}"
        )


def learning_rate(config: StageConfig, step: int, *, discriminator: bool = False) -> float:
    """Adam learning rate at a step: a linear warm-up, then a constant or a half cosine down to the last step.

    The discriminator's warm-up begins at ``gan_start``; its cosine is that of the tokenizer.
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
    """EMA decay at a step: small at first, so that initial weights are soon forgotten.

    ``min(decay, (1 + n) / (10 + n))`` at the n-th update, as in the reference where its warm-up is switched on.
    """
    return min(config.ema_decay, (2 + step) / (11 + step))


def _optimizer_step(optimizer: torch.optim.Adam, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


@torch.no_grad()
def _update_averages(state: TrainState) -> None:
    decay = average_decay(state.config, state.step)
    if not state.averages:
        return
    parameters = dict(state.tokenizer.named_parameters())
    weights = [parameters[name].detach() for name in state.averages]
    torch._foreach_lerp_(list(state.averages.values()), weights, 1 - decay)  # few kernels on a GPU, the same numbers
