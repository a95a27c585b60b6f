"""Storage while the network and the server misbehave: it gives the right content or a clear end, never half."""

from __future__ import annotations

import errno
import functools
import io
import logging
import math
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import boto3
import fsspec
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from tests.support.faulty_s3 import FaultyS3
from vidshard.pipeline import storage
from vidshard.pipeline.storage import StorageError, clients, files, retry
from vidshard.pipeline.storage.retry import errors_named
from vidshard.schemas.errors import UserError

PASSING = ("slow_down", "internal_error", "bad_gateway", "reset_before", "stall")
"""Faults that any request can meet."""

BODIES = ("truncate", "short")
"""Faults of an answer with a body."""

SECRET = "a-secret-that-must-not-be-seen"


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Pauses that a test can afford; and where nothing comes, that is not waited for long."""
    monkeypatch.setattr(retry, "_FIRST_PAUSE_SECONDS", 0.02)
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("kind") == "stall":
        monkeypatch.setattr(clients, "_ANSWER_SECONDS", 0.4)


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the environment said one second."""
    monkeypatch.setattr(retry, "RETRY_SECONDS", 1.0)


@pytest.fixture
def folder(s3: str) -> str:
    """A folder of its own in the bucket."""
    return f"s3://videos/storage/{uuid.uuid4().hex}"


@functools.cache
def direct() -> Any:
    """A client that asks past the proxy."""
    return boto3.client("s3")


def stored(path: str) -> bytes | None:
    """Content of the server, asked past the proxy."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    client = direct()
    try:
        return bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    except client.exceptions.NoSuchKey:
        return None


def put(path: str, data: bytes, **options: str) -> str:
    """Put it past the proxy."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    direct().put_object(Bucket=bucket, Key=key, Body=data, **options)
    return path


def uploads() -> list[str]:
    """Keys to which parts were uploaded that make no object."""
    return [u["Key"] for u in direct().list_multipart_uploads(Bucket="videos").get("Uploads", [])]


def said_by_us(caplog: pytest.LogCaptureFixture) -> str:
    """Log lines of storage; the server of the test logs its requests too."""
    return "\n".join(record.getMessage() for record in caplog.records if record.name == storage.__name__)


CONTENT = bytes(range(256)) * 64


class Operation(NamedTuple):
    """A function of storage, what it returns, and the method of the request that may go wrong."""

    call: Callable[[str], Any]
    result: Any
    method: str


def read_open(path: str) -> bytes:
    with storage.open_binary(path, block_bytes=4096) as file:
        return b"".join(iter(lambda: file.read(3000), b""))


def read_video(path: str) -> bytes:
    with storage.open_video(path) as file:
        return file.read()


OPERATIONS = {
    "read_bytes": Operation(storage.read_bytes, CONTENT, "GET"),
    "open_binary": Operation(read_open, CONTENT, "GET"),
    "open_video": Operation(read_video, CONTENT, "GET"),
    "list_files": Operation(lambda path: len(storage.list_files(path.rsplit("/", 1)[0], ".bin")), 1, "GET"),
    "exists": Operation(storage.exists, True, "HEAD"),
    "fingerprint": Operation(lambda path: storage.fingerprint(path) is not None, True, "HEAD"),
    "write_atomic": Operation(lambda path: storage.write_atomic(path, CONTENT), None, "PUT"),
    "create_exclusive": Operation(lambda path: storage.create_exclusive(f"{path}.new", CONTENT), True, "PUT"),
    "remove": Operation(storage.remove, None, "DELETE"),
}


def faults(name: str) -> list[str]:
    """Faults that the request of an operation can meet."""
    if OPERATIONS[name].method == "GET":
        # nobody knows how long the whole of a file, or of a listing, should be
        return [*PASSING, "timeout", "truncate", *(["short"] if name.startswith("open") else [])]
    # a HEAD has no body that would name a time-out
    return [*PASSING, "reset_after", "lost_answer", *([] if OPERATIONS[name].method == "HEAD" else ["timeout"])]


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in OPERATIONS for kind in faults(name)])
def test_trouble_that_passes_is_got_over(name: str, kind: str, faulty_s3: FaultyS3, folder: str) -> None:
    operation = OPERATIONS[name]
    path = put(f"{folder}/a.bin", CONTENT)
    faulty_s3.misbehave(kind, method=operation.method, path="storage", times=2)
    assert operation.call(path) == operation.result
    assert [k for _, _, k in faulty_s3.seen].count(kind) == 2
    after = {"write_atomic": path, "create_exclusive": f"{path}.new", "remove": path}.get(name)
    if after is not None:
        assert stored(after) == (None if name == "remove" else CONTENT)


