"""Ranges of a file over a socket: a process without network and credentials reads what another one fetches.

The decoder's process has one end of a pair of sockets and sees a read-only, seekable file, `RangeFile`. The process at
the other end holds the credentials, runs no decoder, and answers with `serve_ranges`. Each side takes the other's words
for what they may be: the decoder may be in the hands of the video that it decodes.

    at first   server: size of the file (int64)
    then       client: number of ranges (uint32, 1 to 8), bytes of each (uint32, 1 to 4 MiB), an offset of each (int64)
               server: number of bytes that follow (int64); all of them, fewer only where a range passes the end
               server: or -1, the length of a text (uint32) and the text: the storage failed, and stays failed

Cost: 0.03 ms a request and 0.1 ms for each MiB.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO

from vidshard.pipeline.video.input_file import RangeReader, ReadOnlyFile, read_exactly

MAX_RANGES = 8
"""Largest number of ranges in one request."""
MAX_RANGE_BYTES = 4 << 20
"""Largest range."""

_FIRST_AHEAD, _MOST_AHEAD = 64 << 10, 1 << 20
"""Bytes asked for at once: after a jump, and at most where reading goes on in order (doubling from read to read)."""
_MAX_TEXT_BYTES = 4 << 10
_SIZE, _REQUEST, _LENGTH = struct.Struct("<q"), struct.Struct("<II"), struct.Struct("<I")
_FAILED = -1


class RangeFile(ReadOnlyFile):
    """Read-only file whose bytes come over a socket; the decoder's side."""

    def __init__(self, server: socket.socket) -> None:
        """Take over a connected socket, which is closed with the file.

        Raises:
            OSError: the server is gone.
        """
        super().__init__()
        self._server = server
        self.num_bytes: int = _SIZE.unpack(_received(server, _SIZE.size))[0]
        self._at = 0
        self._held, self._held_at = memoryview(b""), 0
        self._ahead = _FIRST_AHEAD

    def samples(self, offsets: Sequence[int], num_bytes: int) -> list[bytes]:
        """``num_bytes`` bytes from each offset, fewer at the end of the file; eight are fetched side by side.

        Raises:
            OSError: the storage failed, or the server is gone.
        """
        parts: list[bytes] = []
        for first in range(0, len(offsets), MAX_RANGES):
            some = offsets[first : first + MAX_RANGES]
            data = self._ask(some, num_bytes)
            at = 0
            for size in (_bytes_of(offset, num_bytes, self.num_bytes) for offset in some):
                parts.append(bytes(data[at : at + size]))
                at += size
        return parts

    def read(self, num_bytes: int | None = -1, /) -> bytes:
        """This many bytes, or all that are left; fewer only at the end of the file.

        Raises:
            OSError: the storage failed, or the server is gone.
        """
        left = max(0, self.num_bytes - self._at)
        wanted = left if num_bytes is None or num_bytes < 0 else min(num_bytes, left)
        parts = []
        while wanted > 0:
            inside = self._at - self._held_at
            if not 0 <= inside < len(self._held):
                self._fetch(wanted)
                inside = 0
            part = self._held[inside : inside + wanted]
            parts.append(part)
            self._at += len(part)
            wanted -= len(part)
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Close the socket, which ends the serving."""
        self._server.close()
        super().close()

    def _fetch(self, wanted: int) -> None:
        """Hold the bytes at the position, and some more."""
        in_order = self._at == self._held_at + len(self._held)
        self._ahead = min(2 * self._ahead, _MOST_AHEAD) if in_order and self._held else _FIRST_AHEAD
        self._held = memoryview(b"")
        self._held = memoryview(self._ask([self._at], min(max(wanted, self._ahead), MAX_RANGE_BYTES)))
        self._held_at = self._at

    def _ask(self, offsets: Sequence[int], num_bytes: int) -> bytearray:
        request = _REQUEST.pack(len(offsets), num_bytes) + struct.pack(f"<{len(offsets)}q", *offsets)
        try:
            self._server.sendall(request)
        except ConnectionError as error:
            raise OSError(_GONE) from error
        size = _SIZE.unpack(_received(self._server, _SIZE.size))[0]
        if size == _FAILED:
            length = _LENGTH.unpack(_received(self._server, _LENGTH.size))[0]
            raise OSError(_received(self._server, length).decode("utf-8", "replace"))
        return _received(self._server, size)


_GONE = "the process that fetches the file's bytes is gone"


def _received(connection: socket.socket, num_bytes: int) -> bytearray:
    """Exactly ``num_bytes`` bytes.

    Raises:
        OSError: the other side is gone.
    """
    data = bytearray(num_bytes)
    view = memoryview(data)
    while view:
        try:
            count = connection.recv_into(view)
        except ConnectionError as error:
            raise OSError(_GONE) from error
        if not count:
            raise OSError(_GONE)
        view = view[count:]
    return data


def _bytes_of(offset: int, num_bytes: int, size: int) -> int:
    """Number of bytes in a range of a file of ``size`` bytes."""
    return max(0, min(num_bytes, size - offset))


# The server's side.


class RefusedRequestError(Exception):
    """A request is one that no decoder makes; whoever sent it is to be ended."""


@dataclass(slots=True)
class Allowance:
    """Requests and bytes that a decoder may still ask for: far beyond what any video takes, and not without end."""

    num_requests: int
    num_bytes: int

    @classmethod
    def of(cls, size: int) -> Allowance:
        """The allowance for a file of ``size`` bytes: reading it some hundred times over, in small pieces."""
        return cls(num_requests=1_000_000 + size // 256, num_bytes=(1 << 30) + 256 * size)

    def take(self, num_bytes: int) -> None:
        """Take a request for this many bytes.

        Raises:
            RefusedRequestError: nothing is left.
        """
        self.num_requests -= 1
        self.num_bytes -= num_bytes
        if self.num_requests < 0 or self.num_bytes < 0:
            raise RefusedRequestError("more bytes or requests than any video takes")


@dataclass(slots=True)
class Served:
    """The state of serving one file."""

    allowance: Allowance
    error: BaseException | None = None
    """The storage's error, after which every request fails; None where there was none."""
    refused: str = ""
    """Reason for which the client was cut off; empty where it was not."""
    num_requests: int = field(default=0)
    num_bytes: int = field(default=0)


