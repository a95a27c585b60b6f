"""``vidshard export`` and ``push``: outputs in the layouts of other programs, and on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from vidshard.jobs.runtime.settings import WholeNumber
from vidshard.jobs.runtime.terminal import output_console

if TYPE_CHECKING:
    from vidshard.jobs.export.job import ExportResult
    from vidshard.jobs.export.push import PushResult


@click.command()
@click.argument("out", metavar="OUTPUT")
@click.argument("dest", metavar="DEST")
@click.option(
    "--to",
    "layout",
    required=True,
    type=click.Choice(["fastvideo", "lance", "webdataset", "lerobot-latents"]),
    help="Layout to write; the list above says which program reads it.",
)
@click.option("--where", metavar="CONDITION", help="Export only the clips that pass this filter, a condition of SQL.")
@click.option("--limit", type=WholeNumber(min=1), metavar="N", help="Export only the first N clips.")
@click.option(
    "--map",
    "columns",
    metavar="FIELD=COLUMN",
    multiple=True,
    help="Column that fills a field of the layout; may be repeated. Default: the column of the field's own name.",
)
def export(
    out: str, dest: str, layout: str, where: str | None, limit: int | None, columns: tuple[str, ...]
) -> ExportResult:
    """Write an output in the layout of another program.

    DEST is an empty folder, local or remote; for lerobot-latents also the LeRobot dataset of the clips. The same
    command again continues an interrupted export. Every clip is written, or refused with a reason, and the counts are
    printed.

    \b
    Layouts, and their fields for --map:
      webdataset       tar files for WebDataset; every column, no fields
      lance            a Lance table for stable-worldmodel and LanceDB:
                       action, observation
      fastvideo        Parquet rows of latents for FastVideo's trainers:
                       caption, text_embedding, keyboard_cond, mouse_cond
      lerobot-latents  a LeRobot v2.1 folder with latents for LingBot-VA:
                       action (needed), observation.state, text, text_emb

    \b
    vidshard export tokens/ tars/ --to webdataset
    vidshard export latents/ s3://b/x --to fastvideo --where "source_fps >= 24"
    vidshard export latents/ episodes/ --to lerobot-latents --map action=joints
    """
    named = _pairs(columns, "--map", "FIELD=COLUMN, such as action=joints")
    from vidshard.jobs.export.job import ExportRun, export_output

    request = ExportRun(out=out, layout=layout, dest=dest, where=where, limit=limit, columns=named)
    return export_output(request, output_console())


def _pairs(texts: Sequence[str], flag: str, form: str) -> dict[str, str]:
    """Values of a flag that is NAME=VALUE and may be repeated.

    Raises:
        click.UsageError: a value has another form, or a name stands twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not (name and value):
            raise click.UsageError(f"{flag} {text}: give {form}")
        if name in found:
            raise click.UsageError(f"{flag}: {name} is named twice")
        found[name] = value
    return found


@click.command()
@click.argument("out", metavar="OUTPUT")
@click.argument("target", metavar="hf://datasets/OWNER/NAME")
@click.option(
    "--create", is_flag=True, help="Make the dataset if it is missing. It is private unless --public is given."
)
@click.option("--public", is_flag=True, help="Make the new dataset of --create visible to everybody.")
@click.option("--prune", is_flag=True, help="Delete shards of the dataset that OUTPUT has not.")
def push(out: str, target: str, create: bool, public: bool, prune: bool) -> PushResult:
    """Push the shards of an output to the Hugging Face Hub.

    Sends the finished shards and a generated dataset card. The same command again sends what is missing. Text that you
    add to the card is kept; its license is yours to state.

    The token is that of HF_TOKEN or of `hf auth login`. HF_ENDPOINT is used as by other tools.

    \b
    vidshard push tokens/ hf://datasets/me/driving-tokens --create
    """
    if public and not create:
        raise click.UsageError("--public is for a dataset that is made: give --create too")
    from vidshard.jobs.export.push import PushRun, push_output

    request = PushRun(out=out, target=target, create=create, public=public, prune=prune)
    return push_output(request, output_console())
