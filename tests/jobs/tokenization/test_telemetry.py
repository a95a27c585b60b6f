"""Telemetry of a run: how far the writers are behind what came out."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from vidshard.jobs.tokenization.telemetry import Telemetry
from vidshard.pipeline.output.shard_writer import WriteStats
from vidshard.pipeline.rows import RECEIPT_SCHEMA


def receipts(clips: int) -> pa.Table:
    row: dict[str, Any] = {field.name: 0 for field in RECEIPT_SCHEMA}
    row |= {
        "todo_number": 0,
        "span_id": "a",
        "num_clips": clips,
        "is_last": False,
        "rejection": None,
        "is_recut": False,
    }
    return pa.Table.from_pylist([row], schema=RECEIPT_SCHEMA)


def test_the_lag_is_the_age_of_the_oldest_clip_that_is_in_no_committed_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, float] = {}
    now = 0.0
    monkeypatch.setattr("vidshard.jobs.tokenization.telemetry.time.monotonic", lambda: now)
    told = Telemetry(Console(file=io.StringIO()))
    monkeypatch.setattr(told._metrics, "set", found.__setitem__)

    def lag() -> tuple[float, float]:
        told.tick()
        return found["writer_lag_seconds"], found["clips_uncommitted"]

    assert lag() == (0, 0)
    told.took(receipts(4), [])
    now = 10.0
    told.took(receipts(2), [])
    assert lag() == (10, 6)
    told.committed("shard", WriteStats(num_clips=3))
    assert lag() == (10, 3)
    told.committed("shard", WriteStats(num_clips=1))
    now = 15.0
    assert lag() == (5, 2)
    told.committed("shard", WriteStats(num_clips=99))
    assert lag() == (0, 0)