@pytest.mark.parametrize("kind", ["slow_down", "reset_before", "stall"])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "fingerprint"])
def test_trouble_without_end_ends_within_the_limit_and_is_told(
    name: str, kind: str, faulty_s3: FaultyS3, folder: str, caplog: pytest.LogCaptureFixture, short_limit: None
) -> None:
    operation = OPERATIONS[name]
    path = put(f"{folder}/a.bin", CONTENT)
    faulty_s3.misbehave(kind, path="storage", times=math.inf)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING, storage.__name__), pytest.raises(StorageError) as caught:
        operation.call(path)
    assert time.monotonic() - started < 2 * storage.RETRY_SECONDS + 5  # also when one attempt takes all of it
    text = str(caught.value)
    assert folder.removeprefix("s3://") in text
    assert "tried " in text
    assert "times in" in text
    assert "VIDSHARD_STORAGE_RETRY_SECONDS" in text
    assert folder.removeprefix("s3://") in said_by_us(caplog)
    assert SECRET not in text + said_by_us(caplog)
    if name == "create_exclusive":
        assert stored(f"{path}.new") is None
    assert stored(path) == CONTENT


@pytest.mark.parametrize("kind", ["denied", "clock", "full"])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "fingerprint"])
def test_trouble_that_stays_is_told_at_once(name: str, kind: str, faulty_s3: FaultyS3, folder: str) -> None:
    operation = OPERATIONS[name]
    path = put(f"{folder}/a.bin", CONTENT)
    faulty_s3.misbehave(kind, path="storage", times=math.inf)
    with pytest.raises(StorageError) as caught:
        operation.call(path)
    assert len(faulty_s3.seen) <= 2
    assert "times in" not in str(caught.value)


@pytest.mark.parametrize("name", ["read_bytes", "open_binary", "open_video", "fingerprint"])
def test_what_is_missing_is_not_asked_for_again(name: str, faulty_s3: FaultyS3, folder: str) -> None:
    if name == "fingerprint":
        assert storage.fingerprint(f"{folder}/none.bin") is None
    else:
        with pytest.raises(StorageError, match=r"none\.bin: no such file or bucket$"):
            OPERATIONS[name].call(f"{folder}/none.bin")
    assert len(faulty_s3.seen) <= 3  # as a file, and as a folder
    assert not storage.exists(f"{folder}/none.bin")
    assert storage.list_files(f"{folder}/none", ".bin") == []
    storage.remove(f"{folder}/none.bin")
    with pytest.raises(StorageError, match="no such file or bucket"):
        storage.write_atomic("s3://no-such-bucket/a.bin", b"a")


def test_an_unreachable_bucket_is_not_taken_for_a_missing_one(faulty_s3: FaultyS3, short_limit: None) -> None:
    assert storage.exists("s3://videos")
    assert not storage.exists("s3://no-such-bucket")
    faulty_s3.misbehave("slow_down", times=math.inf)
    with pytest.raises(StorageError, match="tried "):
        storage.exists("s3://videos")


@pytest.mark.parametrize("seed", range(2))
def test_everything_goes_well_on_a_bad_day(seed: int, faulty_s3: FaultyS3, folder: str) -> None:
    kinds = [*PASSING[:-1], "truncate", "reset_after", "lost_answer"]
    faulty_s3.misbehave_at_random(seed, 0.3, kinds)
    for number in range(6):
        path, data = f"{folder}/{number}.bin", bytes([number]) * 10_000
        storage.write_atomic(path, data)
        assert storage.exists(path)
        assert storage.read_bytes(path) == data
        assert read_open(path) == data
        assert storage.create_exclusive(f"{path}.lock", data)
        assert not storage.create_exclusive(f"{path}.lock", b"somebody else")
    assert len(storage.list_files(folder, ".bin")) == 6
    assert sum(bool(kind) for _, _, kind in faulty_s3.seen) > 10


