"""How a job ends when it does not simply succeed: the errors and exit codes that all jobs share."""

from __future__ import annotations

import re
from types import FrameType

import click

from vidshard.schemas.errors import VidshardError


def cause_of(error: BaseException) -> str:
    """The innermost exception of a failure, in a line; of one of Ray's, what its text says was raised first."""
    cause = error
    while (inner := _inner(cause)) is not None:
        cause = inner
    if isinstance(cause, VidshardError):
        return str(cause)  # written for people, without the name of a class
    root = str(cause).split("The above exception was")[0].split("\nFailed to apply UDF")[0]  # Ray's advice
    lines = [line.strip() for line in root.splitlines()]
    named = [at for at, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception): ", line)]
    if named:
        return re.sub(r"^[\w.]*\.(?=\w+: )", "", " ".join(lines[named[-1] :])).strip()[:1000]
    return f"{type(cause).__name__}: {' '.join(root.split())[-600:]}".removesuffix(": ")


def _inner(error: BaseException) -> BaseException | None:
    failures = getattr(error, "worker_failures", None)
    if failures:
        return next(iter(failures.values()))  # type: ignore[no-any-return]
    cause = getattr(error, "cause", None)  # a RayTaskError's own, without the worker's traceback
    return cause if isinstance(cause, BaseException) else error.__cause__


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
