"""Parquet files, read by the calling thread alone.

With threads, Arrow gives the buffers of a Python file back in a thread of its own, a moment after the caller has the
table. A program that ends in that moment is aborted ("terminate called without an active exception", Arrow's issue
34314). Threads work on columns, and nearly all bytes of a shard are in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


class ParquetFile(pq.ParquetFile):  # type: ignore[misc]
    """A Parquet file."""

    def __init__(self, source: Any, **options: Any) -> None:
        """Open a file.

        Args:
            source: open for reading and seekable, or a local path.
            options: as pyarrow's class takes them.
        """
        super().__init__(source, pre_buffer=False, **options)

    def read_row_group(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read columns of a row group, all of them by default."""
        return super().read_row_group(number, columns=_listed(columns), use_threads=False)

    def read_row_groups(self, numbers: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
        """Read columns of several row groups, all of them by default."""
        return super().read_row_groups(list(numbers), columns=_listed(columns), use_threads=False)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read columns of the whole file, all of them by default."""
        return super().read(columns=_listed(columns), use_threads=False)


def _listed(names: Sequence[str] | None) -> list[str] | None:
    return None if names is None else list(names)
