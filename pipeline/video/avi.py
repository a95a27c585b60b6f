"""Empty chunks at the end of an AVI: each repeats the picture before it, and FFmpeg's demuxer passes over them."""

from __future__ import annotations

from vidshard.pipeline.video.input_file import WatchedFile, read_exactly

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
