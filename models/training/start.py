"""Start of a training stage: its discriminator, and what it takes from an earlier stage or a released checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vidshard.models.checkpoint_parts import LossParts
from vidshard.models.tokenizer import parse_config
from vidshard.models.training.discriminator import Discriminator, LeCam
from vidshard.models.training.distributed import load_full_state
from vidshard.models.training.generator import Generator
from vidshard.models.weights import network_differences
from vidshard.schemas.text import readable
from vidshard.schemas.training import StageConfig

STATE_FORMAT = 1
"""Format version of `TrainState.state_dict`."""


def check_format(state: Mapping[str, Any]) -> None:
    """Refuse a stored state of another format version.

    Raises:
        ValueError: its format is not ``STATE_FORMAT``.
    """
    found = state.get("format")
    if not isinstance(found, int) or found != STATE_FORMAT:
        raise ValueError(f"a training state of format {STATE_FORMAT} is needed, got {readable(repr(found), 80)}")


def new_discriminator(config: StageConfig) -> Discriminator | None:
    """Make the discriminator of a stage with its initial weights; None where the stage never uses one."""
    if not config.has_discriminator:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Discriminator(config.discriminator, config.discriminator_width)


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
    there, here = parse_config(json.loads(previous["tokenizer"])), generator.trainable.config
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


# From a released checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """Parts of a released checkpoint's loss that a stage takes."""

    logvar: bool
    discriminator: bool
    left_out: str
    """Why there is no trained discriminator though the stage uses one; empty otherwise."""


def taken_from(loss: LossParts, config: StageConfig) -> Taken:
    """Decide what a stage takes of a released checkpoint's loss.

    The log variance is taken where the stage learns one, the discriminator where it is of the stage's kind and width.
    """
    logvar = loss.logvar is not None and config.learn_logvar and bool(torch.isfinite(loss.logvar).all())
    if not config.has_discriminator:
        return Taken(logvar=logvar, discriminator=False, left_out="")
    if not loss.discriminator:
        return Taken(logvar=logvar, discriminator=False, left_out="the file holds no discriminator")
    with torch.device("meta"):
        own = Discriminator(config.discriminator, config.discriminator_width).state_dict()
    if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in loss.discriminator.items()}:
        return Taken(
            logvar=logvar,
            discriminator=False,
            left_out=f"its discriminator is not a {config.discriminator} one of width {config.discriminator_width}",
        )
    if not all(bool(torch.isfinite(value).all()) for value in loss.discriminator.values()):
        return Taken(logvar=logvar, discriminator=False, left_out="its discriminator has values that are not finite")
    return Taken(logvar=logvar, discriminator=True, left_out="")


def init_from_loss(
    loss: LossParts, generator: Generator, discriminator: Discriminator | None, config: StageConfig
) -> Taken:
    """Copy the log variance and the discriminator of a released checkpoint, as its own training code does.

    LeCam's scores are in no released checkpoint and begin anew.

    Returns:
        The parts that were copied.
    """
    taken = taken_from(loss, config)
    if taken.logvar:
        assert loss.logvar is not None
        with torch.no_grad():
            generator.logvar.copy_(loss.logvar.reshape(1).float())
    if taken.discriminator:
        assert discriminator is not None
        load_full_state(discriminator, loss.discriminator)
    return taken
