"""Row groups of shards, read by many: footers are kept, remote ranges are joined, and nothing is read twice.

Payload columns are decoded from their pages (`pages`), other columns by Arrow.
"""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from vidshard.pipeline import storage
from vidshard.pipeline.output.parquet import BoundedParquet, named_if_damaged
from vidshard.pipeline.output.parquet_footer import ColumnChunk, ColumnRanges
from vidshard.pipeline.reader.pages import Spare, decoded
from vidshard.pipeline.storage.errors import ReadError
from vidshard.pipeline.storage.file_systems import bounded, file_info
from vidshard.pipeline.storage.retry import errors_named, whole
from vidshard.pipeline.storage.signed_ranges import signed_range
from vidshard.schemas.tokens import PayloadColumn

FOOTERS = 64
"""Footers kept in memory: more than the shards that are read at a time."""
_TAIL_BYTES = 256 << 10
"""Bytes at the end of a remote shard that are fetched at once: the footer of most shards, in one request."""
_HOLE_BYTES = 64 << 10
"""Bytes between two ranges that are fetched with them, rather than in a request of their own."""


class RangeFile(io.RawIOBase):
    """A remote file whose every read is one request for exactly these bytes, unless they were fetched before."""

    def __init__(self, path: str, num_bytes: int | None = None) -> None:
        """Ask for the size of the file, unless it is known.

        Raises:
            StorageError: it is missing or not readable.
        """
        super().__init__()
        self._path = path
        self._fs, self._inner = storage.filesystem(path)
        if num_bytes is None:
            with errors_named("read", path):
                num_bytes = int(storage.with_retries(path, lambda: file_info(self._fs, self._inner))["size"])
        self.num_bytes = num_bytes
        self._at = 0
        self._held: list[tuple[int, bytes | bytearray]] = []

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Position of the next read."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position of the next read."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.num_bytes}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Read the next ``size`` bytes, all that are left by default.

        Raises:
            StorageError: the storage failed.
        """
        start = self._at
        stop = self.num_bytes if size < 0 else min(self.num_bytes, start + size)
        self._at = max(start, stop)
        return bytes(self.view(start, stop))

    def view(self, start: int, stop: int) -> memoryview:
        """The bytes of a range, as far as the file goes, in the memory that holds them.

        Raises:
            StorageError: the storage failed.
        """
        stop = min(stop, self.num_bytes)
        if stop <= start:
            return memoryview(b"")
        for at, (begin, data) in enumerate(self._held):
            if start < begin < stop <= begin + len(data):
                data = self._fetch(start, begin) + data
                self._held[at] = begin, data = start, data
            if begin <= start and stop <= begin + len(data):
                return memoryview(data)[start - begin : stop - begin]
        return memoryview(self._fetch(start, stop))

    def hold(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch ranges that are not held, near ones in one request, and serve reads of them from memory.

        Raises:
            StorageError: the storage failed.
        """
        joined: list[list[int]] = []
        for start, stop in sorted(ranges):
            if any(begin <= start and stop <= begin + len(data) for begin, data in self._held):
                continue
            if joined and start <= joined[-1][1] + _HOLE_BYTES:
                joined[-1][1] = max(joined[-1][1], stop)
            else:
                joined.append([start, stop])
        self._held += [(start, self._fetch(start, min(stop, self.num_bytes))) for start, stop in joined]

    def hold_tail(self) -> None:
        """Fetch the end of the file, and serve reads of it from memory.

        Raises:
            StorageError: the storage failed.
        """
        self.hold([(max(0, self.num_bytes - _TAIL_BYTES), self.num_bytes)])

    def _fetch(self, start: int, stop: int) -> bytes | bytearray:
        def once() -> bytes:
            options = {"start": start, "end": stop}
            data: bytes = bounded(self._fs, "cat_file", self._inner, num_bytes=stop - start, **options)
            return whole(data, stop - start)

        with errors_named("read", self._path, ReadError):
            return signed_range(self._fs, self._inner, start, stop) or storage.with_retries(self._path, once)


