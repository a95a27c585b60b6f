"""The console of a command: whatever is printed on it, foreign text cannot steer the terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from vidshard.schemas.text import readable_lines


class SafeConsole(Console):
    """A rich console that writes control characters and bidirectional marks as escapes.

    Values that may hold line breaks are made readable where they are put into a line; this is the net below.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as ``rich.console.Console.print`` does."""
        super().print(*map(_safe, objects), **options)


def output_console(*, stderr: bool = False) -> SafeConsole:
    """Console on standard output: as wide as the terminal; 160 columns without a line limit where there is none.

    Args:
        stderr: use standard error instead, as standard output is for JSON.
    """
    if (sys.stderr if stderr else sys.stdout).isatty():
        return SafeConsole(stderr=stderr)
    return SafeConsole(width=160, soft_wrap=True, stderr=stderr)  # a pipe has no width of its own, tables need one


json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the result as one JSON object on standard output, and the report on standard error.",
)
"""Flag of a command whose result schedulers read."""


def print_json(record: Mapping[str, Any]) -> None:
    """Print a JSON object on one line of standard output, in ASCII, so that no value can steer a terminal.

    Args:
        record: JSON values; numbers that are not finite become null, which JSON lacks.
    """
    sys.stdout.write(json.dumps(finite(record), ensure_ascii=True, allow_nan=False) + "\n")


def print_field(console: Console, name: str, text: str) -> None:
    """Print a line of a result: a name in a column of its own, and a text that is not wrapped.

    Args:
        text: foreign parts of it are made readable by the caller.
    """
    console.print(f"  {name:<12}{text}", highlight=False, markup=False, soft_wrap=True)


def finite(value: Any) -> Any:
    """A JSON value in which numbers that are not finite are null, as JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value


def _safe(value: Any) -> Any:
    if isinstance(value, str):
        return readable_lines(value)
    if isinstance(value, Text) and readable_lines(value.plain) != value.plain:
        return Text(readable_lines(value.plain), style=value.style)
    return value
