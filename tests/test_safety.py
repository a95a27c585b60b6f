"""Files from the open internet reach nothing but their own bytes, and cost no more than the limits allow."""

from __future__ import annotations

import io
import struct
import threading
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.container import storage_failures_named
from pipeline.decode import decode_span, probe_video
from pipeline.frames import Start, decode_from
from pipeline.picture import Renderer
from pipeline.sampling import plan_spans
from pipeline.sandbox import DecodeSandbox
from pipeline.storage import open_video
from schemas.runs import TokenizeRun
from schemas.video import Clip, ClipSpec, Limits, Reason, VideoError, VideoRef
from tests.videos import Recipe, write_video

SPEC = ClipSpec(fps=Fraction(4), num_frames=5, height=32, width=32)


def decode(path: Path, limits: Limits | None = None) -> list[Clip]:
    probe = probe_video(VideoRef(uri=str(path), num_bytes=-1), open_video, limits)
    spans = plan_spans(probe, SPEC, 1000)
    return [clip for span in spans for clip in decode_span(span, SPEC, str(path), max_clips=1000, limits=limits)]


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, list[str]]]:
    """A good video, an address that serves it, and the requests that came."""
    video = write_video(tmp_path_factory.mktemp("canary") / "canary.ts", Recipe(num_frames=25))
    requests: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(video.read_bytes())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield video, f"http://127.0.0.1:{server.server_port}/canary.ts", requests
    server.shutdown()
    server.server_close()


SCRIPTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
    "hls_of_hls": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{target}\n",
    "hls_in_data": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n"
    "data:text/plain,%23EXTM3U%0A{target}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{target}'\n",
    "dash": '<?xml version="1.0"?><MPD><Period><AdaptationSet><Representation id="0"><BaseURL>{target}</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "a=control:{target}\nm=video 5004 RTP/AVP 96\n",
    "m3u": "{target}\n",
    "xspf": '<?xml version="1.0"?><playlist><trackList>'
    "<track><location>{target}</location></track></trackList></playlist>",
    "asx": '<asx version="3"><entry><ref href="{target}"/></entry></asx>',
    "imf": '<?xml version="1.0"?><CompositionPlaylist><Id>{target}</Id></CompositionPlaylist>',
}


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("kind", SCRIPTS)
def test_scripts_that_name_other_files_are_no_videos_and_nothing_is_fetched(
    tmp_path: Path, canary: tuple[Path, str, list[str]], kind: str, remote: bool, suffix: str
) -> None:
    video, address, requests = canary
    path = tmp_path / f"script.{suffix}"
    path.write_text(SCRIPTS[kind].format(target=address if remote else video))
    with pytest.raises(VideoError) as caught:
        decode(path)
    assert caught.value.reason is Reason.NOT_A_VIDEO
    assert not requests


def _box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body) + 8) + name + body


@pytest.mark.parametrize("remote", [False, True])
def test_an_mp4_whose_pictures_lie_in_another_file_gives_none_of_them(
    tmp_path: Path, canary: tuple[Path, str, list[str]], remote: bool
) -> None:
    _, address, requests = canary
    whole = write_video(tmp_path / "whole.mov", Recipe(num_frames=25))
    data = bytearray(whole.read_bytes())
    target = address if remote else str(whole)
    dref = data.index(b"dref") - 4
    size = int.from_bytes(data[dref : dref + 4], "big")
    reference = _box(b"url ", struct.pack(">I", 0) + target.encode() + b"\0")
    longer = _box(b"dref", struct.pack(">II", 0, 1) + reference)
    data[dref : dref + size] = longer
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        at = data.rindex(name, 0, dref + 8) - 4
        data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") + len(longer) - size).to_bytes(4, "big")
    mdat = data.index(b"mdat") + 4
    data[mdat : data.index(b"moov") - 4] = bytes(data.index(b"moov") - 4 - mdat)  # its own pictures are gone
    path = tmp_path / "reference.mov"
    path.write_bytes(data)
    with pytest.raises(VideoError):
        decode(path)
    assert not requests


LARGE = Limits()


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        (replace(LARGE, max_pixels=96 * 64 - 1), "--max-pixels"),
        (replace(LARGE, max_seconds=1.9), "--max-seconds"),
        (replace(LARGE, max_frames=49), "--max-frames"),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_a_video_beyond_a_limit_is_rejected_and_the_limit_named(
    tmp_path: Path, limits: Limits, named: str, suffix: str
) -> None:
    path = write_video(tmp_path / f"video.{suffix}", Recipe(num_frames=50))
    with pytest.raises(VideoError) as caught:
        decode(path, limits)
    assert caught.value.reason is Reason.OVER_LIMIT
    assert named in caught.value.detail
    assert decode(path, Limits(max_pixels=96 * 64, max_seconds=2.1, max_frames=50))


