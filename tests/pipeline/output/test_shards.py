"""Shards give back what was written to them, whatever the codebook or the latents."""

from __future__ import annotations

import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vidshard.pipeline.output.commit import TokenShardSink
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.shard_reader import read_clips, read_payloads
from vidshard.pipeline.output.shard_writer import ShardSettings
from vidshard.pipeline.rows import WORK_SCHEMA, EncodeStats, add_clips, add_payload, span_row
from vidshard.schemas.tokens import Payload, Provenance, latents_payload, tokens_payload
from vidshard.schemas.video import Clip, ClipSpec, Geometry, Span, SpanClips, VideoSource

SPEC = ClipSpec(fps=Fraction(8), num_frames=1, height=8, width=8)
SOURCE = VideoSource(width=8, height=8, codec="h264", fps=8.0, rotation_degrees=0)


def span_rows(num_clips: int) -> pa.Table:
    """One decoded span of so many clips."""
    span = Span(
        video_id="v",
        uri="v.mp4",
        time_base=Fraction(1, 8),
        grid_start_pts=0,
        first_clip=0,
        end_clip=None,
        duration_seconds_from_header=1.0,
        source=SOURCE,
    )
    clips = [
        Clip(
            video_id="v",
            clip_index=index,
            frames=np.zeros((1, 8, 8, 3), np.uint8),
            frame_pts_seconds=np.array([index / 8]),
            num_valid_frames=1,
            start_seconds=index / 8,
            geometry=Geometry(policy="crop", scaled_width=8, scaled_height=8, left=0, top=0),
        )
        for index in range(num_clips)
    ]
    plan = pa.Table.from_pylist([span_row(span, SPEC, None)], schema=WORK_SCHEMA)
    return add_clips(plan, SpanClips(clips=clips), uri="v.mp4", start_seconds=0.0, seconds=0.1)


def written_and_read(values: np.ndarray[Any, Any], payload: Payload) -> np.ndarray[Any, Any]:
    provenance = Provenance(
        tokenizer={},
        weights_sha256="0",
        weights_source="seed:0",
        payload=payload,
        run={},
        identity={},
        code_version="0",
        libraries={},
    )
    with tempfile.TemporaryDirectory() as out:
        settings = ShardSettings(
            out=out, buckets=((SPEC, payload),), provenance=provenance, shard_bytes=1 << 20, commit_seconds=60.0
        )
        sink = TokenShardSink(settings)
        stats = EncodeStats(seconds=0.0, wait_seconds=0.0, num_slots=len(values))
        flat = list(values.reshape(len(values), -1))
        sink.add(add_payload(span_rows(len(values)), {payload[0].name: flat}, payload, stats))
        sink.close()
        (path,) = shard_paths(out)
        assert Path(path).suffix == ".parquet"
        clips = np.stack([clip.payload[payload[0].name] for clip in read_clips(path)])
        groups = [arrays[payload[0].name] for arrays in read_payloads(path)]
        np.testing.assert_array_equal(np.concatenate(groups), clips)
        return clips


def test_several_threads_write_each_clip_once(tmp_path: Path) -> None:
    payload = tokens_payload((1, 1, 1), 256)
    provenance = Provenance(
        tokenizer={},
        weights_sha256="0",
        weights_source="seed:0",
        payload=payload,
        run={},
        identity={},
        code_version="0",
        libraries={},
    )
    settings = ShardSettings(
        out=str(tmp_path), buckets=((SPEC, payload),), provenance=provenance, shard_bytes=2, commit_seconds=60.0
    )
    sink = TokenShardSink(settings, num_threads=3)
    stats = EncodeStats(seconds=0.0, wait_seconds=0.0, num_slots=1)
    for number in range(20):
        row = span_rows(1)
        for name, value in (("span_id", f"{number}-0-end"), ("video_id", f"{number}")):
            row = row.set_column(row.schema.get_field_index(name), row.schema.field(name), pa.array([value]))
        sink.add(add_payload(row, {"tokens": [np.array([number], np.uint8)]}, payload, stats))
    sink.close()
    paths = shard_paths(str(tmp_path))
    clips = [
        (clip.values["video_id"], int(clip.payload["tokens"].item())) for path in paths for clip in read_clips(path)
    ]
    assert sorted(clips) == sorted((str(number), number) for number in range(20))
    assert (sink.committed.num_shards, sink.committed.num_clips) == (len(paths), 20) == (10, 20)


SHAPES = hnp.array_shapes(min_dims=4, max_dims=4, min_side=1, max_side=4)
"""Clips, then T', H', W'."""


@pytest.mark.parametrize(
    ("codebook_size", "dtype"),
    [
        (2, np.uint8),
        (256, np.uint8),
        (257, np.uint16),
        (4096, np.uint16),
        (65536, np.uint16),
        (65537, np.uint32),
        (262144, np.uint32),
        (2**31 - 1, np.uint32),
    ],
)
@given(data=st.data())
@settings(deadline=None, max_examples=8)
def test_tokens_come_back_from_a_shard_as_they_went_in(
    codebook_size: int, dtype: type[np.unsignedinteger[Any]], data: st.DataObject
) -> None:
    shape = data.draw(SHAPES)
    tokens = data.draw(hnp.arrays(dtype, shape, elements=st.integers(0, codebook_size - 1)))
    tokens.flat[0] = codebook_size - 1
    payload = tokens_payload(shape[1:], codebook_size)
    assert np.dtype(payload[0].dtype) == dtype
    read = written_and_read(tokens, payload)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, tokens)


@given(data=st.data())
@settings(deadline=None, max_examples=20)
def test_latents_come_back_from_a_shard_bit_for_bit(data: st.DataObject) -> None:
    clips, *grid = data.draw(SHAPES)
    # every finite float16 by its bits: magnitudes below infinity's 0x7C00, then the same with a sign
    drawn = data.draw(hnp.arrays(np.uint16, (clips, 3, *grid), elements=st.integers(0, 2 * 0x7C00 - 1)))
    latents = np.where(drawn < 0x7C00, drawn, drawn - 0x7C00 + 0x8000).astype(np.uint16).view(np.float16)
    assert np.isfinite(latents).all()
    read = written_and_read(latents, latents_payload((3, *grid), keep_logvar=False))
    assert read.dtype == np.float16
    np.testing.assert_array_equal(read.view(np.uint16), latents.view(np.uint16))
