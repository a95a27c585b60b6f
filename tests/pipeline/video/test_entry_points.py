"""Spans begin where decoding may begin: the decoder's state is whole there, whatever the container marks."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest
from av.codec import Codec
from av.packet import Packet
from av.video.frame import PictureType
from av.video.stream import VideoStream

from tests.support.avi import EMPTY, FRAME, PALETTE, write_avi
from tests.support.decoding import assert_same, decode, numbers
from tests.support.law import EVERY_DECODER
from tests.support.videos import Recipe, numbered_frame, read_frame_number, write_video
from vidshard.pipeline.video.frames import frames_after
from vidshard.pipeline.video.input_file import storage_failures_named
from vidshard.pipeline.video.timestamps import Clock
from vidshard.schemas.rejections import VideoError
from vidshard.schemas.video import ClipSpec

SPEC = ClipSpec(fps=Fraction(25), num_frames=5, height=64, width=64)
GRAY = b"".join(bytes([level, level, level, 0]) for level in range(256))
CYAN = b"".join(bytes([level, level, 0, 0]) for level in range(256))


def rows(number: int) -> bytes:
    """A numbered frame in shades of gray, its rows bottom up."""
    return bytes(np.ascontiguousarray(numbered_frame(number, 64, 64)[::-1, :, 1]))


def assert_spans_equal_one_pass(path: Path, spec: ClipSpec = SPEC) -> list[int]:
    """Spans of one clip, and of two, give the clips of one pass; returns the numbers of its frames."""
    whole = decode(path, spec)
    for clips_per_span in (1, 2):
        assert_same(decode(path, spec, clips_per_span), whole)
    return numbers(whole)


def test_palettes_survive_seeking(tmp_path: Path) -> None:
    path = write_avi(
        tmp_path / "camera.avi", ((FRAME, rows(n)) for n in range(50)), width=64, height=64, bits=8, palette=GRAY
    )
    assert assert_spans_equal_one_pass(path) == list(range(50))


def change_of(palette: bytes) -> bytes:
    """The chunk that changes all colors: red, green, blue and flags each."""
    colors = (palette[at : at + 4] for at in range(0, len(palette), 4))
    return bytes(4) + b"".join(bytes([color[2], color[1], color[0], 0]) for color in colors)


def test_palettes_that_change_in_mid_stream_survive_seeking(tmp_path: Path) -> None:
    chunks = [(FRAME, rows(n)) for n in range(50)]
    chunks[33:33] = [(PALETTE, change_of(GRAY))]
    chunks[12:12] = [(PALETTE, change_of(CYAN))]
    path = write_avi(tmp_path / "camera.avi", chunks, width=64, height=64, bits=8, palette=GRAY)
    assert_spans_equal_one_pass(path)
    frames = [frame for clip in decode(path, SPEC, 1) for frame in clip.frames]
    are_gray = [bool((frame[..., 0] == frame[..., 2]).all()) for frame in frames]
    assert are_gray == [n < 12 or n >= 33 for n in range(50)]


def test_palettes_survive_leaps_over_ten_seconds(tmp_path: Path) -> None:
    path = write_avi(
        tmp_path / "camera.avi",
        ((FRAME, rows(n)) for n in range(150)),
        width=64,
        height=64,
        bits=8,
        palette=GRAY,
        rate=5,
    )
    spec = replace(SPEC, fps=Fraction(5), stride_seconds=Fraction(12))
    assert assert_spans_equal_one_pass(path, spec) == [start + n for start in (0, 60, 120) for n in range(5)]


def test_palettes_survive_damage(tmp_path: Path) -> None:
    """After damage decoding goes on at the next picture."""
    path = write_avi(
        tmp_path / "camera.avi", ((FRAME, rows(n)) for n in range(50)), width=64, height=64, bits=8, palette=GRAY
    )
    clock = Clock(time_base=Fraction(1, 25), start_pts=0)
    with path.open("rb") as file, storage_failures_named(file) as watched:
        first = next(frames_after(watched, 22, clock, "NONE", lambda start, end: True))
    picture = first.frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    assert (first.pts, read_frame_number(picture)) == (23, 23)


# Codecs that PyAV writes here and whose pictures refer to others.
INTER_CODECS = [
    ("mpeg4", "mp4"),
    ("mpeg4", "avi"),
    ("mpeg4", "mkv"),
    ("msmpeg4", "avi"),
    ("msmpeg4v2", "avi"),
    ("wmv1", "asf"),
    ("wmv2", "asf"),
    ("h263", "avi"),
    ("h263p", "avi"),
    ("flv", "flv"),
    ("svq1", "mov"),
    ("snow", "avi"),
    ("ffv1", "mkv"),
    ("cinepak", "avi"),
    ("cinepak", "mov"),
    ("msvideo1", "avi"),
    ("qtrle", "mov"),
    ("rpza", "mov"),
    ("h261", "avi"),
    ("flashsv", "flv"),
    ("mpeg1video", "mkv"),
    ("mpeg2video", "mkv"),
    ("libx264", "mp4"),
    ("libx264", "flv"),
    ("libx265", "mp4"),
    ("libvpx", "mkv"),
    ("libvpx-vp9", "mkv"),
]


@pytest.mark.parametrize(("codec", "suffix"), INTER_CODECS)
def test_keyframe_marks_count_only_where_the_picture_agrees(tmp_path: Path, codec: str, suffix: str) -> None:
    formats = [each.name for each in Codec(codec, "w").video_formats or ()]
    pixel_format = "yuv420p" if "yuv420p" in formats else formats[0]
    width, height = (176, 144) if codec in ("h261", "h263") else (96, 64)
    recipe = Recipe(codec=codec, pixel_format=pixel_format, width=width, height=height, num_frames=40)
    honest = write_video(tmp_path / f"honest.{suffix}", recipe)
    marked = mark_all(honest, tmp_path / f"marked.{suffix}")
    whole = decode(honest, SPEC, limits=EVERY_DECODER)
    assert len(numbers(whole)) == 40
    for path in (honest, marked):
        for clips_per_span in (1, 3):
            assert_same(decode(path, SPEC, clips_per_span, limits=EVERY_DECODER), whole)


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv", "nut", "ts"])
@pytest.mark.parametrize("b_frames", [0, 3])
def test_interlaced_mpeg4_is_decoded_from_its_start(tmp_path: Path, suffix: str, b_frames: int) -> None:
    recipe = Recipe(codec="mpeg4", gop=3, num_frames=60, b_frames=b_frames, options=(("flags", "+ildct+ilme"),))
    path = write_video(tmp_path / f"v.{suffix}", recipe)
    for fps in (recipe.rate, Fraction(7)):
        spec = replace(SPEC, fps=fps)
        whole = decode(path, spec)
        if fps == recipe.rate:
            assert numbers(whole) == list(range(60))
        for clips_per_span in (1, 3):
            assert_same(decode(path, spec, clips_per_span), whole)


@pytest.mark.parametrize("codec", ["mpeg2video", "libx264", "libx265", "mpeg4"])
@pytest.mark.parametrize(("gop", "b_frames"), [(3, 2), (3, 0), (5, 1)])
def test_spans_of_a_program_stream_equal_one_pass_though_few_pictures_have_times(
    tmp_path: Path, codec: str, gop: int, b_frames: int
) -> None:
    path = write_video(tmp_path / "v.mpg", Recipe(codec=codec, gop=gop, b_frames=b_frames, num_frames=90))
    try:
        whole = decode(path, SPEC)
    except VideoError as refused:
        with pytest.raises(VideoError, match=re.escape(refused.detail)):
            decode(path, SPEC, 1)
    else:
        assert_same(decode(path, SPEC, 1), whole)


def mark_all(source: Path, path: Path) -> Path:
    """A copy in which each picture is marked as a keyframe."""
    with av.open(str(source)) as given, av.open(str(path), "w") as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.is_keyframe = True
                packet.stream = stream
                made.mux(packet)
    return path


@pytest.mark.parametrize("codec", ["mpeg4", "libx264", "libx265", "mpeg2video"])
def test_a_missing_table_of_keyframes_marks_nothing(tmp_path: Path, codec: str) -> None:
    honest = write_video(tmp_path / "honest.mp4", Recipe(codec=codec, num_frames=40))
    data = honest.read_bytes()
    assert data.count(b"stss") == 1
    path = tmp_path / "v.mp4"
    path.write_bytes(data.replace(b"stss", b"free"))
    assert_same(decode(path, SPEC, 1), decode(honest, SPEC))


def test_intra_pictures_that_are_marked_like_all_others_are_no_entry_points(tmp_path: Path) -> None:
    """An I picture that is no IDR picture: those after it may refer to pictures before it."""
    options = (("x264-params", "keyint=1000:min-keyint=1000:scenecut=0:ref=4"), ("preset", "medium"))
    honest = tmp_path / "honest.mp4"
    with av.open(str(honest), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.options = dict(options)
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number % 7, 96, 64), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            frame.pict_type = PictureType.I if number % 10 == 5 else PictureType.NONE
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    marked = mark_all(honest, tmp_path / "marked.mp4")
    whole = decode(honest, SPEC)
    for clips_per_span in (1, 3):
        assert_same(decode(marked, SPEC, clips_per_span), whole)


def jpegs(tmp_path: Path, count: int) -> list[bytes]:
    """Numbered frames as JPEG pictures."""
    video = write_video(
        tmp_path / "whole.avi",
        Recipe(codec="mjpeg", pixel_format="yuvj420p", width=64, height=64, num_frames=count),
    )
    with av.open(str(video)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize("count", [1, 10, 75])
def test_empty_chunks_at_the_end_hold_the_picture(tmp_path: Path, count: int) -> None:
    chunks = [(FRAME, data) for data in jpegs(tmp_path, 20)] + [(EMPTY, b"")] * count
    path = write_avi(tmp_path / "v.avi", chunks, width=64, height=64, codec=b"MJPG")
    assert assert_spans_equal_one_pass(path) == [min(n, 19) for n in range(20 + count)]


def test_empty_chunks_anywhere_hold_the_picture(tmp_path: Path) -> None:
    shown = [0, 0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4, 5, 5, 6, 7, 8, 9, 9, 9, 9, 9, 9]
    pictures = jpegs(tmp_path, 10)
    chunks = [
        (EMPTY, b"") if at and shown[at - 1] == number else (FRAME, pictures[number]) for at, number in enumerate(shown)
    ]
    path = write_avi(tmp_path / "v.avi", chunks, width=64, height=64, codec=b"MJPG")
    assert assert_spans_equal_one_pass(path) == shown


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "mjpeg", "prores"])
def test_empty_samples_of_an_mp4_hold_the_picture(tmp_path: Path, codec: str) -> None:
    suffix = "mov" if codec == "prores" else "mp4"
    pixel_format = {"mjpeg": "yuvj420p", "prores": "yuv422p10le"}.get(codec, "yuv420p")
    whole = write_video(tmp_path / f"whole.{suffix}", Recipe(codec=codec, num_frames=60, pixel_format=pixel_format))
    data = bytearray(whole.read_bytes())
    sizes = data.index(b"stsz") + 16
    data[sizes + 4 * 20 : sizes + 4 * 60] = bytes(4 * 40)
    path = tmp_path / f"v.{suffix}"
    path.write_bytes(data)
    assert assert_spans_equal_one_pass(path) == [min(n, 19) for n in range(60)]


@pytest.mark.parametrize("suffix", ["avi", "mkv", "mp4"])
def test_pictures_that_are_not_coded_hold_the_one_before(tmp_path: Path, suffix: str) -> None:
    """MPEG-4 states with a picture of seven bytes that nothing changed (vop_coded 0, ISO 14496-2 6.2.5)."""
    whole = write_video(tmp_path / f"whole.{suffix}", Recipe(codec="mpeg4", num_frames=60))
    path = tmp_path / f"v.{suffix}"
    with av.open(str(whole)) as given, av.open(str(path), "w") as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(packet for packet in given.demux(video=0) if packet.size):
            held: Packet[VideoStream] = packet
            if number >= 20:
                held = cast("Packet[VideoStream]", Packet(not_coded(bytes(packet))))
                held.pts, held.dts, held.duration = packet.pts, packet.dts, packet.duration
                held.time_base = packet.time_base
            held.stream = stream
            made.mux(held)
    assert assert_spans_equal_one_pass(path) == [min(n, 19) for n in range(60)]


def not_coded(picture: bytes) -> bytes:
    """The picture's header up to vop_time_increment of five bits, then a marker, vop_coded 0 and stuffing."""
    at = picture.index(b"\0\0\1\xb6") + 4
    bits = f"{int.from_bytes(picture[at : at + 4], 'big'):032b}"
    end = bits.index("0", 2) + 2 + 5  # modulo_time_base ends with a zero; a marker
    header = "01" + bits[2:end] + "1" + "0"
    header += "0" + "1" * (-(len(header) + 1) % 8)
    return b"\0\0\1\xb6" + int(header, 2).to_bytes(len(header) // 8, "big")
