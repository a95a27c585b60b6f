from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import pytest
from av.stream import Disposition

from tests.support.decoding import SPEC, assert_same, decode, expected, numbers, probe, rejection
from tests.support.shared import SHARED
from tests.support.videos import (
    BLUE,
    RED,
    Recipe,
    numbered_frame,
    read_frame_number,
    write_audio_only,
    write_damaged,
    write_sound_with_cover,
    write_truncated,
    write_undecodable,
    write_video,
    write_without_frames,
)
from vidshard.pipeline.storage import WHOLE_BYTES, open_video
from vidshard.pipeline.video.content_id import content_id
from vidshard.pipeline.video.decode import decode_span
from vidshard.pipeline.video.geometry import Orientation, display_size, plan_geometry
from vidshard.pipeline.video.input_file import WatchedFile
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import ClipSpec, ResizePolicy, VideoRef

CLIPS = SHARED / "videos"
needs_shared = [
    pytest.mark.shared,
    pytest.mark.skipif(not CLIPS.is_dir(), reason=f"no clips in {CLIPS.name}/ beside the repository"),
]


def with_absurd_index(mp4: bytes) -> bytes:
    """Two thousand million frames, says its table of sizes."""
    at = mp4.index(b"stsz") + 12
    return mp4[:at] + b"\x7f\xff\xff\xff" + mp4[at + 4 :]


def outcome(path: Path) -> Reason | None:
    try:
        decode(path)
    except VideoError as error:
        return error.reason
    return None


CODECS_AND_CONTAINERS = [
    ("libx264", "mp4", 0),
    ("libx264", "mp4", 2),
    ("libx264", "mov", 2),
    ("libx264", "mkv", 2),
    ("libx264", "ts", 2),
    ("libx264", "flv", 2),
    ("libx264", "avi", 0),
    ("libx264", "avi", 2),
    ("libx264", "h264", 2),
    ("libx265", "mp4", 2),
    ("libx265", "mkv", 0),
    ("mpeg4", "mp4", 2),
    ("mpeg4", "avi", 0),
    ("mpeg4", "avi", 2),
    ("mpeg2video", "ts", 2),
    ("mpeg2video", "mpg", 2),
    ("libvpx-vp9", "webm", 0),
    ("libsvtav1", "mp4", 0),
    ("mjpeg", "avi", 0),
    ("mjpeg", "mov", 0),
    ("ffv1", "mkv", 0),
    ("gif", "gif", 0),
    ("prores_ks", "mov", 0),
]
PIXEL_FORMATS = {"mjpeg": "yuvj420p", "gif": "rgb8", "prores_ks": "yuv422p10le"}


@pytest.mark.parametrize(("codec", "suffix", "b_frames"), CODECS_AND_CONTAINERS)
def test_sampled_frames_are_those_on_screen_and_spans_equal_the_whole(
    tmp_path: Path, codec: str, suffix: str, b_frames: int
) -> None:
    recipe = Recipe(codec=codec, b_frames=b_frames, num_frames=60, pixel_format=PIXEL_FORMATS.get(codec, "yuv420p"))
    path = write_video(tmp_path / f"video.{suffix}", recipe)
    clips = decode(path)
    times = [n / recipe.rate for n in range(60)]
    assert numbers(clips) == expected(times, Fraction(60) / recipe.rate, SPEC.fps)
    assert [clip.num_valid_frames for clip in clips] == [5, 5, 5, 5, 4]
    start = probe(path).grid_start_pts * probe(path).time_base
    for clip in clips:
        assert clip.start_seconds == pytest.approx(float(start) + clip.clip_index * 0.5)
        shown = np.array([float(times[read_frame_number(frame)] + start) for frame in clip.frames])
        assert np.abs(clip.frame_pts_seconds - shown).max() < 1e-3
    assert probe(path).duration_seconds_from_header == pytest.approx(2.4, abs=0.2)
    for clips_per_span in (1, 2):
        assert len(plan_spans(probe(path), SPEC, clips_per_span)) > 1
        assert_same(decode(path, clips_per_span=clips_per_span), clips)


