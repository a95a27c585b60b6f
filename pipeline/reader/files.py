"""Row groups of shards, read by many: footers are kept, remote ranges are joined, and nothing is read twice."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vidshard.pipeline import storage
from vidshard.pipeline.output.parquet import BoundedParquet, named_if_damaged
from vidshard.pipeline.output.parquet_footer import ColumnChunk
from vidshard.pipeline.storage.file_systems import bounded, file_info
from vidshard.pipeline.storage.retry import ReadError, errors_named, whole

FOOTERS = 64
"""Footers kept in memory: more than the shards that are read at a time."""
_TAIL_BYTES = 256 << 10
"""Bytes at the end of a remote shard that are fetched at once: the footer of most shards, in one request."""


class RangeFile(io.RawIOBase):
    """A remote file whose every read is one request for exactly these bytes; the end is fetched once."""

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
        self._tail: tuple[int, bytes] | None = None

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
        if stop <= start:
            return b""
        self._at = stop
        if self._tail is None or stop <= self._tail[0]:
            return self._fetch(start, stop)
        begin, tail = self._tail
        before = self._fetch(start, begin) if start < begin else b""
        return before + tail[max(0, start - begin) : stop - begin]

    def keep_tail(self) -> None:
        """Fetch the end of the file, and serve reads of it from memory.

        Raises:
            StorageError: the storage failed.
        """
        start = max(0, self.num_bytes - _TAIL_BYTES)
        self._tail = (start, self._fetch(start, self.num_bytes))

    def _fetch(self, start: int, stop: int) -> bytes:
        def once() -> bytes:
            options = {"start": start, "end": stop}
            data: bytes = bounded(self._fs, "cat_file", self._inner, num_bytes=stop - start, **options)
            return whole(data, stop - start)

        with errors_named("read", self._path, ReadError):
            return storage.with_retries(self._path, once)


class ShardFiles:
    """Reads row groups of a list of shards; safe to use from several threads."""

    def __init__(self, paths: Sequence[str]) -> None:
        """Remember the paths; nothing is opened."""
        self._paths = paths
        self._footers: OrderedDict[int, _Footer] = OrderedDict()
        self._lock = threading.Lock()
        self._opening: dict[int, threading.Lock] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_paths": self._paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_paths"])  # type: ignore[misc]

    def group(self, shard: int, number: int, columns: Sequence[str]) -> pa.Table:
        """Read columns of one row group.

        Raises:
            ShardError: the shard is damaged, or the columns take more memory than allowed.
            storage.StorageError: the storage failed.
        """
        path = self._paths[shard]
        with named_if_damaged(path, remedy=""):
            known = self._footer(shard)
            if known is None:
                with self._lock:
                    opening = self._opening.setdefault(shard, threading.Lock())
                with opening:  # of several threads one reads the footer
                    known = self._footer(shard) or self._read_footer(shard)
            file = _open(path, known.num_bytes)
            try:
                parquet = BoundedParquet(file, metadata=known.metadata, pre_buffer=isinstance(file, RangeFile))
                parquet.keep_chunks(known.chunks)
                if not 0 <= number < parquet.metadata.num_row_groups:
                    raise ValueError("it was replaced since it was opened")
                table = parquet.group(number, columns)
                known.chunks = parquet.known_chunks
                return table
            finally:
                file.close()

    def _footer(self, shard: int) -> _Footer | None:
        with self._lock:
            known = self._footers.get(shard)
            if known is not None:
                self._footers.move_to_end(shard)
            return known

    def _read_footer(self, shard: int) -> _Footer:
        file = _open(self._paths[shard], None)
        try:
            if isinstance(file, RangeFile):
                file.keep_tail()
            parquet = BoundedParquet(file)
            size = file.num_bytes if isinstance(file, RangeFile) else 0
            footer = _Footer(metadata=parquet.metadata, num_bytes=size)
        finally:
            file.close()
        with self._lock:
            self._footers[shard] = footer
            while len(self._footers) > FOOTERS:
                self._footers.popitem(last=False)
        return footer


@dataclass(kw_only=True)
class _Footer:
    """Facts about a shard that are kept."""

    metadata: pq.FileMetaData
    num_bytes: int
    """Size of a remote file; 0 for a local one."""
    chunks: list[list[ColumnChunk]] | None = None
    """Chunks that `BoundedParquet.chunks` has read; None before columns were read that need it."""


def _open(path: str, num_bytes: int | None) -> Any:
    if not storage.is_local(path):
        return RangeFile(path, num_bytes)
    if num_bytes is None:
        storage.open_binary(path).close()  # which refuses what is no regular file
    return pa.OSFile(storage.absolute(path))
