"""The encoder with too little memory: smaller batches, the same tokens, and rejections of what cannot fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from vidshard.models.vidtok.config import PRESETS
from vidshard.pipeline.clip_specs import continuous_spec
from vidshard.pipeline.encode_stage import ClipEncoder, EncoderSpec, is_out_of_memory
from vidshard.pipeline.rows import WORK_SCHEMA, add_clips, span_row
from vidshard.pipeline.tokenizer_source import TokenizerSource
from vidshard.schemas.rejections import REMEDIES, Reason, VideoError
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


def outcome(table: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.select(["span_id", "clips", "rejection", "tokens"]).to_pylist()
    return rows


def status(name: str) -> int:
    """A figure of this process in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def main(batch_size: int, share: float, continuous: bool) -> None:
    """Encode with memory for ``share`` large clips at once beyond what the process has, and print what comes out."""
    import resource

    rows = rows_of_two_sizes(continuous=continuous)
    encoder = ClipEncoder(encoder_spec(1, continuous=continuous))
    encoder(rows)  # libraries and threads have what they keep
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here
    before = status("VmRSS")
    encoder(rows)
    of_one = status("VmHWM") - before
    encoder = ClipEncoder(encoder_spec(batch_size, continuous=continuous))
    encoder(rows.slice(4))
    limit = status("VmSize") + int(share * of_one)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    encoded = encoder(rows)
    again = encoder(rows)
    assert encoded["tokens"] == again["tokens"]
    print(json.dumps(outcome(encoded)))


def encoded_with_little_memory(batch_size: int, share: float, *, continuous: bool) -> tuple[list[dict[str, Any]], str]:
    """What a process of its own prints, and its log."""
    # freed memory goes back at once, so that the limit is one of what is in use
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "1000000",
        "MALLOC_TRIM_THRESHOLD_": "1000000",
        "MALLOC_ARENA_MAX": "1",
    }
    command = [
        sys.executable,
        "-m",
        "tests.pipeline.test_encode_memory",
        str(batch_size),
        str(share),
        str(int(continuous)),
    ]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout), process.stderr


@pytest.fixture(scope="module", params=[False, True], ids=["clips", "streams"])
def continuous(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def undisturbed(continuous: bool) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    encoded = ClipEncoder(encoder_spec(8, continuous=continuous))(rows_of_two_sizes(continuous=continuous))
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = json.loads(json.dumps(outcome(encoded)))
    return rows


def test_a_batch_that_does_not_fit_is_halved_once_and_for_all_and_gives_the_same_tokens(
    continuous: bool, undisturbed: list[dict[str, Any]]
) -> None:
    printed, log = encoded_with_little_memory(8, 2.5, continuous=continuous)
    assert printed == undisturbed
    lines = [line for line in log.splitlines() if "out of memory" in line]
    assert 1 <= len(lines) <= 3  # 8 to 4, 2, 1, though the rows were encoded twice
    num_frames = clip_spec(LARGE, continuous=continuous).num_frames
    assert all(f"clips of {num_frames}x128x128 frames at once" in line for line in lines)  # small ones keep theirs


def test_a_clip_that_does_not_fit_by_itself_rejects_its_row_alone(
    continuous: bool, undisturbed: list[dict[str, Any]]
) -> None:
    printed, _ = encoded_with_little_memory(8, 0.4, continuous=continuous)
    spec = clip_spec(LARGE, continuous=continuous)
    for row, expected in zip(printed, undisturbed, strict=True):
        if row["span_id"].startswith(("video2", "video3", "video4")):
            assert row == expected
            continue
        assert row["clips"] == row["tokens"] == []
        rejection = row["rejection"]
        assert (rejection["stage"], rejection["reason"]) == ("encode", "out_of_memory")
        assert rejection["remedy"] == REMEDIES[Reason.OUT_OF_MEMORY]
        assert f"{spec.num_frames}x128x128" in rejection["detail"]
        assert "allocate" in rejection["detail"]
        assert "\n" not in rejection["detail"]
        assert rejection["span_id"] == row["span_id"]
        assert rejection["start_seconds"] == pytest.approx(float(2 * spec.clip_seconds))
        assert "secret" not in rejection["uri"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_only_a_shortage_of_memory_counts_as_one(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_any_other_error_ends_the_call() -> None:
    spec = encoder_spec(2)
    with pytest.raises(ValueError, match="must be divisible"):
        ClipEncoder(spec)(decoded_row(0, replace(clip_spec(LARGE), width=LARGE + 1), 1))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), bool(int(sys.argv[3])))
