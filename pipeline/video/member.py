"""A member of an archive as a file of its own: a window of the archive, or a bounded part of it in memory.

Locations name members (``schemas.locations``): ``bytes=OFFSET:LENGTH`` is a file in a tar,
``zip=OFFSET:LENGTH:METHOD:SIZE`` one in a zip, from its local header on, and ``row=N&column=NAME`` a value in a Parquet
file. These functions run in the decoding process, which has the archive open, so that an archive is trusted no more
than a video. Nothing is unpacked to disk.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from vidshard.pipeline.video.input_file import RangeReader, ReadOnlyFile, read_exactly
from vidshard.schemas.errors import one_line
from vidshard.schemas.rejections import Reason, VideoError

MAX_HELD_BYTES = 1 << 30
"""Largest member that has to be held in memory: a compressed one, or a value of a Parquet file."""

STORED, DEFLATED = 0, 8
"""Methods of compression in a zip (4.4.5 of APPNOTE.TXT)."""

_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_CHECKSUM_FOLLOWS = 1 << 3
"""Flag of a zip's member: its checksum stands behind its bytes."""
_MOST_CHECKED_BYTES = 64 << 20
"""Largest stored member whose checksum is compared, in a local archive; that reads all of it at each opening."""
_MOST_FOOTER_BYTES = 256 << 20
_INFLATED_AT_ONCE = 1 << 20


class Window(ReadOnlyFile):
    """Read-only file of some bytes of another one, which stays open."""

    def __init__(self, file: BinaryIO, start: int, num_bytes: int) -> None:
        """A window of ``num_bytes`` bytes from offset ``start``.

        Raises:
            VideoError: TRUNCATED: the file ends before the window does.
        """
        super().__init__()
        if start + num_bytes > file.seek(0, os.SEEK_END):
            raise VideoError(Reason.TRUNCATED, "the archive ends inside this member")
        self._file, self._start, self.num_bytes, self._at = file, start, num_bytes, 0

    def samples(self, offsets: Sequence[int], num_bytes: int) -> list[bytes]:
        """``num_bytes`` bytes from each offset, fewer at the end of the window."""
        if isinstance(self._file, RangeReader) and all(offset + num_bytes <= self.num_bytes for offset in offsets):
            return self._file.samples([self._start + offset for offset in offsets], num_bytes)
        parts = []
        for offset in offsets:
            self.seek(offset)
            parts.append(read_exactly(cast(BinaryIO, self), num_bytes))
        return parts

    def read(self, num_bytes: int | None = -1, /) -> bytes:
        """At most this many bytes."""
        left = max(0, self.num_bytes - self._at)
        wanted = left if num_bytes is None or num_bytes < 0 else min(num_bytes, left)
        self._file.seek(self._start + self._at)
        data = self._file.read(wanted)
        self._at += len(data)
        return data

    def fileno(self) -> int:
        """Descriptor of the archive, by which it is known to be unchanged.

        Raises:
            OSError: it has none.
        """
        return self._file.fileno()


def open_member(file: BinaryIO, options: Mapping[str, str]) -> BinaryIO:
    """Open a member of an archive.

    Args:
        file: the archive, seekable; it stays open.
        options: which member.

    Raises:
        VideoError: UNREADABLE: the options have another form. TRUNCATED or DECODE_ERROR: the archive is not what they
            say. OVER_LIMIT: the member is too large to be held in memory. UNSUPPORTED: it is compressed otherwise.
    """
    try:
        if "bytes" in options:
            start, num_bytes = _numbers(options["bytes"], 2)
            return cast(BinaryIO, Window(file, start, num_bytes))
        if "zip" in options:
            return _of_zip(file, *_numbers(options["zip"], 4))
        [row] = _numbers(options["row"], 1)
        return _of_parquet(file, row, options["column"])
    except (KeyError, ValueError) as error:
        raise VideoError(Reason.UNREADABLE, f"its place in the archive is not understood: {one_line(error)}") from error


def _numbers(text: str, count: int) -> list[int]:
    parts = text.split(":")
    if len(parts) != count or not all(part.isascii() and part.isdigit() and len(part) < 19 for part in parts):
        raise ValueError(f"{text!r:.80}")
    return [int(part) for part in parts]


