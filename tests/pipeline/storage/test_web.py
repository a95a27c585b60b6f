"""Web servers: private addresses are refused unless allowed, and listings end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import count

import pyarrow as pa
import pytest

from tests.support.http_server import http_server
from vidshard.pipeline import storage
from vidshard.pipeline.row_errors import row_error
from vidshard.pipeline.storage import retry, web_listing
from vidshard.pipeline.storage.addresses import check_address, is_public
from vidshard.schemas.rejections import Reason


@pytest.mark.parametrize(
    ("rows", "hosts"),
    [
        (["http://a/1"], ("a",)), (["http://a/1", "http://b/2"], ()), (["http://a/1", "/2", "/3"], ()),
        (["HTTP://u:p@A:80/1", "https://a:80/2", "/3"], ("a:80",)), (["http://a/"] * 9 + ["/1"] * 81, ()),
        (["http://a/"] * 10 + ["/1"] * 90, ("a",)), (["http://a/"] * 10 + ["/1"] * 91, ()),
        ([f"http://{n % 10}/x" for n in range(100)], tuple(map(str, range(10)))),
        ([f"http://{n}/x" for n in range(100)], ()), (["s3://a/1"], ()), ([None, "http://a/1"], ()),
    ],
)  # fmt: skip
def test_a_run_depends_on_the_web_servers_that_hold_many_of_its_rows(
    rows: list[str | None], hosts: tuple[str, ...]
) -> None:
    assert storage.storage_hosts([pa.chunked_array([rows], pa.string())], len(rows)) == hosts


@pytest.mark.parametrize(
    ("uri", "ends_the_run"),
    [
        ("s3://b/k", True), ("gs://b/k", True), ("hf://o/r/f", True), ("http://a:80/x", True),
        ("HTTPS://u@A:80/x", True),
        ("http://b/x", False), ("http://a/x", False), ("http://a:80.evil/x", False), ("sftp://h/x", True),
    ],
)  # fmt: skip
def test_an_outage_is_a_rows_fault_only_if_it_is_of_one_site_among_many(uri: str, ends_the_run: bool) -> None:
    outage = storage.StorageOutageError("no answer")
    if ends_the_run:
        with pytest.raises(storage.StorageOutageError):
            row_error(outage, uri, ("a:80",))
    else:
        assert row_error(outage, uri, ("a:80",)).reason is Reason.UNREADABLE


def test_a_web_server_that_was_down_is_asked_once_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.3)
    is_up = False
    with http_server(lambda _path: b"x" if is_up else (500, {}, b"")) as server:
        asked = []
        for _ in range(2):
            with pytest.raises(storage.StorageOutageError):
                storage.open_video(f"{server.url}/a")
            asked.append(len(server.asked))
        assert asked[1] - asked[0] == 3 < asked[0]  # HEAD and GET of the file, HEAD of the root
        is_up = True
        assert storage.open_video(f"{server.url}/a").read() == b"x"


@pytest.fixture(autouse=True)
def unrestricted() -> Iterator[None]:
    yield
    storage.restrict_addresses(None)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "ff02::1", "x", "",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::a9fe:a9fe", "255.255.255.255",
        "fec0::1", "::127.0.0.1", "::ffff:0:7f00:1", "64:ff9b:1::7f00:1", "192.0.0.8", "192.88.99.1", "3fff::1",
        "5f00::1",
    ],
)  # fmt: skip
def test_addresses_of_this_machine_and_its_networks_are_private(address: str) -> None:
    assert not is_public(address)
    storage.restrict_addresses(["Allowed.example"])
    check_address("allowed.EXAMPLE", [address])
    with pytest.raises(storage.StorageError, match="refused"):
        check_address("other.example", ["8.8.8.8", address])


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)
    storage.restrict_addresses([])
    check_address("any.example", [address])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_private_server_is_reached_only_if_it_was_named(host: str) -> None:
    with http_server(lambda _path: b"video") as server:
        url = server.url.replace("127.0.0.1", host) + "/v.mp4"
        storage.restrict_addresses([])
        for read in (storage.read_bytes, storage.open_video, storage.open_binary, storage.exists):
            with pytest.raises(storage.StorageError, match="refused"):
                read(url)
        assert storage.fingerprint(url) is None
        assert server.asked == []
        storage.restrict_addresses([host])
        assert storage.read_bytes(url) == b"video"


def test_a_redirect_to_a_private_server_is_refused() -> None:
    with (
        http_server(lambda _path: b"secret") as private,
        http_server(lambda _path: (302, {"Location": f"{private.url}/latest/meta-data"}, b"")) as public,
    ):
        url = public.url.replace("127.0.0.1", "localhost") + "/v.mp4"
        storage.restrict_addresses(["localhost"])
        with pytest.raises(storage.StorageError, match="refused"):
            storage.read_bytes(url)
        assert public.asked
        assert private.asked == []


def test_a_folder_of_a_web_server_is_listed_below_itself() -> None:
    pages = {
        "/v/": b'<a href="a.mp4">a</a> <A HREF=\'sub/\'>s</A> <a href="../x.mp4"> <a href="http://127.0.0.2/y.mp4">',
        "/v/sub/": b'<a href="/v/sub/b.mp4?x=1"> <a href="../"> <a href="b.mp4#t"> <a href="http://[bad/">',
    }
    with http_server(lambda path: pages.get(path)) as server:
        assert list(storage.list_web_folder(f"{server.url}/v/")) == [
            f"{server.url}/v/a.mp4",
            f"{server.url}/v/sub/b.mp4",
        ]


def test_listings_without_end_end(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = count()
    with http_server(lambda _path: f'<a href="{next(numbers)}/">'.encode()) as server:
        with pytest.raises(storage.StorageError, match="levels"):
            list(storage.list_web_folder(f"{server.url}/"))
        assert len(server.asked) <= 4 * web_listing.MAX_DEPTH
    monkeypatch.setattr(web_listing, "MAX_PAGES", 50)
    with (
        http_server(lambda _path: "".join(f'<a href="{next(numbers)}/">' for _ in range(40)).encode()) as server,
        pytest.raises(storage.StorageError, match="folders"),
    ):
        list(storage.list_web_folder(f"{server.url}/"))


def test_a_huge_page_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_listing, "MAX_PAGE_BYTES", 1 << 16)
    with http_server(lambda _path: b"x" * (1 << 17)) as server, pytest.raises(storage.StorageError, match="larger"):
        list(storage.list_web_folder(f"{server.url}/"))


def test_informational_answers_without_end_end() -> None:
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection, suppress(OSError):
                    while True:
                        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 50)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v.mp4"
    answers: list[object] = []

    def ask() -> None:
        with suppress(storage.StorageError):
            answers.append(storage.open_video(url))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(20)
    listening.close()
    assert not asking.is_alive()
    assert not answers
