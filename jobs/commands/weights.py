"""``vidshard tokenizers`` and ``convert``: which tokenizers there are, and their weights."""

from __future__ import annotations

import click

from vidshard.jobs.runtime.terminal import output_console


@click.command()
def tokenizers() -> None:
    """List the tokenizers that vidshard knows."""
    from vidshard.jobs.weights.table import print_tokenizers

    print_tokenizers(output_console())


@click.command()
@click.argument("source", metavar="CHECKPOINT")
@click.argument("target", metavar="FILE.safetensors")
@click.option("--tokenizer", metavar="NAME", help="Tokenizer in the checkpoint. Needed unless the checkpoint names it.")
@click.option("--ema", is_flag=True, help="Take the averaged (EMA) weights instead of those of the last training step.")
def convert(source: str, target: str, tokenizer: str | None, ema: bool) -> None:
    """Convert a published checkpoint to safetensors.

    The new file also holds the configuration of the tokenizer: `vidshard tokenize --weights FILE.safetensors` needs no
    --tokenizer.

    CHECKPOINT is a .ckpt, .pt, .pth or .safetensors file: local, at any URL that fsspec opens, or on the Hugging Face
    Hub as hf://OWNER/REPO[@REVISION]/PATH. Nothing in it is executed. The Hub's cache and its variables HF_TOKEN,
    HF_HOME, HF_HUB_OFFLINE and HF_ENDPOINT are used as by other tools.

    Versions 1.0 and 1.1 of a published tokenizer have the same tensors: name the one that you downloaded. A file
    named after another tokenizer is refused.

    \b
    vidshard convert model.ckpt fsq.safetensors --tokenizer fsq_causal_488_32768
    vidshard convert \\
        hf://microsoft/VidTok/checkpoints/vidtok_fsq_causal_488_32768.ckpt \\
        fsq.safetensors --tokenizer fsq_causal_488_32768
    """
    from vidshard.jobs.weights.convert import convert_weights

    convert_weights(source, target, tokenizer, output_console(), ema=ema)
