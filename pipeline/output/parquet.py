"""Parquet helpers that all files of an output share: atomic writes, and errors that name a damaged file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from vidshard.pipeline import storage
from vidshard.schemas.errors import VidshardError, one_line

_ROW_GROUP_ROWS = 1 << 16


class ShardError(VidshardError):
    """A file of an output cannot be read; the message names it and says why."""


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
