"""Remote videos in a confined decoder, which gets their bytes from another process and has neither network nor keys."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.faulty_s3 import FaultyS3
from tests.support.http_server import Answer, HttpServer, http_server
from tests.support.modules import loaded_modules
from tests.support.videos import Recipe, write_video
from vidshard.pipeline import decode_stage, storage
from vidshard.pipeline.decode_stage import SpanDecoder, probe
from vidshard.pipeline.remote_bytes import fetching_process, remote_file
from vidshard.pipeline.video.child import given_descriptors, given_file, missing_confinement
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.pipeline.video.sandbox import DecodeSandbox
from vidshard.schemas.errors import OutageError
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import ClipSpec, Limits, SpanClips, VideoProbe, VideoRef

SPEC = ClipSpec(fps=Fraction(4), num_frames=5, height=32, width=32)
LIMITS = Limits(memory_bytes=1 << 30)
PADDING = 18 << 20


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HttpServer, Path]]:
    """A web server on loopback, and the folder that it serves."""
    folder = tmp_path_factory.mktemp("site")
    write_video(folder / "small.mp4", Recipe(num_frames=100))
    data = write_video(folder / "large.mp4", Recipe(num_frames=100)).read_bytes()
    # the index first, then a box that players skip, then the pictures as they were
    padding = (PADDING + 8).to_bytes(4, "big") + b"free" + random.Random(0).randbytes(PADDING)
    (folder / "large.mp4").write_bytes(data + padding)

    def answer(path: str) -> Answer | None:
        file = folder / path.strip("/").partition("?")[0]
        return file.read_bytes() if file.is_file() else None

    with http_server(answer) as server:
        yield server, folder


def clips_of(uri: str, limits: Limits = LIMITS) -> list[SpanClips]:
    header = probe(VideoRef(uri=uri, num_bytes=-1), limits)
    if isinstance(header, VideoError):
        raise header
    assert header.uri == uri
    spans = plan_spans(header, SPEC, 2)
    decoder = SpanDecoder(spec=SPEC, max_clips=100, clips_per_pass=100, limits=limits)
    return decoder.decode_together(spans, [SPEC] * len(spans), storage.fingerprint(uri))


def assert_same(ours: list[SpanClips], theirs: list[SpanClips]) -> None:
    clips = [[clip for span in spans for clip in span.clips] for spans in (ours, theirs)]
    assert len(clips[0]) == len(clips[1]) > 2
    for one, other in zip(*clips, strict=True):
        assert (one.video_id, one.clip_index) == (other.video_id, other.clip_index)
        assert np.array_equal(one.frames, other.frames)
        assert np.array_equal(one.frame_pts_seconds, other.frame_pts_seconds)


@pytest.mark.parametrize("name", ["small.mp4", "large.mp4"])
@pytest.mark.parametrize("sandbox", ["auto", "off"])
def test_remote_frames_are_the_local_ones(site: tuple[HttpServer, Path], name: str, sandbox: str) -> None:
    server, folder = site
    limits = Limits(memory_bytes=1 << 30, sandbox=sandbox)  # type: ignore[arg-type]
    assert_same(clips_of(f"{server.url}/{name}", limits), clips_of(str(folder / name)))


def test_a_large_file_is_read_in_parts(site: tuple[HttpServer, Path]) -> None:
    server, _ = site
    server.asked.clear()
    with remote_file(f"{server.url}/large.mp4", LIMITS) as file:
        assert isinstance(file, socket.socket)
    with remote_file(f"{server.url}/small.mp4", LIMITS) as file:
        assert not isinstance(file, socket.socket)


# What a hostile decoder does with the descriptor it was given.


def lacks() -> list[str]:
    return missing_confinement()


def ask(request: bytes) -> int:
    """Send a request and count what comes."""
    [fd] = given_descriptors()
    with socket.socket(fileno=fd) as server:
        server.recv(8)
        server.sendall(request)
        count = 0
        with suppress(OSError):
            while part := server.recv(1 << 20):
                count += len(part)
        return count


def ask_and_never_read(request: bytes) -> None:
    [fd] = given_descriptors()
    with socket.socket(fileno=fd) as server, suppress(OSError):
        while True:
            server.send(request, socket.MSG_DONTWAIT)


def keep_the_socket() -> str:
    kept.append(os.dup(given_descriptors()[0]))
    return "kept"


kept: list[int] = []


class OpensMaps:
    """Opens the list of a process's memory where it is first unpickled, in a confined child before the confinement."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open_maps, ()


