"""Parts of training checkpoints beside plain weights: our own checkpoints, and the loss in released ones.

Pure functions of entries that `models.weights` has read; no file is opened here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vidshard.schemas.tokenizers import TokenizerConfig

_GENERATOR = "tokenizer."


def own_state(entries: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """State in a checkpoint of ``vidshard train`` (``TrainState.state_dict``); None for a file of another program."""
    state = entries.get("state")
    if not isinstance(state, dict) or not isinstance(state.get("tokenizer"), str):
        return None
    tables = state.get("generator"), state.get("averages")
    is_own = all(isinstance(table, dict) and all(isinstance(name, str) for name in table) for table in tables)
    return state if is_own else None


def own_tokenizer(state: Mapping[str, Any]) -> Any:
    """Config in a state, as JSON values for `models.tokenizer.parse_config`.

    Raises:
        ValueError: it is no JSON.
    """
    return json.loads(state["tokenizer"])


def own_weights(state: Mapping[str, Any], *, averaged: bool) -> dict[str, Any]:
    """Weights of the tokenizer in a state, by their names in the network.

    Args:
        averaged: the moving averages of the trained weights, where some were kept; these are what a stage exports.
    """
    weights = {
        name.removeprefix(_GENERATOR): value
        for name, value in state["generator"].items()
        if name.startswith(_GENERATOR)
    }
    return weights | (state["averages"] if averaged else {})


@dataclass(frozen=True, kw_only=True, eq=False)
class LossParts:
    """Trained parts of the loss in a released training checkpoint."""

    logvar: Tensor | None
    """Learned log variance of the reconstruction loss; a single value of any shape."""
    discriminator: dict[str, Tensor]
    """State of the discriminator by name; empty if there is none."""


def loss_parts(entries: Mapping[str, Any]) -> LossParts:
    """Find the log variance and the discriminator among the entries of a released checkpoint.

    VidTok and VidTwin keep them as ``loss.logvar`` and ``loss.discriminator.*``.
    """
    named = {
        ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod")): value
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }
    logvar = named.get("loss.logvar")
    prefix = "loss.discriminator."
    return LossParts(
        logvar=logvar if logvar is not None and logvar.numel() == 1 else None,
        discriminator={n.removeprefix(prefix): value for n, value in named.items() if n.startswith(prefix)},
    )


def describe(config: TokenizerConfig, state: Mapping[str, Any]) -> str:
    """One line on a state: model, step and whether it keeps averages."""
    kept = "averaged weights" if state["averages"] else "weights"
    return f"{kept} of {config.name} at step {state.get('step', 'unknown')}"
