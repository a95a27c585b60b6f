"""The row boundary: whatever one row's bytes, text or address do, it is a value of that row, and the run goes on."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.cli import SMALL, tokenize
from tests.support.faulty_s3 import FaultyS3
from tests.support.fuzz_text import KINDS, fuzz_text
from tests.support.http_server import http_server, unused_port
from tests.support.videos import Recipe, write_video
from vidshard.jobs.tokenization.summary import FEWEST_INTERNAL_ERRORS
from vidshard.pipeline import decode_stage
from vidshard.pipeline.output.rejects import read_rejects
from vidshard.pipeline.video import sampling
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.sandbox import DecodeSandbox
from vidshard.schemas.errors import EXIT_AGAIN


def reasons(out: Path) -> Counter[str]:
    return Counter(read_rejects(str(out))["reason"].to_pylist())


@pytest.fixture(scope="module")
def two_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for number in range(2):
        write_video(folder / f"{number}.mp4", Recipe(num_frames=50 + number, codec="mpeg4", width=64, height=64))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_odd_text_and_bytes_never_escape(kind: str, tmp_path: Path) -> None:
    outcomes, escapes = fuzz_text(kind, 150, 1, tmp_path)
    assert not escapes, escapes[0]
    assert outcomes.total() == 150
    assert len(outcomes) > 1


@pytest.mark.parametrize("digits", ["9" * 400, "9" * 5000, "0." + "1" * 5000])
def test_a_duration_of_many_digits_is_no_duration(digits: str, two_videos: Path, tmp_path: Path) -> None:
    with av.open(str(two_videos / "0.mp4")) as source, av.open(str(tmp_path / "odd.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.metadata["DURATION-eng"] = f"{digits}:00:00.0"
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    result = tokenize(tmp_path / "odd.mkv", "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 0, result.output
    assert not reasons(tmp_path / "out")


@pytest.mark.parametrize("where", ["open", "plan", "decode"])
def test_an_unforeseen_exception_rejects_its_row_alone(
    where: str,
    two_videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = str(two_videos / "1.mp4")

    def plan_spans(video: Any, *rest: Any) -> Any:
        if where == "plan" and video.uri == broken:
            raise OverflowError("a secret of the file")
        return sampling.plan_spans(video, *rest)

    def run(self: DecodeSandbox, function: Any, *args: Any, **kwargs: Any) -> Any:
        if where == "decode" and function is decode_stage._decode_in_child and args[0][0].uri == broken:
            raise KeyError("a secret of the file")
        if where == "open" and function is probe_video and args[0].uri == broken:
            raise KeyError("a secret of the file")
        return real_run(self, function, *args, **kwargs)

    real_run = DecodeSandbox.run
    monkeypatch.setattr("vidshard.pipeline.plan.plan_spans", plan_spans)
    monkeypatch.setattr(DecodeSandbox, "run", run)
    with caplog.at_level(logging.ERROR):
        result = tokenize(two_videos, "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 0, result.output
    rejects = read_rejects(str(tmp_path / "out")).to_pylist()
    assert {r["uri"] for r in rejects} == {broken}
    assert {r["reason"] for r in rejects} == {"internal_error"}
    name = "OverflowError" if where == "plan" else "KeyError"
    assert all(name in r["detail"] and "test_row_errors.py:" in r["detail"] for r in rejects)
    assert not any("secret" in r["detail"] for r in rejects)
    assert "Traceback" in caplog.text
    assert pq.read_table(tmp_path / "out" / "shards").num_rows


def test_many_internal_errors_end_the_run_as_a_defect(
    tmp_path: Path, two_videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(FEWEST_INTERNAL_ERRORS):
        data = (two_videos / "0.mp4").read_bytes() + b"\0" * (number + 9)
        (tmp_path / "in" / f"{number}.mp4").write_bytes(data)

    def plan_spans(*_: Any) -> Any:
        raise IndexError

    monkeypatch.setattr("vidshard.pipeline.plan.plan_spans", plan_spans)
    result = tokenize(tmp_path / "in", "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 1
    assert "--max-internal-error-share 0.01 allows: this is a defect" in " ".join(result.output.split())
    assert reasons(tmp_path / "out") == {"internal_error": FEWEST_INTERNAL_ERRORS}
    allowed = tokenize(tmp_path / "in", "--out", tmp_path / "out2", *SMALL, "--max-internal-error-share", "1")
    assert "a defect, and not" not in " ".join(allowed.output.split())


@pytest.mark.parametrize("where", ["vidshard.pipeline.plan.plan_spans", "vidshard.pipeline.decode_stage._decode_spans"])
def test_a_defect_that_meets_every_video_ends_the_run_early(
    where: str, two_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3 * FEWEST_INTERNAL_ERRORS):
        (tmp_path / "in" / f"{number:02}.mp4").write_bytes((two_videos / "0.mp4").read_bytes() + b"\0" * (number + 9))
    calls = 0

    def fail(*_: Any) -> Any:
        nonlocal calls
        calls += 1
        raise ZeroDivisionError

    monkeypatch.setattr("vidshard.pipeline.plan._MAX_VIDEOS_PER_TASK", 1)
    monkeypatch.setattr(where, fail)
    result = tokenize(tmp_path / "in", "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 1, result.output
    assert "this is a defect" in " ".join(result.output.split())
    assert calls < 2 * FEWEST_INTERNAL_ERRORS


def test_odd_addresses_of_a_manifest_are_rejections(two_videos: Path, tmp_path: Path) -> None:
    odd = ["zip://a::x.mp4", "tar://x", "reference://x", "dir://x", "jlab://x", "generic::x", "async_wrapper://x"]
    odd += [
        "data://x",
        "http://[::1",
        "a\0b.mp4",
        "~\0/a.mp4",
        "file:///%00.mp4",
        "simplecache::file:///etc/passwd",
        "no://such",
    ]
    pq.write_table(pa.table({"uri": [str(two_videos / "0.mp4"), *odd]}), tmp_path / "m.parquet")
    result = tokenize(tmp_path / "m.parquet", "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 0, result.output
    found = reasons(tmp_path / "out")
    assert set(found) == {"unreadable", "not_allowed"}
    assert found.total() == len(odd)


def test_an_address_that_breaks_what_reads_it_rejects_its_row_alone(
    two_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expanduser = os.path.expanduser

    def broken(path: str) -> str:
        if "odd" in str(path):
            raise ZeroDivisionError
        return expanduser(path)

    pq.write_table(pa.table({"uri": ["odd.mp4", str(two_videos / "0.mp4")]}), tmp_path / "m.parquet")
    monkeypatch.setattr("os.path.expanduser", broken)
    result = tokenize(tmp_path / "m.parquet", "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 0, result.output
    assert reasons(tmp_path / "out") == {"bad_row": 1}


def test_times_beyond_any_video_reject_their_row_alone(two_videos: Path, tmp_path: Path) -> None:
    uri = str(two_videos / "0.mp4")
    table = pa.table({"uri": [uri] * 3, "start_seconds": [0.0, 1e307, 0.0], "end_seconds": [1.0, 1e308, 1e308]})
    pq.write_table(table, tmp_path / "m.parquet")
    result = tokenize(tmp_path / "m.parquet", "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 0, result.output
    assert reasons(tmp_path / "out") == {"too_short": 1}


def test_damaged_signals_reject_their_rows_alone(two_videos: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "good.npy", np.column_stack([np.arange(99) / 10, np.ones(99)]))
    data = bytearray((tmp_path / "good.npy").read_bytes())
    data[11] = ord("`")  # in the header, which NumPy parses as Python source
    (tmp_path / "odd.npy").write_bytes(data)
    table = pa.table(
        {
            "uri": [str(two_videos / "0.mp4"), str(two_videos / "1.mp4")],
            "s": [str(tmp_path / "good.npy"), str(tmp_path / "odd.npy")],
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    result = tokenize(tmp_path / "m.parquet", "--out", tmp_path / "out", *SMALL, "--signals", "s=nearest")
    assert result.exit_code == 0, result.output
    rejects = read_rejects(str(tmp_path / "out")).to_pylist()
    assert {(Path(r["uri"]).name, r["reason"]) for r in rejects} == {("1.mp4", "bad_signal")}


def test_an_outage_of_an_object_store_ends_the_run_and_rejects_nothing(
    faulty_s3: FaultyS3, two_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    boto3.client("s3").upload_file(str(two_videos / "0.mp4"), "videos", "outage/a.mp4")
    pq.write_table(pa.table({"uri": ["s3://videos/outage/a.mp4", str(two_videos / "1.mp4")]}), tmp_path / "m.parquet")
    monkeypatch.setenv("VIDSHARD_STORAGE_RETRY_SECONDS", "1")
    monkeypatch.setattr("vidshard.pipeline.storage.retry.RETRY_SECONDS", 1.0)
    faulty_s3.misbehave("unavailable", path="outage", times=math.inf)
    result = tokenize(tmp_path / "m.parquet", "--out", tmp_path / "out", *SMALL)
    faulty_s3.behave()
    assert result.exit_code == EXIT_AGAIN, result.output
    assert "cannot read s3://videos/outage/a.mp4" in " ".join(result.output.split())
    assert not reasons(tmp_path / "out")
    again = tokenize(tmp_path / "m.parquet", "--out", tmp_path / "out", *SMALL)
    assert again.exit_code == 0, again.output


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storages are asked again for half a second, in child processes too."""
    monkeypatch.setenv("VIDSHARD_STORAGE_RETRY_SECONDS", "0.5")
    monkeypatch.setattr("vidshard.pipeline.storage.retry.RETRY_SECONDS", 0.5)


