"""What is not decoded is not missed: the same pixels and times as when everything is, for less work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

import pipeline.frames
from pipeline.decode import decode_spans, probe_video
from pipeline.packets import Action, CannotSkipError, Step, steps
from pipeline.sampling import plan_spans
from pipeline.storage import open_binary
from schemas.video import Clip, ClipSpec, Part, VideoRef
from tests.videos import Recipe, read_frame_number, write_video

SPEC = ClipSpec(fps=Fraction(3), num_frames=4, height=48, width=48)


def clips_of(path: Path, spec: ClipSpec, part: Part | None = None, clips_per_span: int = 1000) -> list[Clip]:
    clips: list[Clip] = []
    for span in plan_spans(probe_video(VideoRef(uri=str(path), num_bytes=-1), open_binary), spec, clips_per_span, part):
        [result] = decode_spans([span], spec, str(path), max_clips=1000)
        assert result.error is None, result.error
        clips += result.clips
    return clips


@contextmanager
def decoding_everything() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.frames.SKIPPABLE_CODECS", frozenset())
        yield


@contextmanager
def counting() -> Iterator[list[Action]]:
    """What was done with the packets."""
    actions: list[Action] = []
    original = pipeline.frames._take_step

    def counted(watched: Any, stream: Any, step: Step) -> Any:
        actions.append(step.action)
        return original(watched, stream, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.frames._take_step", counted)
        yield actions


def assert_same(some: list[Clip], others: list[Clip]) -> None:
    assert [clip.clip_index for clip in some] == [clip.clip_index for clip in others]
    for one, other in zip(some, others, strict=True):
        assert np.array_equal(one.frames, other.frames), one
        assert np.array_equal(one.frame_pts_seconds, other.frame_pts_seconds), one
        assert one.num_valid_frames == other.num_valid_frames


def x264(**params: object) -> Recipe:
    text = ":".join(f"{name.replace('_', '-')}={value}" for name, value in params.items())
    return Recipe(options=(("preset", "medium"), ("x264-params", text)))


def x265(**params: object) -> Recipe:
    text = ":".join(f"{name.replace('_', '-')}={value}" for name, value in params.items())
    return Recipe(codec="libx265", width=128, height=96, options=(("x265-params", text + ":log-level=none"),))


STRUCTURES = {
    "no b frames": x264(keyint=30, bframes=0, scenecut=0),
    "b frames": x264(keyint=40, bframes=3, b_pyramid="none", scenecut=0),
    "b pyramid": x264(keyint=25, bframes=7, b_pyramid="normal", b_adapt=0, scenecut=0),
    "open gop": x264(keyint=20, min_keyint=20, bframes=4, open_gop=1, scenecut=0, b_pyramid="normal"),
    "one long gop": x264(keyint="infinite", bframes=2, scenecut=0),
    "intra refresh": x264(keyint=25, intra_refresh=1, bframes=0),
    "fields": x264(keyint=24, bframes=2, tff=1),
    "many references": x264(keyint=50, bframes=5, ref=8, b_adapt=2, weightp=2),
    "hevc": x265(keyint=30, bframes=4),
    "hevc, open gop": x265(keyint=16, min_keyint=16, bframes=4, open_gop=1, b_adapt=0),
    "hevc, temporal layers": x265(keyint=32, bframes=7, b_adapt=0, b_pyramid=1, temporal_layers=3),
    "mpeg4": Recipe(codec="mpeg4", b_frames=2, gop=15),
    "mpeg2": Recipe(codec="mpeg2video", b_frames=2, gop=15),
    "vp8": Recipe(
        codec="libvpx", gop=30, options=(("auto-alt-ref", "1"), ("lag-in-frames", "16"), ("deadline", "good"))
    ),
    "vp9": Recipe(codec="libvpx-vp9", gop=30, options=(("auto-alt-ref", "1"), ("lag-in-frames", "16"))),
    "av1": Recipe(codec="libsvtav1", gop=32),
    "mjpeg": Recipe(codec="mjpeg", pixel_format="yuvj420p"),
    "prores": Recipe(codec="prores_ks", pixel_format="yuv422p10le"),
}
SUFFIXES = {
    "vp8": ("webm",),
    "vp9": ("webm", "mp4"),
    "mjpeg": ("mov", "mkv"),
    "prores": ("mov",),
    "mpeg2": ("ts", "mp4"),
    "mpeg4": ("mp4",),
    "av1": ("mp4", "mkv"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("structures")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_pixels_and_times_are_those_of_decoding_everything(folder: Path, structure: str) -> None:
    random = np.random.default_rng(len(structure))
    gaps = random.integers(1, 12, 240)
    times = [Fraction(int(gaps[:n].sum()), 200) for n in range(240)]
    for suffix in SUFFIXES.get(structure, ("mp4", "mkv", "ts")):
        recipe = replace(STRUCTURES[structure], num_frames=240)
        if suffix == "mkv":
            recipe = replace(recipe, times=times)
        path = write_video(folder / f"{structure}.{suffix}", recipe)
        for _ in range(6):
            fps = Fraction(int(random.integers(1, 60)), int(random.integers(1, 9)))
            stride = [None, Fraction(int(random.integers(1, 30)), 7)][int(random.integers(2))]
            start = float(random.integers(0, 40)) / 10
            part = [None, Part.of(start, start + float(random.integers(2, 60)) / 10)][int(random.integers(2))]
            spec = replace(SPEC, fps=fps, stride_seconds=stride)
            clips_per_span = int(random.integers(1, 5))
            with decoding_everything():
                expected = clips_of(path, spec, part)
            assert_same(clips_of(path, spec, part), expected)
            assert_same(clips_of(path, spec, part, clips_per_span), expected)


@pytest.mark.parametrize(
    ("structure", "most"),
    [("b frames", 0.6), ("b pyramid", 0.7), ("hevc", 0.75), ("mpeg4", 0.6), ("mjpeg", 0.15), ("prores", 0.15)],
)
def test_frames_that_nobody_needs_are_not_decoded(folder: Path, structure: str, most: float) -> None:
    path = write_video(folder / f"count {structure}.mov", replace(STRUCTURES[structure], num_frames=240))
    with counting() as actions:
        clips_of(path, SPEC)
    decoded = sum(action in (Action.DECODE, Action.RESTART) for action in actions) - 1  # the end of it
    assert decoded / 240 <= most
    with decoding_everything(), counting() as actions:
        clips_of(path, SPEC)
    assert len(actions) - 1 >= 240


def test_groups_of_pictures_between_distant_clips_are_left_out(folder: Path) -> None:
    path = write_video(folder / "distant.mp4", Recipe(num_frames=500, gop=10))
    with counting() as actions:
        clips = clips_of(path, replace(SPEC, fps=Fraction(25), stride_seconds=Fraction(4)))
    assert [read_frame_number(clip.frames[0]) for clip in clips] == [0, 100, 200, 300, 400]
    assert sum(action in (Action.DECODE, Action.RESTART) for action in actions) < 40


def test_a_stream_that_lies_about_its_keyframes_is_decoded_whole(folder: Path) -> None:
    """Matroska marks keyframes in each block: here all of them, though most lean on others."""
    path = write_video(folder / "honest.mkv", replace(x264(keyint=40, bframes=0, scenecut=0), num_frames=240))
    lying = folder / "lying.mkv"
    with av.open(str(path)) as source, av.open(str(lying), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.is_keyframe = True
                packet.stream = stream
                target.mux(packet)
    for spec in (SPEC, replace(SPEC, stride_seconds=Fraction(3))):
        with decoding_everything():
            expected = clips_of(path, spec)
        assert_same(clips_of(lying, spec), expected)


def test_a_packet_without_a_time_asks_for_decoding_everything() -> None:
    packet: Any = av.Packet(b"x")
    packet.is_keyframe = True
    with pytest.raises(CannotSkipError):
        list(steps(iter([packet]), lambda _start, _end: True, codec="h264", frame_ticks=1))
