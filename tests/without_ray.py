"""A run's flow in the test's own process: the same stages on the same rows in the same portions.

For tests of what is stored and read, where Ray's processes, which take seconds to start for every run, are not the
point. `tests.test_flow` and those beside it that interrupt and kill hold the same flow on Ray against the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.encode import ClipEncoder, EncoderSpec
from pipeline.flow import Placement
from pipeline.stages import SpanDecoder


class StopSignHere:
    """Never raised, as nobody interrupts."""

    def is_raised(self) -> bool:
        """As of `StopSign`."""
        return False


class FlowHere:
    """In place of the dataset that `build_flow` gives; takes what that takes."""

    def __init__(self, plan: str | pa.Table, *, decoder: SpanDecoder, encoder: EncoderSpec, placement: Placement):
        if isinstance(plan, str):
            with storage.open_binary(plan) as file:
                plan = pq.ParquetFile(file).read()
        self._plan = plan
        self._decoder = decoder
        self._encode = ClipEncoder(replace(encoder, num_threads=1))
        self._placement = placement

    def iter_batches(self, **_format: Any) -> Iterator[pa.Table]:
        """Encoded rows, a table for each of the encoder's batches."""
        held: list[pa.Table] = []
        for row in self._decoded():
            held.append(row)
            if len(held) == self._placement.rows_per_batch:
                yield self._encode(pa.concat_tables(held))
                held = []
        if held:
            yield self._encode(pa.concat_tables(held))

    def _decoded(self) -> Iterator[pa.Table]:
        size = self._placement.rows_per_task
        for at in range(0, self._plan.num_rows, size):
            yield from self._decoder(self._plan.slice(at, size).combine_chunks())
