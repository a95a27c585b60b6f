"""Report job: one HTML page about a finished output, from its files alone.

`report_of` makes the page of any output, at any time. `add_report` is what a run calls at its end: it never fails a
run, and says in one line where the page is or why there is none.
"""

from __future__ import annotations

import os
import time

from rich.console import Console

from vidshard.jobs.report.page import Page, render
from vidshard.jobs.report.wall import WallSettings
from vidshard.jobs.runtime.run_record import MAX_RECORD_BYTES
from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import REPORT, RUN
from vidshard.pipeline.versions import code_version
from vidshard.schemas.errors import UserError, VidshardError, one_line
from vidshard.schemas.text import readable
from vidshard.schemas.tokens import parse_json
from vidshard.schemas.uris import shown_uri, without_secrets

VARIABLE = "VIDSHARD_REPORT"
"""Environment variable that switches the reports of all runs off, with the value ``none``."""


def write_report(out: str, target: str | None = None, wall: WallSettings | None = None) -> tuple[str, int]:
    """Make the report of an output.

    Args:
        out: output folder of any run, local or remote.
        target: file to write; None for ``report.html`` in the output.
        wall: clips to decode; None for as many as the end of a run takes.

    Returns:
        Path and size in bytes of the file.

    Raises:
        UserError: it is no output, or a package that makes the page is missing.
        VidshardError: the output is damaged, or a file could not be read or written.
    """
    out = storage.absolute(out)
    path = storage.join(out, REPORT) if target is None else storage.absolute(target)
    if not storage.exists(storage.join(out, RUN)):
        raise UserError(f"{shown_uri(out)} is no output of vidshard: it has no {RUN}")
    made = f"Made {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} by vidshard {code_version()}."
    try:
        data = render(_page(out, made, wall)).encode()
    except ModuleNotFoundError as error:
        if (error.name or "vidshard").startswith("vidshard"):
            raise
        raise UserError(f"a report needs the package {error.name}: pip install {error.name}") from error
    storage.write_atomic(path, data)
    return path, len(data)


def _page(out: str, made: str, wall: WallSettings | None) -> Page:
    """Page of an output of any kind.

    Raises:
        UserError: its record is damaged, or of no kind that is known.
    """
    path = storage.join(out, RUN)
    try:
        record = parse_json(storage.read_bytes(path, max_bytes=MAX_RECORD_BYTES), RUN)
        if isinstance(record.get("evaluation"), dict):
            from vidshard.jobs.report.evaluated import evaluated_page

            return evaluated_page(out, record, made, wall or WallSettings())
        if isinstance(record["run"].get("stages"), dict):
            from vidshard.jobs.report.trained import trained_page

            return trained_page(out, record, made)
        from vidshard.jobs.report.tokenized import tokenized_page

        return tokenized_page(out, record, made, wall)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{shown_uri(path)}, or a file beside it, is damaged: {one_line(error, 200)}") from error


def add_report(out: str, report: str, console: Console, *, wall: WallSettings | None = None) -> None:
    """Make the report of a run that has just ended, as ``--report`` says; failures are printed in one line.

    Args:
        out: output folder.
        report: ``auto``, ``none`` or a file.
        console: for the line that says where the page is.
        wall: clips to decode; None for a share of the time of the runs.
    """
    if report == "none" or (report == "auto" and os.environ.get(VARIABLE, "").lower() == "none"):
        return
    started = time.monotonic()
    try:
        path, num_bytes = write_report(out, None if report == "auto" else report, wall)
    except VidshardError as error:
        text = f"no report: {error}"
    except KeyboardInterrupt:
        text = f"no report: interrupted; what the run wrote is complete. To make it later: vidshard report {out}"
    except Exception as error:  # noqa: BLE001  whatever is wrong with a report, the run that it is about has ended well
        text = f"no report: {type(error).__name__}: {error}"
    else:
        text = f"{shown_uri(path)} ({num_bytes / 1e6:.1f} MB, {time.monotonic() - started:.1f} s)"
    console.print(
        f"  {'report':<12}{readable(without_secrets(text), 500)}", highlight=False, markup=False, soft_wrap=True
    )


def report_on(out: str, target: str | None, wall: WallSettings, console: Console) -> None:
    """Make the report of an output, and print where it is.

    Raises:
        VidshardError: as `write_report`.
    """
    path, num_bytes = write_report(out, target, wall)
    console.print(f"wrote {shown_uri(path)} ({num_bytes / 1e6:.1f} MB)", highlight=False, markup=False, soft_wrap=True)
