"""A published checkpoint to a safetensors file that says which model it holds; and what such a file says."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from vidshard.jobs.runtime.errors import print_error
from vidshard.models.tokenizer import TokenizerConfig, get_preset
from vidshard.models.weights import load_tokenizer, load_weights, preset_in_name, save_tokenizer, weights_digest
from vidshard.pipeline import storage
from vidshard.schemas.errors import EXIT_REFUSED, UserError


def convert_weights(source: str, target: str, preset: str | None, console: Console, *, ema: bool = False) -> int:
    """Write the weights of ``source`` with the model's configuration in the header; gives the exit code.

    Args:
        source: a local path, a URL, or a file of the Hugging Face Hub.
        preset: which model they are of; None where the file says so itself.
        ema: take the averaged weights.
    """
    try:
        if not storage.is_local(target):
            raise UserError(f"{storage.public_uri(target)}: converted weights are written to a local file")
        config = get_preset(preset) if preset is not None else None  # a wrong name is known before the download
        source = storage.pinned(storage.absolute(source))
        with storage.local_copy(source) as path:
            tokenizer = load_tokenizer(config or stated_tokenizer(source, ema=ema), path, ema=ema)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        save_tokenizer(target, tokenizer)
    except (UserError, ValueError, OSError, storage.StorageError) as error:
        print_error(error)
        return EXIT_REFUSED
    kind = "averaged (EMA) weights" if ema else "weights"
    digest = weights_digest(tokenizer.state_dict())
    for line in (
        f"read {storage.public_uri(source)}",
        f"wrote {target}: {tokenizer.config.name}, {kind}, SHA-256 {digest}",
        f"use it with: vidshard tokenize ... --weights {target}",
    ):
        console.print(line, highlight=False, markup=False)
    return 0


def stated_tokenizer(weights: str, *, ema: bool = False) -> TokenizerConfig:
    """The model that a weights file itself names.

    Raises:
        UserError: there is no such file, or it names none; then the file's own name may suggest one.
    """
    try:
        with storage.local_copy(storage.absolute(weights)) as path:
            assert path is not None
            return load_weights(path, ema=ema)[0]
    except ValueError as error:
        named = preset_in_name(weights)
        hint = f"by its name it is --tokenizer {named}" if named else "--tokenizer NAME says which model it is"
        raise UserError(f"{error} ({hint})") from error
    except (FileNotFoundError, storage.StorageError) as error:
        raise UserError(str(error)) from error
