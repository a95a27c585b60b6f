"""``vidshard report``: a page about an output, from its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from vidshard.jobs.commands.outputs import allow_private, fetch_sources, moved_weights
from vidshard.jobs.runtime.settings import WholeNumber
from vidshard.jobs.runtime.terminal import output_console

if TYPE_CHECKING:
    from vidshard.jobs.report.page import Page
    from vidshard.jobs.report.wall import WallSettings


@click.command()
@click.argument("out", metavar="OUTPUT")
@click.option("--to", "target", metavar="FILE", help="File to write, local or remote. Default: OUTPUT/report.html.")
@click.option(
    "--clips",
    "num_clips",
    type=WholeNumber(min=0, max=64),
    default=8,
    show_default=True,
    metavar="N",
    help="Number of clips to decode and show.",
)
@moved_weights
@fetch_sources
@allow_private
def report(
    out: str, target: str | None, num_clips: int, weights: str | None, fetch_sources: bool, allow_private: bool
) -> None:
    """Make a page about an output.

    Writes one HTML file that needs no network: what was run, speed, rejections, clips beside their reconstructions,
    distributions and use of the codebook. OUTPUT is the folder of a run of tokenize, evaluate or train, local or
    remote. Only its finished files are read, so it can be done at any time.

    \b
    vidshard report tokens/
    vidshard report s3://bucket/tokens --to report.html
    """
    from vidshard.jobs.report.job import report_on
    from vidshard.jobs.report.wall import WallSettings

    wall = WallSettings(num_clips=num_clips, weights=weights, fetch_sources=fetch_sources, allow_private=allow_private)
    report_on(out, page_of, target, wall, output_console())


def page_of(out: str, record: Mapping[str, Any], made: str, wall: WallSettings | None) -> Page:
    """Page of an output of any kind, by its ``run.json``."""
    if isinstance(record.get("evaluation"), dict):
        from vidshard.jobs.evaluation.report import evaluated_page

        return evaluated_page(out, record, made, wall)
    if isinstance(record["run"].get("stages"), dict):
        from vidshard.jobs.training.report import trained_page

        return trained_page(out, record, made, wall)
    from vidshard.jobs.tokenization.report import tokenized_page

    return tokenized_page(out, record, made, wall)
