"""Decode stage of an evaluation: clips of several frame rates and sizes from one pass over a video's frames.

Spans that overlap in time form a window. The spans of a window are decoded together, whatever clips they are of.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pyarrow as pa

from vidshard.pipeline.decode_stage import SpanDecoder, start_seconds
from vidshard.pipeline.rows import WORK_SCHEMA, row_span, row_spec
from vidshard.schemas.video import ClipSpec

GROUP = pa.field("group", pa.int32(), nullable=False)
"""Position of the row's clip settings among those of the evaluation."""
WINDOW = pa.field("window", pa.int64(), nullable=False)
"""Number of the window that the row belongs to; rows of one window are adjacent."""
_ROUNDING = 1e-6
"""Seconds by which the end of a span and the start of the next one may differ by rounding."""
WINDOW_SCHEMA = WORK_SCHEMA.append(GROUP).append(WINDOW)


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowDecoder:
    """Decodes the spans of each window in one pass, as `SpanDecoder` decodes spans of one kind of clips."""

    specs: tuple[ClipSpec, ...]
    """Clip settings by ``group``; each row gives its own frame size."""
    decoder: SpanDecoder
    """Limits of a video, and of one pass."""

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Decode rows of ``WINDOW_SCHEMA``; yields one table of one row for each, with frames or a rejection."""
        plan = rows.to_pylist()
        for _, numbers in groupby(range(len(plan)), key=lambda number: plan[number]["window"]):
            window = list(numbers)
            spans = [row_span(plan[number]) for number in window]
            specs = [row_spec(plan[number], self.specs[plan[number]["group"]]) for number in window]
            started = time.monotonic()
            outcomes = self.decoder.decode_together(spans, specs, plan[window[0]]["fingerprint"])
            seconds = (time.monotonic() - started) / len(window)
            for number, outcome, spec in zip(window, outcomes, specs, strict=True):
                yield self.decoder.with_outcome(rows.slice(number, 1), plan[number], outcome, spec, seconds)


def in_windows(rows: Sequence[dict[str, Any]], specs: Sequence[ClipSpec]) -> list[pa.Table]:
    """Sort spans into windows: a table of ``WINDOW_SCHEMA`` each.

    A window begins with a span, the longest of those that begin then, and holds every span of the video that begins
    before that one ends.

    Args:
        rows: rows of ``WORK_SCHEMA`` with ``group``.
        specs: clip settings by ``group``.
    """
    windows: list[list[dict[str, Any]]] = []
    until, uri = -math.inf, None
    for start, end, row in sorted((_seconds(row, specs) for row in rows), key=_order):
        if row["uri"] != uri or start >= until - _ROUNDING:
            windows.append([])
            until, uri = end, row["uri"]
        windows[-1].append(row | {"window": len(windows) - 1})
    return [pa.Table.from_pylist(window, schema=WINDOW_SCHEMA) for window in windows]


def _order(timed: tuple[float, float, dict[str, Any]]) -> tuple[str, str, float, float, int]:
    start, end, row = timed
    return row["uri"], str(row["fingerprint"]), start, -end, row["group"]


def _seconds(row: dict[str, Any], specs: Sequence[ClipSpec]) -> tuple[float, float, dict[str, Any]]:
    """Start and end of a row's span after the first frame, and the row."""
    span, spec = row_span(row), specs[row["group"]]
    start = start_seconds(span, spec)
    if span.end_clip is None:
        return start, math.inf, row
    return start, start + float((span.end_clip - span.first_clip) * spec.stride), row
