"""Stages that compute nothing, for `benchmarks.driver` and `benchmarks.scale`; their rows look like real ones.

The workers that run them load this module. It loads no torch, so that hundreds of encoders fit one machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pyarrow as pa

from vidshard.pipeline.rows import WORK_NUMBER, WORK_SCHEMA, EncodeStats, add_clips, add_payload, span_row
from vidshard.schemas.tokens import Payload, latents_payload, tokens_payload
from vidshard.schemas.video import Clip, ClipSpec, Geometry, Span, SpanClips, VideoSource

CLIPS_PER_SPAN = 10
FRAMES_SHARE = 100
SPEC = ClipSpec(fps=Fraction(8), num_frames=17, height=256, width=256)
PAYLOADS = {
    "tokens": tokens_payload((5, 32, 32), 32768),
    "KL-4": latents_payload((4, 5, 32, 32), keep_logvar=False),
    "KL-16": latents_payload((16, 5, 32, 32), keep_logvar=False),
}


def work_rows(first: int, count: int) -> pa.Table:
    """Rows of a work list: spans of ten clips, each of a video of its own."""
    spans = [
        Span(
            video_id=f"{number * 2654435761 % (1 << 96):024x}",
            uri=f"s3://a-bucket/videos/{number:012d}.mp4",
            time_base=Fraction(1, 90000),
            grid_start_pts=0,
            first_clip=0,
            end_clip=None,
            duration_seconds_from_header=CLIPS_PER_SPAN * 17 / 8,
            source=VideoSource(width=1280, height=720, codec="h264", fps=30.0, rotation_degrees=0),
        )
        for number in range(first, first + count)
    ]
    table = pa.Table.from_pylist([span_row(span, SPEC, None) for span in spans], schema=WORK_SCHEMA)
    return table.append_column(WORK_NUMBER, pa.array(range(first, first + count), pa.int64()))


@dataclass(frozen=True)
class StubDecoder:
    """Decode stage that opens no video."""

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Give each span ten clips of frames of a hundredth of their size."""
        geometry = Geometry(policy="crop", scaled_width=455, scaled_height=256, left=99, top=0)
        for at in range(rows.num_rows):
            row = rows.slice(at, 1)
            video_id = row["video_id"][0].as_py()
            clips = [
                Clip(
                    video_id=video_id,
                    clip_index=index,
                    frames=np.zeros((17, 25, 26, 3), np.uint8),
                    start_seconds=index * 17 / 8,
                    frame_pts_seconds=index * 17 / 8 + np.arange(17) / 8,
                    num_valid_frames=17,
                    geometry=geometry,
                )
                for index in range(CLIPS_PER_SPAN)
            ]
            yield add_clips(row, SpanClips(clips=clips), uri=row["uri"][0].as_py(), start_seconds=0.0, seconds=0.01)


class StubEncoder:
    """Encode stage that computes nothing: values are cut out of random ones at random places."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload
        self._random = np.random.default_rng()
        [column] = payload
        count = max(1 << 22, 8 * column.num_values)
        if column.codebook_size is None:
            self._values = self._random.standard_normal(count, np.float32).astype(np.float16)
        else:
            self._values = self._random.integers(0, column.codebook_size, count).astype(column.dtype)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Give each clip random values."""
        [column] = self._payload
        starts = self._random.integers(0, len(self._values) - column.num_values, rows.num_rows * CLIPS_PER_SPAN)
        clips = [self._values[start : start + column.num_values] for start in starts]
        return add_payload(
            rows, {column.name: clips}, self._payload, EncodeStats(seconds=0.1, wait_seconds=0.0, num_slots=len(clips))
        )


@dataclass(frozen=True)
class StubSpec:
    """Stands for ``EncoderSpec``."""

    payload: Payload

    def encoder(self) -> StubEncoder:
        """Make an encoder."""
        return StubEncoder(self.payload)
