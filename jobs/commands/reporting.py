"""``vidshard report``: a page about an output, from its files."""

from __future__ import annotations

import click

from vidshard.jobs.runtime.terminal import output_console


@click.command()
@click.argument("out", metavar="OUTPUT")
@click.option("--to", "target", metavar="FILE", help="File to write, local or remote. Default: OUTPUT/report.html.")
def report(out: str, target: str | None) -> None:
    """Make a page about an output.

    Writes one HTML file that needs no network: what was run, speed, rejections, distributions and use of the codebook.
    OUTPUT is the folder of a run, local or remote. Only its finished files are read, so it can be done at any time.

    \b
    vidshard report tokens/
    vidshard report s3://bucket/tokens --to report.html
    """
    from vidshard.jobs.report.job import report_on

    report_on(out, target, output_console())
