"""Sections of a long benchmark, each of which may fail, hang or take its process with it without costing the others.

A supervisor runs the sections in a child process and reads their rows line by line. When the child dies or a section
passes its limit, that is a row too, and a new child does the sections that are left. The JSON file is written after
every row, so that an interrupted benchmark leaves what it measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import Row

_MARK = "\x1evidshard "
"""Start of the lines that a child writes for its supervisor."""


@dataclass(frozen=True)
class Section:
    """Part of a benchmark."""

    run: Callable[[Rows], None]
    seconds: float
    """Usual time, start of the process not included; it is stopped after three times as long."""
    needs_gpu: bool = False


class Rows:
    """Rows of a section, in the child process."""

    def __init__(self, name: str) -> None:
        self._name = name

    def add(self, section: str, what: str, value: float | str, unit: str, note: str = "") -> None:
        """Give a row to the supervisor."""
        shown = value if isinstance(value, str) else float(f"{value:.4g}")
        _say("row", {"section": section, "what": what, "value": shown, "unit": unit, "note": note})

    def fail(self, error: Exception) -> None:
        """Give the message of an exception."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.add(self._name, "failed", "-", "", text)


def run_here(sections: Mapping[str, Section], names: Sequence[str], *, after_failure: Callable[[], None]) -> None:
    """Run sections in this process, which is a child of `supervise`."""
    for name in names:
        _say("begin", name)
        rows = Rows(name)
        try:
            sections[name].run(rows)
        except Exception as error:  # noqa: BLE001  one section must not take the others with it
            rows.fail(error)
            after_failure()
        _say("end", name)


@dataclass
class Supervisor:
    """State of a benchmark whose sections run in child processes."""

    name: str
    command: Sequence[str]
    """Command of a child, which is followed by the names of sections, comma-separated."""
    minutes: float
    json_path: str | None
    rows: list[Row] = field(default_factory=list)

    def supervise(self, limits: Mapping[str, float]) -> list[Row]:
        """Run the sections.

        Args:
            limits: usual seconds of each section; after three times as many it is stopped.

        Returns:
            All rows.
        """
        end = time.monotonic() + 60 * self.minutes
        left = list(limits)
        while left:
            needed = limits[left[0]]
            if end - time.monotonic() < needed:
                self._add(left.pop(0), "skipped", f"takes some {needed:.0f} s, {end - time.monotonic():.0f} s are left")
                continue
            left = self._run_child(left, limits, end)
        return self.rows

    def _run_child(self, names: list[str], limits: Mapping[str, float], end: float) -> list[str]:
        """Run a child until it ends or must be stopped; returns the sections that are left."""
        child = subprocess.Popen(
            [*self.command, ",".join(names)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            errors="replace",
        )
        lines: queue.Queue[str | None] = queue.Queue()
        assert child.stdout is not None
        reader = threading.Thread(target=_read, args=(child.stdout, lines), daemon=True)
        reader.start()
        left, current, deadline = list(names), names[0], time.monotonic() + 3 * limits[names[0]] + _START_SECONDS
        try:
            while True:
                try:
                    line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    self._add(current, "stopped", "it took more than three times as long as it should")
                    return left[left.index(current) + 1 :]
                if line is None:
                    code = child.wait()
                    if left:
                        self._add(current, "failed", f"its process ended with code {code}")
                        return left[left.index(current) + 1 :]
                    return []
                kind, value = _parsed(line)
                if kind == "row":
                    self._append(value)
                elif kind == "begin":
                    current = value
                    if end - time.monotonic() < limits[current]:
                        return left  # the supervisor says which ones are skipped
                    deadline = min(time.monotonic() + 3 * limits[current], end + _GRACE_SECONDS)
                elif kind == "end":
                    left.remove(value)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def _add(self, section: str, what: str, note: str) -> None:
        self._append({"section": section, "what": what, "value": "-", "unit": "", "note": note})

    def _append(self, row: Row) -> None:
        self.rows.append(row)
        print(" ".join(str(value) for value in row.values()).rstrip(), flush=True)
        if self.json_path:
            text = json.dumps({"benchmark": self.name, "rows": self.rows}, indent=2) + "\n"
            partial = Path(f"{self.json_path}.partial")
            partial.write_text(text)
            partial.replace(self.json_path)


_START_SECONDS = 60.0
"""Time that the start of a child may take."""
_GRACE_SECONDS = 30.0
"""Time that the last section may take beyond the end."""


def _say(kind: str, value: Any) -> None:
    print(f"{_MARK}{json.dumps([kind, value])}", flush=True)


def _parsed(line: str) -> tuple[str, Any]:
    """Message of a child, or a line that something else printed."""
    if _MARK in line:
        try:
            kind, value = json.loads(line.split(_MARK, 1)[1])
        except ValueError:
            return "", None
        return kind, value
    print(line, end="", file=sys.stderr, flush=True)
    return "", None


def _read(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
