"""``vidshard train``: one sub-command for each way to train, ``resume`` and ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vidshard.jobs.runtime.settings import (
    OrderedGroup,
    SectionedCommand,
    WholeNumber,
    options_of,
    report_options,
    shared_option,
)
from vidshard.jobs.runtime.terminal import output_console
from vidshard.jobs.training.settings import preset_defaults, training_run
from vidshard.schemas.fields import ClusterSettings
from vidshard.schemas.training import TrainFlags

if TYPE_CHECKING:
    from vidshard.jobs.training.summary import Result


@click.group(cls=OrderedGroup)
def train() -> None:
    """Train a tokenizer on raw videos.

    A run uses one machine or a Ray cluster. The same command again, or `vidshard train resume`, continues a run where
    it stopped.

    \b
    Both stages of the VidTok paper, or a tiny tokenizer on a CPU in minutes:
      vidshard train two_stage --videos clips/ --out runs/mine
      vidshard train two_stage --videos clips/ --out runs/try --preset tiny

    \b
    VidTwin, which has a single stage, or a tiny one:
      vidshard train one_stage --videos clips/ --out runs/twin
      vidshard train one_stage --videos clips/ --out runs/a --preset vidtwin_tiny

    \b
    One stage at a time, on two corpora:
      vidshard train stage1 --videos a/=0.7 --videos b/=0.3 --out runs/one
      vidshard train stage2 --init-from runs/one/stage1 --videos a/ --out runs/two

    \b
    Adapt published weights to your videos:
      vidshard train finetune --init-from fsq.safetensors --videos a/ --out runs/a
    """


def _training_command(kind: str, preset: str, stages: tuple[str, ...], text: str) -> None:
    """Add ``vidshard train KIND``: flags and file, laid over some stages of a preset."""

    def run_command(config_path: Path | None, **flags: Any) -> Result:
        run = training_run(preset, stages, flags, config_path)
        from vidshard.jobs.training.job import train as run_job

        return run_job(run, output_console())

    run_command.__doc__ = text
    own_stages = frozenset[str]() if len(stages) > 1 else frozenset({"stage1", "stage2"})
    options = options_of(TrainFlags, leave_out=own_stages, defaults=preset_defaults(preset, stages))
    train.command(kind, cls=SectionedCommand)(options(run_command))


_training_command(
    "two_stage",
    "paper",
    ("stage1", "stage2"),
    """Train both stages, one after the other.

    Stage 1 trains everything at low resolution; stage 2 trains the decoder at full resolution. A flag applies to both
    stages. --stage1 and --stage2 set values for one of them, as do the keys stage1 and stage2 of a YAML file.
    """,
)
_training_command(
    "stage1",
    "paper_stage1",
    ("stage1",),
    """Train everything at low resolution.

    This is the first stage of the VidTok paper.
    """,
)
_training_command(
    "stage2",
    "paper_stage2",
    ("stage2",),
    """Train the decoder at full resolution.

    This is the second stage of the VidTok paper. Its starting point is a first stage, given with --init-from. Encoder
    and quantizer stay as they are, so existing tokens stay valid.
    """,
)
_training_command(
    "one_stage",
    "vidtwin",
    ("one_stage",),
    """Train everything in one stage, at full resolution.

    VidTwin is trained so. The defaults are those of its paper; --preset vidtwin_tiny trains a tiny one on a CPU in
    minutes. --init-from starts from published weights or from an earlier run.
    """,
)
_training_command(
    "finetune",
    "domain",
    ("finetune",),
    """Adapt a trained tokenizer to your own videos.

    The tokenizer is given with --init-from. With --preset long_video, it is adapted to longer sequences.
    """,
)


@train.command("run", cls=SectionedCommand)
@options_of(TrainFlags, defaults={name: [None] for name in TrainFlags.model_fields if name not in ("videos", "out")})
def run_preset(config_path: Path | None, **flags: Any) -> Result:
    """Train all stages of a preset.

    The preset is named with --preset. A flag applies to all of its stages; the preset decides what is left out.

    \b
    vidshard train run --preset small --videos clips/ --out runs/small
    """
    run = training_run(None, (), flags, config_path)
    from vidshard.jobs.training.job import train as run_job

    return run_job(run, output_console())


@train.command("export")
@click.argument("out", metavar="RUN")
@click.option(
    "--step",
    default="last",
    show_default=True,
    metavar="N|best|last",
    help="Step of the checkpoint: its number, the last one, or the best one by the --best-by of the run.",
)
@click.option("--to", "target", metavar="FILE", help="File to write. Default: RUN/STAGE/tokenizer-step-N.safetensors.")
@click.option("--raw", is_flag=True, help="Take the weights of the step itself rather than their average (EMA).")
def export_step(out: str, step: str, target: str | None, raw: bool) -> None:
    """Write the tokenizer of a checkpoint.

    RUN is the folder of a run, whose last stage with a checkpoint is taken, or of a stage such as runs/mine/stage1.
    The run may have been interrupted, or may still go on.

    \b
    vidshard train export runs/mine
    vidshard train export runs/mine/stage1 --step best --to best.safetensors
    """
    from vidshard.jobs.training.export import export_checkpoint

    export_checkpoint(out, output_console(), step=step, target=target, raw=raw)


@train.command()
@click.argument("out", metavar="RUN")
@click.option(
    "--steps",
    type=WholeNumber(min=1),
    metavar="N",
    help="Number of steps of the stage that the run has come to, to make it longer. All its state is kept.",
)
@click.option("--workers", type=WholeNumber(min=1), metavar="N", help="Number of training processes from now on.")
@click.option("--threads", type=WholeNumber(min=1), metavar="N", help="Number of threads of a worker on CPUs.")
@shared_option(ClusterSettings, "ray_address")
@report_options
@shared_option(ClusterSettings, "verbose")
def resume(out: str, steps: int | None, **changes: Any) -> Result:
    """Resume a training run from its folder.

    RUN is the folder that an earlier command named with --out. The run continues at its last checkpoint, with the
    settings that the folder holds.
    """
    from vidshard.jobs.training.job import resume as run_job

    given = {name: value for name, value in changes.items() if value is not None}
    return run_job(out, given, output_console(), steps=steps)