def open_maps() -> None:
    if os.getpid() not in maps:
        maps[os.getpid()] = os.open("/proc/self/maps", os.O_RDONLY)


maps: dict[int, int] = {}


def loaded(_: object) -> None:
    """Nothing: loads this module, and what comes with the request."""


def read_maps() -> list[str]:
    os.lseek(maps[os.getpid()], 0, os.SEEK_SET)
    data = b""
    while part := os.read(maps[os.getpid()], 1 << 16):
        data += part
    return data.decode().splitlines()


def secrets_in_memory(start: bytes, rest_bytes: int, rest_digest: str) -> int:
    """Count a secret in all memory of this process; it is not given whole, or it would be there."""
    count = 0
    for line in read_maps():
        addresses, rights, *_ = line.split()
        if rights[0] != "r" or "[v" in line:
            continue
        at, end = (int(address, 16) for address in addresses.split("-"))
        while at < end:
            data = ctypes.string_at(at, min(1 << 20, end - at))
            found = data.find(start)
            while found >= 0:
                rest = data[found + len(start) : found + len(start) + rest_bytes]
                count += hashlib.sha256(rest).hexdigest() == rest_digest
                found = data.find(start, found + 1)
            at += len(data)
    return count


def write_to_the_file() -> str:
    [fd] = given_descriptors()
    try:
        os.pwrite(fd, b"x", 0)
    except OSError as error:
        return type(error).__name__
    return "written"


def claim_an_outage() -> None:
    raise OutageError("the whole storage is down, says a video")


@pytest.fixture(scope="module")
def confined() -> Iterator[DecodeSandbox]:
    with DecodeSandbox(memory_limit_bytes=1 << 30, confined=True) as sandbox:
        if lacking := sandbox.run(lacks, timeout_seconds=60):
            pytest.skip(f"this kernel lacks {' and '.join(lacking)}")
        yield sandbox


HOSTILE = {
    "a negative offset": b"\1\0\0\0\x0a\0\0\0" + b"\xff" * 8,
    "a huge range": b"\1\0\0\0" + b"\xff" * 4 + b"\0" * 8,
    "too many ranges": b"\xff\0\0\0\x0a\0\0\0" + b"\0" * 2040,
    "garbage": b"GET /other HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_of_a_decoder_is_a_rejection(
    site: tuple[HttpServer, Path], confined: DecodeSandbox, name: str
) -> None:
    server, _ = site
    pid = fetching_process(LIMITS.memory_bytes).pid
    with (
        pytest.raises(VideoError, match="asked for what no decoder asks") as caught,
        remote_file(f"{server.url}/large.mp4", LIMITS) as file,
    ):
        assert confined.run(ask, HOSTILE[name], timeout_seconds=60, files=(file,)) == 0
    assert caught.value.reason is Reason.DECODER_CRASHED
    with remote_file(f"{server.url}/large.mp4", LIMITS) as file:
        assert confined.run(size_of_given, timeout_seconds=60, files=(file,)) > PADDING
    assert fetching_process(LIMITS.memory_bytes).pid == pid is not None


def size_of_given() -> int:
    return given_file().seek(0, os.SEEK_END)


