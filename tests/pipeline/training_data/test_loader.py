"""Blocks and batches of training clips."""

from __future__ import annotations

from fractions import Fraction

import pyarrow as pa

from vidshard.pipeline.training_data.loader import (
    CLIP_SCHEMA,
    batches,
    rows_per_block,
)
from vidshard.schemas.training import StageConfig

STAGE = StageConfig(frames=3, size=(32, 32), fps=Fraction(4), batch_size=4)
SPEC = STAGE.clip_spec(clips_per_video=2)


def test_blocks_divide_a_batch_and_stay_small() -> None:
    assert rows_per_block(4, SPEC) == 4
    large = StageConfig(frames=17, size=(1024, 1024)).clip_spec(clips_per_video=1)  # 53 MB a clip
    assert rows_per_block(4, large) == 1
    middle = StageConfig(frames=17, size=(384, 384)).clip_spec(clips_per_video=1)  # 7.5 MB: four fit
    assert rows_per_block(6, middle) == 3


def test_batches_know_how_long_they_were_waited_for_and_begin_where_they_shall() -> None:
    def table(first: int) -> pa.Table:
        rows = [
            {"sample": first + n, "video_id": "v", "uri": "u", "frames": bytes(SPEC.clip_bytes), "rejected": []}
            for n in range(2)
        ]
        return pa.Table.from_pylist(rows, schema=CLIP_SCHEMA)

    times = iter([0.0, 1.0, 5.0, 5.5, 6.0, 6.25, 9.0, 9.0])
    got = list(batches(iter([table(4), table(6), table(8)]), SPEC, first=6, clock=lambda: next(times)))
    assert [batch.samples for batch in got] == [[6, 7], [8, 9]]
    assert [batch.wait_seconds for batch in got] == [0.5, 0.25]
