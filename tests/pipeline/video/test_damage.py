"""Damaged videos: refused whole, or their undamaged clips kept, each exactly as if there were no damage."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.support.videos import Recipe, write_damaged, write_truncated, write_video
from vidshard.pipeline.storage import open_binary
from vidshard.pipeline.video.container import open_video
from vidshard.pipeline.video.decode import decode_spans
from vidshard.pipeline.video.input_file import opened, storage_failures_named
from vidshard.pipeline.video.packets import SeekPoint, decode_packet, read_packets
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Clip, ClipSpec, SpanClips, VideoRef

SPEC = ClipSpec(fps=Fraction(10), num_frames=5, height=48, width=48)
NUM_CLIPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damage")


def whole_video(folder: Path, suffix: str) -> Path:
    path = folder / f"whole.{suffix}"
    return path if path.exists() else write_video(path, Recipe(num_frames=300, gop=25, width=160, height=96))


def kept(path: Path, clips_per_span: int, spec: ClipSpec = SPEC) -> list[SpanClips]:
    probe = probe_video(VideoRef(uri=str(path), num_bytes=-1), open_binary)
    spans = plan_spans(probe, spec, clips_per_span)
    return [decode_spans([s], spec, str(path), max_clips=1000, keep_undamaged=True)[0] for s in spans]


def clips_of(results: Sequence[SpanClips]) -> dict[int, Clip]:
    return {clip.clip_index: clip for result in results for clip in result.clips}


@pytest.mark.parametrize("clips_per_span", [1000, 5, 1])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_clips_beside_the_damage_are_those_of_the_undamaged_video(
    folder: Path, suffix: str, share: float, clips_per_span: int
) -> None:
    whole = whole_video(folder, suffix)
    original = clips_of(kept(whole, 1000))
    assert sorted(original) == list(range(NUM_CLIPS))
    results = kept(write_damaged(folder / f"damaged.{suffix}", whole, share=share, num_bytes=900), clips_per_span)
    clips = clips_of(results)
    assert NUM_CLIPS - 9 <= len(clips) < NUM_CLIPS
    for index, clip in clips.items():
        assert np.array_equal(clip.frames, original[index].frames)
        assert np.array_equal(clip.frame_pts_seconds, original[index].frame_pts_seconds)
        assert clip.num_valid_frames == original[index].num_valid_frames
    missing = set(original) - set(clips)
    told = [result for result in results if result.error is not None]
    assert told
    assert all(result.num_errors >= 1 for result in told)
    for result in told:
        assert result.error is not None
        assert result.error.reason is Reason.DECODE_ERROR
    if clips_per_span == 1:
        assert len(told) == len(missing)


def without_packet(path: Path, source: Path, lost: int) -> Path:
    """A remux that leaves a packet out without a trace."""
    with av.open(str(source)) as reader, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(reader.streams.video[0])
        for number, packet in enumerate(reader.demux(video=0)):
            if packet.size and number != lost:
                packet.stream = stream
                target.mux(packet)
    return path


@pytest.mark.parametrize(
    ("codec", "b_frames", "suffix"),
    [("libx265", 3, "mp4"), ("libx264", 0, "mp4"), ("libx264", 3, "mkv"), ("libx264", 3, "ts")],
)
def test_a_picture_that_others_refer_to_and_that_is_missing_is_damage(
    codec: str, b_frames: int, suffix: str, folder: Path
) -> None:
    recipe = Recipe(codec=codec, num_frames=100, gop=25, b_frames=b_frames, width=160, height=96)
    whole = write_video(folder / f"{codec}-{b_frames}.{suffix}", recipe)
    original = clips_of(kept(whole, 1000))
    lacking = without_packet(folder / f"lacking-{codec}-{b_frames}.{suffix}", whole, 26)  # second of its group
    [result] = kept(lacking, 1000)
    assert result.error is not None
    assert "a picture that this one refers to is missing" in str(result.error)
    clips = clips_of([result])
    assert 0 < len(clips) < len(original)
    assert all(np.array_equal(clip.frames, original[index].frames) for index, clip in clips.items())


def read_marked(path: Path) -> list[bool]:
    """Whether the decoder refuses each packet of a video; another reader's packets are freed before it is asked."""
    with ExitStack() as stack:
        readers = []
        for _ in range(2):
            watched = stack.enter_context(storage_failures_named(stack.enter_context(opened(str(path))), None))
            readers.append((watched, *stack.enter_context(open_video(watched))))
        (_, other, others_stream), (watched, container, stream) = readers
        freed = list(read_packets(other, others_stream, SeekPoint(), watched))
        packets = [packet for packet in read_packets(container, stream, SeekPoint(), watched) if packet is not None]
        del freed
        refused = []
        for packet in packets:
            try:
                decode_packet(watched, stream, packet)
                refused.append(False)
            except VideoError:
                refused.append(True)
        return refused


def test_a_missing_reference_is_seen_whatever_becomes_of_packets_of_other_readers(folder: Path) -> None:
    whole = write_video(folder / "marked.mkv", Recipe(num_frames=50, gop=25, b_frames=0, width=160, height=96))
    refused = read_marked(without_packet(folder / "marked-lacking.mkv", whole, 26))
    assert refused.count(True) >= 1
    assert not any(read_marked(whole))


def test_a_picture_that_none_refers_to_may_be_missing(folder: Path) -> None:
    whole = write_video(folder / "b.mp4", Recipe(num_frames=100, gop=25, b_frames=3, width=160, height=96))
    lacking = without_packet(folder / "no-b.mp4", whole, 29)  # the last of its run of B-frames
    [result] = kept(lacking, 1000)
    assert result.error is None


def test_of_a_truncated_video_the_clips_before_its_end_are_kept(folder: Path) -> None:
    original = clips_of(kept(whole_video(folder, "mkv"), 1000))
    [result] = kept(write_truncated(folder / "cut.mkv", whole_video(folder, "mkv"), 0.5), 1000)
    assert result.error is not None
    assert result.error.reason is Reason.TRUNCATED
    assert 6 <= len(result.clips) <= 13
    assert [clip.clip_index for clip in result.clips] == list(range(len(result.clips)))
    assert all(clip.num_valid_frames == 5 for clip in result.clips), "a cut clip is no padded tail"
    assert all(np.array_equal(clip.frames, original[clip.clip_index].frames) for clip in result.clips)


def test_a_video_that_is_noise_from_some_point_on_ends_there(folder: Path) -> None:
    whole = whole_video(folder, "mkv")
    [result] = kept(write_damaged(folder / "noise.mkv", whole, share=0.5, num_bytes=10**6), 1000)
    assert result.error is not None
    assert {clip.clip_index for clip in result.clips} <= set(range(13))
    assert len(result.clips) >= 8


def test_overlapping_and_sparse_clips_are_kept_likewise(folder: Path) -> None:
    whole = whole_video(folder, "mp4")
    damaged = write_damaged(folder / "strides.mp4", whole, share=0.5, num_bytes=900)
    for stride in (Fraction(1, 5), Fraction(2)):
        spec = replace(SPEC, stride_seconds=stride)
        original, clips = clips_of(kept(whole, 1000, spec)), clips_of(kept(damaged, 1000, spec))
        assert len(original) * 0.7 < len(clips) < len(original)
        assert all(np.array_equal(clip.frames, original[index].frames) for index, clip in clips.items())
