"""Rows as the decoding stage gives them, of noise, and the encoder's settings for them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pyarrow as pa

from vidshard.models.vidtok.config import PRESETS
from vidshard.pipeline.clip_specs import continuous_spec
from vidshard.pipeline.encode_stage import EncoderSpec
from vidshard.pipeline.rows import WORK_SCHEMA, add_clips, span_row
from vidshard.pipeline.tokenizer_source import TokenizerSource
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Clip, ClipSpec, Geometry, Span, SpanClips, VideoSource

NUM_FRAMES = 5
LARGE, SMALL = 128, 16
"""Sides of the frames. A large clip takes 64 times what a small one does."""
CONFIG = PRESETS["tiny"]


def clip_spec(side: int, *, continuous: bool = False) -> ClipSpec:
    spec = ClipSpec(fps=Fraction(4), num_frames=NUM_FRAMES, height=side, width=side)
    return continuous_spec(spec, CONFIG) if continuous else spec


def decoded_row(number: int, spec: ClipSpec, num_clips: int, error: VideoError | None = None) -> pa.Table:
    """A row as the decoder gives it, of noise: the span of clips 2 … of a video whose first frame is at 1 s."""
    span = Span(
        video_id=f"video{number}",
        uri=f"https://user:secret@host/{number}.mp4?sig=secret",
        time_base=Fraction(1, 1000),
        grid_start_pts=1000,
        first_clip=2,
        end_clip=2 + num_clips,
        duration_seconds_from_header=100.0,
        source=VideoSource(width=spec.width, height=spec.height, codec="h264", fps=4.0, rotation_degrees=0),
    )
    random = np.random.default_rng(number)
    clips = [
        Clip(
            video_id=span.video_id,
            clip_index=index,
            frames=random.integers(0, 256, (spec.num_frames, spec.height, spec.width, 3), np.uint8),
            start_seconds=float(1 + index * spec.clip_seconds),
            frame_pts_seconds=np.arange(spec.num_frames) / 4,
            num_valid_frames=spec.num_frames,
            geometry=Geometry(policy="crop", scaled_width=spec.width, scaled_height=spec.height, left=0, top=0),
        )
        for index in range(2 - spec.halo_of(2) if num_clips else 2, 2 + num_clips)
    ]
    outcome = SpanClips(clips=clips, error=error)
    plan = pa.Table.from_pylist([span_row(span, spec, None)], schema=WORK_SCHEMA)
    start_seconds = float(2 * spec.clip_seconds)
    return add_clips(plan, outcome, uri="public", start_seconds=start_seconds, seconds=0.0, continuous=spec.continuous)


def rows_of_two_sizes(*, continuous: bool = False) -> pa.Table:
    """Rows 0 to 2 and 5 are of large frames, 3 and 4 of small ones; row 1 is damaged, row 2 a rejection."""
    large, small = (clip_spec(side, continuous=continuous) for side in (LARGE, SMALL))
    damaged = VideoError(Reason.DECODE_ERROR, "clips are missing")
    return pa.concat_tables(
        [
            decoded_row(0, large, 2),
            decoded_row(1, large, 2, damaged),
            decoded_row(2, large, 0, VideoError(Reason.TRUNCATED, "its end is missing")),
            decoded_row(5, large, 1),
            decoded_row(3, small, 3),
            decoded_row(4, small, 2),
        ]
    )


def encoder_spec(batch_size: int, *, continuous: bool = False) -> EncoderSpec:
    spec = clip_spec(LARGE, continuous=continuous)
    return EncoderSpec(
        source=TokenizerSource(config=CONFIG, weights=None, seed=0),
        precision="float32",
        num_frames=spec.num_frames,
        payload=CONFIG.payload(NUM_FRAMES, LARGE, LARGE),
        batch_size=batch_size,
        num_threads=1,
        continuous=spec if continuous else None,
    )