def serve_ranges(client: socket.socket, file: BinaryIO, size: int, served: Served) -> None:
    """Answer requests for ranges of a file until the client closes its socket, or asks for what no decoder asks.

    Args:
        client: a connected socket; it stays open.
        file: seekable and binary; after the first error of reading it every request fails.
        size: of the file, in bytes.
        served: gets what happened.
    """
    with suppress(OSError):  # the client is gone, or was cut off while it was being answered
        client.sendall(_SIZE.pack(size))
        while (request := _next_request(client, size, served)) is not None:
            offsets, num_bytes = request
            if served.error is None:
                try:
                    data = _read(file, offsets, num_bytes, size)
                except Exception as error:  # noqa: BLE001  the parent gets it
                    served.error = error
            if served.error is not None:
                text = str(served.error).encode("utf-8", "replace")[:_MAX_TEXT_BYTES]
                client.sendall(_SIZE.pack(_FAILED) + _LENGTH.pack(len(text)) + text)
                continue
            client.sendall(_SIZE.pack(len(data)))
            client.sendall(data)


def _next_request(client: socket.socket, size: int, served: Served) -> tuple[list[int], int] | None:
    """Offsets and length of the next request; None where there is none, or where it is refused."""
    try:
        count, num_bytes = _REQUEST.unpack(_received(client, _REQUEST.size))
        if not (1 <= count <= MAX_RANGES and 1 <= num_bytes <= MAX_RANGE_BYTES):
            raise RefusedRequestError(f"{count} ranges of {num_bytes} bytes")
        offsets = list(struct.unpack(f"<{count}q", _received(client, 8 * count)))
        if not all(0 <= offset <= size for offset in offsets):
            raise RefusedRequestError(f"a range at byte {min(offsets) if min(offsets) < 0 else max(offsets)}")
        wanted = sum(_bytes_of(offset, num_bytes, size) for offset in offsets)
        served.allowance.take(wanted)
    except RefusedRequestError as error:
        served.refused = str(error)
        return None
    except OSError:
        return None
    served.num_requests += 1
    served.num_bytes += wanted
    return offsets, num_bytes


def _read(file: BinaryIO, offsets: Sequence[int], num_bytes: int, size: int) -> bytes:
    if len(offsets) > 1 and isinstance(file, RangeReader):
        data = b"".join(file.samples(offsets, num_bytes))
    else:
        parts = []
        for offset in offsets:
            file.seek(offset)
            parts.append(read_exactly(file, _bytes_of(offset, num_bytes, size)))
        data = b"".join(parts)
    wanted = sum(_bytes_of(offset, num_bytes, size) for offset in offsets)
    if len(data) != wanted:
        raise OSError(f"{len(data)} of {wanted} bytes came")
    return data
