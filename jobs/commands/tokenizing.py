"""``vidshard demo``, ``tokenize`` and ``plan``: videos to token shards."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vidshard.jobs.runtime.settings import SectionedCommand, SectionedOption, options_of, resolve_settings
from vidshard.jobs.runtime.terminal import json_option, output_console, print_json
from vidshard.schemas.runs import TokenizeRun

if TYPE_CHECKING:
    from vidshard.jobs.tokenization.summary import Summary


@click.command()
@click.argument("videos", nargs=-1, metavar="[VIDEOS]...")
@click.option("--out", default="demo-out", show_default=True, metavar="FOLDER", help="Output folder.")
def demo(videos: tuple[str, ...], out: str) -> int:
    """Tokenize and reconstruct a sample corpus, or your VIDEOS.

    The sample takes about a minute. Every step is shown on the way.
    """
    from vidshard.jobs.tokenization.demo import run_demo

    return run_demo(videos, out, output_console())


@click.command(cls=SectionedCommand)
@click.argument("inputs", nargs=-1, metavar="VIDEOS...")
@options_of(TokenizeRun, leave_out=frozenset({"inputs"}))
@click.option(
    "--local",
    is_flag=True,
    cls=SectionedOption,
    section="Execution",
    common=True,
    help="Run every stage in this process, without Ray: for debugging and small machines.",
)
def tokenize(config_path: Path | None, local: bool, **flags: Any) -> Summary:
    """Turn videos into Parquet shards of tokens or latents.

    VIDEOS are files, folders, globs, archives of videos, manifests or LeRobot datasets (lerobot:FOLDER), local or at
    any URL of fsspec. A manifest is a .parquet, .csv or .jsonl file with a 'uri' column; its other columns are copied.

    Every video becomes tokens or a row in rejects/ with the reason. The same command again continues what is
    unfinished.

    \b
    vidshard tokenize clips/ --out tokens/
    vidshard tokenize 's3://bucket/*.mp4' --out s3://bucket/out --config run.yaml
    """
    run = resolve_settings(TokenizeRun, flags, config_path)
    from vidshard.jobs.tokenization.job import tokenize as run_job

    return run_job(run, output_console(), local=local)


@click.command(cls=SectionedCommand)
@click.argument("inputs", nargs=-1, metavar="VIDEOS...")
@click.option(
    "--out",
    metavar="FOLDER",
    cls=SectionedOption,
    section="Output",
    common=True,
    help="Output folder of the run that will follow. The forecast is stored there, and that run compares itself.",
)
@options_of(TokenizeRun, leave_out=frozenset({"inputs", "out"}))
@click.option(
    "--local",
    is_flag=True,
    cls=SectionedOption,
    section="Execution",
    common=True,
    help="Forecast a run of `vidshard tokenize --local`.",
)
@click.option(
    "--machine",
    default="here",
    show_default=True,
    metavar="NAME",
    cls=SectionedOption,
    section="Execution",
    common=True,
    help="Machine to forecast for: here, h200, h100, a100, or a file of `python -m benchmarks.machine`.",
)
@json_option
def plan(config_path: Path | None, out: str | None, local: bool, machine: str, as_json: bool, **flags: Any) -> None:
    """Forecast the output and the cost of a run before it starts.

    Opens every video, decodes a sample and encodes a few clips, with the settings of `vidshard tokenize`. Prints
    videos, clips, hours, bytes, and the GPU-hours and core-hours of the run.

    \b
    vidshard plan clips/ --out tokens/
    vidshard plan clips/ --machine h200
    """
    run = resolve_settings(TokenizeRun, flags | {"out": out or "."}, config_path)
    from vidshard.jobs.tokenization.forecast_run import forecast_run

    console = output_console(stderr=as_json)
    forecast = forecast_run(run, console, local=local, machine=machine, save=out is not None)
    if as_json:
        print_json(asdict(forecast))
