"""``vidshard evaluate``: how good reconstructions are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vidshard.jobs.runtime.settings import SectionedCommand, SectionedOption, options_of, resolve_settings
from vidshard.jobs.runtime.terminal import output_console
from vidshard.schemas.evaluation import EvaluateRun


@click.command(cls=SectionedCommand)
@click.argument("inputs", nargs=-1, metavar="[VIDEOS]...")
@click.option(
    "--from",
    "tokens",
    metavar="OUTPUT",
    cls=SectionedOption,
    section="Input",
    common=True,
    help=EvaluateRun.model_fields["tokens"].description,
)
@options_of(EvaluateRun, leave_out=frozenset({"inputs", "tokens"}))
@click.option(
    "--local",
    is_flag=True,
    cls=SectionedOption,
    section="Execution",
    common=True,
    help="Run every stage in this process, without Ray: for debugging and small machines.",
)
def evaluate(config_path: Path | None, local: bool, **flags: Any) -> None:
    """Measure how well tokenizers reconstruct videos.

    Decodes clips of VIDEOS, reconstructs them with every tokenizer, and prints PSNR, SSIM, LPIPS, use of the codebook
    and bits, beside the published figures. The scores of every clip are stored in Parquet.

    The same command again continues what is unfinished.

    \b
    vidshard evaluate clips/ --tokenizer fsq_causal_488_small_haar --fps 8,30
    vidshard evaluate mcl/ --protocol mcl_jcv --tokenizer fsq.safetensors
    vidshard evaluate --from tokens/
    """
    run = resolve_settings(EvaluateRun, flags, config_path)
    from vidshard.jobs.evaluation.job import evaluate as run_job

    run_job(run, output_console(), local=local)
