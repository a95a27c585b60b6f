"""Table of the tokenizers that vidshard knows: presets, and the autoencoders of diffusers."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from vidshard.models.diffusers_vae.classes import CLASSES
from vidshard.models.diffusers_vae.library import installed_classes
from vidshard.models.tokenizer import PRESETS
from vidshard.models.weights import DEFAULT, SHIPPED, count_parameters, shipped_weights, training_summary


def print_tokenizers(console: Console) -> None:
    """Print the tokenizer presets as a table."""
    table = Table(box=None, pad_edge=False)
    for name in ("name", "family", "head", "causal", "compression (t x h x w)", "codebook"):
        table.add_column(name, no_wrap=True)
    for name in ("parameters", "rate"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("clip", "weights", "latents"):
        table.add_column(name, no_wrap=True)
    for config in PRESETS.values():
        clip = config.default_clip
        columns = config.payload(*clip)
        space = config.space_stride
        table.add_row(
            config.name,
            config.family,
            config.head_name,
            "yes" if config.is_causal else "no",
            "by part" if config.parts else f"{config.time_stride} x {space} x {space}",
            f"{config.codebook_size:,}" if config.codebook_size else "none",
            f"{count_parameters(config) / 1e6:.2f} M",
            f"{config.compression_rate:.3%}",
            "x".join(map(str, clip)),
            "shipped" if config.name in SHIPPED else "",
            " + ".join(f"{column.name} {'x'.join(map(str, column.shape))}" for column in columns),
        )
    # whole lines, also where they are wider than the terminal or go to a file
    table.width = console.measure(table, options=console.options.update(width=1000)).maximum
    console.print(table, soft_wrap=True)
    console.print("\nrate: number of values of a clip's latents, or of its tokens, over that of its pixels' colors")
    console.print(f"\n{DEFAULT} is what `vidshard tokenize` uses by itself. With trained weights on unseen clips:")
    for name in SHIPPED:
        measured = training_summary(shipped_weights(name)).get("measured")
        if isinstance(measured, str):
            console.print(f"{name}: {measured}.", highlight=False, markup=False)
    console.print("For the others: --weights FILE, from their release or from `vidshard train`.", highlight=False)
    _print_autoencoders(console)


def _print_autoencoders(console: Console) -> None:
    """Print the classes of diffusers that are tokenizers here."""
    version, installed = installed_classes()
    console.print("\nautoencoders of diffusers", style="bold")
    found = f"diffusers {version} is installed" if version else "not installed: pip install 'vidshard[diffusers]'"
    place = "--tokenizer diffusers:FOLDER or diffusers:OWNER/REPO[@REVISION][/SUBFOLDER]"
    console.print(f"{place}; {found}", highlight=False, markup=False)
    table = Table(box=None, pad_edge=False)
    for name in ("class", "models", "installed", "--keep-logvar", "--continuous", "clips"):
        table.add_column(name, no_wrap=True)
    for row in CLASSES.values():
        table.add_row(
            row.name,
            row.models,
            "yes" if row.name in installed else "no",
            "yes" if row.has_logvar else "no",
            "yes" if row.streams else f"no: {row.no_streams}",
            row.clips,
        )
    table.width = console.measure(table, options=console.options.update(width=1000)).maximum
    console.print(table, soft_wrap=True)
