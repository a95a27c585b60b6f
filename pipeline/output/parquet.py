"""Parquet helpers that all files of an output share: atomic writes, bounded reads, errors that name a damaged file.

A few kilobytes of Parquet can decode to terabytes. What a row group takes in memory is computed from the footer before
it is read, and a file that takes too much is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vidshard.pipeline import storage
from vidshard.pipeline.output.parquet_footer import ColumnChunk, row_groups
from vidshard.schemas.errors import VidshardError, one_line
from vidshard.schemas.uris import shown_uri

Mask = npt.NDArray[np.bool_]
"""bool (rows,): which rows of a table."""

_ROW_GROUP_ROWS = 1 << 16
_READERS = 16
"""Files read at once: on an object store each is a request or two."""


MAX_GROUP_BYTES = 1 << 30
"""Largest size of one row group in memory. Those that vidshard writes take a few MiB."""
MAX_FILE_BYTES = 8 << 30
"""Largest size in memory of a file that is read as a whole."""
MAX_ROWS = 1 << 24
"""Largest number of rows of one file."""


class ShardError(VidshardError):
    """A file of an output cannot be read; the message names it and says why."""

    is_damage: bool = True
    """Whether the file itself is at fault. False where it could not be checked, as for want of memory."""


def _unchecked(path: str, why: str) -> ShardError:
    error = ShardError(f"cannot read {shown_uri(path)}: {why}")
    error.is_damage = False
    return error


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


_REPAIR = "`vidshard verify --repair` takes it out, and the same command again fills it in"


@contextmanager
def named_if_damaged(path: str, *, remedy: str = _REPAIR) -> Iterator[None]:
    """Turn every error of reading a damaged file into one that names the file and its remedy.

    Args:
        path: the file.
        remedy: what to do about it; empty where that depends on the error.

    Raises:
        ShardError: the file is damaged. Its ``is_damage`` is false where there was too little memory, or an error that
            no check foresaw.
        storage.StorageError: the storage failed, which says nothing about the file.
    """
    try:
        yield
    except VidshardError:
        raise
    except MemoryError as error:
        raise _unchecked(path, "there is too little memory to read it") from error
    except OSError as error:
        if error.errno:
            raise storage.StorageError(f"cannot read {shown_uri(path)}: {one_line(error, about=path)}") from error
        raise _damaged(path, error, remedy) from error
    except (
        pa.ArrowException,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        ArithmeticError,
    ) as e:
        raise _damaged(path, e, remedy) from e
    except Exception as error:
        raise _unchecked(path, f"{type(error).__name__}: {one_line(error, 200)}; please report this") from error


def _damaged(path: str, error: Exception, remedy: str) -> ShardError:
    if not remedy:
        return ShardError(f"cannot read {shown_uri(path)}: {one_line(error, 400)}")
    return ShardError(f"{shown_uri(path)} is damaged ({one_line(error, 200)}): {remedy}")


class BoundedParquet(storage.ParquetFile):
    """A Parquet file whose row groups are refused before they take too much memory; page checksums are checked."""

    def __init__(self, file: Any, *, metadata: pq.FileMetaData | None = None) -> None:
        """Open a file.

        Args:
            file: open for reading, and seekable.
            metadata: its footer, if that was read before.

        Raises:
            ValueError: it has more rows than any file of vidshard.
        """
        super().__init__(file, metadata=metadata, page_checksum_verification=True)
        self._file = file
        self._chunks: list[list[ColumnChunk]] | None = None
        if self.metadata.num_rows > MAX_ROWS:
            raise ValueError(f"it has {self.metadata.num_rows:,} rows; at most {MAX_ROWS:,} are read")

    def group(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read columns of one row group, all of them by default.

        Raises:
            ValueError: they take more memory than allowed.
        """
        # reading the footer anew takes 0.5 ms a row group, a quarter of the time of reading its tokens
        bound = None if columns is None else self._fixed_bytes(number, columns)
        if bound is None or bound > MAX_GROUP_BYTES:
            _refuse_large(self._group_bytes(number, columns), MAX_GROUP_BYTES, f"row group {number}")
        return self.read_row_group(number, columns)

    def check_size(self) -> None:
        """Check that each row group, and the whole file, may be read.

        Raises:
            ValueError: they take more memory than allowed.
        """
        sizes = [self._group_bytes(group, None) for group in range(self.metadata.num_row_groups)]
        _refuse_large(sum(sizes), MAX_FILE_BYTES, "it")

    def whole(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read columns of the whole file, all of them by default.

        Raises:
            ValueError: they take more memory than allowed.
        """
        groups = range(self.metadata.num_row_groups)
        _refuse_large(sum(self._group_bytes(group, columns) for group in groups), MAX_FILE_BYTES, "it")
        if not groups:
            return self.read(columns)
        return pa.concat_tables([self.group(group, columns) for group in groups])

    def chunks(self, group: int) -> list[ColumnChunk]:
        """Statements of the footer about each column of a row group.

        Raises:
            ValueError: the footer states what cannot be.
        """
        if self._chunks is None:
            self._chunks = row_groups(self._file, self.metadata.num_columns)
        return self._chunks[group]

    @property
    def known_chunks(self) -> list[list[ColumnChunk]] | None:
        """Chunks that :meth:`chunks` has read from the footer; None before it was needed."""
        return self._chunks

    def keep_chunks(self, chunks: list[list[ColumnChunk]] | None) -> None:
        """Take over `known_chunks` of the same file, opened before."""
        self._chunks = chunks

    def _fixed_bytes(self, group: int, columns: Sequence[str]) -> int | None:
        """Bound of the memory of columns whose values have a fixed width, without reading the footer once more.

        It is the size of the whole row group as its footer states it, or of the values if that is larger; None for
        other columns.
        """
        row_group = self.metadata.row_group(group)
        total = 0
        for field in self.schema_arrow:
            if field.name in columns:
                for leaf, fixed, is_flat in _leaves(field.type):
                    if not is_flat or not pa.types.is_primitive(leaf):
                        return None
                    total += row_group.num_rows * fixed * max(1, leaf.bit_width // 8)
        return max(total, int(row_group.total_byte_size))

    def _group_bytes(self, group: int, columns: Sequence[str] | None) -> int:
        """Bytes that columns of a row group take in memory, from the footer."""
        wanted = None if columns is None else set(columns)
        num_rows, chunks = self.metadata.row_group(group).num_rows, self.chunks(group)
        total = number = 0
        for field in self.schema_arrow:
            leaves = _leaves(field.type)
            number += len(leaves)
            if wanted is not None and field.name not in wanted:
                continue
            for at, (leaf, fixed, is_flat) in enumerate(leaves, start=number - len(leaves)):
                chunk = chunks[at]
                width = chunk.value_bytes or self.schema.column(at).length
                num_values = max(chunk.num_values, num_rows * fixed) if is_flat else chunk.num_values * fixed
                size = max(chunk.total_uncompressed_size, num_values * width)
                if not width:
                    # a dictionary of one long text may stand for it in every row
                    size += num_values * min(chunk.total_uncompressed_size, 1 << 31)
                    if size > MAX_GROUP_BYTES and leaf is field.type:
                        size = self._text_bytes(group, field.name)
                total += size
        return total

    def _text_bytes(self, group: int, name: str) -> int:
        """Bytes of a column of texts; it is read with its dictionary, so that repeated texts take no memory."""
        parquet = storage.ParquetFile(self._file, page_checksum_verification=True, read_dictionary=[name])
        total = 0
        for chunk in parquet.read_row_group(group, [name])[name].chunks:
            if not pa.types.is_dictionary(chunk.type):
                total += chunk.nbytes
                continue
            lengths = pc.fill_null(pc.binary_length(chunk.dictionary), 0).to_numpy()
            indices = chunk.indices.drop_null().to_numpy()
            total += int(np.bincount(indices, minlength=len(lengths)) @ lengths.astype(np.float64)) + 4 * len(chunk)
        return total


def _refuse_large(num_bytes: int, limit: int, what: str) -> None:
    if num_bytes > limit:
        raise ValueError(f"{what} takes {num_bytes:,} bytes in memory, more than the {limit:,} that are allowed")


def _leaves(kind: pa.DataType, fixed: int = 1, is_flat: bool = True) -> list[tuple[pa.DataType, int, bool]]:
    """Leaves of an Arrow type: each with the product of the fixed list sizes above, and whether no list varies."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_struct(kind):
        return [leaf for field in kind for leaf in _leaves(field.type, fixed, is_flat)]
    if pa.types.is_fixed_size_list(kind):
        return _leaves(kind.value_type, fixed * max(1, kind.list_size), is_flat)
    if pa.types.is_map(kind):
        return [*_leaves(kind.key_type, fixed, False), *_leaves(kind.item_type, fixed, False)]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _leaves(kind.value_type, fixed, False)
    return [(kind, fixed, is_flat)]


def release_memory() -> None:
    """Return memory that reading and look-ups freed to the system: Arrow keeps it, 300 MiB for a million videos."""
    pa.default_memory_pool().release_unused()
