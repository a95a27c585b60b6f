"""Report job: one HTML page about a finished output, from its files alone.

Each kind of run has a page of its own, such as `jobs.tokenization.report`, which it gives to `add_report` at its end:
that never fails a run, and says in one line where the page is or why there is none. `write_report` makes a page at any
time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

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


PageMaker = Callable[[str, Mapping[str, Any], str, WallSettings | None], Page]
"""Function that makes the page of an output of one kind, or of any: from its folder, its ``run.json``, a text that says
when and by what the page is made, and the clips to decode (None for as many as the end of a run takes)."""


def write_report(
    out: str, make: PageMaker, *, target: str | None = None, wall: WallSettings | None = None
) -> tuple[str, int]:
    """Make the report of an output.

    Args:
        out: output folder of a run, local or remote.
        make: makes its page.
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
        data = render(_page(out, make, made, wall)).encode()
    except ModuleNotFoundError as error:
        if (error.name or "vidshard").startswith("vidshard"):
            raise
        raise UserError(f"a report needs the package {error.name}: pip install {error.name}") from error
    storage.write_atomic(path, data)
    return path, len(data)


def _page(out: str, make: PageMaker, made: str, wall: WallSettings | None) -> Page:
    """Page of an output.

    Raises:
        UserError: its record is damaged, or of no kind that is known.
    """
    path = storage.join(out, RUN)
    try:
        record = parse_json(storage.read_bytes(path, max_bytes=MAX_RECORD_BYTES), RUN)
        return make(out, record, made, wall)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{shown_uri(path)}, or a file beside it, is damaged: {one_line(error, 200)}") from error


def add_report(out: str, report: str, console: Console, make: PageMaker, *, wall: WallSettings | None = None) -> None:
    """Make the report of a run that has just ended, as ``--report`` says; failures are printed in one line.

    Args:
        out: output folder.
        report: ``auto``, ``none`` or a file.
        console: for the line that says where the page is.
        make: makes its page.
        wall: clips to decode; None for a share of the time of the runs.
    """
    if report == "none" or (report == "auto" and os.environ.get(VARIABLE, "").lower() == "none"):
        return
    started = time.monotonic()
    try:
        path, num_bytes = write_report(out, make, target=None if report == "auto" else report, wall=wall)
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


def report_on(out: str, make: PageMaker, target: str | None, wall: WallSettings, console: Console) -> None:
    """Make the report of an output, and print where it is.

    Raises:
        VidshardError: as `write_report`.
    """
    path, num_bytes = write_report(out, make, target=target, wall=wall)
    console.print(f"wrote {shown_uri(path)} ({num_bytes / 1e6:.1f} MB)", highlight=False, markup=False, soft_wrap=True)