@pytest.mark.parametrize(
    ("source_fps", "target_fps"),
    [("24", "10"), ("10", "30"), ("30000/1001", "8"), ("25", "8"), ("24000/1001", "24"), ("50", "15/2")],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_rates_of_every_ratio_follow_the_times_of_the_frames(
    tmp_path: Path, suffix: str, source_fps: str, target_fps: str
) -> None:
    path = write_video(tmp_path / f"v.{suffix}", Recipe(rate=Fraction(source_fps), num_frames=40, b_frames=2))
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(container.streams.video[0]) if packet.size]
        shown = sorted((packet.pts or 0, packet.duration or 0) for packet in packets)
        times = [pts * packets[0].time_base for pts, _ in shown]
        end = times[-1] + shown[-1][1] * packets[0].time_base
    if suffix == "mkv":  # whose milliseconds are those of frames at a steady rate, rounded
        assert all(abs(time - n / Fraction(source_fps)) <= Fraction(1, 1000) for n, time in enumerate(times))
        times, end = [n / Fraction(source_fps) for n in range(40)], 40 / Fraction(source_fps)
    spec = replace(SPEC, fps=Fraction(target_fps))
    clips = decode(path, spec)
    assert numbers(clips) == expected(times, end, spec.fps)
    assert_same(decode(path, spec, clips_per_span=1), clips)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_rate_and_a_late_start_are_followed(tmp_path: Path, suffix: str) -> None:
    gaps = [40, 40, 500, 20, 20, 20, 1000, 33, 34, 33] * 3
    times = [Fraction(sum(gaps[:n]), 1000) for n in range(len(gaps))]
    recipe = Recipe(times=times, start_seconds=Fraction(3), b_frames=2, gop=7)
    path = write_video(tmp_path / f"v.{suffix}", recipe)
    clips = decode(path)
    found = numbers(clips)
    assert found[: len(found) - 1] == expected(times, times[-1] + Fraction(1, 25), SPEC.fps)[: len(found) - 1]
    assert clips[0].frame_pts_seconds[0] == pytest.approx(float(probe(path).grid_start_pts * probe(path).time_base))
    assert_same(decode(path, clips_per_span=1), clips)


