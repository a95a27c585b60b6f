"""Start of a training stage from files: an earlier stage, a checkpoint or weights; and the tokenizer that it writes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from vidshard.models.checkpoint_parts import LossParts, describe, loss_parts, own_state, own_tokenizer
from vidshard.models.tokenizer import FAMILIES, PRESETS, Tokenizer, parse_config
from vidshard.models.training.families import trainable_family
from vidshard.models.training.start import check_format, taken_from
from vidshard.models.weights import (
    UnstatedModelError,
    WeightsError,
    load_weights,
    network_differences,
    preset_in_name,
    read_checkpoint,
    save_tokenizer,
)
from vidshard.pipeline import storage
from vidshard.pipeline.training_data.checkpoints import CheckpointError, Checkpoints
from vidshard.schemas.errors import one_line
from vidshard.schemas.tokenizers import TokenizerConfig
from vidshard.schemas.training import StageConfig

_PICKLED = (".ckpt", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """Starting point of a stage; with nothing it starts from the initial weights of its family."""

    weights: dict[str, Tensor] | None = None
    """Weights of the tokenizer."""
    loss: LossParts | None = None
    """Trained parts of the loss beside the weights, from a released checkpoint."""
    state: Mapping[str, Any] | None = None
    """State of an earlier stage, with everything that it learned (``TrainState.state_dict``)."""


def read_start(path: str, config: TokenizerConfig) -> Start:
    """Read what a file offers to a training: weights, a released checkpoint, or a checkpoint of ``vidshard train``.

    Raises:
        ValueError: the file belongs to another architecture, or is damaged.
        StorageError, FileNotFoundError: there is no such file.
    """
    loss = None
    with storage.local_copy(path) as local:
        assert local is not None
        if local.suffix in _PICKLED and local.is_file():
            entries = read_checkpoint(local)
            state = own_state(entries)
            if state is not None:
                stated = _stated_config(path, state)
                _check_differences(path, stated, config)
                if not network_differences(stated, config):
                    return Start(state=state)
            else:
                loss = loss_parts(entries)
            del entries
        return Start(weights=_weights_of(local, path, config), loss=loss)


def _stated_config(path: str, state: Mapping[str, Any]) -> TokenizerConfig:
    try:
        check_format(state)
        return parse_config(own_tokenizer(state))
    except (ValueError, RecursionError, OverflowError) as error:  # including pydantic's ValidationError
        raise WeightsError(
            f"{storage.public_uri(path)} is no checkpoint to start from: {one_line(error, 400)}"
        ) from error


def begins_discriminator(start: Start, stage: StageConfig) -> bool:
    """Whether a stage has a discriminator, and takes none from a start."""
    if start.state is not None or not stage.has_discriminator:
        return False
    return start.loss is None or not taken_from(start.loss, stage).discriminator


def describe_start(start: Start, config: TokenizerConfig, stage: StageConfig) -> str:
    """One line that says what a stage takes of a start, and what not."""
    if start.state is not None:
        return f"takes what a training learned: {describe(config, start.state)}, its log variance and discriminator"
    if start.loss is None or (start.loss.logvar is None and not start.loss.discriminator):
        without = ", and begins a new discriminator" if begins_discriminator(start, stage) else ""
        return f"takes the tokenizer's weights; the file holds nothing else to start from{without}"
    taken = taken_from(start.loss, stage)
    parts = ["the tokenizer's weights"]
    if taken.logvar:
        assert start.loss.logvar is not None
        parts.append(f"the log variance ({float(start.loss.logvar):.3g})")
    if taken.discriminator:
        parts.append("the discriminator")
    begins = f"; begins a new discriminator, as {taken.left_out}" if taken.left_out else ""
    return f"takes {', '.join(parts)}{begins}"


def last_state(folder: str, run_id: str) -> dict[str, Any]:
    """Load the last checkpoint of a stage.

    Raises:
        CheckpointError: the stage has none, or it is damaged.
    """
    checkpoints = Checkpoints(folder, run_id)
    checkpoint = checkpoints.latest()
    if checkpoint is None:
        raise CheckpointError(f"{storage.public_uri(folder)} has no checkpoint: train that stage first")
    return checkpoints.load(checkpoint)


def start_weights(path: str, config: TokenizerConfig) -> dict[str, Tensor]:
    """Load weights from a file to start training from, named as in the model's state dict.

    The family decides what may differ, see `TrainableFamily.start_differences`.

    Raises:
        ValueError: the weights belong to another architecture.
        StorageError, FileNotFoundError: there is no such file.
    """
    with storage.local_copy(path) as local:
        assert local is not None
        return _weights_of(local, path, config)


def _weights_of(local: Path, path: str, config: TokenizerConfig) -> dict[str, Tensor]:
    try:
        stated, weights = load_weights(local)
    except UnstatedModelError:
        stated, weights = load_weights(local, PRESETS.get(preset_in_name(path) or "", config))
    _check_differences(path, stated, config)
    return weights


def _check_differences(path: str, stated: TokenizerConfig, config: TokenizerConfig) -> None:
    if stated.family == config.family:
        differing = trainable_family(config).start_differences(stated, config)
    else:
        differing = network_differences(stated, config)
    if differing:
        raise ValueError(
            f"{storage.public_uri(path)} is of {stated.name}, not {config.name} ({differing}): --tokenizer says which "
            "model is meant"
        )


def write_tokenizer(path: str, config: TokenizerConfig, weights: Mapping[str, Tensor]) -> None:
    """Write weights with their config as ``.safetensors``, to any storage, whole or not at all."""
    tokenizer = FAMILIES[config.family].build(config)
    tokenizer.load_state_dict(dict(weights))
    with tempfile.TemporaryDirectory(prefix="vidshard-") as folder:
        local = Path(folder) / "tokenizer.safetensors"
        save_tokenizer(local, cast(Tokenizer, tokenizer))
        storage.write_atomic(path, local.read_bytes())