def test_a_picture_that_grows_beyond_the_limit_in_mid_stream_is_not_decoded(tmp_path: Path) -> None:
    small = write_video(tmp_path / "small.h264", Recipe())
    large = write_video(tmp_path / "large.h264", Recipe(width=192, height=128))
    path = tmp_path / "grows.h264"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    assert decode(path)
    with pytest.raises(VideoError) as caught:
        decode(path, Limits(max_pixels=96 * 64))
    assert caught.value.reason is Reason.OVER_LIMIT


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [
        ("libx264", "h264"),
        ("libx265", "hevc"),
        ("libvpx-vp9", "ivf"),
        ("libsvtav1", "obu"),
        ("mpeg2video", "mpg"),
        ("mjpeg", "mjpeg"),
    ],
)
def test_a_picture_that_grows_so_far_that_ffmpeg_refuses_it_is_over_the_limit_too(
    tmp_path: Path, codec: str, suffix: str
) -> None:
    recipe = Recipe(codec=codec, num_frames=10, pixel_format="yuvj420p" if codec == "mjpeg" else "yuv420p")
    small = write_video(tmp_path / f"small.{suffix}", recipe).read_bytes()
    large = write_video(tmp_path / f"large.{suffix}", replace(recipe, width=1600, height=1200)).read_bytes()
    path = tmp_path / f"grows.{suffix}"
    path.write_bytes(small + large[32 if suffix == "ivf" else 0 :])  # without a second file header
    with pytest.raises(VideoError) as caught:
        decode(path, Limits(max_pixels=96 * 64))
    assert (caught.value.reason, "1600x1200" in caught.value.detail) == (Reason.OVER_LIMIT, True)
    assert "--max-pixels" in caught.value.detail


@pytest.mark.parametrize("from_end", [-18, -19])
def test_an_index_that_points_to_no_place_is_the_videos_fault_and_does_no_harm_where_it_is_not_needed(
    tmp_path: Path, from_end: int
) -> None:
    whole = write_video(tmp_path / "whole.nut", Recipe(codec="mpeg4", num_frames=20))
    data = bytearray(whole.read_bytes())
    data[from_end : from_end + 8] = b"\xff" * 8
    path = tmp_path / "damaged.nut"
    path.write_bytes(data)
    [clip] = decode(path)
    assert clip.frames.tobytes() == decode(whole)[0].frames.tobytes()


@pytest.mark.parametrize("kind", [io.BytesIO, "path"])
@pytest.mark.parametrize("offset", [-1, 1 << 62])
def test_an_impossible_place_is_no_failure_of_the_storage(tmp_path: Path, kind: object, offset: int) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    with (
        io.BytesIO(b"12345") if kind is io.BytesIO else (tmp_path / "file").open("rb") as file,
        storage_failures_named(file) as watched,
    ):
        at = watched.seek(offset)
        assert at < 0 or watched.read(1) == b""
        assert watched.seek(1) == 1
        assert watched.read(2) == b"23"


def rendered_after_the_end(path: Path) -> int:
    """Width of the last frame, when its container is closed and its memory was used for other things."""
    with path.open("rb") as file, storage_failures_named(file) as watched:
        [*_, last] = decode_from(watched, Start())
    other = [b"\xc8" * size for size in range(100, 3000)]
    _, geometry = Renderer(SPEC).render(last)
    return geometry.scaled_width * bool(other)


