"""Files from the open internet reach nothing but their own bytes, and cost no more than the limits allow."""

from __future__ import annotations

import base64
import io
import shutil
import struct
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, cast

import av
import pytest

from tests.support.videos import Recipe, write_video
from vidshard.pipeline.storage import open_video
from vidshard.pipeline.video.decode import decode_span
from vidshard.pipeline.video.frames import decode_from
from vidshard.pipeline.video.input_file import storage_failures_named
from vidshard.pipeline.video.packets import SeekPoint
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.render import Renderer
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.pipeline.video.sandbox import DecodeSandbox
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.video import Clip, ClipSpec, Limits, VideoRef

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


def referring(folder: Path, reference: bytes) -> tuple[Path, Path]:
    """A mov, and a copy without pictures whose index says that they lie in another file."""
    whole = write_video(folder / "whole.mov", Recipe(num_frames=25))
    data = bytearray(whole.read_bytes())
    dref = data.index(b"dref") - 4
    size = int.from_bytes(data[dref : dref + 4], "big")
    longer = _box(b"dref", struct.pack(">II", 0, 1) + reference)
    data[dref : dref + size] = longer
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        at = data.rindex(name, 0, dref + 8) - 4
        data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") + len(longer) - size).to_bytes(4, "big")
    mdat = data.index(b"mdat") + 4
    data[mdat : data.index(b"moov") - 4] = bytes(data.index(b"moov") - 4 - mdat)
    path = folder / "reference.mov"
    path.write_bytes(data)
    return whole, path


def _alias(path: Path) -> bytes:
    """A Macintosh alias record with an absolute path, as FFmpeg reads it."""
    name = str(path).encode()
    name += bytes(len(name) % 2)
    record = bytes(10) + bytes(28) + bytes(12) + bytes(64) + bytes(16) + struct.pack(">HH", 0, 0) + bytes(16)
    record += struct.pack(">HH", 2, len(name)) + name + struct.pack(">HH", 0xFFFF, 0)
    return _box(b"alis", struct.pack(">I", 0) + record)


@pytest.mark.parametrize("remote", [False, True])
def test_an_mp4_whose_pictures_lie_in_another_file_gives_none_of_them(
    tmp_path: Path, canary: tuple[Path, str, list[str]], remote: bool
) -> None:
    _, address, requests = canary
    target = address if remote else str(tmp_path / "whole.mov")
    _, path = referring(tmp_path, _box(b"url ", struct.pack(">I", 0) + target.encode() + b"\0"))
    with pytest.raises(VideoError):
        decode(path)
    assert not requests


def test_a_reference_that_ffmpeg_would_follow_is_not_followed(tmp_path: Path) -> None:
    whole, path = referring(tmp_path, _alias(tmp_path / "whole.mov"))
    with av.open(str(path), container_options={"enable_drefs": "1", "use_absolute_path": "1"}) as container:
        assert sum(1 for _ in container.decode(video=0)) == 25, "the trap does not work"
    assert decode(whole)
    with pytest.raises(VideoError) as caught:
        decode(path)
    assert caught.value.reason is Reason.NO_FRAMES


