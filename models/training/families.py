"""Families of tokenizers that can be trained, and the stages that they have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from vidshard.models.training.trainable import Trainable, TrainableFamily
from vidshard.models.training.vidtok import VidTokTraining
from vidshard.models.training.vidtwin import VidTwinTraining
from vidshard.models.vidtok.heads import Affinity
from vidshard.schemas.tokenizers import TokenizerConfig

TRAINABLES: dict[str, TrainableFamily] = {"vidtok": VidTokTraining, "vidtwin": VidTwinTraining}
"""The families that can be trained, by the ``family`` tag of their configs."""

TWO_STAGES = ("stage1", "stage2")
"""Names of the stages of two-stage training."""


def trainable_family(config: TokenizerConfig) -> TrainableFamily:
    """Look up how a family is trained.

    Raises:
        ValueError: tokenizers of this family cannot be trained.
    """
    if config.family not in TRAINABLES:
        raise ValueError(
            f"{config.name} is of family {config.family}, whose tokenizers cannot be trained; these can: "
            f"{', '.join(TRAINABLES)}"
        )
    return TRAINABLES[config.family]


def trainable_of(network: nn.Module, trainable: str, affinity: Affinity = "dot") -> Trainable:
    """Make the training interface of a network, let gradients reach the weights that it trains, and no others.

    Args:
        network: network with a ``config``, which is put into training mode.
        trainable: "all" of the weights, or the "decoder" alone.
        affinity: affinity of the entropies of FSQ.

    Raises:
        ValueError: tokenizers of this family cannot be trained, or not in part.
    """
    config = cast(TokenizerConfig, network.config)
    made = trainable_family(config)(network, trainable, affinity)
    network.requires_grad_(False)
    for parameter in made.parameters_to_train():
        parameter.requires_grad_(True)
    network.train()
    return made


def check_stages(config: TokenizerConfig, trainables: Mapping[str, str]) -> None:
    """Refuse stages that a family does not have.

    Args:
        trainables: what each stage of a run trains, by the name of the stage.

    Raises:
        ValueError: tokenizers of this family cannot be trained, or not in these stages.
    """
    if trainable_family(config).trains_in_stages:
        return
    reason = None
    if len(trainables) > 1:
        reason = f"training in stages ({', '.join(trainables)})"
    elif "decoder" in trainables.values():
        reason = "a stage that trains the decoder alone"
    elif two_stage := [name for name in trainables if name in TWO_STAGES]:
        reason = f"{two_stage[0]} of two-stage training"
    if reason is not None:
        in_stages = [name for name, family in TRAINABLES.items() if family.trains_in_stages]
        raise ValueError(
            f"{config.name} is of family {config.family}, which trains all its weights in one stage; {reason} is for "
            f"tokenizers of family {', '.join(in_stages)}: use `vidshard train one_stage`"
        )
