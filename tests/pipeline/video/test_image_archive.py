"""Images in tar and zip archives as videos, and animated pictures."""

from __future__ import annotations

import gc
import io
import struct
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.support.archives import ENCODERS, HEIGHT, WIDTH, image, sequence, write_archive
from tests.support.decoding import numbers
from tests.support.videos import numbered_frame
from vidshard.pipeline.storage import open_binary, open_video, write_atomic
from vidshard.pipeline.video.decode import decode_span, decode_spans
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Clip, ClipSpec, Limits, Span, VideoProbe, VideoRef

SPEC = ClipSpec(fps=Fraction(24), num_frames=5, height=48, width=48)


def probe(path: Path, limits: Limits | None = None) -> VideoProbe:
    return probe_video(VideoRef(uri=str(path), num_bytes=-1), open_binary, limits)


def spans_of(path: Path, spec: ClipSpec = SPEC, clips_per_span: int = 1000, limits: Limits | None = None) -> list[Span]:
    return plan_spans(probe(path, limits), spec, clips_per_span)


def clips_of(path: Path, spec: ClipSpec = SPEC, clips_per_span: int = 1000, limits: Limits | None = None) -> list[Clip]:
    spans = spans_of(path, spec, clips_per_span, limits)
    return [clip for span in spans for clip in decode_span(span, spec, str(path), max_clips=1000, limits=limits)]


def refusal(path: Path, limits: Limits | None = None) -> VideoError:
    with pytest.raises(VideoError) as caught:
        clips_of(path, limits=limits)
    return caught.value