@pytest.mark.parametrize("content", [b"%03d.png", b"\x89PNG\r\n\x1a\n", None])
@pytest.mark.parametrize("name", ["%03d.png", "%d.jpg", "*.png", "video.mp4"])
def test_a_name_or_text_that_is_a_pattern_of_pictures_opens_none_of_them(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    for number in range(5):
        write_video(tmp_path / f"{number:03}.png", Recipe(codec="png", pixel_format="rgb24", num_frames=1))
    path = tmp_path / name
    path.write_bytes((tmp_path / "000.png").read_bytes() if content is None else content)
    with pytest.raises(VideoError) as caught:
        decode(path)
    assert caught.value.reason is Reason.NOT_A_VIDEO


def test_matroska_that_links_to_another_file_or_has_one_attached_shows_only_itself(tmp_path: Path) -> None:
    plain = write_video(tmp_path / "plain.mkv", Recipe(num_frames=25))
    write_video(tmp_path / "canary.mkv", Recipe(num_frames=75))
    data = plain.read_bytes()
    at = data.index(b"\x4d\x80")  # who wrote it
    size = data[at + 2] & 0x7F
    name = b"canary.mkv".ljust(size - 1, b"\0")  # the identifier below is longer by one
    linked = tmp_path / "linked.mkv"
    linked.write_bytes(data[:at] + b"\x3e\x83\xbb" + bytes([0x80 | len(name)]) + name + data[at + 3 + size :])
    attached = tmp_path / "attached.mkv"
    with av.open(str(plain)) as source, av.open(str(attached), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        container.add_attachment("canary.mkv", "video/x-matroska", (tmp_path / "canary.mkv").read_bytes())
        container.add_attachment("cover.png", "image/png", write_picture(tmp_path / "cover.png").read_bytes())
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    frames = [clip.frames.tobytes() for clip in decode(plain)]
    for path in (linked, attached):
        assert [clip.frames.tobytes() for clip in decode(path)] == frames


def write_picture(path: Path) -> Path:
    return write_video(path, Recipe(codec="png", pixel_format="rgb24", num_frames=1, width=640, height=480))


@pytest.mark.parametrize("suffix", ["ogv", "mkv"])
def test_a_cover_picture_that_is_an_address_is_not_fetched(
    tmp_path: Path, canary: tuple[Path, str, list[str]], suffix: str
) -> None:
    _, address, requests = canary
    link = b"-->"
    picture = struct.pack(">II", 3, len(link)) + link + bytes(4) + struct.pack(">4I", 9, 9, 24, 0)
    picture += struct.pack(">I", len(address)) + address.encode()
    plain = write_video(tmp_path / "plain.mkv", Recipe(codec="libvpx", num_frames=25))
    path = tmp_path / f"video.{suffix}"
    with av.open(str(plain)) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        stream.metadata["METADATA_BLOCK_PICTURE"] = base64.b64encode(picture).decode()
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    assert b"METADATA_BLOCK_PICTURE" in path.read_bytes().upper()
    assert len(decode(path)) == 1
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
        [*_, last] = decode_from(watched, SeekPoint())
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


class Endless(io.RawIOBase):
    """A file that repeats its content for ever, or keeps silent for ever after it."""

    def __init__(self, content: bytes, *, silent: bool = False) -> None:
        super().__init__()
        self.content, self.silent, self.position = content, silent, 0

    def read(self, num_bytes: int = -1, /) -> bytes:
        at = self.position % len(self.content)
        data = self.content[at : at + num_bytes]
        if self.silent and self.position >= len(self.content):
            threading.Event().wait()
        self.position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self.position = offset + {0: 0, 1: self.position, 2: 1 << 50}[whence]
        return self.position

    def tell(self) -> int:
        return self.position


def decode_endless(content: bytes, limits: Limits, *, silent: bool = False, probed: bool = False) -> int:
    """Number of clips; runs in the child too."""
    whole = Path(tempfile.mkdtemp()) / "whole"
    whole.write_bytes(content)
    uri = str(whole)

    def open_input(_: str) -> BinaryIO:
        return cast(BinaryIO, Endless(content, silent=silent)) if probed else whole.open("rb")

    [span, *_] = plan_spans(probe_video(VideoRef(uri=uri, num_bytes=-1), open_input, limits), SPEC, 1000)
    shutil.rmtree(whole.parent)
    file = cast(BinaryIO, Endless(content, silent=silent))
    return len(decode_span(span, SPEC, file, max_clips=10**6, limits=limits))


@pytest.mark.parametrize(
    ("limits", "named"),
    [(replace(LARGE, max_seconds=20), "--max-seconds"), (replace(LARGE, max_frames=500), "--max-frames")],
)
@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize("suffix", ["h264", "mjpeg"])
def test_a_video_without_an_end_is_over_a_limit(
    tmp_path: Path, suffix: str, probed: bool, limits: Limits, named: str
) -> None:
    recipe = Recipe(num_frames=10)
    if suffix == "mjpeg":
        recipe = replace(recipe, codec="mjpeg", pixel_format="yuvj420p")
    content = write_video(tmp_path / f"v.{suffix}", recipe).read_bytes()
    with pytest.raises(VideoError) as caught:
        decode_endless(content, limits, probed=probed)
    assert (caught.value.reason, named in caught.value.detail) == (Reason.OVER_LIMIT, True)


@pytest.mark.parametrize("suffix", ["ts", "mpg", "flv", "mkv"])
def test_a_video_that_begins_again_and_again_is_refused(tmp_path: Path, suffix: str) -> None:
    content = write_video(tmp_path / f"v.{suffix}", Recipe(codec="mpeg2video" if suffix == "mpg" else "libx264"))
    with pytest.raises(VideoError) as caught:
        decode_endless(content.read_bytes(), replace(LARGE, max_seconds=20, max_frames=500))
    assert caught.value.reason in (Reason.DECODE_ERROR, Reason.OVER_LIMIT)


@pytest.mark.parametrize("silent", [False, True])
def test_a_decoder_that_never_ends_or_waits_for_ever_is_ended(tmp_path: Path, silent: bool) -> None:
    content = write_video(tmp_path / "v.h264", Recipe(num_frames=20)).read_bytes()
    with DecodeSandbox() as sandbox:
        with pytest.raises(VideoError) as caught:
            sandbox.run(decode_endless, content, LARGE, silent=silent, timeout_seconds=1.5)
        assert caught.value.reason is Reason.DECODE_TIMEOUT
        assert sandbox.run(len, content, timeout_seconds=60) == len(content), "the next video has a decoder again"


def test_long_stretches_have_more_time() -> None:
    limits = Limits(timeout_seconds=10, seconds_per_second=2)
    assert [limits.seconds_for(seconds) for seconds in (0, 5, 6)] == [10, 10, 12]


def test_limits_are_settings() -> None:
    values = {"max_pixels": 1, "max_seconds": 2, "max_frames": 3, "decode_timeout": 4, "decode_seconds_per_second": 5}
    run = TokenizeRun.model_validate({"inputs": ["a"], "out": "b", "decode_memory": "1GiB", **values})
    assert run.limits == Limits(
        private_hosts=(),
        max_pixels=1,
        max_seconds=2,
        max_frames=3,
        timeout_seconds=4,
        seconds_per_second=5,
        memory_bytes=1 << 30,
    )
    assert TokenizeRun.model_validate({"inputs": ["a"], "out": "b"}).limits == Limits(private_hosts=())


CRASHING_DECODER = """
import os, sys
if sys.argv[:1] == ["-m"]:
    from vidshard.pipeline.video import decode
    decode_spans = decode.decode_spans
    def dying(spans, *args, **kwargs):
        if spans[0].uri.endswith("killer.mp4"):
            with open({log!r}, "a") as file:
                file.write("x")
            os.abort()
        return decode_spans(spans, *args, **kwargs)
    decode.decode_spans = dying
"""


def test_a_video_that_kills_the_decoder_costs_one_child_and_no_other_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vidshard.pipeline import decode_stage as stages

    folder, log = tmp_path / "site", tmp_path / "deaths"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CRASHING_DECODER.format(log=str(log)))
    monkeypatch.syspath_prepend(str(folder))
    sandbox = DecodeSandbox()
    monkeypatch.setattr(stages, "_sandbox", lambda *_: sandbox)
    monkeypatch.setattr(stages, "_crashes", {})
    good = write_video(tmp_path / "good.mp4", Recipe(num_frames=75))
    killer = write_video(tmp_path / "killer.mp4", Recipe(num_frames=74))
    decoder = stages.SpanDecoder(spec=SPEC, max_clips=100, clips_per_pass=1)
    with sandbox:
        outcomes = []
        for path in (killer, good, killer):
            probe = stages.probe(VideoRef(uri=str(path), num_bytes=-1))
            assert not isinstance(probe, VideoError)
            outcomes += [decoder.decode_together([span], [SPEC], None)[0] for span in plan_spans(probe, SPEC, 1)]
    crashed = [outcome.error for outcome in outcomes if outcome.error is not None]
    assert {error.reason for error in crashed} == {Reason.DECODER_CRASHED}
    assert len(crashed) >= 2
    assert all("SIGABRT" in error.detail for error in crashed)
    assert sum(len(outcome.clips) for outcome in outcomes) == 3  # the good one's
    assert log.read_text() == "x"
