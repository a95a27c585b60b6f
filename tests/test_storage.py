"""Storage that fails for a while, or for good: an operation ends with the right content, or an error that says so."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from pipeline import storage
from tests.faulty_s3 import FAULTS, FaultyS3, faulty_s3_server


@pytest.fixture(scope="module")
def proxy(s3: str) -> Iterator[tuple[str, FaultyS3]]:
    with faulty_s3_server(s3) as server:
        yield server


@pytest.fixture
def faulty(proxy: tuple[str, FaultyS3], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """All S3 of this process goes through the proxy, where s3fs gives a request up after a second, and repeats none."""
    import fsspec.config
    from s3fs import S3FileSystem

    url, control = proxy
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    options = {"config_kwargs": {"read_timeout": 1, "retries": {"max_attempts": 1}}, "skip_instance_cache": False}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    S3FileSystem.clear_instance_cache()
    control.misbehave(0)
    yield control
    control.misbehave(0)
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("fault", FAULTS)
def test_every_operation_gets_through_a_fault(faulty: FaultyS3, fault: str) -> None:
    content = os.urandom(1 << 16)
    folder = f"s3://videos/faults/{fault}"
    faulty.misbehave(0.3 if fault == "hang" else 0.6, fault, seed=3)
    for number in range(2):
        storage.write_atomic(f"{folder}/{number}.bin", content)
    assert storage.read_bytes(f"{folder}/0.bin") == content
    assert [p.rsplit("/", 1)[-1] for p in storage.list_files(folder, ".bin")] == ["0.bin", "1.bin"]
    assert storage.exists(f"{folder}/1.bin")
    with storage.open_video(f"{folder}/1.bin") as file:
        assert file.read() == content
    assert storage.fingerprint(f"{folder}/1.bin") is not None
    assert storage.create_exclusive(f"{folder}/only", b"mine, whatever became of the answer")
    assert not storage.create_exclusive(f"{folder}/only", b"another's")
    storage.remove(f"{folder}/0.bin")
    assert not storage.exists(f"{folder}/0.bin")
    assert faulty.counts[fault] > 0


def test_a_large_video_is_read_whole_over_a_connection_that_breaks(
    faulty: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(12 << 20)
    storage.write_atomic("s3://videos/faults/large.bin", content)
    monkeypatch.setattr(storage, "WHOLE_BYTES", 1 << 20)
    faulty.misbehave(0.4, "reset", "half_answer", "slow_down", seed=5)
    with storage.open_video("s3://videos/faults/large.bin") as file:
        assert isinstance(file, storage.RemoteVideo)
        assert file.samples([0, 5 << 20], 100) == [content[:100], content[5 << 20 : (5 << 20) + 100]]
        parts = []
        while part := file.read(1 << 20):
            parts.append(part)
    assert b"".join(parts) == content
    assert sum(faulty.counts[name] for name in ("reset", "half_answer", "slow_down"))


def test_parts_of_an_upload_that_fail_leave_nothing_that_can_be_seen(faulty: FaultyS3) -> None:
    fs, inner = storage.filesystem("s3://videos/faults/parts.bin")
    content = os.urandom(12 << 20)
    faulty.misbehave(0.5, "slow_down", "reset", seed=1, path_part="partNumber")
    storage.with_retries("s3://x", lambda: fs.pipe_file(inner, content, chunksize=5 << 20))
    assert storage.read_bytes("s3://videos/faults/parts.bin") == content
    faulty.misbehave(1.0, "error", path_part="partNumber")
    with pytest.raises(OSError, match="made for a test"):
        storage.with_retries("s3://x", lambda: fs.pipe_file(inner + "2", content, chunksize=5 << 20), retry_seconds=1)
    assert not storage.exists("s3://videos/faults/parts.bin2")


def test_faults_that_do_not_end_are_an_error_that_says_how_often_it_was_tried(
    faulty: FaultyS3, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage, "RETRY_SECONDS", 3.0)
    faulty.misbehave(1.0, "slow_down")
    with pytest.raises(storage.StorageError) as caught:
        storage.write_atomic("s3://videos/faults/never.bin", b"content")
    assert str(caught.value).startswith("cannot write s3://videos/faults/never.bin: ")
    assert "tried" in str(caught.value)
    assert "again in" in caplog.text
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in caplog.text + str(caught.value)
    faulty.misbehave(0)
    assert not storage.exists("s3://videos/faults/never.bin")


@pytest.mark.parametrize("path", ["s3://no-such-bucket/x", "s3://videos/no-such-file"])
def test_what_is_not_there_is_not_asked_for_again(faulty: FaultyS3, path: str) -> None:
    with pytest.raises(storage.StorageError, match=r"no such file or bucket$"):
        storage.read_bytes(path)
    assert faulty.counts["requests"] < 10


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


def test_a_file_is_known_again_until_it_is_replaced(s3: str, tmp_path: Path) -> None:
    for path in (str(tmp_path / "v.mp4"), "s3://videos/known/v.mp4"):
        storage.write_atomic(path, b"one")
        before = storage.fingerprint(path)
        assert before is not None
        assert storage.fingerprint(path) == before
        storage.write_atomic(path, b"two")
        assert storage.fingerprint(path) not in (None, before)
    fs, inner = storage.filesystem("s3://videos/known")
    [info] = fs.find(inner, detail=True).values()
    assert storage.fingerprint_of(info) == storage.fingerprint("s3://videos/known/v.mp4")
    assert storage.fingerprint(str(tmp_path / "nothing")) is None


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.parquet.0123abcd.tmp", "a.parquet", ".hidden", "b.tmp"):
        (tmp_path / name).write_bytes(b"x")
    assert storage.remove_leftovers(str(tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a.parquet", "b.tmp"]
    assert storage.remove_leftovers(str(tmp_path / "none")) == 0


def test_a_full_disk_leaves_what_was_there_and_says_what_to_do(tmp_path: Path) -> None:
    script = f"""
mount -t tmpfs -o size=1m none {tmp_path} && cd {os.getcwd()} && exec {sys.executable} - <<'END'
import os
from pipeline import storage
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