class ShardFiles:
    """Reads row groups of a list of shards; safe to use from several threads."""

    def __init__(self, paths: Sequence[str], num_bytes: npt.NDArray[np.int64]) -> None:
        """Remember paths and sizes of the shards; nothing is opened."""
        self._paths, self._num_bytes = paths, num_bytes
        self._footers: OrderedDict[int, _Footer] = OrderedDict()
        self._lock = threading.Lock()
        self._opening: dict[int, threading.Lock] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_paths": self._paths, "_num_bytes": self._num_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_paths"], state["_num_bytes"])  # type: ignore[misc]

    def group(self, shard: int, number: int, columns: Sequence[str]) -> pa.Table:
        """Read columns of one row group.

        Raises:
            ShardError: the shard is damaged, or the columns take more memory than allowed.
            storage.StorageError: the storage failed.
        """
        with named_if_damaged(self._paths[shard], remedy=""):
            file = self._open(shard)
            try:
                return self._table(file, shard, number, columns)
            finally:
                file.close()

    def row_groups(
        self,
        shard: int,
        groups: Sequence[tuple[int, int]],
        payload: Sequence[tuple[PayloadColumn, ColumnRanges | None]],
        columns: Sequence[str],
        spare: Spare | None = None,
    ) -> list[tuple[Mapping[str, np.ndarray], pa.Table | None]]:
        """Read payload columns and other columns of row groups; ranges of a remote shard are fetched together.

        Args:
            shard: number of the shard.
            groups: (number of the row group in the shard, its rows).
            payload: payload columns as the shard has them, and where they lie if that is known.
            columns: other columns.
            spare: memory for the values.

        Returns:
            By row group: values (rows, values of a row) by payload column; and a table of the other columns, with the
            payload columns whose pages Arrow must read. None if there are none of these.

        Raises:
            ShardError, storage.StorageError: as `group`.
        """
        with named_if_damaged(self._paths[shard], remedy=""):
            file = self._open(shard)
            try:
                known = [(column, ranges) for column, ranges in payload if ranges is not None]
                others = [*columns, *(column.name for column, ranges in payload if ranges is None)]
                wanted = [(int(r.starts[number]), int(r.stops[number])) for number, _ in groups for _, r in known]
                if isinstance(file, RangeFile):
                    chunks = [] if not others else self._chunks(file, shard, [number for number, _ in groups], others)
                    file.hold([*wanted, *chunks])
                return [self._row_group(file, shard, group, known, others, spare) for group in groups]
            finally:
                file.close()

    def _row_group(
        self,
        file: Any,
        shard: int,
        group: tuple[int, int],
        payload: Sequence[tuple[PayloadColumn, ColumnRanges]],
        columns: Sequence[str],
        spare: Spare | None,
    ) -> tuple[Mapping[str, np.ndarray], pa.Table | None]:
        number, num_rows = group
        table = self._table(file, shard, number, columns) if columns else None
        values: dict[str, np.ndarray] = {}
        for column, ranges in payload:
            start, stop = int(ranges.starts[number]), int(ranges.stops[number])
            if isinstance(file, RangeFile):
                pages = file.view(start, stop)
            else:
                file.seek(start)
                pages = memoryview(file.read(stop - start))
            found = decoded(
                pages,
                codec=ranges.codec,
                dtype=column.dtype,
                num_rows=num_rows,
                width=column.num_values,
                spare=spare,
            )
            if found is not None:
                values[column.name] = found
        if odd := [column.name for column, _ in payload if column.name not in values]:
            more = self._table(file, shard, number, odd)
            if table is not None:
                for name in table.column_names:
                    more = more.append_column(name, table[name])
            table = more
        return values, table

    def _table(self, file: Any, shard: int, number: int, columns: Sequence[str]) -> pa.Table:
        """Read columns by Arrow."""
        known, parquet = self._parquet(file, shard, [number])
        if isinstance(file, RangeFile):
            file.hold(_chunks_of(parquet, number, columns))
        table = parquet.group(number, columns)
        known.chunks = parquet.known_chunks
        return table

    def _chunks(self, file: Any, shard: int, numbers: Sequence[int], columns: Sequence[str]) -> list[tuple[int, int]]:
        """Ranges of columns of row groups."""
        _, parquet = self._parquet(file, shard, numbers)
        return [found for number in numbers for found in _chunks_of(parquet, number, columns)]

    def _parquet(self, file: Any, shard: int, numbers: Sequence[int]) -> tuple[_Footer, BoundedParquet]:
        known = self._footer(shard)
        if known is None:
            with self._lock:
                opening = self._opening.setdefault(shard, threading.Lock())
            with opening:  # of several threads one reads the footer
                known = self._footer(shard) or self._read_footer(shard)
        parquet = BoundedParquet(file, metadata=known.metadata)
        parquet.keep_chunks(known.chunks)
        if not all(0 <= number < parquet.metadata.num_row_groups for number in numbers):
            raise ValueError("it was replaced since it was opened")
        return known, parquet

    def _open(self, shard: int) -> Any:
        """Open a shard to read row groups.

        Raises:
            ValueError: it has another size than when its end was read.
            OSError, StorageError: it cannot be read.
        """
        path, num_bytes = self._paths[shard], int(self._num_bytes[shard])
        if not storage.is_local(path):
            return RangeFile(path, num_bytes)
        file = pa.OSFile(storage.absolute(path))
        if file.size() != num_bytes:
            file.close()
            raise ValueError("it was replaced since it was opened")
        return file

    def _footer(self, shard: int) -> _Footer | None:
        with self._lock:
            known = self._footers.get(shard)
            if known is not None:
                self._footers.move_to_end(shard)
            return known

    def _read_footer(self, shard: int) -> _Footer:
        with open_end(self._paths[shard], num_bytes=int(self._num_bytes[shard])) as file:
            parquet = BoundedParquet(file)
            chunks = None
            if isinstance(file, RangeFile):
                chunks = [parquet.chunks(number) for number in range(parquet.metadata.num_row_groups)]
            footer = _Footer(metadata=parquet.metadata, chunks=chunks)
        with self._lock:
            self._footers[shard] = footer
            while len(self._footers) > FOOTERS:
                self._footers.popitem(last=False)
        return footer


def _chunks_of(parquet: BoundedParquet, number: int, columns: Sequence[str]) -> list[tuple[int, int]]:
    """Ranges of columns of a row group."""
    wanted = tuple(f"{name}." for name in columns)  # names may hold dots
    return [(c.start, c.stop) for c in parquet.chunks(number) if c.path in columns or c.path.startswith(wanted)]


@dataclass(kw_only=True)
class _Footer:
    """Facts about a shard that are kept."""

    metadata: pq.FileMetaData
    chunks: list[list[ColumnChunk]] | None
    """Chunks that `BoundedParquet.chunks` has read; None before they were needed."""


@contextmanager
def open_end(path: str, num_bytes: int | None = None) -> Iterator[Any]:
    """Open a shard to read its footer; the end of a remote one comes in one request.

    Args:
        path: the shard.
        num_bytes: its size, if that is known.

    Raises:
        StorageError: it is missing, not readable, or no regular file.
    """
    if storage.is_local(path):
        with storage.open_binary(path) as file:  # which refuses what is no regular file
            yield file
        return
    with RangeFile(path, num_bytes) as file:
        file.hold_tail()
        yield file
