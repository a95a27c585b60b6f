"""Processor time of processes and of those that they started."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def tree_seconds(pid: int, without: int | None = None) -> float:
    """Processor seconds of a process, its children, theirs, and all that these have waited for.

    Args:
        pid: the process.
        without: one that does not count.
    """
    seconds = 0.0
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended, and its parent counts it
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        seconds = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            children = [int(child) for child in path.read_text().split()]
            seconds += sum(tree_seconds(child, without) for child in children if child != without)
    return seconds