def _manifest(folder: Path, uris: list[str]) -> Path:
    path = folder / "m.csv"
    path.write_text("\n".join(["uri", *uris]))
    return path


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("trouble", ["refuses connections", "answers 503"])
def test_an_outage_of_the_web_server_of_most_rows_ends_the_run_and_rejects_nothing(
    two_videos: Path, tmp_path: Path, trouble: str
) -> None:
    is_up = False
    content = (two_videos / "0.mp4").read_bytes()
    with http_server(lambda _path: content if is_up else (503, {}, b"")) as server:
        url = server.url if trouble == "answers 503" else f"http://127.0.0.1:{unused_port()}"
        run = [tmp_path / "m.csv", "--out", tmp_path / "out", *SMALL, "--allow-private"]
        _manifest(tmp_path, [f"{url}/a.mp4", f"{url}/b.mp4", str(two_videos / "1.mp4")])
        result = tokenize(*run)
        assert result.exit_code == EXIT_AGAIN, result.output
        assert f"cannot read {url}/a.mp4" in " ".join(result.output.split())
        assert not reasons(tmp_path / "out")
        is_up = True
        if trouble == "answers 503":
            again = tokenize(*run)
            assert again.exit_code == 0, again.output
            assert reasons(tmp_path / "out") == {"duplicate": 1}