class TestLargeVideo:
    """A video that is read in blocks, the next one fetched meanwhile."""

    CONTENT = bytes(range(256)) * (20 << 12)

    @pytest.fixture
    def path(self, s3: str) -> str:
        path = "s3://videos/storage/large.mp4"
        return path if storage.exists(path) else put(path, self.CONTENT)

    def read_through(self, path: str) -> bytes:
        assert len(self.CONTENT) > storage.WHOLE_BYTES
        with storage.open_video(path) as file:
            assert isinstance(file, storage.RemoteVideo)
            return b"".join(iter(lambda: file.read(1 << 20), b""))

    @pytest.mark.parametrize(
        ("kind", "skip"), [*((kind, 1) for kind in (*PASSING, *BODIES)), ("slow_down", 0), ("truncate", 3)]
    )
    def test_blocks_that_fail_come_later(self, kind: str, skip: int, faulty_s3: FaultyS3, path: str) -> None:
        faulty_s3.misbehave(kind, method="GET", path="large", times=2, skip=skip)
        assert self.read_through(path) == self.CONTENT
        assert [k for _, _, k in faulty_s3.seen].count(kind) == 2

    def test_samples_that_fail_come_later(self, faulty_s3: FaultyS3, path: str) -> None:
        for kind in ("slow_down", "reset_before", *BODIES):
            faulty_s3.misbehave(kind, method="GET", path="large")
        with storage.open_video(path) as file:
            assert isinstance(file, storage.RemoteVideo)
            offsets = [0, 5_000_000, len(self.CONTENT) - 10]
            assert file.samples(offsets, 1000) == [self.CONTENT[at : at + 1000] for at in offsets]

    def test_blocks_that_never_come_end_within_the_limit_as_an_error_of_reading(
        self, faulty_s3: FaultyS3, path: str, short_limit: None
    ) -> None:
        faulty_s3.misbehave("slow_down", method="GET", path="large", times=math.inf, skip=2)
        with pytest.raises(OSError, match=r"cannot read s3://videos/storage/large\.mp4.*tried \d+ times"):
            self.read_through(path)

    def test_the_end_is_as_far_as_ever(self, faulty_s3: FaultyS3, path: str) -> None:
        with storage.open_video(path) as file:
            file.seek(-5, os.SEEK_END)
            assert file.read(100) == self.CONTENT[-5:]
            assert file.read(100) == b""
        assert not any(kind for _, _, kind in faulty_s3.seen)


