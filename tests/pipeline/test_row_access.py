"""Locations that the rows of a manifest may name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli import vidshard_exits
from tests.support.http_server import http_server
from tests.support.shards import rejects_of
from tests.support.videos import Recipe, write_video
from vidshard.pipeline import storage
from vidshard.pipeline.discover import discover
from vidshard.pipeline.row_access import RowAccess
from vidshard.schemas.runs import TokenizeRun

LOCAL, S3, WEB = "/data/m.csv", "s3://bucket/m.csv", "https://host/m.csv"


@pytest.mark.parametrize(
    ("uri", "manifest", "allowed"),
    [
        ("/a.mp4", LOCAL, True), ("s3://b/k", LOCAL, True), ("https://h/x", LOCAL, True), ("hf://o/r/x", LOCAL, True),
        ("sftp://h/x", LOCAL, False), ("ftp://h/x", LOCAL, False), ("github://o:r@/x", LOCAL, False),
        ("reference://x", LOCAL, False), ("zip://a::s3://b/c", LOCAL, False), ("unknown://x", LOCAL, False),
        ("/etc/x", S3, False), ("file:///etc/x", WEB, False), ("s3://b/k", S3, True), ("https://h/x", WEB, True),
        ("sftp://h/x", "sftp://h/m.csv", True), ("HTTPS://h/x", LOCAL, True), ("FTP://h/x", LOCAL, False),
        ("SimpleCache::https://h/x", LOCAL, False),
    ],
)  # fmt: skip
def test_schemes_of_rows(uri: str, manifest: str, allowed: bool) -> None:
    assert (RowAccess().refusal(uri, manifest) is None) == allowed


def test_schemes_that_are_named_are_the_only_ones() -> None:
    access = RowAccess(schemes=("s3", "sftp"))
    assert access.refusal("sftp://h/x", LOCAL) is None
    assert access.refusal("S3://h/x", LOCAL) is None
    assert "--allow-schemes allows s3, sftp" in str(access.refusal("/a.mp4", LOCAL))
    assert RowAccess(schemes=("file",)).refusal("/a.mp4", S3) is None


@pytest.mark.parametrize(
    ("uri", "allowed"),
    [
        ("s3://b/videos/a.mp4", True), ("S3://b/videos/a.mp4", True), ("s3://b/videos2/a.mp4", False),
        ("s3://b/videos/../x.mp4", False), ("s3://b/videos/%2e%2e/x.mp4", False), ("s3://b/x.mp4", False),
        ("gs://b/videos/a.mp4", False), ("https://u:p@h/v/a.mp4", True), ("https://H/v/a.mp4", True),
        ("https://h.evil/v/a.mp4", False), ("https://h@evil/v/a.mp4", False), ("https://h/V/a.mp4", False),
    ],
)  # fmt: skip
def test_rows_lie_under_what_is_allowed(uri: str, allowed: bool) -> None:
    assert (RowAccess(under=("s3://b/videos/", "https://h/v")).refusal(uri, LOCAL) is None) == allowed


def test_links_out_of_a_folder_are_not_under_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out.mp4").touch()
    (tmp_path / "in" / "link.mp4").symlink_to(tmp_path / "out.mp4")
    access = RowAccess(under=(str(tmp_path / "in"),))
    assert access.refusal(str(tmp_path / "in" / "a.mp4"), LOCAL) is None
    for name in ("in/link.mp4", "in/../out.mp4", "inner/a.mp4", "out.mp4", "in/a\0.mp4"):
        assert access.refusal(f"{tmp_path}/{name}", LOCAL) is not None


def test_a_run_names_the_hosts_that_may_be_private() -> None:
    run = TokenizeRun(inputs=["HTTP://u:p@Nas.Local:8080/m.csv", "/a", "http://[::1]/x"], out="o")
    assert run.limits.private_hosts == ("::1", "nas.local")
    assert TokenizeRun(inputs=["/a"], out="o", allow_private=True).limits.private_hosts is None
    assert TokenizeRun(inputs=["/a"], out="o", allow_schemes=["S3, https://"]).allow_schemes == ["s3", "https"]


@pytest.mark.parametrize("folder", ["", "  ", "http://", "s3://", "https:///"])
def test_a_folder_that_names_no_place_is_refused(folder: str, tmp_path: Path) -> None:
    code, printed = vidshard_exits("tokenize", tmp_path, "--out", tmp_path / "o", "--allow-under", folder)
    assert code == 2
    assert "--allow-under: a folder is a path or a URL with a server or bucket" in " ".join(printed.split())


def test_rows_that_are_not_allowed_are_rejections_and_nothing_is_asked(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", Recipe(num_frames=20))
    with http_server(lambda _path: video.read_bytes()) as server:
        rows = ["v.mp4", f"{server.url}/latest.mp4", "sftp://127.0.0.1/x.mp4", f"simplecache::{server.url}/c.mp4"]
        (tmp_path / "m.csv").write_text("\n".join(["uri", *rows]))
        run = ["tokenize", tmp_path / "m.csv", "--size", 32, "--frames", 5, "--tokenizer", "tiny", "--local", "--out"]
        code, printed = vidshard_exits(*run, tmp_path / "out", "--recheck")
        assert code == 0, printed
        own = [request for request in server.asked if "latest" in request or "c.mp4" in request]
        assert own == [], "a request for something else is of another test, whose server had this port before"
        found = rejects_of(tmp_path / "out")
        assert found == {"latest.mp4": "unreadable", "x.mp4": "not_allowed", "c.mp4": "not_allowed"}
        code, printed = vidshard_exits(*run, tmp_path / "o2", "--allow-private")
        assert rejects_of(tmp_path / "o2").get("latest.mp4") == "duplicate", printed
        assert server.asked
        code, printed = vidshard_exits(*run, tmp_path / "o3", "--allow-under", tmp_path / "elsewhere")
        assert set(rejects_of(tmp_path / "o3").values()) == {"not_allowed"}


def test_a_typed_url_may_be_private(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", Recipe(num_frames=20))
    with http_server(lambda path: video.read_bytes() if path == "/v.mp4" else None) as server:
        code, printed = vidshard_exits(
            "tokenize", f"{server.url}/v.mp4", "--size", 32, "--frames", 5, "--tokenizer", "tiny", "--local", "--out",
            tmp_path / "out",
        )  # fmt: skip
        assert code == 0, printed
        assert rejects_of(tmp_path / "out") == {}


def test_a_url_without_a_slash_at_its_end_is_not_listed() -> None:
    with http_server(lambda _path: (200, {"Content-Type": "text/html"}, b'<a href="x/a.mp4">')) as server:
        videos = discover([f"{server.url}/x"]).videos["uri"].to_pylist()
        assert videos == [f"{server.url}/x"]
        assert discover([f"{server.url}/"]).videos["uri"].to_pylist() == [f"{server.url}/x/a.mp4"]
        assert len(server.asked) < 10


def test_what_was_restricted_is_free_after_a_run(tmp_path: Path) -> None:
    code, _ = vidshard_exits("tokenize", tmp_path / "none.mp4", "--out", tmp_path / "o", "--local")
    assert code == 2
    with http_server(lambda _path: b"x") as server:
        assert storage.read_bytes(f"{server.url}/a") == b"x"