def test_the_last_frame_needs_nothing_of_the_closed_container(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", Recipe(pixel_aspect=Fraction(4, 3)))
    with DecodeSandbox() as sandbox:
        assert sandbox.run(rendered_after_the_end, path, timeout_seconds=60) == 64


def test_a_large_remote_video_is_fetched_once_in_blocks_and_its_id_takes_only_samples(
    tmp_path: Path,
) -> None:
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem
    from fsspec.spec import AbstractBufferedFile

    fetched: list[tuple[int, int]] = []

    class Counted(MemoryFileSystem):  # type: ignore[misc]
        protocol = "counted"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("counted://").strip("/")

        def _open(self, path: str, mode: str = "rb", **options: object) -> AbstractBufferedFile:
            return CountedFile(self, path, mode, **options)

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: object) -> bytes:
            data = bytes(self.store[path].getvalue())
            fetched.append((start or 0, len(data) if end is None else end))
            return data[start:end]

    class CountedFile(AbstractBufferedFile):  # type: ignore[misc]
        def _fetch_range(self, start: int, end: int) -> bytes:
            return bytes(self.fs.cat_file(self.path, start, end))

    fsspec.register_implementation("counted", Counted, clobber=True)
    whole = write_video(tmp_path / "video.mp4", Recipe(num_frames=50)).read_bytes()
    index = whole.index(b"moov") - 4
    padding = struct.pack(">I", 48 << 20) + b"free" + bytes((48 << 20) - 8)
    data = whole[:index] + padding + whole[index:]  # the index at the end, far from the pictures
    MemoryFileSystem().pipe_file("/large.mp4", data)
    MemoryFileSystem().pipe_file("/small.mp4", whole)

    for name, content in {"small": whole, "large": data}.items():
        fetched.clear()
        probe = probe_video(VideoRef(uri=f"counted:///{name}.mp4", num_bytes=-1), open_video)
        assert probe.num_bytes == len(content)
        sizes = [end - start for start, end in fetched]
        assert sizes == [len(whole)] if name == "small" else sizes.count(1 << 16) == 5
        (tmp_path / "local.mp4").write_bytes(content)
        [span] = plan_spans(probe_video(VideoRef(uri=str(tmp_path / "local.mp4"), num_bytes=-1), open_video), SPEC, 100)
        assert span.video_id == probe.video_id
        fetched.clear()
        with open_video(probe.uri) as file:
            clips = decode_span(span, SPEC, file, max_clips=100)
        assert [clip.frames.tobytes() for clip in clips] == [
            clip.frames.tobytes() for clip in decode_span(span, SPEC, str(tmp_path / "local.mp4"), max_clips=100)
        ]
        ranges = sorted(fetched)
        assert all(before[1] <= after[0] for before, after in pairwise(ranges)), ranges
        assert sum(end - start for start, end in ranges) <= 16 << 20


def test_long_stretches_have_more_time() -> None:
    limits = Limits(timeout_seconds=10, seconds_per_second=2)
    assert [limits.seconds_for(seconds) for seconds in (0, 5, 6)] == [10, 10, 12]


def test_limits_are_settings() -> None:
    values = {"max_pixels": 1, "max_seconds": 2, "max_frames": 3, "decode_timeout": 4, "decode_seconds_per_second": 5}
    run = TokenizeRun.model_validate({"inputs": ["a"], "out": "b", "decode_memory": "1GiB", **values})
    assert run.limits == Limits(
        max_pixels=1,
        max_seconds=2,
        max_frames=3,
        timeout_seconds=4,
        seconds_per_second=5,
        memory_bytes=1 << 30,
    )
    assert TokenizeRun.model_validate({"inputs": ["a"], "out": "b"}).limits == Limits()


CRASHING_DECODER = """
import os, sys
if sys.argv[:1] == ["-m"]:
    import pipeline.decode
    decode_spans = pipeline.decode.decode_spans
    def dying(spans, *args, **kwargs):
        if spans[0].uri.endswith("killer.mp4"):
            with open({log!r}, "a") as file:
                file.write("x")
            os.abort()
        return decode_spans(spans, *args, **kwargs)
    pipeline.decode.decode_spans = dying
"""


def test_a_video_that_kills_the_decoder_costs_one_child_and_no_other_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import stages

    folder, log = tmp_path / "site", tmp_path / "deaths"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CRASHING_DECODER.format(log=str(log)))
    monkeypatch.syspath_prepend(str(folder))
    sandbox = DecodeSandbox()
    monkeypatch.setattr(stages, "_sandbox", lambda _: sandbox)
    monkeypatch.setattr(stages, "_crashes", {})
    good = write_video(tmp_path / "good.mp4", Recipe(num_frames=75))
    killer = write_video(tmp_path / "killer.mp4", Recipe(num_frames=74))
    decoder = stages.SpanDecoder(spec=SPEC, max_clips=100, clips_per_pass=1)
    with sandbox:
        outcomes = []
        for path in (killer, good, killer):
            probe = stages.probe(VideoRef(uri=str(path), num_bytes=-1))
            assert not isinstance(probe, VideoError)
            outcomes += [decoder._decode([span], SPEC)[0] for span in plan_spans(probe, SPEC, 1)]
    crashed = [outcome.error for outcome in outcomes if outcome.error is not None]
    assert {error.reason for error in crashed} == {Reason.DECODER_CRASHED}
    assert len(crashed) >= 2
    assert all("SIGABRT" in error.detail for error in crashed)
    assert sum(len(outcome.clips) for outcome in outcomes) == 3  # the good one's
    assert log.read_text() == "x"