@pytest.fixture(scope="module", params=["tar", "zip"])
def archive(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 numbered images in no order, and others that are none."""
    path = tmp_path_factory.mktemp("archive") / f"images.{request.param}"
    members = [
        ("notes.txt", b"hello"),
        ("__MACOSX/shot/._frame1.png", b"rubbish"),
        ("shot/.hidden.png", b"rubbish"),
        *sorted(sequence(50)),
    ]
    return write_archive(path, members)


def test_images_are_frames_in_natural_order(archive: Path) -> None:
    header = probe(archive)
    assert (header.source.width, header.source.height, header.source.codec) == (WIDTH, HEIGHT, "png")
    assert header.source.fps == 24.0
    assert header.duration_seconds_from_header == pytest.approx(50 / 24)
    clips = clips_of(archive)
    assert numbers(clips) == list(range(50))
    assert [time for clip in clips for time in clip.frame_pts_seconds] == pytest.approx([n / 24 for n in range(50)])


@pytest.mark.parametrize("fps", ["24", "7", "30000/1001", "60"])
@pytest.mark.parametrize("stride", [None, "11/10"])
def test_spans_decoded_apart_equal_the_whole(archive: Path, fps: str, stride: str | None) -> None:
    spec = replace(SPEC, fps=Fraction(fps), stride_seconds=Fraction(stride) if stride else None)
    whole = clips_of(archive, spec)
    times = [clip.start_seconds + n / float(spec.fps) for clip in whole for n in range(clip.num_valid_frames)]
    assert numbers(whole) == [int(time * 24 + 1e-6) for time in times]
    for clips_per_span in (1, 3):
        some = clips_of(archive, spec, clips_per_span)
        assert [clip.clip_index for clip in some] == [clip.clip_index for clip in whole]
        for one, other in zip(some, whole, strict=True):
            assert np.array_equal(one.frames, other.frames)
            assert np.array_equal(one.frame_pts_seconds, other.frame_pts_seconds)
            assert one.num_valid_frames == other.num_valid_frames


@pytest.mark.parametrize("suffix", ENCODERS)
def test_every_kind_of_image_is_decoded(tmp_path: Path, suffix: str) -> None:
    path = write_archive(tmp_path / "v.zip", sequence(7, suffix))
    assert numbers(clips_of(path)) == list(range(7))


def test_the_content_tells_what_a_file_is_and_not_its_name(tmp_path: Path) -> None:
    members = [("1.png", image(0, "jpg")), ("2.JPG", image(1, "webp")), ("3.bmp", image(2, "png"))]
    path = write_archive(tmp_path / "v.zip", members).rename(tmp_path / "v.mp4")
    assert numbers(clips_of(path)) == [0, 1, 2]


def test_folders_come_one_after_another_and_a_name_that_comes_twice_is_its_last(tmp_path: Path) -> None:
    names = ["./a-b/1.png", "./a/2.png", "./a/10.png", "./a10/1.png", "./a9/1.png", "./a/010.png", "./a/2.png"]
    path = write_archive(tmp_path / "v.tar", [(name, image(n)) for n, name in enumerate(names)])
    assert numbers(clips_of(path)) == [6, 5, 2, 4, 3, 0]


def test_the_rate_is_a_setting(archive: Path) -> None:
    limits = Limits(image_fps=Fraction(30000, 1001))
    header = probe(archive, limits)
    assert header.time_base == Fraction(1001, 30000)
    assert header.source.fps == pytest.approx(29.97, abs=1e-3)
    assert header.video_id != probe(archive).video_id
    clips = clips_of(archive, replace(SPEC, fps=Fraction(30000, 1001)), 2, limits)
    assert numbers(clips) == list(range(50))


def test_only_needed_images_are_decoded(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SPEC, fps=Fraction(4))
    [span] = spans_of(archive, spec)
    decoded: list[int] = []
    from vidshard.pipeline.video.image_archive import ImageArchive

    frame = ImageArchive.frame

    def counted(self: ImageArchive, index: int) -> av.VideoFrame:
        decoded.append(index)
        return frame(self, index)

    monkeypatch.setattr(ImageArchive, "frame", counted)
    decode_span(span, spec, str(archive), max_clips=9)
    assert decoded == [0, 6, 12, 18, 24, 30, 36, 42, 48, 49]


def test_images_of_other_sizes_and_depths_follow_one_another(tmp_path: Path) -> None:
    path = tmp_path / "v.zip"
    gray = saved(Image.fromarray(numbered_frame(1, 64, 64)).convert("L"), "png")
    palette = saved(Image.fromarray(numbered_frame(2, 128, 96)).convert("P"), "png")
    write_archive(path, [("0.png", image(0)), ("1.png", gray), ("2.png", palette)])
    assert numbers(clips_of(path)) == [0, 1, 2]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpeg", "png", "webp", "tiff"])
def test_a_camera_held_otherwise_gives_upright_pictures(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = numbered_frame(5, WIDTH, HEIGHT)
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(turned)), suffix, exif=exif)
    path = write_archive(tmp_path / "v.zip", [(f"a.{suffix}", data)])
    header = probe(path)
    assert (header.source.width, header.source.height) == (WIDTH, HEIGHT)
    assert numbers(clips_of(path)) == [5]


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("png", "RGB", {"icc_profile": PROFILE}),
        ("png", "LA", {}),
        ("png", "P", {}),
        ("jpeg", "RGB", {"icc_profile": PROFILE, "progressive": True, "dpi": (72, 144)}),
        ("jpeg", "L", {}),
        ("jpeg", "CMYK", {}),
        ("webp", "RGBA", {"lossless": True}),
        ("webp", "RGB", {"icc_profile": PROFILE}),
        ("bmp", "P", {}),
        ("tiff", "RGB", {"compression": "tiff_lzw"}),
        ("tiff", "RGB", {"compression": "tiff_adobe_deflate"}),
        ("tiff", "CMYK", {"compression": "packbits"}),
        ("tiff", "1", {"compression": "group4"}),
    ],
)
def test_images_as_other_programs_write_them(tmp_path: Path, kind: str, mode: str, options: dict[str, Any]) -> None:
    pictures = [Image.fromarray(numbered_frame(number, WIDTH, HEIGHT)).convert(mode) for number in range(3)]
    members = [(f"{number}.{kind}", saved(picture, kind, **options)) for number, picture in enumerate(pictures)]
    path = write_archive(tmp_path / "v.zip", members)
    clips = clips_of(path)
    gc.collect()  # PyAV frees a png's profile twice, and dies of it here
    assert numbers(clips) == [0, 1, 2]
    assert (probe(path).source.width, probe(path).source.height) == (WIDTH, HEIGHT)


def test_a_tiff_that_ffmpeg_shows_black_is_refused(tmp_path: Path) -> None:
    data = saved(Image.fromarray(numbered_frame(1, WIDTH, HEIGHT)), "tiff", compression="jpeg")
    path = write_archive(tmp_path / "v.zip", [("0.tif", image(0, "tif")), ("1.tif", data)])
    error = refusal(path)
    assert error.reason is Reason.UNSUPPORTED
    assert "1.tif: a tiff compressed by method 7" in error.detail


def test_a_video_of_camera_pictures_is_upright_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "v.mjpeg"
    turned = [np.ascontiguousarray(np.rot90(numbered_frame(number, WIDTH, HEIGHT))) for number in range(5)]
    path.write_bytes(b"".join(saved(Image.fromarray(picture), "jpeg", exif=exif) for picture in turned))
    assert numbers(clips_of(path, replace(SPEC, fps=Fraction(25)))) == [0, 1, 2, 3, 4]


def test_an_archive_is_read_from_any_file_system(archive: Path) -> None:
    uri = f"memory://{archive.name}"
    write_atomic(uri, archive.read_bytes())
    header = probe_video(VideoRef(uri=uri, num_bytes=-1), open_video)
    [span] = plan_spans(header, SPEC, 1000)
    with open_video(uri) as file:
        assert numbers(decode_span(span, SPEC, file, max_clips=99)) == list(range(50))


# Damage and hostility.


class _Lost(io.BytesIO):
    """A file whose storage fails after so many reads."""

    num_left = 1 << 30

    def read(self, num_bytes: int | None = -1, /) -> bytes:
        self.num_left -= 1
        if self.num_left < 0:
            raise OSError("connection lost")
        return super().read(num_bytes)


def test_a_lost_connection_is_the_storages_fault(archive: Path) -> None:
    [span] = spans_of(archive)
    reads = []
    for num_reads in (1, 2, 4, 9, 60, 100):
        file = _Lost(archive.read_bytes())
        file.num_left = num_reads
        try:
            decode_span(span, SPEC, file, max_clips=99)
        except VideoError as error:
            reads.append((error.reason, error.detail))
    assert len(reads) > 4
    assert set(reads) == {(Reason.UNREADABLE, "connection lost")}


def test_an_archive_without_images_is_no_video(tmp_path: Path) -> None:
    for suffix in ("tar", "zip"):
        path = write_archive(tmp_path / f"v.{suffix}", [("a.mp4", b"video"), ("b.txt", b"text")])
        error = refusal(path)
        assert error.reason is Reason.NOT_A_VIDEO
        assert f"a {suffix} archive without images" in error.detail
        assert "as an input of its own" in error.detail


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"v.tar.{suffix}"
    with tarfile.open(path, f"w:{suffix}") as tar:  # type: ignore[call-overload]
        entry = tarfile.TarInfo("a.png")
        entry.size = len(image(0))
        tar.addfile(entry, io.BytesIO(image(0)))
    error = refusal(path)
    assert error.reason is Reason.NOT_A_VIDEO
    assert "decompress it" in error.detail


@pytest.mark.parametrize("suffix", [*ENCODERS])
def test_a_damaged_image_is_named_and_costs_only_its_spans(tmp_path: Path, suffix: str) -> None:
    members = sequence(20, suffix)
    name, data = members[7]
    members[7] = name, data[: len(data) // 2]
    path = write_archive(tmp_path / "v.zip", members)
    spans = spans_of(path, SPEC, 1)
    results = decode_spans(spans, SPEC, str(path), max_clips=9)
    assert [result.error is None for result in results] == [True, False, True]
    error = results[1].error
    assert error is not None
    assert error.reason is Reason.DECODE_ERROR
    assert error.detail.startswith(f"at 0.29 s, in shot/frame7.{suffix}: ")


def test_clips_beside_a_damaged_image_can_be_kept(tmp_path: Path) -> None:
    members = sequence(40)
    for number in (7, 8, 32):
        members[number] = members[number][0], b"no image"
    path = write_archive(tmp_path / "v.tar", members)
    [result] = decode_spans(spans_of(path), SPEC, str(path), max_clips=99, keep_undamaged=True)
    whole = [clip.clip_index for clip in result.clips]
    assert whole == [0, 2, 3, 4, 5, 7]
    assert numbers(result.clips) == [n for index in whole for n in range(5 * index, 5 * index + 5)]


def test_a_broken_first_image_begins_the_video_later(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "v.tar", [("shot/frame0.png", b"no image"), *sequence(6)[1:]])
    header = probe(path)
    assert header.grid_start_pts == 1
    assert header.duration_seconds_from_header == pytest.approx(5 / 24)
    none = write_archive(tmp_path / "n.tar", [("a.png", b"no image")])
    assert refusal(none).reason is Reason.NO_FRAMES


def test_encrypted_images_are_refused_by_name(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "v.zip", sequence(3))
    data = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = -1
        while (place := data.find(mark, place + 1)) >= 0:
            data[place + at] |= 1
    path.write_bytes(data)
    error = refusal(path)
    assert "shot/frame2.png: it is encrypted" in error.detail


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_a_truncated_archive_is_refused(tmp_path: Path, archive: Path, share: float) -> None:
    path = tmp_path / archive.name
    path.write_bytes(archive.read_bytes()[: int(archive.stat().st_size * share)])
    error = refusal(path)
    assert error.reason is (Reason.TRUNCATED if path.suffix == ".tar" else Reason.DECODE_ERROR)


def test_a_damaged_tar_header_is_no_end(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "v.tar", sequence(5))
    data = bytearray(path.read_bytes())
    at = data.index(b"shot/frame3.png")
    data[at : at + 40] = b"?" * 40
    path.write_bytes(data)
    error = refusal(path)
    assert (error.reason, error.detail) == (Reason.DECODE_ERROR, f"the tar archive is damaged at byte {at}")


def test_what_inflates_beyond_its_claim_or_the_limits_is_refused_without_inflating_it(tmp_path: Path) -> None:
    bomb = bytes(64 << 20)
    path = write_archive(tmp_path / "v.zip", [("a.png", b"\x89PNG\r\n\x1a\n" + bomb)])
    limits = Limits(max_pixels=1 << 20)
    error = refusal(path, limits)
    assert error.reason is Reason.NO_FRAMES
    assert "more than the 9,437,184 that --max-pixels allows" in error.detail
    data = bytearray(path.read_bytes())  # now it claims little
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = struct.pack("<I", 1000)
    path.write_bytes(data)
    assert "it is damaged" in refusal(path, limits).detail


def test_pictures_beyond_the_limit_are_refused_unseen(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    path = write_archive(tmp_path / "v.zip", [("0.png", image(0)), ("1.png", data)])
    error = refusal(path)
    assert (error.reason, error.detail) == (
        Reason.OVER_LIMIT,
        "at 0.04 s, in 1.png: pictures of 60000x60000, more than the 67,108,864 of --max-pixels",
    )
    small = write_archive(tmp_path / "s.zip", sequence(2))
    assert "more than the 6,143 of --max-pixels" in refusal(small, Limits(max_pixels=96 * 64 - 1)).detail


def test_too_many_images_are_refused(archive: Path) -> None:
    assert refusal(archive, Limits(max_frames=49)).reason is Reason.OVER_LIMIT
    assert refusal(archive, Limits(max_seconds=2.0)).reason is Reason.OVER_LIMIT
    assert clips_of(archive, limits=Limits(max_frames=50, max_seconds=2.1))


@pytest.mark.parametrize("seed", range(40))
def test_noise_in_an_archive_is_a_refusal_or_clips(archive: Path, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(archive.read_bytes())
    for _ in range(4):
        at = int(rng.integers(len(data) - 3000 if seed % 2 else 0, len(data) - 8))
        data[at : at + 8] = rng.bytes(8)
    path = tmp_path / "v.bin"
    path.write_bytes(data)
    try:
        clips_of(path)
    except VideoError as error:
        refused = error
    else:
        return
    assert refused.detail.isprintable()
    assert refused.reason is not Reason.UNREADABLE


def test_a_member_without_a_name_is_passed_over(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "v.zip", [*sequence(3), ("a", b"text")])
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 28 : entry + 32] = struct.pack("<HH", 0, 1)  # its name becomes an extra field
    path.write_bytes(data)
    assert numbers(clips_of(path)) == [0, 1, 2]


def test_names_that_cannot_be_printed_are_refused_readably(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "v.tar", [("0.png", image(0)), ("a\nb\udcff\x1b[31m.png", b"no image")])
    error = refusal(path)
    assert "a?b?" in error.detail
    assert error.detail.isprintable()


# Animated pictures.


def write_animation(path: Path, delays: Sequence[int]) -> Path:
    """Frames that carry their numbers, for so many milliseconds each."""
    first, *rest = [Image.fromarray(numbered_frame(number, WIDTH, HEIGHT)) for number in range(len(delays))]
    first.save(path, save_all=True, append_images=rest, duration=list(delays), loop=0)
    return path


DELAYS = [100, 40, 300, 20, 20, 500, 70, 110, 240, 100]


@pytest.mark.parametrize("suffix", ["gif", "png"])
def test_animated_pictures_have_their_own_times(tmp_path: Path, suffix: str) -> None:
    path = write_animation(tmp_path / f"v.{suffix}", DELAYS)
    spec = replace(SPEC, fps=Fraction(100))
    ends = np.cumsum(DELAYS)
    expected = [int(np.searchsorted(ends, at, side="right")) for at in range(0, int(ends[-1]), 10)]
    whole = clips_of(path, spec)
    assert numbers(whole) == expected
    apart = clips_of(path, spec, 2)
    for one, other in zip(apart, whole, strict=True):
        assert np.array_equal(one.frames, other.frames)
        assert np.array_equal(one.frame_pts_seconds, other.frame_pts_seconds)


def test_an_animation_with_a_color_profile_is_decoded(tmp_path: Path) -> None:
    first, *rest = [Image.fromarray(numbered_frame(number, WIDTH, HEIGHT)) for number in range(3)]
    path = tmp_path / "v.png"
    first.save(path, save_all=True, append_images=rest, duration=100, icc_profile=PROFILE)
    clips = clips_of(path, replace(SPEC, fps=Fraction(10)))
    gc.collect()
    assert numbers(clips) == [0, 1, 2]


@pytest.mark.parametrize(
    ("suffix", "disposal", "taken_away"), [("gif", 1, 0), ("gif", 2, 1), ("png", 0, 0), ("png", 1, 1)]
)
def test_what_is_transparent_is_black(tmp_path: Path, suffix: str, disposal: int, taken_away: bool) -> None:
    """Frame n brings a white square at column 10 n; the last one's stays or is taken away."""
    pictures = []
    for number in range(4):
        rgba = np.zeros((48, 48, 4), np.uint8)
        rgba[20:28, 10 * number : 10 * number + 8] = 255
        pictures.append(Image.fromarray(rgba))
    path = tmp_path / f"v.{suffix}"
    blend = 1  # over what is there
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=100, loop=0, disposal=disposal, blend=blend
    )
    [clip] = clips_of(path, replace(SPEC, fps=Fraction(10)))
    assert clip.num_valid_frames == 4
    for number, frame in enumerate(clip.frames[:4]):
        assert frame[:18].max() == 0
        white = [column for column in range(4) if frame[24, 10 * column + 4].min() == 255]
        assert white == ([number] if taken_away else list(range(number + 1)))


@pytest.mark.parametrize("animated", [False, True])
def test_webp_files_are_refused_by_name(tmp_path: Path, animated: bool) -> None:
    path = write_animation(tmp_path / "v.webp", DELAYS if animated else DELAYS[:1])
    error = refusal(path)
    assert error.reason is Reason.NOT_A_VIDEO
    assert error.detail.startswith("a WebP picture: ")
    assert ".zip" in error.detail