@pytest.mark.usefixtures("hasty")
def test_one_web_server_among_many_that_is_down_rejects_its_rows_alone(two_videos: Path, tmp_path: Path) -> None:
    content = (two_videos / "0.mp4").read_bytes()
    with http_server(lambda path: content if path == "/a.mp4" else (503, {}, b"") if path == "/b.mp4" else None) as up:
        dead = f"http://127.0.0.1:{unused_port()}"
        rows = [f"{up.url}/a.mp4", f"{up.url}/b.mp4", f"{up.url}/c.mp4", f"{dead}/d.mp4", str(two_videos / "1.mp4")]
        result = tokenize(_manifest(tmp_path, rows), "--out", tmp_path / "out", *SMALL, "--allow-private")
    assert result.exit_code == 0, result.output
    rejects = {row["uri"]: row["reason"] for row in read_rejects(str(tmp_path / "out")).to_pylist()}
    assert rejects == dict.fromkeys(rows[1:4], "unreadable")


def test_a_tag_that_is_not_utf8_ends_no_run(two_videos: Path, tmp_path: Path) -> None:
    content = (two_videos / "0.mp4").read_bytes()
    with http_server(lambda _path: (200, {"ETag": '"\xff\x80"'}, content)) as server:  # sent as Latin-1
        rows = [f"{server.url}/a.mp4", str(two_videos / "1.mp4")]
        result = tokenize(_manifest(tmp_path, rows), "--out", tmp_path / "out", *SMALL, "--allow-private")
    assert result.exit_code == 0, result.output
    assert not reasons(tmp_path / "out")


@pytest.mark.usefixtures("hasty")
def test_a_web_server_of_signals_that_is_down_rejects_their_rows(two_videos: Path, tmp_path: Path) -> None:
    dead = f"http://127.0.0.1:{unused_port()}/s.npy"
    (tmp_path / "m.csv").write_text(f"uri,s\n{two_videos}/0.mp4,{dead}\n{two_videos}/1.mp4,\n")
    run = [tmp_path / "m.csv", "--out", tmp_path / "out", *SMALL, "--signals", "s=nearest", "--allow-private"]
    result = tokenize(*run)
    assert result.exit_code == 0, result.output
    assert set(reasons(tmp_path / "out")) == {"unreadable"}


def test_a_key_with_two_colons_is_a_name(s3: str, two_videos: Path, tmp_path: Path) -> None:
    import boto3

    boto3.client("s3").upload_file(str(two_videos / "0.mp4"), "videos", "colons/a::b.mp4")
    result = tokenize("s3://videos/colons", "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 0, result.output
    assert not reasons(tmp_path / "out")
    assert set(pq.read_table(tmp_path / "out" / "shards")["uri"].to_pylist()) == {"s3://videos/colons/a::b.mp4"}


class _Chunked(BaseHTTPRequestHandler):
    """Serves one file without its length."""

    protocol_version = "HTTP/1.1"
    content = b""
    repeat = 1

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        for _ in range(self.repeat):
            self.wfile.write(f"{len(self.content):x}\r\n".encode() + self.content + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(content: bytes, repeat: int = 1) -> Iterator[str]:
    handler = type("Handler", (_Chunked,), {"content": content, "repeat": repeat})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_answer_without_a_length_is_fetched_whole(
    two_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served((two_videos / "0.mp4").read_bytes()) as url:
        result = tokenize(f"{url}/a.mp4", "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 0, result.output
    assert not reasons(tmp_path / "out")
    from vidshard.pipeline.storage import StorageError, open_video, remote_video

    monkeypatch.setattr(remote_video, "UNSIZED_BYTES", 1000)
    with served(b"x" * 600, repeat=2) as url, pytest.raises(StorageError, match="does not state its length"):
        open_video(f"{url}/a.mp4")
