"""History of an output: the figures of each run that wrote to it, and its speed over time, in ``history/*.json``.

``summary.json`` holds the latest run alone. A run that was killed leaves no figures here; its clips are in the shards.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import HISTORY
from vidshard.schemas.tokens import parse_json

MAX_POINTS = 240
"""Most points of a timeline."""
MAX_RUNS = 200
"""Most runs that are read, the latest ones: a run on preemptible machines may have been started a thousand times."""
_MAX_BYTES = 1 << 20


@dataclass(kw_only=True)
class Timeline:
    """Counts of a run over time since this object was made, in at most `MAX_POINTS` points however long it takes."""

    points: list[tuple[float, int, int]] = field(default_factory=list)
    """Seconds since the start, clips and rejections so far; each non-decreasing."""
    started: float = field(default_factory=time.monotonic)
    _every: float = 0.5
    _clips: int = 0
    _rejections: int = 0

    def count(self, clips: int, rejections: int) -> None:
        """Count what came out, and add a point unless the last one is too near."""
        self._clips += clips
        self._rejections += rejections
        seconds = time.monotonic() - self.started
        if self.points and seconds - self.points[-1][0] < self._every:
            return
        self._add(seconds)
        if len(self.points) >= MAX_POINTS:
            self.points = self.points[1::2]
            self._every *= 2

    def end(self) -> list[tuple[float, int, int]]:
        """All points, the last one now."""
        self._add(time.monotonic() - self.started)
        return self.points

    def _add(self, seconds: float) -> None:
        self.points.append((round(seconds, 2), self._clips, self._rejections))


def save_to_history(out: str, record: Mapping[str, Any]) -> None:
    """Write the figures of a run as one more file.

    Raises:
        storage.StorageError: it could not be written.
    """
    name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}.json"
    storage.write_atomic(storage.join(out, HISTORY, name), json.dumps(record, indent=1).encode())


def read_history(out: str) -> list[dict[str, Any]]:
    """Read the figures of the latest `MAX_RUNS` runs, oldest first; a damaged file is left out.

    Raises:
        storage.StorageError: the output could not be read.
    """
    found = []
    for path in storage.list_files(storage.join(out, HISTORY), ".json")[-MAX_RUNS:]:
        with suppress(ValueError):
            record = parse_json(storage.read_bytes(path, max_bytes=_MAX_BYTES), "history")
            if isinstance(record, dict):
                found.append(record)
    return found
