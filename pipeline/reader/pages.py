"""Payload values from the pages of a column chunk, in the encodings that vidshard writes.

Arrow's reader decodes two levels for each value of a list. A payload column has neither nulls nor lists of different
lengths, so here the levels are compared once with what they must be. Decoding takes a third of Arrow's time, checksums
included (docs/performance.md). Everything else, from other encodings to damage, is left to Arrow.
"""

from __future__ import annotations

import threading
import zlib
from collections import deque
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vidshard.pipeline.output.parquet_footer import page_header

_CODECS = {0: None, 6: "zstd"}
"""Codecs by their numbers in parquet.thrift."""
_DATA_PAGE, _PLAIN, _RLE, _BYTE_STREAM_SPLIT = 0, 0, 3, 9
_STORED_BYTES = {"uint8": 4, "uint16": 4, "uint32": 4, "uint64": 8, "float16": 2, "float32": 4, "float64": 8}
"""Bytes of a value in a page: small integers are stored as INT32."""
_LEVEL_BYTES = 1 << 18
"""Largest size of the levels of a page; those of vidshard take a few bytes a row."""


class Spare:
    """Arrays that are not needed any more, for values that are decoded next; safe to use from several threads.

    Memory that the system hands out anew costs as much time as decoding tokens into it (docs/performance.md).
    """

    def __init__(self, max_bytes: int) -> None:
        """Start empty; ``max_bytes`` of arrays are kept, the newest ones."""
        self._left_bytes = max_bytes
        self._arrays: deque[np.ndarray] = deque()
        self._lock = threading.Lock()

    def take(self, size: int, dtype: str) -> np.ndarray:
        """An array (size,) with any values."""
        with self._lock:
            for at, values in enumerate(self._arrays):
                if values.size == size and values.dtype == dtype:
                    del self._arrays[at]
                    self._left_bytes += values.nbytes
                    return values
        return np.empty(size, dtype)

    def give(self, values: np.ndarray) -> None:
        """Give back what `decoded` returned, of which no other view is left; arrays of other origin are ignored."""
        whole = values.base
        if not isinstance(whole, np.ndarray) or not (whole.flags.owndata and whole.flags.writeable):
            return
        with self._lock:
            self._arrays.append(whole)
            self._left_bytes -= whole.nbytes
            while self._left_bytes < 0:
                self._left_bytes += self._arrays.popleft().nbytes


def decoded(
    data: memoryview, *, codec: int, dtype: str, num_rows: int, width: int, spare: Spare | None = None
) -> np.ndarray | None:
    """Decode the pages of a column of fixed-size lists without nulls.

    Args:
        data: all pages of the column in one row group.
        codec: number of the compression codec in parquet.thrift.
        dtype: dtype of the values.
        num_rows: rows of the row group.
        width: values of a row.
        spare: memory for the values.

    Returns:
        ``dtype`` (num_rows, width); None where Arrow's reader must be asked, as it knows every encoding and can say
        what is wrong.
    """
    if codec not in _CODECS or dtype not in _STORED_BYTES:
        return None
    out = np.empty(num_rows * width, dtype) if spare is None else spare.take(num_rows * width, dtype)
    done = at = 0
    try:
        while at < len(data):
            header, start = page_header(data, at)
            at = start + int(header[3])
            page = data[start:at]
            count = int(header[5][1])
            if len(page) != header[3] or header[1] != _DATA_PAGE or not 0 < count <= len(out) - done:
                return None
            if 4 in header and zlib.crc32(page) != header[4] & 0xFFFFFFFF:
                return None
            values = _page_values(page, header, codec, width, done % width, count * _STORED_BYTES[dtype])
            if values is None or not _store(values, header[5][2], out[done : done + count]):
                return None
            done += count
    except (KeyError, TypeError, IndexError, ValueError, pa.ArrowException):
        return None
    return out.reshape(num_rows, width) if done == len(out) else None


def _page_values(
    page: memoryview, header: dict[int, Any], codec: int, width: int, offset: int, num_bytes: int
) -> npt.NDArray[np.uint8] | None:
    """Bytes of the values of a page, after its levels; None if the lists are not all there and of one length."""
    size = int(header[2])
    if not num_bytes <= size <= num_bytes + _LEVEL_BYTES or (header[5][3], header[5][4]) != (_RLE, _RLE):
        return None
    name = _CODECS[codec]
    whole = memoryview(page if name is None else pa.Codec(name).decompress(page, decompressed_size=size))
    begin = 4 + int.from_bytes(whole[:4], "little")
    if not _is_regular(bytes(whole[4:begin]), int(header[5][1]), width, offset):
        return None
    begin += 4 + int.from_bytes(whole[begin : begin + 4], "little")
    # a null has levels and no value: as many bytes as values of all lists mean that there is none
    return np.frombuffer(whole[begin:], np.uint8) if len(whole) - begin == num_bytes else None


@lru_cache(maxsize=64)
def _is_regular(levels: bytes, count: int, width: int, offset: int) -> bool:
    """Whether repetition levels are those of lists of ``width`` values; pages of full row groups have the same ones.

    Args:
        levels: RLE / bit-packing hybrid of bit width 1 (Encodings.md of apache/parquet-format).
        count: values of the page.
        width: values of a list.
        offset: values of the first list that the pages before hold.
    """
    runs, at, total = [], 0, 0
    while at < len(levels):
        head = shift = 0
        while True:
            byte = levels[at]
            head |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                break
        if head & 1:
            packed = np.frombuffer(levels[at : at + (head >> 1)], np.uint8)
            at += head >> 1
            runs.append(np.unpackbits(packed, bitorder="little"))
        else:
            if total + (head >> 1) > count:
                return False
            runs.append(np.full(head >> 1, levels[at], np.uint8))
            at += 1
        total += len(runs[-1])
    found = np.concatenate([np.empty(0, np.uint8), *runs])[:count]
    wanted = (np.arange(offset, offset + count) % width != 0).astype(np.uint8)
    return np.array_equal(found, wanted)


def _store(values: npt.NDArray[np.uint8], encoding: int, out: np.ndarray) -> bool:
    """Decode values into ``out``; False if the encoding is another one or a value does not fit."""
    width = len(values) // len(out)
    if encoding == _PLAIN:
        stored = values.view(np.dtype(f"<u{width}"))
        if width > out.itemsize and int(stored.max()) >> (8 * out.itemsize):
            return False
        (out.view(f"u{out.itemsize}") if width == out.itemsize else out)[:] = stored
        return True
    if encoding != _BYTE_STREAM_SPLIT:
        return False
    planes = values.reshape(width, len(out))
    if planes[out.itemsize :].max(initial=0):
        return False
    joined = out.view(f"u{out.itemsize}")
    joined[:] = planes[0]
    for number, plane in enumerate(planes[1 : out.itemsize], start=1):
        if out.itemsize <= 2 or plane.any():
            joined |= np.left_shift(plane, 8 * number, dtype=joined.dtype)
    return True
