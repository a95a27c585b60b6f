"""Conversion of a published checkpoint to a safetensors file that states its model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from vidshard.models.tokenizer import get_preset
from vidshard.models.weights import load_tokenizer, save_tokenizer, weights_digest
from vidshard.pipeline import storage
from vidshard.pipeline.resolved_run import stated_config
from vidshard.schemas.errors import UserError


def convert_weights(source: str, target: str, preset: str | None, console: Console, *, ema: bool = False) -> None:
    """Write the weights of ``source`` to a ``.safetensors`` file with the model's configuration in its header.

    Args:
        source: a local path, a URL, or a file of the Hugging Face Hub.
        target: local path of the new file.
        preset: name of the weights' preset; None if the file states its model.
        ema: write the averaged (EMA) weights.

    Raises:
        VidshardError: the weights cannot be read or are of another model, or the target cannot be written.
    """
    if not storage.is_local(target):
        raise UserError(f"{storage.public_uri(target)}: converted weights are written to a local file")
    try:
        config = get_preset(preset) if preset is not None else None  # first, to refuse a wrong name before the download
        source = storage.pinned(storage.absolute(source))
        with storage.local_copy(source) as path:
            tokenizer = load_tokenizer(config or stated_config(source, ema=ema), path, ema=ema)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        save_tokenizer(target, tokenizer)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    kind = "averaged (EMA) weights" if ema else "weights"
    digest = weights_digest(tokenizer.state_dict())
    for line in (
        f"read {storage.public_uri(source)}",
        f"wrote {target}: {tokenizer.config.name}, {kind}, SHA-256 {digest}",
        f"use it with: vidshard tokenize ... --weights {target}",
    ):
        console.print(line, highlight=False, markup=False)
