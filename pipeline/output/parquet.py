"""Parquet helpers that all files of an output share: atomic writes, and errors that name a damaged file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from vidshard.pipeline import storage
from vidshard.schemas.errors import VidshardError, one_line

Mask = npt.NDArray[np.bool_]
"""bool (rows,): which rows of a table."""

_ROW_GROUP_ROWS = 1 << 16
_READERS = 16
"""Files read at once: on an object store each is a request or two."""


class ShardError(VidshardError):
    """A file of an output cannot be read; the message names it and says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRows:
    """The rows of several files as one table, and which file each row is from."""

    table: pa.Table
    paths: tuple[str, ...]
    ends: tuple[int, ...]
    """For each file the number of its first row plus its number of rows; the files' rows follow one another."""

    @classmethod
    def of(cls, schema: pa.Schema, files: Sequence[tuple[str, pa.Table]]) -> FileRows:
        """Join the tables of files, (path, rows) in order, each of this schema."""
        tables = [table for _, table in files]
        return cls(
            table=pa.concat_tables([schema.empty_table(), *tables]),
            paths=tuple(path for path, _ in files),
            ends=tuple(int(end) for end in np.cumsum([table.num_rows for table in tables])),
        )

    @classmethod
    def read(cls, schema: pa.Schema, paths: Sequence[str], read: Callable[[str], pa.Table]) -> FileRows:
        """Read files with a function, several at once."""
        with ThreadPoolExecutor(_READERS) as pool:
            return cls.of(schema, list(zip(paths, pool.map(read, paths), strict=True)))

    def touched(self, rows: Mask) -> Iterator[tuple[str, slice]]:
        """(path, its rows) of each file that has one of these rows."""
        starts = (0, *self.ends)[:-1]
        for path, start, end in zip(self.paths, starts, self.ends, strict=True):
            if rows[start:end].any():
                yield path, slice(start, end)


def table_bytes(table: pa.Table) -> pa.Buffer:
    """Encode a table of the plan or of the rejections, with checksums of its pages."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP_ROWS, write_page_checksum=True)
    return sink.getvalue()


def write_table(path: str, table: pa.Table) -> None:
    """Write a table of the plan or of the rejections atomically.

    Raises:
        storage.StorageError: it could not be written.
    """
    storage.write_atomic(path, table_bytes(table))


@contextmanager
def named_if_damaged(path: str) -> Iterator[None]:
    """Turn errors of reading a damaged file into one that names the file and its remedy.

    Raises:
        ShardError: the file is damaged.
    """
    try:
        yield
    except (ShardError, storage.StorageError):
        raise  # it has its own message; storage that fails says nothing about the file
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise ShardError(
            f"{path} is damaged ({one_line(error, 200)}): `vidshard verify --repair` takes it "
            "out, and the same command again fills it in"
        ) from error


def release_memory() -> None:
    """Return memory that reading and look-ups freed to the system: Arrow keeps it, 300 MiB for a million videos."""
    pa.default_memory_pool().release_unused()
