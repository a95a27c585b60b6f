"""Checks the shell commands that documentation shows, without running their jobs.

A ``vidshard`` command goes through the real command line with every job replaced: its flags have to exist and its
values to be valid. Of other programs, what they name in the checkout has to exist.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import click

from tests.support.markdown import ROOT
from vidshard.jobs import cli


class CommandError(Exception):
    """A command in the documentation cannot work; the message says why."""


class _JobReachedError(BaseException):
    """The command line has accepted everything and calls the job."""


def check_command(command: str) -> None:
    """Check one shell command.

    Raises:
        CommandError: an unknown program, command, flag, target, module or file, or an impossible value.
    """
    words = shlex.split(command, comments=True)
    if not words:
        return
    program, arguments = words[0], words[1:]
    check = {
        "vidshard": _check_vidshard,
        "make": _check_make,
        "python": _check_python,
        "pip": _check_pip,
        "pytest": _check_pytest,
        "docker": _check_docker,
    }.get(program)
    if check is None:
        raise CommandError(f"{command}: nothing here knows the program {program!r}")
    try:
        check(arguments)
    except CommandError as error:
        raise CommandError(f"{command}: {error}") from error


def _check_vidshard(arguments: list[str]) -> None:
    with _jobs_replaced(), redirect_stderr(io.StringIO()) as said, redirect_stdout(io.StringIO()):
        try:
            cli.vidshard.main(arguments, standalone_mode=False)
        except _JobReachedError:
            return
        except click.exceptions.Exit as ending:
            _check_exit_code(ending.exit_code, said.getvalue())
        except SystemExit as ending:
            _check_exit_code(ending.code, said.getvalue())
        except click.ClickException as error:
            raise CommandError(error.format_message()) from error
        except Exception as error:
            raise CommandError(f"{type(error).__name__}: {error}") from error


def _check_exit_code(code: object, said: str) -> None:
    if code not in (0, None):
        raise CommandError(f"exit code {code}: {said.strip()}")


@contextmanager
def _jobs_replaced() -> Iterator[None]:
    """Every function that ``jobs/commands/`` imports inside a command raises `_JobReachedError` instead of working."""

    def reached(*_: object, **__: object) -> None:
        raise _JobReachedError

    patches = []
    nodes = (node for path in (ROOT / "jobs/commands").glob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.col_offset and node.module:
            module = importlib.import_module(node.module)
            names = [alias.name for alias in node.names if inspect.isfunction(getattr(module, alias.name))]
            patches += [patch.object(module, name, reached) for name in names]
    for job in patches:
        job.start()
    try:
        yield
    finally:
        for job in reversed(patches):  # one function may be imported by several commands
            job.stop()


def _check_make(arguments: list[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    for word in arguments:
        if "=" in word:
            if not re.search(rf"(?m)^{word.split('=')[0]} \?=", text):
                raise CommandError(f"the Makefile has no variable {word.split('=')[0]}")
        elif not re.search(rf"(?m)^{re.escape(word)}:", text):
            raise CommandError(f"the Makefile has no target {word}")


def _check_python(arguments: list[str]) -> None:
    if arguments[:1] != ["-m"]:
        raise CommandError("only `python -m MODULE` is understood")
    spec = importlib.util.find_spec(arguments[1])
    if spec is None or spec.origin is None:
        raise CommandError(f"there is no module {arguments[1]}")
    source = Path(spec.origin).read_text()
    for flag in (word for word in arguments[2:] if word.startswith("--")):
        if f'"{flag}"' not in source:
            raise CommandError(f"{arguments[1]} has no {flag}")


def _check_pip(arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"vidshard\[([^\]]+)\]", " ".join(arguments)):
        for extra in extras.split(","):
            if extra not in project["optional-dependencies"]:
                raise CommandError(f"pyproject.toml has no extra {extra}")


def _check_pytest(arguments: list[str]) -> None:
    for word in arguments:
        if "/" in word and not (ROOT / word).exists():
            raise CommandError(f"there is no {word}")


def _check_docker(arguments: list[str]) -> None:
    text = (ROOT / "Dockerfile").read_text()
    for name in re.findall(r"--build-arg (\w+)", " ".join(arguments)):
        if not re.search(rf"(?m)^ARG {name}\b", text):
            raise CommandError(f"the Dockerfile has no argument {name}")


def known_flags() -> set[str]:
    """Every flag of every command of vidshard, hidden ones included, of the benchmarks, and in the files of deploy/."""
    flags = {"--help", "--version"}

    def collect(command: click.Command) -> None:
        flags.update(o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--"))
        for child in getattr(command, "commands", {}).values():
            collect(child)

    collect(cli.vidshard)
    for path in [*(ROOT / "benchmarks").glob("*.py"), ROOT / "tests/support/fuzz.py"]:
        flags.update(re.findall(r'"(--[a-z][a-z0-9-]*)"', path.read_text()))
    for path in (ROOT / "deploy").iterdir():
        flags.update(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", path.read_text()))
    return flags


def command_names() -> set[str]:
    """Names of the commands of vidshard."""
    return set(cli.vidshard.commands)
