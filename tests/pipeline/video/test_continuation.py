"""Files that can only be decoded from far before: their spans are decoded in one pass, and are those decoded alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import pytest

import vidshard.pipeline.video.decode as decoding
from tests.support.decoding import assert_same, probe
from tests.support.videos import Recipe, write_video
from vidshard.pipeline.video.decode import decode_spans
from vidshard.pipeline.video.packets import decode_packet
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.video import Clip, ClipSpec, Span, SpanClips

SPEC = ClipSpec(fps=Fraction(2), num_frames=5, height=32, width=32)
RATE, NUM_FRAMES = Fraction(2), 120
ONE_KEYFRAME = (("x264-params", "keyint=10000:min-keyint=9999:scenecut=0"),)


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    yield
    decoding._keep(None)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each packet that a decoder got."""
    counted: list[int] = []
    original = decode_packet

    def counting(*arguments: object) -> object:
        counted.append(1)
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("vidshard.pipeline.video.decoding_pass.decode_packet", counting)
    return counted


def video(folder: Path, kind: str) -> Path:
    recipe = Recipe(num_frames=NUM_FRAMES, rate=RATE, gop=10000)
    if kind == "one keyframe":
        return write_video(folder / "v.mp4", replace(recipe, options=ONE_KEYFRAME))
    if kind == "one keyframe and B-frames":
        return write_video(folder / "v.mkv", replace(recipe, options=ONE_KEYFRAME, b_frames=2))
    if kind == "raw":
        return write_video(folder / "v.h264", replace(recipe, gop=10))
    if kind == "a codec that cannot be asked":
        return write_video(folder / "v.mov", replace(recipe, codec="qtrle", pixel_format="rgb24"))
    source = write_video(folder / "source.mp4", replace(recipe, gop=10, b_frames=2))
    with av.open(str(source)) as original, av.open(str(folder / "v.mp4"), "w") as output:
        stream = output.add_stream_from_template(original.streams.video[0])
        first: int | None = None
        for packet in original.demux(video=0):
            if packet.dts is not None:
                first = packet.dts if first is None else first
                packet.pts = packet.dts = packet.dts - first
                packet.stream = stream
                output.mux(packet)
    return folder / "v.mp4"


KINDS = [
    "one keyframe",
    "one keyframe and B-frames",
    "raw",
    "a codec that cannot be asked",
    "times of decoding alone",
]


def result(span: Span, spec: ClipSpec, path: Path, *, continuing: bool) -> SpanClips:
    [found] = decode_spans([span], spec, str(path), max_clips=1000, continuing=continuing)
    return found


def clips(spans: Sequence[Span], spec: ClipSpec, path: Path, *, continuing: bool) -> list[Clip]:
    return [clip for span in spans for clip in result(span, spec, path, continuing=continuing).clips]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("halo_clips", [0, 1])
def test_spans_are_decoded_in_one_pass(tmp_path: Path, decoded: list[int], kind: str, halo_clips: int) -> None:
    path = video(tmp_path, kind)
    spec = replace(SPEC, halo_clips=halo_clips, continuous=bool(halo_clips))
    spans = plan_spans(probe(path), spec, 2)
    assert len(spans) >= 10
    alone = clips(spans, spec, path, continuing=False)
    assert len(decoded) > 4 * NUM_FRAMES
    decoded.clear()
    assert_same(clips(spans, spec, path, continuing=True), alone)
    # the first ten seconds, of sixty, are decoded several times; without certain times 19 frames more each time
    assert len(decoded) < (3 if kind == "times of decoding alone" else 1.7) * NUM_FRAMES


def test_spans_may_come_in_any_order_and_with_gaps(tmp_path: Path) -> None:
    path = video(tmp_path, "one keyframe")
    spans = plan_spans(probe(path), SPEC, 2)
    order = [*spans[::3], *spans[::-2], spans[-1], spans[0]]
    assert_same(clips(order, SPEC, path, continuing=True), clips(order, SPEC, path, continuing=False))


def test_files_do_not_mix(tmp_path: Path) -> None:
    paths = []
    for number, b_frames in enumerate((0, 2)):
        recipe = Recipe(num_frames=NUM_FRAMES, rate=RATE, gop=10000, options=ONE_KEYFRAME, b_frames=b_frames)
        paths.append(write_video(tmp_path / f"{number}.mp4", recipe))
    plans = [plan_spans(probe(path), SPEC, 3) for path in paths]
    for spans in zip(*plans, strict=True):
        for span, path in zip(spans, paths, strict=True):
            assert_same(clips([span], SPEC, path, continuing=True), clips([span], SPEC, path, continuing=False))


def test_damage_behind_far_entry_points_is_that_of_the_span_alone(tmp_path: Path) -> None:
    path = video(tmp_path, "one keyframe")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    at = packets[80].pos
    assert at is not None
    data[at : at + packets[80].size] = bytes(packets[80].size)
    path.write_bytes(data)
    for span in plan_spans(probe(path), SPEC, 2):
        alone, continued = (result(span, SPEC, path, continuing=each) for each in (False, True))
        assert str(alone.error) == str(continued.error)
        assert_same(alone.clips, continued.clips)


def test_files_with_near_entry_points_keep_no_decoder(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", Recipe(num_frames=NUM_FRAMES, rate=RATE, gop=10))
    clips(plan_spans(probe(path), SPEC, 2), SPEC, path, continuing=True)
    assert decoding._kept is None
