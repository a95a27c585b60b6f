"""How a job ends when it does not simply succeed: the errors and exit codes that all jobs share."""

from __future__ import annotations

from types import FrameType

import click

EXIT_FAILED = 1
"""The job ran, and its result is not what was asked for."""
EXIT_REFUSED = 2
"""The request cannot be carried out as it stands; nothing was done."""


class UserError(Exception):
    """The request cannot be carried out as it stands; the message says why and what to change."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a job as Ctrl-C does, with an exit code of its own."""


def terminate(_signum: int, _frame: FrameType | None) -> None:
    """Signal handler for SIGTERM."""
    raise Terminated


def exit_code_of(interrupt: KeyboardInterrupt) -> int:
    """130 after Ctrl-C, 143 after SIGTERM, as shells have it."""
    return 143 if isinstance(interrupt, Terminated) else 130


def print_error(text: object) -> None:
    """Say on stderr why a job cannot be done."""
    click.secho(f"error: {text}", fg="red", bold=True, err=True)
