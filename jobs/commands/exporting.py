"""``vidshard export``: outputs in the layouts of other programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from vidshard.jobs.runtime.terminal import output_console

if TYPE_CHECKING:
    from vidshard.jobs.export.job import ExportResult


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
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Export only the first N clips.")
@click.option(
    "--map",
    "columns",
    metavar="FIELD=COLUMN",
    multiple=True,
    help="Fill a field of the layout from this column. May be repeated. Default: the column of the field's own name.",
)
def export(
    out: str, dest: str, layout: str, where: str | None, limit: int | None, columns: tuple[str, ...]
) -> ExportResult:
    """Write an output in the layout of another program.

    DEST is an empty folder, local or remote. The same command again continues an interrupted export. Every clip is
    written, or refused with a reason, and the counts are printed.

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
