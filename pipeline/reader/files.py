"""Row groups of shards, read by many: footers are kept, remote ranges are joined, and nothing is read twice."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
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
        if self._tail is not None and start >= self._tail[0]:
            return self._tail[1][start - self._tail[0] : stop - self._tail[0]]
        return self._fetch(start, stop)

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
        self._footers: OrderedDict[int, tuple[pq.FileMetaData, list[list[ColumnChunk]], int]] = OrderedDict()
        self._lock = threading.Lock()

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
            with self._lock:
                known = self._footers.get(shard)
                if known is not None:
                    self._footers.move_to_end(shard)
            file = _open(path, None if known is None else known[2])
            try:
                parquet = self._parquet(file, shard, known)
                if not 0 <= number < parquet.metadata.num_row_groups:
                    raise ValueError("it was replaced since it was opened")
                return parquet.group(number, columns)
            finally:
                file.close()

    def _parquet(
        self, file: Any, shard: int, known: tuple[pq.FileMetaData, list[list[ColumnChunk]], int] | None
    ) -> BoundedParquet:
        remote = isinstance(file, RangeFile)
        if known is not None:
            parquet = BoundedParquet(file, metadata=known[0], pre_buffer=remote)
            parquet.keep_chunks(known[1])
            return parquet
        if remote:
            file.keep_tail()
        parquet = BoundedParquet(file, pre_buffer=remote)
        size = file.num_bytes if remote else 0
        chunks = [parquet.chunks(group) for group in range(parquet.metadata.num_row_groups)]
        with self._lock:
            self._footers[shard] = (parquet.metadata, chunks, size)
            while len(self._footers) > FOOTERS:
                self._footers.popitem(last=False)
        return parquet


def _open(path: str, num_bytes: int | None) -> Any:
    if not storage.is_local(path):
        return RangeFile(path, num_bytes)
    if num_bytes is None:
        storage.open_binary(path).close()  # which refuses what is no regular file
    return pa.OSFile(storage.absolute(path))
