"""Rows of the flow: bytes of frames that crossed the network."""

from __future__ import annotations

import pyarrow as pa

from tests.support.encoding import clip_spec, decoded_row
from vidshard.pipeline.rows import DECODED_ON, frame_bytes
from vidshard.schemas.rejections import Reason, VideoError


def test_frames_of_another_node_count_as_moved_and_rejected_rows_have_none() -> None:
    spec = clip_spec(32)
    refused = VideoError(Reason.TRUNCATED, "no frames")
    rows = pa.concat_tables(
        [decoded_row(0, spec, 2), decoded_row(1, spec, 1), decoded_row(2, spec, 0, refused), decoded_row(3, spec, 3)]
    )
    rows = rows.append_column(DECODED_ON, pa.array(["here", "there", "there", "there"]))
    sizes, moved = frame_bytes(rows, "here")
    assert sizes.to_pylist() == [2 * spec.clip_bytes, spec.clip_bytes, 0, 3 * spec.clip_bytes]
    assert moved.to_pylist() == [0, spec.clip_bytes, 0, 3 * spec.clip_bytes]
