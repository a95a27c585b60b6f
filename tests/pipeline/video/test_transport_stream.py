"""Transport streams: joined recordings are whole, and packets that were lost are damage wherever they were."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest

from tests.support.decoding import assert_same, decode, numbers, probe, rejection
from tests.support.transport_streams import recording
from vidshard.pipeline.video.decode import decode_spans
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Clip, ClipSpec

SPEC = ClipSpec(fps=Fraction(25), num_frames=5, height=48, width=48)
PACKET = 188


def joined(path: Path, parts: Sequence[Path]) -> Path:
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


KINDS = [("libx264", 0), ("libx264", 2), ("libx265", 2), ("mpeg2video", 2), ("mpeg4", 0)]


@pytest.mark.parametrize(("codec", "b_frames"), KINDS)
def test_joined_recordings_are_whole(tmp_path: Path, codec: str, b_frames: int) -> None:
    parts = [recording(tmp_path / f"{n}.ts", codec, 30 + 30 * n, b_frames=b_frames) for n in range(3)]
    path = joined(tmp_path / "joined.ts", parts)
    whole = decode(path, SPEC)
    assert numbers(whole) == list(range(30, 120))
    assert_same(decode(path, SPEC, 2), whole)


def test_joined_recordings_with_time_codes_are_whole(tmp_path: Path) -> None:
    parts = [recording(tmp_path / f"{n}.m2ts", "libx264", 30 + 30 * n, m2ts=True) for n in range(2)]
    assert parts[0].stat().st_size % 192 == 0
    assert numbers(decode(joined(tmp_path / "joined.m2ts", parts), SPEC)) == list(range(30, 90))


def test_recordings_joined_with_a_gap_are_refused_by_name_and_kept_beside_it(tmp_path: Path) -> None:
    parts = [recording(tmp_path / "0.ts", "libx264", 30), recording(tmp_path / "1.ts", "libx264", 80)]
    path = joined(tmp_path / "joined.ts", parts)
    error = rejection(path, SPEC)
    assert error.reason is Reason.DECODE_ERROR
    assert "two recordings are joined, and time is missing between them" in error.detail
    [span] = plan_spans(probe(path), SPEC, 1000)
    [result] = decode_spans([span], SPEC, str(path), max_clips=1000, keep_undamaged=True)
    assert numbers(result.clips) == [*range(30, 55), *range(80, 110)]


def frames_by_time(clips: Sequence[Clip]) -> dict[float, bytes]:
    return {
        round(float(time), 3): frame.tobytes()
        for clip in clips
        for frame, time in zip(clip.frames, clip.frame_pts_seconds, strict=True)
    }


def without(data: bytes, first: int, count: int) -> bytes:
    return data[: first * PACKET] + data[(first + count) * PACKET :]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("codec", "b_frames"), [("libx264", 0), ("mpeg2video", 0), ("mpeg4", 0)])
def test_lost_packets_are_never_silent(tmp_path: Path, codec: str, b_frames: int, parts: int) -> None:
    """Small pictures of one packet or two, so that whole pictures are lost without a trace in any other."""
    made = [recording(tmp_path / f"{n}.ts", codec, 30 + 30 * n, b_frames=b_frames) for n in range(parts)]
    path = joined(tmp_path / "whole.ts", made)
    data, truth = path.read_bytes(), frames_by_time(decode(path, SPEC))
    count = len(data) // PACKET
    last_picture = max(n for n in range(count) if data[n * PACKET + 1 : n * PACKET + 3] == b"\x41\0")
    choose = random.Random(1)
    lossy = tmp_path / "lossy.ts"
    refused = 0
    for _ in range(12):
        lost = choose.choice((1, 1, 2, 5, 13, 40))
        first = choose.randrange(12, last_picture - lost)
        lossy.write_bytes(without(data, first, lost))
        try:
            found = frames_by_time(decode(lossy, SPEC))
        except VideoError:
            refused += 1
        else:
            assert found == truth, f"packets {first} to {first + lost} of {count}"
    assert refused >= 6


def test_lost_packets_before_the_first_keyframe_that_is_whole_are_damage(tmp_path: Path) -> None:
    path = recording(tmp_path / "v.ts", "libx264", 30)
    lossy = tmp_path / "lossy.ts"
    lossy.write_bytes(without(path.read_bytes(), 5, 1))
    assert "packets are missing" in rejection(lossy, SPEC).detail
    [span] = plan_spans(probe(lossy), SPEC, 1000)
    [result] = decode_spans([span], SPEC, str(lossy), max_clips=1000, keep_undamaged=True)
    found = numbers(result.clips)
    assert found[0] > 30  # the first picture is lost, and all up to the next keyframe
    assert found == list(range(found[0], 60))
    assert result.clips[0].frame_pts_seconds[0] == found[0] / 25


def test_tables_alone_may_be_lost(tmp_path: Path) -> None:
    path = recording(tmp_path / "v.ts", "libx264", 30)
    data = path.read_bytes()
    tables = [n for n in range(len(data) // PACKET) if data[n * PACKET + 1 : n * PACKET + 3] == b"\x40\0"]
    lossy = tmp_path / "lossy.ts"
    lossy.write_bytes(without(data, tables[3], 1))
    assert_same(decode(lossy, SPEC)[:1], decode(path, SPEC)[:1])
    assert numbers(decode(lossy, SPEC)) == list(range(30, 60))