class TestLargeUpload:
    """One in parts."""

    CONTENT = bytes(12 << 20)

    @pytest.fixture(autouse=True)
    def small_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The smallest that S3 takes."""
        monkeypatch.setattr(files, "UPLOAD_PART_BYTES", 5 << 20)

    @pytest.mark.parametrize(
        ("kind", "method", "what"),
        [
            ("slow_down", "PUT", "partNumber=2"),
            ("reset_after", "PUT", "partNumber=3"),
            ("internal_error", "POST", "uploads"),
            ("reset_after", "POST", "uploadId"),
            ("lost_answer", "POST", "uploadId"),
        ],
    )
    def test_parts_that_fail_are_sent_again(
        self, kind: str, method: str, what: str, faulty_s3: FaultyS3, folder: str
    ) -> None:
        faulty_s3.misbehave(kind, method=method, path=what)
        storage.write_atomic(f"{folder}/large", self.CONTENT)
        assert stored(f"{folder}/large") == self.CONTENT

    def test_one_that_breaks_leaves_nothing(self, faulty_s3: FaultyS3, folder: str, short_limit: None) -> None:
        faulty_s3.misbehave("internal_error", method="PUT", path="partNumber=2", times=math.inf)
        faulty_s3.misbehave("internal_error", method="DELETE", path="uploadId", times=1)
        with pytest.raises(StorageError, match=r"cannot write .*/large: .*tried \d+ times"):
            storage.write_atomic(f"{folder}/large", self.CONTENT)
        assert stored(f"{folder}/large") is None
        assert not [key for key in uploads() if key.startswith(folder.removeprefix("s3://videos/"))]


def test_of_two_who_create_a_file_the_one_whose_answer_was_lost_knows_that_it_was_first(
    faulty_s3: FaultyS3, folder: str
) -> None:
    for kind in ("reset_after", "lost_answer"):
        faulty_s3.misbehave(kind, method="PUT", path="lock", times=1)
        assert storage.create_exclusive(f"{folder}/{kind}.lock", b"first")
        assert not storage.create_exclusive(f"{folder}/{kind}.lock", b"second")
        assert stored(f"{folder}/{kind}.lock") == b"first"


def test_a_conflict_with_somebody_who_then_fails_is_tried_again(faulty_s3: FaultyS3, folder: str) -> None:
    faulty_s3.misbehave("conflict", method="PUT", path="lock")
    assert storage.create_exclusive(f"{folder}/lock", b"first")
    assert stored(f"{folder}/lock") == b"first"


@pytest.mark.parametrize("where", ["local", "memory"])
def test_create_exclusive_on_other_file_systems(where: str, tmp_path: Path) -> None:
    root = str(tmp_path) if where == "local" else f"memory://{uuid.uuid4().hex}"
    assert storage.create_exclusive(f"{root}/deep/lock", b"first")
    assert not storage.create_exclusive(f"{root}/deep/lock", b"second")
    assert storage.read_bytes(f"{root}/deep/lock") == b"first"
    if where == "local":
        assert os.listdir(tmp_path / "deep") == ["lock"]


def test_create_exclusive_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    assert storage.create_exclusive(str(tmp_path / "lock"), b"first")
    assert not storage.create_exclusive(str(tmp_path / "lock"), b"second")
    assert (tmp_path / "lock").read_bytes() == b"first"


def test_a_full_disk_is_told_at_once_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    calls: tuple[Callable[[str, bytes], object], ...] = (storage.write_atomic, storage.create_exclusive)
    for call in calls:
        with pytest.raises(StorageError, match=r"cannot write .*/a: No space left on device"):
            call(str(tmp_path / "a"), b"content")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", [storage.write_atomic, storage.create_exclusive])
def test_a_file_that_was_written_is_there_after_a_power_loss(
    call: Callable[[str, bytes], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, list[str]]] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        synced.append((path, sorted(os.listdir(path)) if os.path.isdir(path) else []))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    call(str(tmp_path / "new" / "a"), b"content")
    folders = [path for path, _ in synced]
    assert folders.index(str(tmp_path)) < folders.index(str(tmp_path / "new")), "the entry of the folder that was made"
    path, entries = synced[-1]
    assert path == str(tmp_path / "new")
    assert "a" in entries, "the folder is synced behind the rename"
    assert any(Path(path).parent == tmp_path / "new" for path, _ in synced[:-1]), "so is the content, before"


def test_leftovers_of_a_killed_writer_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = ["a.parquet", ".hidden", ".a.parquet.tmp", "a.parquet.0123abcd.tmp", ".a.parquet.0123ABCD.tmp"]
    for name in (*kept, ".a.parquet.0123abcd.tmp", ".b.json.ffffffff.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".c.0123abcd.tmp").touch()
    assert storage.remove_leftovers(str(tmp_path)) == 2
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "deep"])
    assert storage.remove_leftovers(str(tmp_path)) == 0
    assert storage.remove_leftovers(str(tmp_path / "none")) == 0
    assert (tmp_path / "deep" / ".c.0123abcd.tmp").exists()


def test_a_writer_that_is_killed_leaves_the_old_content_and_a_leftover(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_bytes(b"old")
    code = (
        "import os, signal; from vidshard.pipeline import storage; "
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL); "
        f"storage.write_atomic({str(target)!r}, b'new')"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert target.read_bytes() == b"old"
    assert storage.remove_leftovers(str(tmp_path)) == 1
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_fingerprint_is_the_same_from_a_listing_and_another_one_for_another_file(s3: str, folder: str) -> None:
    path = put(f"{folder}/a.bin", b"first")
    fs, inner = storage.filesystem(folder)
    [listed] = fs.ls(inner, detail=True)
    [found] = fs.find(inner, detail=True).values()
    first = storage.fingerprint(path)
    assert first == storage.fingerprint_of(listed) == storage.fingerprint_of(found) == storage.fingerprint(path)
    put(path, b"other")
    assert storage.fingerprint(path) != first
    assert storage.fingerprint(f"{folder}/none") is None


def test_a_fingerprint_of_a_local_file_is_of_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"first")
    first = storage.fingerprint(str(path))
    assert first == storage.fingerprint(f"file://{path}")
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000))
    second = storage.fingerprint(str(path))
    path.write_bytes(b"longer")
    assert len({first, second, storage.fingerprint(str(path))}) == 3


@pytest.fixture
def web(faulty_s3: FaultyS3, folder: str) -> str:
    """A file as a web server without passwords shows it, by a link with a secret in it."""
    put(f"{folder}/a.bin", CONTENT, ACL="public-read")
    return f"{faulty_s3.url}/{folder.removeprefix('s3://')}/a.bin?sig={SECRET}"


@pytest.mark.parametrize("name", ["read_bytes", "open_binary", "open_video", "exists"])
def test_trouble_of_a_web_server_is_got_over_or_told_without_the_secret(
    name: str, faulty_s3: FaultyS3, web: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = OPERATIONS[name]
    for kind in ("unavailable", "reset_before", "unavailable", "internal_error"):
        faulty_s3.misbehave(kind, path="storage")
    assert operation.call(web) == operation.result
    assert [bool(kind) for _, _, kind in faulty_s3.seen].count(True) == 4
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.2)
    for kind, shown in (("unavailable", "tried "), ("denied", "40")):
        faulty_s3.behave()
        faulty_s3.misbehave(kind, path="storage", times=math.inf)
        with pytest.raises(StorageError, match=shown) as caught:
            operation.call(web)
        assert SECRET not in str(caught.value)
    assert SECRET not in said_by_us(caplog)


def test_the_users_own_settings_of_the_client_win(faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"endpoint_url": faulty_s3.url, "config_kwargs": {"read_timeout": 7, "max_pool_connections": 3}}
    monkeypatch.setitem(fsspec.config.conf, "s3", own)
    fs, _ = storage.filesystem("s3://videos/a")
    fs.connect(refresh=True)
    config = fs.s3.meta.config
    assert (config.read_timeout, config.max_pool_connections) == (7, 3)
    assert config.connect_timeout <= 15
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": faulty_s3.url})
    fs, _ = storage.filesystem("s3://videos/a")
    fs.connect(refresh=True)
    assert fs.s3.meta.config.read_timeout <= 15


def test_an_error_that_is_none_of_the_storage_is_not_hidden(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    fs, _ = storage.filesystem("s3://videos/a")

    def broken(*_: object, **__: object) -> bytes:
        raise KeyError("a bug")

    monkeypatch.setattr(fs, "cat_file", broken)
    with pytest.raises(KeyError, match="a bug"):
        storage.read_bytes("s3://videos/a")


def test_an_open_video_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "v").write_bytes(b"abc")
    with storage.open_video(str(tmp_path / "v")) as file:
        assert isinstance(file, io.BufferedIOBase)
        assert file.read() == b"abc"


@pytest.mark.parametrize(
    ("module", "name", "base", "fields", "transient"),
    [
        ("gcsfs.retry", "HttpError", Exception, {"code": 503}, True),
        ("gcsfs.retry", "HttpError", Exception, {"code": 404}, False),
        ("gcsfs.retry", "ChecksumError", Exception, {}, True),
        ("azure.core.exceptions", "AzureError", Exception, {"status_code": 500}, True),
        ("azure.core.exceptions", "AzureError", Exception, {"status_code": 403}, False),
        ("azure.core.exceptions", "ServiceRequestError", Exception, {}, True),
        ("google.auth.exceptions", "TransportError", Exception, {}, True),
        ("paramiko.ssh_exception", "SSHException", Exception, {}, False),
        ("someone.unknown", "ReadTimeoutError", Exception, {}, True),
        ("someone.unknown", "ParseError", Exception, {}, None),
    ],
)
def test_errors_of_the_clients_of_other_stores(
    module: str,
    name: str,
    base: type[Exception],
    fields: dict[str, Any],
    transient: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = type(name, (base,), {"__module__": module, **fields})
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: kind}))  # the client is not installed here
    error = kind("trouble")
    assert storage.is_transient(error) is bool(transient)
    expected: type[Exception] = kind if transient is None else storage.StorageError
    with pytest.raises(expected) as caught, errors_named("read", "gs://bucket/key"):
        raise error
    assert isinstance(caught.value, storage.StorageOutageError) == bool(transient)


@pytest.mark.parametrize("later", [ConnectionResetError(), TimeoutError(), EOFError()], ids=repr)
def test_trouble_while_another_error_is_handled_is_not_judged_by_that_error(later: Exception) -> None:
    """As s3fs lists a folder when there is no such object, and the listing breaks off."""
    later.__context__ = FileNotFoundError("404")
    assert storage.is_transient(later)
    later.__cause__ = PermissionError("stated")
    assert not storage.is_transient(later)


def client_error(status: int, code: str) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (client_error(503, "SlowDown"), True),
        (client_error(500, "InternalError"), True),
        (client_error(400, "RequestTimeout"), True),
        (client_error(429, "TooManyRequests"), True),
        (client_error(403, "AccessDenied"), False),
        (client_error(404, "NoSuchBucket"), False),
        (EndpointConnectionError(endpoint_url="http://x"), True),
        (NoCredentialsError(), False),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(errno.EIO, "i/o"), True),
        (OSError(errno.ENOSPC, "full"), False),
        (OSError(errno.EDQUOT, "quota"), False),
        (FileNotFoundError(), False),
        (PermissionError(), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: BaseException, transient: bool) -> None:
    assert storage.is_transient(error) is transient
    tries = 0

    def fail() -> None:
        nonlocal tries
        tries += 1
        raise error

    with pytest.raises(type(error)):
        storage.with_retries("s3://x/y", fail, retry_seconds=0.5)
    assert (tries > 1) is transient
    tries = 0
    with pytest.raises(type(error)):
        storage.with_retries("/local", fail, retry_seconds=0.5)
    assert tries == 1


@pytest.mark.parametrize("where", ["local", "s3"])
def test_of_many_that_create_a_file_one_does(s3: str, tmp_path: Path, where: str) -> None:
    folder = str(tmp_path) if where == "local" else "s3://videos/race"
    for number in range(5):
        path = f"{folder}/{number}.json"
        made: list[int] = []
        barrier = threading.Barrier(6)

        def create(who: int, path: str = path, made: list[int] = made, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            if storage.create_exclusive(path, f"by {who}".encode()):
                made.append(who)

        threads = [threading.Thread(target=create, args=(who,)) for who in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1
        assert storage.read_bytes(path) == f"by {made[0]}".encode()


def test_a_full_disk_leaves_what_was_there_and_says_what_to_do(tmp_path: Path) -> None:
    script = f"""