def _of_zip(file: BinaryIO, at: int, num_bytes: int, method: int, size: int) -> BinaryIO:
    file.seek(at)
    header = read_exactly(file, _LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\3\4":
        raise VideoError(Reason.DECODE_ERROR, "the zip archive has no member where its index says")
    name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)[-2:]
    window = Window(file, at + _LOCAL_HEADER.size + name_bytes + extra_bytes, num_bytes)
    checksum = _checksum(file, header, at + _LOCAL_HEADER.size + name_bytes + extra_bytes + num_bytes)
    if method == STORED:
        if size != num_bytes:
            raise VideoError(Reason.DECODE_ERROR, f"stored in {num_bytes:,} bytes, not the {size:,} of the index")
        if size <= _MOST_CHECKED_BYTES and not isinstance(file, RangeReader):
            _refuse_other_content(window.read(), checksum)
            window.seek(0)
        return cast(BinaryIO, window)
    if method != DEFLATED:
        raise VideoError(
            Reason.UNSUPPORTED, f"compressed by zip's method {method}; pack the archive with deflate, or stored"
        )
    if size > MAX_HELD_BYTES:
        raise VideoError(
            Reason.OVER_LIMIT,
            f"compressed, and {size:,} bytes large: more than {MAX_HELD_BYTES:,} must be stored in a zip",
        )
    inflater, content = zlib.decompressobj(-zlib.MAX_WBITS), bytearray()
    try:
        while not inflater.eof and len(content) <= size:
            data = inflater.unconsumed_tail or window.read(_INFLATED_AT_ONCE)
            if not data:
                break
            content += inflater.decompress(data, min(_INFLATED_AT_ONCE, size + 1 - len(content)))
    except zlib.error as error:
        raise VideoError(Reason.DECODE_ERROR, f"its compressed bytes are damaged: {one_line(error)}") from error
    if len(content) != size or not inflater.eof:
        raise VideoError(Reason.DECODE_ERROR, f"it unpacks to other than the {size:,} bytes that the index says")
    _refuse_other_content(content, checksum)
    return io.BytesIO(content)


def _checksum(file: BinaryIO, header: bytes, end: int) -> int | None:
    """CRC-32 of a member's content: from its header or, where a zip was written as a stream, from behind its bytes.

    Sections 4.3.7 and 4.3.9 of APPNOTE.TXT. None where the archive ends before it.
    """
    fields = _LOCAL_HEADER.unpack(header)
    if not fields[2] & _CHECKSUM_FOLLOWS:
        return int(fields[6])
    file.seek(end)
    data = read_exactly(file, 8)
    data = data[4:] if data[:4] == b"PK\7\10" else data[:4]
    return int.from_bytes(data, "little") if len(data) == 4 else None


def _refuse_other_content(content: bytes | bytearray, checksum: int | None) -> None:
    if checksum is not None and zlib.crc32(content) != checksum:
        raise VideoError(Reason.DECODE_ERROR, "its bytes are not those that were packed: their checksum is another")


def _of_parquet(file: BinaryIO, row: int, column: str) -> BinaryIO:
    """The bytes of a value: of a column of bytes, or of the field ``bytes`` of a column of structures."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 8))
    if int.from_bytes(file.read(8)[:4], "little") > min(_MOST_FOOTER_BYTES, end):
        raise VideoError(Reason.OVER_LIMIT, "the Parquet file has a footer that is too large")
    file.seek(0)
    try:
        # in small pieces, as a row group may hold gigabytes of videos
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        first = 0
        for group in range(parquet.metadata.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            if row < first + count:
                kind = parquet.schema_arrow.field(column).type
                names = [f"{column}.bytes"] if pa.types.is_struct(kind) else [column]
                batches = parquet.iter_batches(1, row_groups=[group], columns=names, use_threads=False)
                for _ in range(row - first):
                    next(batches)
                value = next(batches).column(0)[0].as_py()
                value = value.get("bytes") if isinstance(value, dict) else value
                if not isinstance(value, bytes):
                    raise VideoError(Reason.EMPTY_FILE, f"row {row} of the Parquet file has no bytes in '{column}'")
                if len(value) > MAX_HELD_BYTES:
                    raise VideoError(Reason.OVER_LIMIT, f"a value of {len(value):,} bytes")
                return io.BytesIO(value)
            first += count
    except (VideoError, OSError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes Arrow raise whatever its bytes lead to
        raise VideoError(Reason.DECODE_ERROR, f"the Parquet file cannot be read: {one_line(error, 200)}") from error
    raise VideoError(Reason.TRUNCATED, f"the Parquet file has {first} rows, and row {row} is asked for")
