"""Flow of an evaluation in this process, without Ray: for small machines, debugging and most tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from vidshard.pipeline.evaluation.decoder import WindowDecoder

Scorer = Callable[[pa.Table], pa.Table]
"""A stage such as `ClipScorer`: rows of decoded spans, or of stored clips, to rows of ``SCORED_SCHEMA``."""


def score_locally(
    blocks: Sequence[pa.Table], *, decoder: WindowDecoder | None, make: Callable[[Any], Scorer], spec: Any
) -> Iterator[pa.Table]:
    """Decode and score rows in this process, as `pipeline.evaluation.flow.score_on_ray`."""
    score = make(spec)
    for block in blocks:
        decoded: Iterable[pa.Table] = [block] if decoder is None else decoder(block)
        for table in decoded:
            yield score(table)
