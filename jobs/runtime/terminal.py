"""The console of a command: whatever is printed on it, foreign text cannot steer the terminal."""

from __future__ import annotations

import sys
from typing import Any

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


def output_console() -> SafeConsole:
    """Console on standard output: as wide as the terminal; 160 columns without a line limit where there is none."""
    if sys.stdout.isatty():
        return SafeConsole()
    return SafeConsole(width=160, soft_wrap=True)  # a pipe has no width of its own, and tables need one


def _safe(value: Any) -> Any:
    if isinstance(value, str):
        return readable_lines(value)
    if isinstance(value, Text) and readable_lines(value.plain) != value.plain:
        return Text(readable_lines(value.plain), style=value.style)
    return value