@pytest.mark.parametrize(
    "params", ["open-gop=1:keyint=12:min-keyint=12:bframes=3:scenecut=0", "intra-refresh=1:keyint=20"]
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_spans_equal_the_whole_where_keyframes_are_not_clean_cuts(tmp_path: Path, suffix: str, params: str) -> None:
    recipe = Recipe(num_frames=90, options=(("preset", "medium"), ("x264-params", params)))
    path = write_video(tmp_path / f"v.{suffix}", recipe)
    clips = decode(path)
    assert numbers(clips) == expected([n / recipe.rate for n in range(90)], 90 / recipe.rate, SPEC.fps)
    assert_same(decode(path, clips_per_span=1), clips)


def test_frame_threads_change_nothing(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.avi", Recipe(b_frames=2))
    [span] = plan_spans(probe(path), SPEC, 1000)
    threaded = decode_span(span, SPEC, str(path), max_clips=9, thread_type="FRAME")
    assert_same(threaded, decode_span(span, SPEC, str(path), max_clips=9))


def test_a_file_object_gives_the_same_as_a_path_and_stays_open(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4")
    [span] = plan_spans(probe(path), SPEC, 1000)
    with path.open("rb") as file:
        clips = decode_span(span, SPEC, file, max_clips=9)
        assert not file.closed
    assert_same(clips, decode(path))


def test_the_tail_is_padded_with_the_last_frame_or_dropped(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", Recipe(num_frames=30))  # 1.2 s: 12 grid times, 2 clips and 2 frames
    padded, dropped = decode(path), decode(path, replace(SPEC, tail="drop"))
    assert [clip.num_valid_frames for clip in padded] == [5, 5, 2]
    last = padded[-1]
    assert all(np.array_equal(frame, last.frames[1]) for frame in last.frames[2:])
    assert last.frame_pts_seconds.tolist() == [1.0, 1.08, 1.08, 1.08, 1.08]
    assert_same(dropped, padded[:2])
    assert rejection(path, replace(SPEC, tail="drop", num_frames=13)).reason is Reason.TOO_SHORT


def test_a_video_longer_than_its_header_is_refused_before_it_fills_memory(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4")
    with pytest.raises(VideoError) as caught:
        decode(path, max_clips=3)
    assert caught.value.reason is Reason.LONGER_THAN_HEADER
    assert len(decode(path, max_clips=4)) == 4


def test_a_span_after_the_end_is_empty(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4")
    [span] = plan_spans(probe(path), SPEC, 1000)
    assert decode_span(replace(span, first_clip=7), SPEC, str(path), max_clips=9) == []


# Pictures.


@pytest.mark.parametrize(("height", "width"), [(128, 128), (127, 201), (96, 340)])
def test_downscaling_is_antialiased_like_the_tokenizers_training(tmp_path: Path, height: int, width: int) -> None:
    import torch

    path = tmp_path / "v.mkv"
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    y, x = np.mgrid[:360, :640]
    picture = np.kron(noise, np.ones((30, 40, 1), np.uint8)) // 2 + (x + 2 * y)[..., None].astype(np.uint8) // 4
    with av.open(str(path), "w") as container:  # 4:4:4, so that chroma upsampling plays no part
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv444p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        whole = next(container.decode(video=0)).to_ndarray(format="rgb24")
    tensor = torch.from_numpy(whole.copy()).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(tensor, (height, width), mode="bilinear", antialias=True)
    spec = replace(SPEC, num_frames=1, height=height, width=width, resize="stretch")
    error = decode(path, spec)[0].frames[0].astype(float) - resized[0].permute(1, 2, 0).numpy()
    psnr = 10 * np.log10(255**2 / np.mean(error**2))
    assert psnr > 40
    assert abs(error.mean()) < 0.5


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_turned_and_mirrored_pictures_are_upright(tmp_path: Path, degrees: int, mirrored: bool) -> None:
    path = write_video(tmp_path / "v.mp4", Recipe(rotation_degrees=degrees, mirrored=mirrored, num_frames=20))
    clips = decode(path, replace(SPEC, height=64, width=96))
    assert numbers(clips) == expected([Fraction(n, 25) for n in range(20)], Fraction(20, 25), SPEC.fps)
    source = probe(path).source
    assert (source.width, source.height) == (96, 64)
    if not mirrored:
        assert source.rotation_degrees == degrees
    assert np.abs(clips[0].frames[0, :, 4].mean(axis=0) - RED).max() < 12
    assert np.abs(clips[0].frames[0, :, -4].mean(axis=0) - BLUE).max() < 12


def test_non_square_pixels_are_shown_in_their_true_shape(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", Recipe(pixel_aspect=Fraction(4, 3)))
    assert (probe(path).source.width, probe(path).source.height) == (128, 64)
    [clip, *_] = decode(path, replace(SPEC, height=64, width=64))
    assert (clip.geometry.scaled_width, clip.geometry.left) == (128, 32)


@pytest.mark.parametrize(
    ("policy", "scaled", "offset"),
    [("crop", (72, 48), (12, 0)), ("stretch", (48, 48), (0, 0)), ("pad", (48, 32), (0, -8))],
)
def test_each_policy_says_and_does_what_it_does(
    tmp_path: Path, policy: ResizePolicy, scaled: tuple[int, int], offset: tuple[int, int]
) -> None:
    path = write_video(tmp_path / "v.mp4")
    [clip, *_] = decode(path, replace(SPEC, resize=policy))
    geometry = clip.geometry
    assert (geometry.scaled_width, geometry.scaled_height) == scaled
    assert (geometry.left, geometry.top) == offset
    if policy == "pad":
        assert (clip.frames[:, :8] == 0).all()
        assert (clip.frames[:, 40:] == 0).all()
        assert read_frame_number(clip.frames[2, 8:40]) == 5
    else:
        assert np.abs(clip.frames[0, 24, 1] - np.array(RED)).max() > 12 or policy == "stretch"


@pytest.mark.parametrize("pixel_format", ["yuv420p10le", "yuv444p", "yuv422p", "gray"])
def test_other_pixel_formats_are_read(tmp_path: Path, pixel_format: str) -> None:
    path = write_video(tmp_path / "v.mp4", Recipe(pixel_format=pixel_format, num_frames=20))
    assert numbers(decode(path)) == expected([Fraction(n, 25) for n in range(20)], Fraction(20, 25), SPEC.fps)


@pytest.mark.parametrize(("codec", "pixel_format"), [("prores_ks", "yuva444p10le"), ("png", "rgba"), ("qtrle", "argb")])
def test_pictures_with_alpha_are_read(tmp_path: Path, codec: str, pixel_format: str) -> None:
    path = write_video(tmp_path / "v.mov", Recipe(codec=codec, pixel_format=pixel_format, num_frames=20))
    assert numbers(decode(path)) == expected([Fraction(n, 25) for n in range(20)], Fraction(20, 25), SPEC.fps)


@pytest.mark.parametrize(("width", "height"), [(98, 66), (130, 70)])
def test_a_size_that_changes_in_the_middle_is_followed(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "v.h264"
    parts = [
        write_video(tmp_path / "a.h264", Recipe(num_frames=25)),
        write_video(tmp_path / "b.h264", Recipe(num_frames=25, width=width, height=height)),
    ]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    clips = decode(path)
    times = [Fraction(n, 25) for n in range(50)]
    assert numbers(clips) == [n % 25 for n in expected(times, Fraction(2), SPEC.fps)]
    assert len({clip.geometry for clip in clips}) == 2


@pytest.mark.parametrize("flip_y", [False, True])
@pytest.mark.parametrize("flip_x", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
def test_a_display_matrix_is_read_as_the_orientation_it_came_from(transpose: bool, flip_x: bool, flip_y: bool) -> None:
    x, y = (-1 if flip_x else 1) << 16, (-1 if flip_y else 1) << 16
    matrix = np.array([0, y, 0, x, 0, 0, 0, 0, 1 << 30] if transpose else [x, 0, 0, 0, y, 0, 0, 0, 1 << 30], np.int32)
    orientation = Orientation.from_display_matrix(matrix.tobytes())
    assert orientation == Orientation(transpose=transpose, flip_x=flip_x, flip_y=flip_y)
    assert display_size(4, 2, None, orientation) == ((2, 4) if transpose else (4, 2))


def test_an_absurd_aspect_ratio_is_refused_before_it_takes_memory() -> None:
    with pytest.raises(ValueError, match="would be scaled"):
        plan_geometry(16384, 2, replace(SPEC, height=256, width=256))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_the_largest_video_stream_is_taken_and_no_cover_picture(tmp_path: Path, suffix: str) -> None:
    sizes = [(48, 32), (96, 64), (64, 48)]
    with av.open(str(tmp_path / f"v.{suffix}"), "w") as container:
        streams = [container.add_stream("libx264", rate=25, options={"preset": "ultrafast"}) for _ in sizes]
        for stream, (width, height) in zip(streams, sizes, strict=True):
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.disposition = Disposition.default
        if suffix == "mp4":
            cover = container.add_stream("png", rate=25)
            cover.width, cover.height, cover.pix_fmt = 640, 480, "rgb24"
            cover.disposition = Disposition.attached_pic
            picture = numbered_frame(4000, 640, 480)
            packets = [*cover.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")), *cover.encode(None)]
            container.mux(packets)
        for number in range(50):
            for place, (stream, (width, height)) in enumerate(zip(streams, sizes, strict=True)):
                picture = numbered_frame(number + 1000 * place, width, height)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    clips = decode(tmp_path / f"v.{suffix}")
    times = [Fraction(n, 25) for n in range(50)]
    assert numbers(clips) == [1000 + n for n in expected(times, Fraction(2), SPEC.fps)]
    assert_same(decode(tmp_path / f"v.{suffix}", clips_per_span=1), clips)


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_alpha_that_does_not_travel_in_the_picture_is_refused_rather_than_ignored(tmp_path: Path, codec: str) -> None:
    options = (("auto-alt-ref", "0"),)
    transparent = write_video(tmp_path / "alpha.webm", Recipe(codec=codec, pixel_format="yuva420p", options=options))
    assert rejection(transparent).reason is Reason.UNSUPPORTED


# Bad input.


def test_every_bad_file_has_its_reason(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", Recipe(num_frames=100))
    at_front = write_video(
        tmp_path / "front.mp4", Recipe(num_frames=100, container_options=(("movflags", "faststart"),))
    )
    matroska = write_video(tmp_path / "whole.mkv", Recipe(num_frames=100))

    def written(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    cases = {
        Reason.UNREADABLE: [tmp_path],
        Reason.EMPTY_FILE: [written("zero.mp4", b"")],
        Reason.NOT_A_VIDEO: [
            written("text.mp4", b"not a video\n" * 100),
            written("noise.mp4", np.random.default_rng(0).bytes(50_000)),
            written("one.mp4", b"\0"),
        ],
        Reason.NO_VIDEO_STREAM: [
            write_audio_only(tmp_path / "sound.mp4"),
            write_audio_only(tmp_path / "sound.mkv"),
            write_sound_with_cover(tmp_path / "cover.mp3"),
        ],
        Reason.NO_FRAMES: [
            write_undecodable(tmp_path / "zeros.mp4", whole),
            write_without_frames(tmp_path / "header.avi"),
        ],
        Reason.TRUNCATED: [
            write_truncated(tmp_path / "short.mp4", whole, 0.6),  # the index is at the end
            write_truncated(tmp_path / "short_front.mp4", at_front, 0.6),
            write_truncated(tmp_path / "short.mkv", matroska, 0.6),
            write_without_frames(tmp_path / "header.mkv"),
        ],
        Reason.DECODE_ERROR: [
            written("absurd.mp4", with_absurd_index(whole.read_bytes())),
            write_damaged(tmp_path / "damaged.mp4", whole),
            write_damaged(tmp_path / "damaged.ts", write_video(tmp_path / "whole.ts", Recipe(num_frames=100))),
        ],
    }
    found = {path.name: outcome(path) for paths in cases.values() for path in paths}
    assert found == {path.name: reason for reason, paths in cases.items() for path in paths}


def test_damage_is_refused_by_the_span_that_holds_it_and_says_when(tmp_path: Path) -> None:
    path = write_damaged(tmp_path / "d.mp4", write_video(tmp_path / "w.mp4", Recipe(num_frames=100)), share=0.6)
    first, second = plan_spans(probe(path), SPEC, 4)
    assert len(decode_span(first, SPEC, str(path), max_clips=9)) == 4
    with pytest.raises(VideoError, match=r"decode_error: at 2\.\d\d s: "):
        decode_span(second, SPEC, str(path), max_clips=9)


def test_sound_longer_than_the_pictures_is_no_truncation(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", Recipe(with_audio=True, times=[Fraction(n, 25) for n in range(25)]))
    assert len(decode(path)) == 2


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{canary}\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", "ffconcat version 1.0\nfile '{canary}'\n"),
        ("scene.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"),
        (
            "dash.mpd",
            '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
            '<Representation id="0" mimeType="video/mp4"><BaseURL>{canary}</BaseURL></Representation>'
            "</AdaptationSet></Period></MPD>",
        ),
    ],
)
@pytest.mark.parametrize("disguise", ["", ".mp4"])
def test_scripts_that_name_other_files_open_nothing(tmp_path: Path, name: str, script: str, disguise: str) -> None:
    canary = write_video(tmp_path / "canary.mp4")
    path = tmp_path / (name + disguise)
    path.write_text(script.format(canary=canary))
    error = rejection(path)
    assert error.reason is Reason.NOT_A_VIDEO
    assert "never opened" in error.detail


class FailingFile(io.BytesIO):
    """A file whose storage breaks after some bytes were read."""

    def __init__(self, content: bytes, good_bytes: int) -> None:
        super().__init__(content)
        self.good_bytes = good_bytes

    def read(self, num_bytes: int | None = -1) -> bytes:
        data = super().read(num_bytes)
        self.good_bytes -= len(data)
        if self.good_bytes < 0:
            raise ConnectionResetError("reset by https://me:secret@host/v.mp4?sig=secret\nretry")
        return data


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_storage_that_fails_is_not_taken_for_a_damaged_video(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"v.{suffix}", Recipe(num_frames=100, codec="mpeg4", width=320, height=240))
    content = path.read_bytes()
    [span] = plan_spans(probe(path), SPEC, 1000)
    for share in (0.0, 0.5, 0.9):
        with pytest.raises(VideoError) as caught:
            decode_span(span, SPEC, FailingFile(content, int(len(content) * share)), max_clips=99)
        assert caught.value.reason is Reason.UNREADABLE
        assert "secret" not in caught.value.detail
        assert "\n" not in caught.value.detail


@pytest.mark.parametrize("suffix", ["mkv", "avi"])
def test_a_large_video_in_s3_gives_the_same_clips_and_is_fetched_in_parts(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    import boto3
    import s3fs

    path = write_video(tmp_path / f"v.{suffix}", Recipe(codec="rawvideo", width=640, height=480))
    uri, num_bytes = f"s3://videos/large/v.{suffix}", path.stat().st_size
    assert num_bytes > WHOLE_BYTES
    boto3.client("s3").upload_file(str(path), "videos", f"large/v.{suffix}")
    fetched: list[tuple[int, int]] = []
    call = s3fs.S3FileSystem._call_s3

    async def counted(self: object, method: str, *args: object, **kwargs: object) -> object:
        if method == "get_object":
            first, last = str(kwargs["Range"]).removeprefix("bytes=").split("-")
            fetched.append((int(first), min(int(last) + 1, num_bytes)))
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    found = probe_video(VideoRef(uri=uri, num_bytes=-1), open_video)
    assert replace(found, uri=str(path)) == probe(path)
    assert sum(end - start for start, end in fetched) < num_bytes * 3 // 4
    fetched.clear()
    [span] = plan_spans(found, SPEC, 1000)
    with open_video(uri) as file:
        clips = decode_span(span, SPEC, file, max_clips=1000)
    assert_same(clips, decode(path))
    assert max(end - start for start, end in fetched) <= 4 << 20
    assert all(before[1] <= after[0] for before, after in pairwise(sorted(fetched))), "a byte twice"


def test_a_bug_in_the_opener_is_no_rejection() -> None:
    def broken(uri: str) -> BinaryIO:
        raise KeyError(uri)

    with pytest.raises(KeyError):
        probe_video(VideoRef(uri="x", num_bytes=-1), broken)


def test_the_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", Recipe(codec="mjpeg", pixel_format="yuvj420p", width=960, height=720))
    assert path.stat().st_size > 5 * 65536
    copy = Path(shutil.copy(path, tmp_path / "elsewhere.bin"))
    assert probe(copy).video_id == probe(path).video_id
    content = path.read_bytes()
    changed: list[Callable[[bytearray], object]] = [
        lambda data: data.append(0),
        lambda data: data.__setitem__(0, data[0] ^ 1),
        lambda data: data.__setitem__(-1, data[-1] ^ 1),
        lambda data: data.__setitem__(len(data) // 2, data[len(data) // 2] ^ 1),
    ]
    ids = {content_id(WatchedFile(io.BytesIO(content)))}
    for change in changed:
        data = bytearray(content)
        change(data)
        ids.add(content_id(WatchedFile(io.BytesIO(data))))
    assert len(ids) == 5
    assert all(len(video_id) == 24 for video_id in ids)


# Real clips, where they lie beside the repository.


class TestSharedClips:
    pytestmark = needs_shared

    SPEC = ClipSpec(fps=Fraction(8), num_frames=17, height=256, width=256)

    @pytest.mark.parametrize(
        "name", ["example", "bikes", "scene_cuts", "carphone_pristine", "h264_10bits", "video_0", "video_90"]
    )
    def test_clips_equal_a_plain_loop_that_decodes_everything(self, name: str) -> None:
        path = next(CLIPS.glob(f"{name}.m*"))
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = sorted((frame.pts or 0, frame.duration) for frame in container.decode(stream))
            assert stream.time_base is not None
            times = [pts * stream.time_base for pts, _ in frames]
            end = times[-1] + frames[-1][1] * stream.time_base
        shown = [times[n] for n in expected(times, end, self.SPEC.fps)]
        for clips_per_span in (1, 1000):
            clips = decode(path, self.SPEC, clips_per_span)
            assert len(clips) == -(-len(shown) // 17)
            found = [t for clip in clips for t in clip.frame_pts_seconds[: clip.num_valid_frames]]
            assert found == [float(time) for time in shown]

    def test_the_corrupted_clip_is_refused(self) -> None:
        error = rejection(CLIPS / "corrupted.mp4", self.SPEC)
        assert error.reason is Reason.DECODE_ERROR
        assert "Invalid data" in error.detail

    @pytest.mark.parametrize("degrees", [0, 90, 180, 270])
    def test_turned_clips_are_shown_upright(self, degrees: int) -> None:
        path = CLIPS / f"video_{degrees}.mov"
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)  # PyAV counts anticlockwise
        height, width = upright.shape[:2]
        clips = decode(path, replace(self.SPEC, height=height, width=width))
        error = np.abs(clips[0].frames[0].astype(int) - upright)
        assert error.mean() < 2.5  # PyAV's own conversion is darker, with blocky chroma
        assert probe(path).source.rotation_degrees == degrees
