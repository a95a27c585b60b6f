"""Flow of an evaluation in this process, without Ray: for small machines, debugging and most tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from vidshard.pipeline.decode_stage import SpanDecoder

Scorer = Callable[[pa.Table], pa.Table]
"""A stage such as `ClipScorer`: rows of decoded spans, or of stored clips, to rows of ``SCORED_SCHEMA``."""


def score_locally(
    rows: pa.Table, *, decoder: SpanDecoder | None, make: Callable[[Any], Scorer], spec: Any
) -> Iterator[pa.Table]:
    """Decode and score rows in this process, as `pipeline.evaluation.flow.score_on_ray`."""
    score = make(spec)
    for number in range(rows.num_rows):
        row = rows.slice(number, 1).combine_chunks()
        decoded: Iterable[pa.Table] = [row] if decoder is None else decoder(row)
        for table in decoded:
            yield score(table)
