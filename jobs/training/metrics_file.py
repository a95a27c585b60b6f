"""File of a training stage's metrics, ``metrics.jsonl``: a line for each time that figures were taken."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from vidshard.pipeline import storage
from vidshard.schemas.training import current_metrics

METRICS = "metrics.jsonl"


def read_metrics(folder: str) -> list[dict[str, Any]]:
    """Read a stage's ``metrics.jsonl``: step, group and figures of each line; what is no record is skipped."""
    path = storage.join(folder, METRICS)
    known = []
    for line in storage.read_bytes(path).decode(errors="replace").splitlines() if storage.exists(path) else ():
        with suppress(ValueError, RecursionError):
            known.append(json.loads(line))
    return [current_metrics(line) for line in known if _is_record(line)]


def _is_record(line: object) -> bool:
    """Whether a line has a step, a group, and nothing but numbers beside them."""
    if not isinstance(line, dict) or not isinstance(line.get("group"), str) or type(line.get("step")) is not int:
        return False
    return all(isinstance(value, (int, float)) for name, value in line.items() if name != "group")
