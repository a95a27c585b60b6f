"""A published checkpoint to a safetensors file that says which model it holds."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from jobs.outcome import EXIT_REFUSED, print_error
from models.tokenizer import get_preset
from models.weights import load_tokenizer, save_tokenizer, weights_digest
from pipeline import storage


def convert_weights(source: str, target: str, preset: str, console: Console) -> int:
    """Write the weights of ``source`` with the preset's configuration in the header; gives the exit code."""
    try:
        with storage.local_copy(storage.absolute(source)) as path:
            tokenizer = load_tokenizer(get_preset(preset), path)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        save_tokenizer(target, tokenizer)
    except (ValueError, OSError, storage.StorageError) as error:
        print_error(error)
        return EXIT_REFUSED
    digest = weights_digest(tokenizer.state_dict())
    console.print(f"wrote {target}: {preset}, weights SHA-256 {digest}", highlight=False, markup=False)
    console.print(f"use it with: vidshard tokenize ... --weights {target}", highlight=False, markup=False)
    return 0
