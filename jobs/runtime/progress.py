"""Progress display of a job: one live line on a terminal, otherwise a plain line about every ten seconds."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.text import Text

from vidshard.schemas.text import readable_lines

PLAIN_INTERVAL_SECONDS = 10.0
"""Shortest time between two lines where the output is not a terminal."""


class PhaseProgress:
    """Progress of one phase of a job, as a context manager."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console = console
        self._title = title
        self._total = max(total, 1)
        self._done = 0.0
        self._started = time.monotonic()
        self._printed = -math.inf
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=self._total, figures="starting")

    def __enter__(self) -> PhaseProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the start of the phase."""
        return time.monotonic() - self._started

    def update(self, done: float, figures: str) -> None:
        """Update the display.

        Args:
            done: units completed; values above the total are shown as the total.
            figures: text after the bar.
        """
        self._done = min(done, self._total)
        left = self.seconds * (self._total - self._done) / self._done if self._done else None
        line = figures + (f" · {_duration(left)} left" if left is not None and self._done < self._total else "")
        self._progress.update(self._task, completed=self._done, figures=line)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._printed >= PLAIN_INTERVAL_SECONDS:
            self._printed = now
            self._console.print(f"{self._title}: {self._done / self._total:.0%} · {line}", highlight=False)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def warn(console: Console, text: str) -> None:
    """Print a warning, marked by ``!!`` and by color."""
    print_alert(console, f"!! {text}", style="bold yellow")


def print_alert(console: Console, text: str, *, style: str) -> None:
    """Print a message that may quote foreign text; lines after the first are indented, so that none passes for ours."""
    console.print(Text(indented(text), style=style))


def indented(text: object) -> str:
    """A message safe to print, its lines after the first indented."""
    first, *others = readable_lines(text).split("\n")
    return "\n".join([first, *(line if line.startswith("  ") else f"  {line}" for line in others)])
