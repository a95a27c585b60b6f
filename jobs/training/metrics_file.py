"""File of a training stage's metrics, ``metrics.jsonl``: a line for each time that figures were taken."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from vidshard.pipeline import storage
from vidshard.schemas.training import current_metrics

METRICS = "metrics.jsonl"


def read_metrics(folder: str) -> list[dict[str, Any]]:
    """Read a stage's ``metrics.jsonl``: step, group and figures of each line; a line that a kill cut off is skipped."""
    path = storage.join(folder, METRICS)
    known = []
    for line in storage.read_bytes(path).decode(errors="replace").splitlines() if storage.exists(path) else ():
        with suppress(ValueError):
            known.append(json.loads(line))
    return [current_metrics(line) for line in known if isinstance(line, dict) and "step" in line and "group" in line]