mount -t tmpfs -o size=1m none {tmp_path} && cd {os.getcwd()} && exec {sys.executable} - <<'END'
import os
from vidshard.pipeline import storage
storage.write_atomic("{tmp_path}/first", b"x" * 600_000)
try:
    storage.write_atomic("{tmp_path}/second", b"x" * 600_000)
except storage.StorageError as error:
    print(error, sorted(os.listdir("{tmp_path}")), os.path.getsize("{tmp_path}/first"))
END
"""
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*namespace, f"mount -t tmpfs -o size=1m none {tmp_path}"], capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here")
    result = subprocess.run([*namespace, script], capture_output=True, text=True, timeout=60)
    assert "No space left on device: make space, then run the same command again ['first'] 600000" in result.stdout, (
        result.stderr
    )


def test_uris_of_local_files_are_read_as_they_are_written_everywhere(tmp_path: Path) -> None:
    for name in ("a b.mp4", "100%.mp4", "ü#?.mp4"):
        path = tmp_path / name
        path.touch()
        for uri in (path.as_uri(), f"file://{path}", path.as_uri().replace("file://", "file://localhost")):
            assert storage.absolute(uri) == str(path)
    (tmp_path / "a%20b.mp4").touch()
    assert storage.absolute(f"file://{tmp_path}/a%20b.mp4") == f"{tmp_path}/a%20b.mp4"
    assert storage.absolute(f"{tmp_path}/c%20d.mp4") == f"{tmp_path}/c%20d.mp4"  # no URI


@pytest.mark.parametrize("value", ["x", "-1", "nan", "inf", ""])
def test_a_retry_time_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="VIDSHARD_STORAGE_RETRY_SECONDS must be a number of seconds"):
        retry._retry_seconds(value)
    assert retry._retry_seconds("0.5") == 0.5


def test_retries_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 7))
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    tries = 0

    def fail() -> None:
        nonlocal tries
        tries += 1
        raise TimeoutError

    with pytest.raises(TimeoutError):
        storage.with_retries("s3://x/y", fail)
    assert 3 < tries < 30


@pytest.mark.parametrize("name", ["environ", "mem", "maps", "cmdline"])
def test_files_that_show_a_process_are_not_read(name: str) -> None:
    for path in (f"/proc/self/{name}", f"/proc/{os.getpid()}/{name}"):
        with pytest.raises(storage.StorageError, match="running process"):
            storage.open_binary(path)
        with pytest.raises(storage.StorageError, match="running process"):
            storage.open_video(path)
