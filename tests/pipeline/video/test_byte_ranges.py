"""Ranges of a file over a socket: the file is what it is locally, and a hostile client gets nothing but its bytes."""

from __future__ import annotations

import io
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import pytest

from vidshard.pipeline.video.byte_ranges import MAX_RANGE_BYTES, Allowance, RangeFile, Served, serve_ranges

CONTENT = random.Random(0).randbytes(3 << 20)


class File(io.BytesIO):
    """A file whose storage may fail, and that remembers what it was asked."""

    fails: Exception | None = None
    reads = 0

    def read(self, num_bytes: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.fails is not None:
            raise self.fails
        return super().read(num_bytes)


class SideBySide(File):
    """A file that reads ranges side by side."""

    def samples(self, offsets: Sequence[int], num_bytes: int) -> list[bytes]:
        return [self.getvalue()[offset : offset + num_bytes] for offset in offsets]


@contextmanager
def served(file: io.BytesIO, allowance: Allowance | None = None) -> Iterator[tuple[socket.socket, Served]]:
    """The client's socket, and what the server notes of it."""
    ours, theirs = socket.socketpair()
    state = Served(allowance or Allowance.of(len(CONTENT)))

    def serve() -> None:
        with theirs:
            serve_ranges(theirs, file, len(CONTENT), state)

    thread = threading.Thread(target=serve)
    thread.start()
    with ours:
        yield ours, state
        ours.close()
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_a_file_over_a_socket_is_the_file() -> None:
    random_ = random.Random(1)
    local = io.BytesIO(CONTENT)
    with served(File(CONTENT)) as (client, _), RangeFile(client) as file:
        assert file.num_bytes == len(CONTENT)
        for _ in range(300):
            whence = random_.choice([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END])
            offset = random_.randrange(len(CONTENT) + 10) * random_.choice([1, -1])
            outcomes = []
            for each in (local, file):
                before = each.tell()
                try:
                    outcomes.append(each.seek(offset, whence))
                except ValueError:
                    outcomes.append(-1)
                if each.tell() < 0 or outcomes[-1] < 0:
                    each.seek(before)
            if whence == os.SEEK_SET:  # a BytesIO takes a negative position for the start otherwise
                assert outcomes[0] == outcomes[1]
            local.seek(file.tell())
            size = random_.choice([0, 1, 100, 65536, 2_000_000, -1 if random_.random() < 0.1 else 7])
            assert local.read(size) == file.read(size)
            assert local.tell() == file.tell()


def test_reading_in_order_takes_few_requests_and_a_jump_few_bytes() -> None:
    with served(File(CONTENT)) as (client, state), RangeFile(client) as file:
        assert b"".join(iter(lambda: file.read(1000), b"")) == CONTENT
        assert state.num_requests < 10
        before = state.num_bytes
        for at in range(5):
            file.seek(at * 500_000 + 7)
            file.read(10)
        assert state.num_bytes - before < 5 * 100_000


@pytest.mark.parametrize("kind", [File, SideBySide])
def test_samples_are_the_files_and_shorter_at_its_end(kind: type[File]) -> None:
    offsets = [0, 17, 1 << 20, len(CONTENT) - 5, len(CONTENT)] * 3
    with served(kind(CONTENT)) as (client, _), RangeFile(client) as file:
        assert file.samples(offsets, 1000) == [CONTENT[at : at + 1000] for at in offsets]


def test_an_error_of_the_storage_is_told_and_stays() -> None:
    content = File(CONTENT)
    with served(content) as (client, state), RangeFile(client) as file:
        content.fails = OSError("cannot read s3://videos/a.mp4: é")
        for _ in range(3):
            with pytest.raises(OSError, match=r"cannot read s3://videos/a\.mp4: é"):
                file.read(10)
        assert state.error is content.fails
        assert content.reads == 1


def test_bytes_that_are_missing_are_an_error_and_not_the_end() -> None:
    short = File(CONTENT[:100])
    with served(short) as (client, _), RangeFile(client) as file, pytest.raises(OSError, match="100 of 65536 bytes"):
        file.read(1000)


def test_a_server_that_is_gone_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(struct.pack("<q", 1000))
    file = RangeFile(ours)
    theirs.close()
    with pytest.raises(OSError, match="is gone"):
        file.read(10)
    file.close()


def all_of(client: socket.socket) -> bytes:
    """Bytes that come until the server closes, perhaps with bytes of ours unread."""
    data = b""
    with suppress(ConnectionResetError):
        while part := client.recv(1 << 20):
            data += part
    return data


def request(count: int, num_bytes: int, *offsets: int) -> bytes:
    return struct.pack("<II", count, num_bytes) + struct.pack(f"<{len(offsets)}q", *offsets)


HOSTILE = {
    "a range before the start": request(1, 10, -1),
    "a range far before the start": request(1, 10, -(2**63)),
    "a range after the end": request(1, 10, len(CONTENT) + 1),
    "a range far after the end": request(1, 10, 2**63 - 1),
    "a huge range": request(1, 2**32 - 1, 0),
    "a range beyond the limit": request(1, MAX_RANGE_BYTES + 1, 0),
    "an empty range": request(1, 0, 0),
    "no ranges": request(0, 10),
    "too many ranges": request(9, 10, *range(9)),
    "ranges without end": request(2**32 - 1, 10),
    "one bad range of many": request(3, 10, 0, -5, 10),
    "garbage": b"\xff" * 1000,
    "text": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_request_that_no_decoder_makes_cuts_the_client_off(name: str) -> None:
    content = File(CONTENT)
    with served(content) as (client, state):
        client.recv(8)
        client.sendall(HOSTILE[name])
        client.shutdown(socket.SHUT_WR)
        assert all_of(client) == b""
    assert state.refused
    assert content.reads == 0


def test_random_requests_get_bytes_of_the_file_or_nothing() -> None:
    random_ = random.Random(2)
    answered = refused = 0
    for _ in range(300):
        count, num_bytes = random_.choice([(1, 100), (2, 5000), (random_.randrange(12), random_.randrange(1 << 23))])
        offsets = [random_.choice([random_.randrange(len(CONTENT)), random_.getrandbits(63)]) for _ in range(count)]
        with served(File(CONTENT)) as (client, state):
            client.recv(8)
            client.sendall(request(count, num_bytes, *offsets))
            client.shutdown(socket.SHUT_WR)
            data = all_of(client)
        if state.refused:
            refused += 1
            assert data == b""
        else:
            answered += 1
            assert data[8:] == b"".join(CONTENT[at : at + num_bytes] for at in offsets)
    assert min(answered, refused) > 20


@pytest.mark.parametrize("allowance", [Allowance(5, 1 << 30), Allowance(1000, 50)])
def test_requests_without_end_come_to_one(allowance: Allowance) -> None:
    with served(File(CONTENT), allowance) as (client, state), RangeFile(client) as file:
        with pytest.raises(OSError, match="is gone"):  # noqa: PT012
            for at in range(0, 1 << 20, 1 << 17):
                file.samples([at], 10)
        assert "more bytes or requests than any video takes" in state.refused


def test_a_client_that_never_reads_holds_nobody_once_it_ends() -> None:
    with served(File(CONTENT)) as (client, _):
        for _ in range(5):
            client.sendall(request(1, 1 << 20, 0))
