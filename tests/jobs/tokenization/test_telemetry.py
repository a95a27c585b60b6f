"""Telemetry of a run: how far the writers are behind what came out, and what counts once though it came twice."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from vidshard.jobs.tokenization.collect import SpanCounter
from vidshard.jobs.tokenization.telemetry import Telemetry
from vidshard.pipeline.output.shard_writer import WriteStats
from vidshard.pipeline.rows import RECEIPT_SCHEMA, WORK_NUMBER


def receipts(clips: int, **more: Any) -> pa.Table:
    row: dict[str, Any] = {field.name: 0 for field in RECEIPT_SCHEMA}
    row |= {"span_id": "a", "num_clips": clips, "is_last": False, "rejection": None, "is_recut": False, **more}
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
    told.took(receipts(2), [])
    told.begun_again(7)
    assert lag() == (0, 0), "what was lost with its writer is in no queue"
    assert found["spans_left"] == 7
    told.took(receipts(2), [])
    assert (lag(), found["spans_left"]) == ((0, 2), 6)


@given(
    spans=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 99), st.booleans(), st.booleans()), min_size=1, max_size=6
    ),
    data=st.data(),
)
@settings(deadline=None)
def test_spans_that_are_done_again_after_a_lost_writer_count_once(spans: list[Any], data: st.DataObject) -> None:
    rejection: dict[str, Any] = {field.name: None for field in RECEIPT_SCHEMA.field("rejection").type}

    def come(counter: SpanCounter, numbers: list[int], reasons: Counter[str]) -> None:
        for number in numbers:
            clips, frames, is_last, is_broken = spans[number]
            row = receipts(
                clips,
                **{WORK_NUMBER.name: number, "num_valid_frames": frames, "is_last": is_last, "is_recut": is_broken},
                rejection=rejection | {"reason": "decode_error"} if is_broken else None,
            )
            reasons.update(one["reason"] for _, _, one in counter.take(row)[1])

    def counted(counter: SpanCounter) -> tuple[int, ...]:
        return counter.clips, counter.num_frames, counter.videos, counter.recut, counter.num_awaited

    every = list(range(len(spans)))
    once, again = (SpanCounter(is_awaited=np.ones(len(spans), np.bool_)) for _ in range(2))
    expected: Counter[str] = Counter()
    come(once, every, expected)
    reasons: Counter[str] = Counter()
    for _ in range(2):
        come(again, data.draw(st.lists(st.sampled_from(every))), reasons)
        lost = np.array(data.draw(st.lists(st.booleans(), min_size=len(spans), max_size=len(spans))))
        reasons -= again.await_again(lost | again.is_awaited)
    come(again, every, reasons)
    assert counted(again) == counted(once)
    assert reasons == expected
