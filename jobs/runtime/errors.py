"""Failures of jobs: error messages, signals and exit codes that all jobs share."""

from __future__ import annotations

import re
import signal
from types import FrameType

import click

from vidshard.schemas.errors import VidshardError
from vidshard.schemas.text import indented
from vidshard.schemas.uris import without_secrets


def cause_of(error: BaseException) -> str:
    """Describe the innermost exception of a failure in one line; it is searched for in the text of a Ray error."""
    cause = innermost(error)
    if isinstance(cause, VidshardError):
        return str(cause)  # its message is for users and needs no class name
    root = str(cause).split("The above exception was")[0].split("\nFailed to apply UDF")[0]  # without Ray's advice
    lines = [line.strip() for line in root.splitlines()]
    named = [at for at, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception): ", line)]
    if named:
        return re.sub(r"^[\w.]*\.(?=\w+: )", "", " ".join(lines[named[-1] :])).strip()[:1000]
    return f"{type(cause).__name__}: {' '.join(root.split())[-600:]}".removesuffix(": ")


def innermost(error: BaseException) -> BaseException:
    """The exception that a failure began with, also behind the errors in which Ray wraps it."""
    while (inner := _inner(error)) is not None:
        error = inner
    return error


def _inner(error: BaseException) -> BaseException | None:
    failures = getattr(error, "worker_failures", None)
    if failures:
        return next(iter(failures.values()))  # type: ignore[no-any-return]
    cause = getattr(error, "cause", None)  # RayTaskError keeps the original here, without the worker's traceback
    return cause if isinstance(cause, BaseException) else error.__cause__


class Terminated(KeyboardInterrupt):
    """SIGTERM was received; it ends a job like Ctrl-C, with another exit code."""


class HungUp(Terminated):
    """SIGHUP was received, as the terminal is lost; it ends a job like SIGTERM."""


def signals_that_end() -> list[int]:
    """Signals that end a job in order. SIGHUP is none of them under ``nohup``, which ignores it."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]


def interrupt_of(number: int) -> KeyboardInterrupt:
    """Exception for a signal."""
    return {signal.SIGTERM: Terminated, signal.SIGHUP: HungUp}.get(signal.Signals(number), KeyboardInterrupt)()


def terminate(number: int, _frame: FrameType | None) -> None:
    """Signal handler: raises KeyboardInterrupt for SIGINT, Terminated for SIGTERM, HungUp for SIGHUP."""
    raise interrupt_of(number)


def interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """Interrupt that an exception is, or that it followed: an import that is interrupted may raise another error."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, KeyboardInterrupt):
            return cause
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return None


def exit_code_of(interrupt: KeyboardInterrupt) -> int:
    """Exit code after an interrupt: 128 + signal number, as in shells. Ctrl-C 130, SIGTERM 143, SIGHUP 129."""
    if isinstance(interrupt, HungUp):
        return 129
    return 143 if isinstance(interrupt, Terminated) else 130


def print_error(text: object) -> None:
    """Print an error message on stderr."""
    click.secho(f"error: {indented(without_secrets(str(text)))}", fg="red", bold=True, err=True)