def test_a_decoder_that_never_reads_its_socket_holds_nobody(
    site: tuple[HttpServer, Path], confined: DecodeSandbox
) -> None:
    server, _ = site
    request = b"\1\0\0\0\0\0\x10\0" + b"\0" * 8
    for function, args in ((ask_and_never_read, (request,)), (keep_the_socket, ())):
        with remote_file(f"{server.url}/large.mp4", LIMITS) as file:
            confined.run(function, *args, timeout_seconds=60, files=(file,))
    with remote_file(f"{server.url}/large.mp4", LIMITS) as file:
        assert confined.run(size_of_given, timeout_seconds=60, files=(file,)) > PADDING


def test_a_decoder_of_remote_files_holds_no_secrets(
    site: tuple[HttpServer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = site
    secret = b"a-secret-" + os.urandom(12).hex().encode()  # the child has this module's constants
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.setenv(name, secret.decode())
    decode_stage.forget_processes()  # a decoder of before could not know them
    uri = f"{server.url}/large.mp4?signature={secret.decode()}"
    decoder = decode_stage._sandbox(LIMITS.memory_bytes, True, LIMITS.videos_per_decoder)
    monkeypatch.setattr("vidshard.pipeline.video.sandbox.RENEWAL_SECONDS", math.inf)
    for process in (decoder, fetching_process(LIMITS.memory_bytes)):
        process.run(loaded, OpensMaps(), timeout_seconds=60)
    assert clips_of(uri)[0].clips
    whole = (secret[:9], len(secret) - 9, hashlib.sha256(secret[9:]).hexdigest())
    assert decoder.run(secrets_in_memory, *whole, timeout_seconds=60) == 0
    assert fetching_process(LIMITS.memory_bytes).run(secrets_in_memory, *whole, timeout_seconds=60) > 0, (
        "the search finds it"
    )


def test_a_decoder_cannot_change_the_bytes_it_is_given(site: tuple[HttpServer, Path], confined: DecodeSandbox) -> None:
    server, _ = site
    with remote_file(f"{server.url}/small.mp4", LIMITS) as file:
        assert confined.run(write_to_the_file, timeout_seconds=60, files=(file,)) == "PermissionError"


def test_no_decoder_can_claim_an_outage(confined: DecodeSandbox) -> None:
    with pytest.raises(VideoError, match="an outage, of which a decoder knows nothing"):
        confined.run(claim_an_outage, timeout_seconds=60)


def test_the_process_that_fetches_has_no_decoder(site: tuple[HttpServer, Path]) -> None:
    server, _ = site
    with remote_file(f"{server.url}/small.mp4", LIMITS):
        modules = fetching_process(LIMITS.memory_bytes).run(loaded_modules, timeout_seconds=60)
    assert "aiohttp" in modules
    assert not {"av", "torch", "ray", "PIL"} & set(modules)


def variable(name: str) -> str:
    return os.environ.get(name, "")


def test_credentials_set_after_a_remote_file_was_read_hold_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen() -> tuple[str, int | None]:
        process = fetching_process(LIMITS.memory_bytes)
        return process.run(variable, "AWS_PROFILE", timeout_seconds=60), process.pid

    monkeypatch.setenv("AWS_PROFILE", "first")
    first, kept = seen(), seen()
    assert first == kept, "one process as long as nothing changes"
    monkeypatch.setenv("AWS_PROFILE", "second")
    assert (first[0], seen()[0]) == ("first", "second")


# Failures of the storage.


def test_an_outage_in_the_middle_is_an_outage_and_no_ones_fault(
    faulty_s3: FaultyS3, site: tuple[HttpServer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    _, folder = site
    boto3.client("s3").upload_file(str(folder / "large.mp4"), "videos", "remote/large.mp4")
    monkeypatch.setenv("VIDSHARD_STORAGE_RETRY_SECONDS", "0.3")
    uri = "s3://videos/remote/large.mp4"
    faulty_s3.misbehave("unavailable", method="GET", path="large", times=math.inf, skip=3)
    with pytest.raises(OutageError, match=r"cannot read s3://videos/remote/large\.mp4"):
        clips_of(uri)
    faulty_s3.behave()
    assert isinstance(probe(VideoRef(uri=uri, num_bytes=-1), LIMITS), VideoProbe)
