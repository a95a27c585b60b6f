"""Chunks of an AVI that FFmpeg passes over without a word: lost ones, empty ones at the end, a second recording's."""

from __future__ import annotations

from bisect import bisect_left

from av.packet import Packet
from av.video.stream import VideoStream

from vidshard.pipeline.video.input_file import WatchedFile, position_kept, read_exactly

_CHUNK_HEADER = 8
"""Bytes before a chunk's content: its name and its size."""


class ChunkOrder:
    """Compares the packets of a stream with the index, which lists all chunks.

    Where a chunk's header is damaged, the demuxer goes on at the next one it finds, and counts time from there: the
    pictures after it come too early. Nothing is said without an index, or where packets are not in it.
    """

    def __init__(self, watched: WatchedFile, stream: VideoStream) -> None:
        """Look at nothing yet."""
        self._watched = watched
        self._entries = stream.index_entries
        self._next: int | None = None  # entry of the next packet; None where it has to be looked for

    def lacks_chunk_before(self, packet: Packet[VideoStream], *, is_start: bool) -> bool:
        """Whether a chunk with content lies between a packet and the one asked about before.

        Args:
            packet: a packet of at least one byte.
            is_start: whether it is the first one of the file that the demuxer gave.
        """
        if packet.pos is None:
            self._next = None
            return False
        offset = packet.pos - _CHUNK_HEADER
        at = 0 if is_start else self._next
        if is_start and self._is_second(packet.size):
            return True
        lacks = False
        while at is not None and at < len(self._entries) and self._entries[at].pos < offset:
            lacks = lacks or (self._entries[at].size > 0 and not self._is_palette(self._entries[at].pos))
            at += 1
        if at is None or at >= len(self._entries) or self._entries[at].pos != offset:
            at = self._find(offset)
            lacks = lacks and at is not None
        self._next = None if at is None else at + 1
        return lacks

    def _is_second(self, num_bytes: int) -> bool:
        """Whether the first packet is the second chunk: FFmpeg moves the offsets of the index to fit it."""
        sizes = [entry.size for entry, _ in zip(self._entries, range(2), strict=False)]
        return len(sizes) == 2 and sizes[0] != num_bytes and sizes[1] == num_bytes

    def _find(self, offset: int) -> int | None:
        at = bisect_left(self._entries, offset, key=lambda entry: entry.pos)
        return at if at < len(self._entries) and self._entries[at].pos == offset else None

    def _is_palette(self, offset: int) -> bool:
        with position_kept(self._watched):
            self._watched.seek(offset)
            return read_exactly(self._watched, 4)[2:] == b"pc"


_MAX_CHUNKS = 1_000_000
"""Chunks that are looked at; the end of a file has few."""


def empty_chunks_after(watched: WatchedFile, stream_index: int, offset: int) -> int:
    """Number of empty chunks of a stream behind an offset, which is the end of its last chunk with content.

    Args:
        watched: the file; its position stays.
        stream_index: number of the stream in the file.
        offset: in bytes.
    """
    position = watched.tell()
    own = b"%02d" % stream_index
    count = 0
    for _ in range(_MAX_CHUNKS):
        offset += offset % 2
        watched.seek(offset)
        header = read_exactly(watched, 12)
        kind, num_bytes = header[:4], int.from_bytes(header[4:8], "little")
        if len(header) < 8 or not kind.isascii():
            break
        if (kind, header[8:12]) in ((b"RIFF", b"AVIX"), (b"LIST", b"movi"), (b"LIST", b"rec ")):
            offset += 12
            continue
        if kind[:2] == own and kind[2:] in (b"db", b"dc"):
            if num_bytes:
                break
            count += 1
        offset += 8 + num_bytes
    watched.seek(position)
    return count


_MAX_RIFFS = 10_000
_MAX_HEADER_BYTES = 1 << 16


def second_recording(watched: WatchedFile) -> int | None:
    """Offset of a second file header whose streams are not those of the first one; None for none.

    FFmpeg goes on with the chunks behind it by the first header. The position is lost.
    """
    at = 0
    streams: list[bytes] | None = None
    for _ in range(_MAX_RIFFS):
        watched.seek(at)
        head = read_exactly(watched, 12)
        num_bytes = int.from_bytes(head[4:8], "little")
        if len(head) < 12 or not head[:4].isascii() or not num_bytes:
            break
        if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
            found = _stream_headers(read_exactly(watched, _MAX_HEADER_BYTES))
            if streams is not None and found != streams:
                return at
            streams = found
        at += 8 + num_bytes + num_bytes % 2
    return None


def sizes_lead_to_end(watched: WatchedFile) -> bool:
    """Whether the sizes of the RIFF chunks lead to the end of the file; the position is lost."""
    at = 0
    for _ in range(_MAX_RIFFS):
        watched.seek(at)
        head = read_exactly(watched, 8)
        num_bytes = int.from_bytes(head[4:8], "little")
        if len(head) < 8 or head[:4] != b"RIFF":
            break
        at += 8 + num_bytes + num_bytes % 2
    return at - watched.num_bytes in (0, 1)


def _stream_headers(data: bytes) -> list[bytes]:
    """Codecs, rates and formats of the streams by the content of an AVI, up to where it is cut off."""
    found = []
    at = 12 if data[:4] == b"LIST" and data[8:12] == b"hdrl" else len(data)
    end = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while at + 8 <= end:
        kind, num_bytes = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        content = data[at + 8 : at + 8 + num_bytes]
        if kind == b"strh":
            found.append(content[:8] + content[20:28] + content[44:48])
        elif kind == b"strf":
            found.append(content)
        # a list's content are chunks, too
        at += 12 if kind == b"LIST" else 8 + num_bytes + num_bytes % 2
    return found
