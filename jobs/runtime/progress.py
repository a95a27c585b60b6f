"""Progress display of a job: one live line on a terminal, otherwise a plain line about every ten seconds, or none.

``--progress`` chooses another one. Each plain line is also an event of ``--log-json`` (`jobs.runtime.events`).
"""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.text import Text

from vidshard.jobs.runtime.events import events_of, mode_of
from vidshard.schemas.text import indented

PLAIN_INTERVAL_SECONDS = 10.0
"""Shortest time between two plain lines, and between two events."""


class PhaseProgress:
    """Progress of one phase of a job, as a context manager."""

    def __init__(self, console: Console, title: str, total: int, *, begun: float = 0.0) -> None:
        """Begin a phase.

        Args:
            total: units of work.
            begun: units of them that an earlier run did.
        """
        self._begun = begun
        self._shown: tuple[float, str] | None = None
        self._console = console
        self._title = title
        self._total = max(total, 1)
        self._done = 0.0
        self._started = time.monotonic()
        self._printed = -math.inf
        mode = mode_of(console)
        self._is_plain = mode == "plain"
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            console=_forced(console) if mode == "live" else console,
            transient=True,
            refresh_per_second=4,
            disable=mode != "live",
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
        own = self._done - self._begun
        left = self.seconds * (self._total - self._done) / own if own > 0 else None
        line = figures + (f" · {_duration(left)} left" if left is not None and self._done < self._total else "")
        self._progress.update(self._task, completed=self._done, figures=line)
        now = time.monotonic()
        if now - self._printed >= PLAIN_INTERVAL_SECONDS:
            self._printed = now
            if self._is_plain and self._shown != (self._done, figures):  # the time left alone is no news
                self._shown = self._done, figures
                self._console.print(f"{self._title}: {self._done / self._total:.0%} · {line}", highlight=False)
            events_of(self._console).emit(
                "progress",
                phase=self._title,
                done=self._done,
                total=self._total,
                seconds=round(self.seconds, 1),
                left_seconds=None if left is None else round(left, 1),
                text=line,
            )


def _forced(console: Console) -> Console:
    """A console for a live line where the output is no terminal, as ``--progress live`` asks for."""
    if console.is_terminal:
        return console
    return Console(file=console.file, force_terminal=True, width=160, quiet=console.quiet)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def warn(console: Console, text: str) -> None:
    """Print a warning, marked by ``!!`` and by color; it is an event too."""
    print_alert(console, f"!! {text}", style="bold yellow")
    events_of(console).emit("warning", text=text)


def print_alert(console: Console, text: str, *, style: str) -> None:
    """Print a message that may quote foreign text; lines after the first are indented, so that none passes for ours."""
    console.print(Text(indented(text), style=style))
