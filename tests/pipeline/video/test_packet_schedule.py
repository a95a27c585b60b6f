from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.packet import Packet, PacketSideData
from av.video.stream import VideoStream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.videos import Recipe, write_damaged, write_truncated, write_video
from vidshard.pipeline.storage import open_binary
from vidshard.pipeline.video import container, decode, decoding_pass, frames
from vidshard.pipeline.video.container import codec_name, open_video, pixel_aspect
from vidshard.pipeline.video.decode import decode_span
from vidshard.pipeline.video.frames import decode_from, frames_covering
from vidshard.pipeline.video.h264 import PictureNumbers, Usability, usability_of
from vidshard.pipeline.video.input_file import WatchedFile, storage_failures_named
from vidshard.pipeline.video.packet_info import _H264, UNKNOWN, PacketFacts, _Hevc
from vidshard.pipeline.video.packet_schedule import FOREVER, Schedule, Step
from vidshard.pipeline.video.packets import SeekPoint
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.pipeline.video.timestamps import Clock, seconds_from_header
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Clip, ClipSpec, VideoRef

SPEC = ClipSpec(fps=Fraction(3), num_frames=4, height=48, width=48)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Requests to decoders: packets sent, and of those skippable ones, restarts, and passes over everything."""
    counts: Counter[str] = Counter()
    decode_step, decode_once = decoding_pass._decode_step, frames._decode_once

    def counting_step(watched: WatchedFile, stream: VideoStream, step: Step | None) -> list[av.VideoFrame]:
        if step is not None:
            counts.update(sent=1, skipped=step.skip, restarts=step.restart)
        return decode_step(watched, stream, step)

    def counting_once(*arguments: Any) -> Generator[Any, None, None]:
        counts.update(whole_passes=arguments[-1] is None)
        yield from decode_once(*arguments)

    monkeypatch.setattr(decoding_pass, "_decode_step", counting_step)
    monkeypatch.setattr(frames, "_decode_once", counting_once)
    return counts


def decoded(path: Path, spec: ClipSpec, clips_per_span: int, *, everything: bool) -> list[Clip | tuple[Reason, str]]:
    """Clips, or in their place why a span was refused; of all frames decoded, or only of those needed."""
    probe = probe_video(VideoRef(uri=str(path), num_bytes=-1), open_binary)
    outcome: list[Clip | tuple[Reason, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        if everything:
            patch.setattr(decode, "frames_covering", lambda *arguments: frames_covering(*arguments[:4]))
        for span in plan_spans(probe, spec, clips_per_span):
            try:
                outcome += decode_span(span, spec, str(path), max_clips=1000)
            except VideoError as error:
                outcome.append((error.reason, error.detail))
    return outcome


def assert_nothing_is_lost(path: Path, spec: ClipSpec = SPEC, clips_per_span: int = 1000) -> None:
    every, needed = (decoded(path, spec, clips_per_span, everything=everything) for everything in (True, False))
    assert len(every) == len(needed)
    for one, other in zip(every, needed, strict=True):
        if isinstance(one, Clip):
            assert isinstance(other, Clip)
            assert np.array_equal(one.frames, other.frames), one
            assert np.array_equal(one.frame_pts_seconds, other.frame_pts_seconds), one
            assert (one.num_valid_frames, one.geometry) == (other.num_valid_frames, other.geometry)
        else:
            assert one == other


CONTAINERS = {
    "libx264": ["mp4", "mkv", "ts", "flv", "avi", "h264"],
    "libx265": ["mp4", "mkv", "ts"],
    "mpeg4": ["mp4", "avi", "mkv"],
    "mpeg2video": ["ts", "mpg"],
    "libvpx-vp9": ["webm", "mp4"],
    "libvpx": ["webm"],
    "libsvtav1": ["mp4"],
    "mjpeg": ["avi", "mov"],
    "prores_ks": ["mov"],
    "ffv1": ["mkv"],
}
PIXEL_FORMATS = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}


@st.composite
def recipes(draw: st.DrawFn) -> tuple[str, Recipe]:
    """Structures of references as encoders make them: pyramids, open groups, temporal layers, moving refreshes."""
    codec = draw(st.sampled_from(sorted(CONTAINERS) + ["libx264", "libx265"] * 3))
    gop, b_frames = draw(st.sampled_from([1, 2, 5, 12, 30, 250])), draw(st.sampled_from([0, 1, 2, 3, 5]))
    either = st.integers(0, 1)
    options: tuple[tuple[str, str], ...] = ()
    if codec == "libx264":
        pyramid = draw(st.sampled_from(["none", "strict", "normal"]))
        params = f"keyint={gop}:min-keyint=1:bframes={b_frames}:b-pyramid={pyramid}:open-gop={draw(either)}:scenecut=0"
        params += f":ref={draw(st.sampled_from([1, 4]))}" + draw(
            st.sampled_from(["", "", ":intra-refresh=1", ":tff=1"])
        )
        options = (("preset", "medium"), ("x264-params", params))
    elif codec == "libx265":
        layers = draw(st.sampled_from([0, 0, 3])) if b_frames else 0
        params = f"log-level=none:keyint={gop}:min-keyint=1:bframes={b_frames}:b-pyramid={draw(either)}:scenecut=0"
        options = (("x265-params", f"{params}:open-gop={draw(either)}:temporal-layers={layers}"),)
    elif codec.startswith("libvpx"):
        options = (("auto-alt-ref", str(draw(either))), ("lag-in-frames", "12"), ("b", "200k"))
    elif codec in ("mpeg4", "mpeg2video"):
        options = (("bf", str(b_frames)), ("g", str(gop)), ("qscale", "3"))
    suffix = draw(st.sampled_from(CONTAINERS[codec]))
    times = None
    num_frames = draw(st.integers(20, 60))
    if suffix in ("mp4", "mkv", "mov") and draw(st.booleans()):
        gaps = draw(st.lists(st.sampled_from([20, 33, 40, 41, 200]), min_size=num_frames, max_size=num_frames))
        times = [Fraction(sum(gaps[:n]), 1000) for n in range(num_frames)]
    return suffix, Recipe(
        codec=codec,
        num_frames=num_frames,
        rate=Fraction(draw(st.sampled_from(["24", "25", "30000/1001", "50"]))),
        times=times,
        gop=gop,
        b_frames=b_frames if codec.startswith(("libx26", "mpeg")) else 0,
        options=options,
        pixel_format=PIXEL_FORMATS.get(codec, "yuv420p"),
    )


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    made=recipes(),
    fps=st.sampled_from(["1/2", "1", "3", "8", "24", "60"]),
    num_frames=st.integers(1, 7),
    clips_per_span=st.sampled_from([1, 2, 1000]),
)
def test_needed_frames_are_those_of_decoding_everything(
    tmp_path_factory: pytest.TempPathFactory, made: tuple[str, Recipe], fps: str, num_frames: int, clips_per_span: int
) -> None:
    suffix, recipe = made
    path = tmp_path_factory.mktemp("made") / f"v.{suffix}"
    try:
        write_video(path, recipe)
    except (av.FFmpegError, ValueError):  # settings that an encoder refuses
        return
    assert_nothing_is_lost(path, replace(SPEC, fps=Fraction(fps), num_frames=num_frames), clips_per_span)


# How much is left out.


@pytest.mark.parametrize(
    ("codec", "suffix", "options"),
    [
        ("libx264", "mp4", (("x264-params", "bframes=3:keyint=250:b-adapt=0:scenecut=0"),)),
        ("libx264", "ts", (("x264-params", "bframes=3:keyint=250:b-adapt=0:scenecut=0"),)),
        ("libx265", "mkv", (("x265-params", "bframes=3:keyint=250:b-adapt=0:scenecut=0:log-level=none"),)),
        ("mpeg4", "mp4", (("bf", "3"), ("g", "250"))),
        ("mpeg2video", "ts", (("bf", "3"), ("g", "250"))),
    ],
)
def test_pictures_that_no_other_references_are_skipped(
    tmp_path: Path, counted: Counter[str], codec: str, suffix: str, options: tuple[tuple[str, str], ...]
) -> None:
    path = write_video(tmp_path / f"v.{suffix}", Recipe(codec=codec, num_frames=100, options=options))
    with path.open("rb") as file:
        every = len(list(decode_from(WatchedFile(file), SeekPoint(), needed=lambda pts, next_pts: True)))
        some = list(decode_from(WatchedFile(file), SeekPoint(), needed=every_nth_second(path, Fraction(1, 3))))
    assert every == 100
    assert len(some) < 60
    assert counted["skipped"] > 60
    assert not counted["whole_passes"]


def every_nth_second(path: Path, step: Fraction) -> Any:
    """Wanted: whatever is on screen at multiples of ``step``."""
    with av.open(str(path)) as container:
        time_base = container.streams.video[0].time_base
        start = container.streams.video[0].start_time or 0
    assert time_base is not None
    return lambda pts, next_pts: -(-(pts - start) * time_base // step) < -(-(next_pts - start) * time_base // step)


@pytest.mark.parametrize(
    ("codec", "suffix", "most"),
    [("mjpeg", "mov", 20), ("prores_ks", "mov", 20), ("libsvtav1", "mp4", 75), ("libx264", "mp4", 80)],
)
def test_packets_that_lead_to_nothing_wanted_are_not_sent(
    tmp_path: Path, counted: Counter[str], codec: str, suffix: str, most: int
) -> None:
    recipe = Recipe(codec=codec, num_frames=100, gop=12, pixel_format=PIXEL_FORMATS.get(codec, "yuv420p"))
    path = write_video(tmp_path / f"v.{suffix}", recipe)
    with path.open("rb") as file:
        list(decode_from(WatchedFile(file), SeekPoint(), needed=every_nth_second(path, Fraction(1, 3))))
    assert counted["sent"] <= most
    assert not counted["whole_passes"]


def test_whole_groups_of_pictures_are_passed_over_open_ones_after_a_restart(
    tmp_path: Path, counted: Counter[str]
) -> None:
    for number, open_groups in enumerate((0, 1)):
        params = f"keyint=10:min-keyint=10:bframes=3:scenecut=0:open-gop={open_groups}:log-level=none"
        recipe = Recipe(codec="libx265", num_frames=150, options=(("x265-params", params),))
        path = write_video(tmp_path / f"{number}.mp4", recipe)
        counted.clear()
        with path.open("rb") as file:
            list(decode_from(WatchedFile(file), SeekPoint(), needed=every_nth_second(path, Fraction(2))))
        assert counted["sent"] < 60
        assert bool(counted["restarts"]) == bool(open_groups)
        assert not counted["whole_passes"]
        assert_nothing_is_lost(path, replace(SPEC, fps=Fraction(1, 2)))


def test_reading_ends_with_the_last_wanted_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", Recipe(num_frames=200, b_frames=2))
    with path.open("rb") as file, av.open(str(path)) as container:
        stream = container.streams.video[0]
        ticks = 1 / (stream.time_base or 1)
        read: list[int] = []

        def packets() -> Iterator[Packet[VideoStream]]:
            for packet in container.demux(stream):
                read.append(packet.pts or 0)
                yield packet

        def in_first_second(pts: int, next_pts: int) -> bool:
            return pts < ticks

        schedule = Schedule(packets(), stream, in_first_second, None)
        sent = [step.expected_pts for step in schedule if step is not None]
        frames = list(decode_from(WatchedFile(file), SeekPoint(), needed=in_first_second))
    assert schedule.stopped
    assert len(sent) <= 30
    assert len(read) <= 40
    assert max(frame.pts for frame in frames) >= 24 * ticks // 25


# Where it cannot be known.


def test_only_the_highest_temporal_layer_of_hevc_is_skippable() -> None:
    def unit(kind: int, layer: int, payload: bytes) -> bytes:
        return b"\0\0\1" + bytes([kind << 1, layer + 1]) + payload

    inspect = _Hevc(unit(33, 0, b"\x03"))  # two layers
    assert inspect(unit(0, 0, b"\x80")) == UNKNOWN  # TRAIL_N of the lower one: the upper one may reference it
    assert inspect(unit(2, 1, b"\x80")) == PacketFacts(skippable=True)
    assert inspect(unit(19, 0, b"\x80")) == PacketFacts(random_access=True)
    assert inspect(unit(21, 0, b"\x80")) == PacketFacts(random_access=True, needs_flush=True)
    assert inspect(unit(39, 0, b"\x80")) is None  # no picture
    assert _Hevc(b"")(unit(0, 0, b"\x80")) == UNKNOWN  # how many layers is not known


def test_only_whole_frames_of_h264_are_skippable_and_only_idr_pictures_give_random_access() -> None:
    def parameters(frames_only: bool) -> bytes:  # baseline, order by number, one macroblock
        return b"\0\0\1\x67" + bytes([66, 0, 30]) + ((0b1_1_011_010_0_1_1 << 1 | frames_only) << 4).to_bytes(2, "big")

    for frames_only in (True, False):
        inspect = _H264(parameters(frames_only) + b"\x80")
        facts = [inspect(b"\0\0\1" + bytes([kind, 0x80])) for kind in (0x65, 0x41, 0x01)]
        expected = [PacketFacts(random_access=True), PacketFacts(skippable=True), PacketFacts(skippable=True)]
        assert facts == (expected if frames_only else [None] * 3)
    changed = _H264(parameters(True) + b"\x80")
    assert changed(parameters(False) + b"\x80\0\0\1\x65\x80") is None


def bits_of(*fields: tuple[int, int] | int) -> bytes:
    """Values of so many bits, and Exp-Golomb ones by themselves, with the bit that ends them."""
    text = ""
    for field in (*fields, (1, 1)):
        if isinstance(field, int):
            code = f"{field + 1:b}"
            text += "0" * (len(code) - 1) + code
        else:
            text += f"{field[0]:0{field[1]}b}"
    text += "0" * (-len(text) % 8)
    return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))


def h264_parameters(may_skip: int = 0) -> bytes:
    """Baseline, numbers of four bits, order by number."""
    sequence = bits_of((66, 8), (0, 8), (30, 8), 0, 0, 2, 1, (may_skip, 1), 0, 0, (1, 1), (0, 3))
    pictures = bits_of(0, 0, (0, 1), (0, 1), 0, 0, 0, (0, 1), (0, 2), 0, 0, 0, (0, 1), (0, 1), (0, 1))
    return b"\0\0\1\x67" + sequence + b"\0\0\1\x68" + pictures


def h264_picture(number: int, *operations: int, is_idr: bool = False, refers: bool = True) -> bytes:
    """A P picture of one slice that does these things with pictures in memory; or an IDR one, or one for itself."""
    if is_idr:
        return b"\0\0\1\x65" + bits_of(0, 7, 0, (number, 4), 0, (0, 2))
    head: list[tuple[int, int] | int] = [0, 5, 0, (number, 4), (0, 1), (0, 1)]
    if refers:
        head += [(bool(operations), 1), *operations, *([0] if operations else [])]
    return b"\0\0\1" + (b"\x61" if refers else b"\x01") + bits_of(*head)


def missing_before(*pictures: bytes, may_skip: int = 0, keyframes: tuple[int, ...] = (0,)) -> list[int]:
    numbers = PictureNumbers(h264_parameters(may_skip))
    return [at for at, picture in enumerate(pictures) if numbers.is_one_missing(picture, at in keyframes)]


def test_numbers_of_h264_pictures_tell_that_one_is_missing() -> None:
    idr = h264_picture(0, is_idr=True)
    following = [h264_picture(number % 16) for number in range(1, 40)]
    assert missing_before(idr, *following) == []  # around four bits more than twice
    assert missing_before(idr, *following[:20], *following[21:]) == [21]
    assert missing_before(idr, *following[:20], *following[21:], may_skip=1) == []
    assert missing_before(idr, *following[:20], *following[21:], keyframes=(0, 21)) == []  # as in a splice
    assert missing_before(*following[6:]) == []  # nobody knows what was before the first one
    alone = h264_picture(3, refers=False)
    assert missing_before(idr, *following[:2], alone, alone, *following[2:]) == []
    assert missing_before(idr, following[0], alone, following[2]) == [2, 3]
    assert missing_before(idr, *following[:9], idr, *following) == []
    assert missing_before(idr, *following[:9], *following) == [10]  # the second IDR picture


def test_after_a_picture_that_empties_the_memory_numbers_begin_anew() -> None:
    idr, first = h264_picture(0, is_idr=True), h264_picture(1)
    assert missing_before(idr, first, h264_picture(2, 1, 0, 5), h264_picture(1)) == []
    assert missing_before(idr, first, h264_picture(2, 1, 0, 5), h264_picture(2)) == []  # too much to ask
    assert missing_before(idr, first, h264_picture(2, 1, 0), h264_picture(1)) == [3]
    assert missing_before(idr, first, h264_picture(2, 3, 0, 1, 4, 2), h264_picture(1)) == [3]
    assert PictureNumbers(b"\0\0\1\x67").is_one_missing(h264_picture(9), False) is False
    assert missing_before(idr, b"\0\0\1\x61", h264_picture(9)) == []  # cut off, and what follows it


NEW_EXTRADATA = 1
"""AV_PKT_DATA_NEW_EXTRADATA of FFmpeg: PyAV makes side data by the number of its kind."""


def test_missing_or_disordered_times_and_new_parameter_sets_decode_everything(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", Recipe(num_frames=60, b_frames=3))
    spoilers: list[Any] = [
        lambda packet: setattr(packet, "pts", None),
        lambda packet: setattr(packet, "dts", (packet.dts or 0) - 10**6),
        lambda packet: setattr(packet, "pts", (packet.dts or 0) - 1),
        lambda packet: packet.set_sidedata(PacketSideData(NEW_EXTRADATA, 8)),  # type: ignore[call-arg]
    ]

    def only_the_first(pts: int, next_pts: int) -> bool:
        return pts <= 0 or next_pts == FOREVER  # and there is no telling that it is

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert len(list(Schedule(iter(packets), stream, only_the_first, None))) < 20
    for spoil in spoilers:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.size]
            for packet in packets[20:]:
                spoil(packet)
            steps = [step for step in Schedule(iter(packets), stream, only_the_first, None) if step]
        assert [step.packet.pos for step in steps[-40:]] == [packet.pos for packet in packets[20:]]
        assert not any(step.skip for step in steps[-40:])


def test_interlaced_h264_is_decoded_whole(tmp_path: Path, counted: Counter[str]) -> None:
    params = "interlaced=1:bframes=3:keyint=20"
    path = write_video(tmp_path / "v.mp4", Recipe(num_frames=60, options=(("x264-params", params),)))
    assert_nothing_is_lost(path)
    assert not counted["skipped"]


def test_a_wanted_frame_that_does_not_come_out_is_found_by_decoding_everything(
    tmp_path: Path, counted: Counter[str]
) -> None:
    params = "intra-refresh=1:keyint=20"  # a keyframe's mark here is where a refresh begins, which takes a while
    path = write_video(tmp_path / "v.mkv", Recipe(num_frames=120, options=(("x264-params", params),)))
    assert_nothing_is_lost(path, clips_per_span=1)
    passes_over_everything = counted["whole_passes"]
    counted.clear()
    decoded(path, SPEC, 1, everything=True)
    assert passes_over_everything > counted["whole_passes"]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_damage_beside_wanted_frames_is_refused_as_ever(tmp_path: Path, suffix: str) -> None:
    recipe = Recipe(num_frames=100, b_frames=2, width=320, height=240)
    whole = write_video(tmp_path / f"whole.{suffix}", recipe)
    spec = replace(SPEC, fps=Fraction(25))
    assert_nothing_is_lost(write_damaged(tmp_path / f"damaged.{suffix}", whole), spec)
    if suffix == "mkv":
        assert_nothing_is_lost(write_truncated(tmp_path / f"short.{suffix}", whole, 0.6))


# Opening without decoding.


def learned(path: Path) -> dict[str, object]:
    """Facts from opening a video that anything here depends on."""
    with path.open("rb") as file, storage_failures_named(file) as watched, open_video(watched) as (container, stream):
        context = stream.codec_context
        return {
            "name": container.format.name,
            "codec": codec_name(stream),
            "size": (context.width, context.height),
            "rate": stream.average_rate,
            "clock": Clock.of(stream, 0),
            "lengths": (stream.duration, container.duration, stream.frames, seconds_from_header(stream, Fraction(0))),
            "starts": (stream.start_time, stream.time_base),
            "reordering": context.reorder_depth,
            "shape": pixel_aspect(stream) or 1,
        }


def without_aspect_box(path: Path) -> Path:
    data = path.read_bytes()
    path.write_bytes(data.replace(b"pasp", b"free"))
    return path


OPENED_QUICKLY = [("libx264", "mp4"), ("libx264", "mov"), ("libvpx-vp9", "webm"), ("libvpx-vp9", "mp4")]


@pytest.mark.parametrize(("codec", "suffix"), [*OPENED_QUICKLY, ("libx265", "mp4"), ("libsvtav1", "mp4")])
@pytest.mark.parametrize("aspect", [None, Fraction(4, 3)])
@pytest.mark.parametrize("b_frames", [0, 3])
@pytest.mark.parametrize("with_audio", [False, True])
def test_opening_without_decoding_teaches_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    codec: str,
    suffix: str,
    aspect: Fraction | None,
    b_frames: int,
    with_audio: bool,
) -> None:
    times = [Fraction(n * 40 + n % 3 * 7, 1000) for n in range(40)] if b_frames else None
    recipe = Recipe(codec=codec, times=times, num_frames=40, b_frames=b_frames, pixel_aspect=aspect)
    path = write_video(tmp_path / f"v.{suffix}", replace(recipe, with_audio=with_audio and suffix != "webm"))
    for _ in range(2):
        quickly = learned(path)
        with monkeypatch.context() as patch:
            patch.setattr("vidshard.pipeline.video.container._quick_options", lambda head, limits: None)
            assert learned(path) == quickly
        without_aspect_box(path)  # then only the pictures say it


@pytest.mark.parametrize(("codec", "suffix"), OPENED_QUICKLY)
def test_files_whose_header_tells_all_are_opened_once_and_others_by_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, suffix: str
) -> None:
    opened: list[bool] = []
    av_open = container._av_open

    def noting(watched: WatchedFile, options: dict[str, str], container_options: dict[str, str]) -> Any:
        opened.append(bool(options))
        return av_open(watched, options, container_options)

    monkeypatch.setattr("vidshard.pipeline.video.container._av_open", noting)
    path = write_video(tmp_path / f"v.{suffix}", Recipe(codec=codec, num_frames=20))
    learned(path)
    assert opened == [True]
    if codec == "libx264":
        opened.clear()
        shaped = write_video(tmp_path / f"shaped.{suffix}", Recipe(num_frames=20, pixel_aspect=Fraction(4, 3)))
        learned(without_aspect_box(shaped))
        assert opened == [True, False]


def test_the_reordering_and_pixel_shape_of_h264_are_read_from_its_parameters(tmp_path: Path) -> None:
    for aspect, says, b_frames in ((None, True, 0), (Fraction(4, 3), False, 1)):
        path = write_video(tmp_path / "v.mp4", Recipe(num_frames=5, pixel_aspect=aspect, b_frames=b_frames))
        with av.open(str(path)) as container:
            header = usability_of(bytes(container.streams.video[0].codec_context.extradata or b""))
        assert header == Usability(square=says, num_reordered=b_frames)
    assert usability_of(b"\0\0\1\x67 start codes") is None
    assert usability_of(b"\1 cut") is None


# Slots.


def test_packets_of_av1_that_only_unwanted_pictures_look_at_are_not_sent(tmp_path: Path, counted: Counter[str]) -> None:
    params = "hierarchical-levels=4:pred-struct=2:keyint=-1"
    recipe = Recipe(codec="libsvtav1", num_frames=120, options=(("preset", "10"), ("svtav1-params", params)))
    path = write_video(tmp_path / "v.mp4", recipe)
    with path.open("rb") as file:
        list(decode_from(WatchedFile(file), SeekPoint(), needed=every_nth_second(path, Fraction(1))))
    assert counted["sent"] <= 40
    assert not counted["whole_passes"]
    for fps in ("1/2", "1", "3"):
        assert_nothing_is_lost(path, replace(SPEC, fps=Fraction(fps), num_frames=3))
    assert_nothing_is_lost(path, replace(SPEC, num_frames=2), clips_per_span=1)
