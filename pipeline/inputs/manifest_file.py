"""Faults of the rows of a manifest, and the text that all of its formats share.

A malformed row stays in the table, empty, and its fault is recorded, so that it does not cost the others.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from vidshard.schemas.text import readable

MAX_COLUMNS = 4096
"""Most columns of a manifest, and most values of one row."""

_MARKS = {
    b"\x1f\x8b": "a gzip file: unpack it first",
    b"PK\x03\x04": "a zip file, or a workbook of a spreadsheet: save it as CSV",
    b"\xff\xfe": "UTF-16 text: save it again as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it again as UTF-8",
    b"\0\0\xfe\xff": "UTF-32 text: save it again as UTF-8",
}
"""First bytes of files that are no UTF-8 text, and what they are."""


class RowFaults:
    """The first fault of each row of a file, by the number of the row from 0."""

    def __init__(self) -> None:
        self._texts: dict[int, str] = {}

    def __bool__(self) -> bool:
        return bool(self._texts)

    def add(self, row: int, text: str) -> None:
        """Record a fault of a row, unless it has one."""
        self._texts.setdefault(row, text)

    def column(self, num_rows: int) -> Iterator[tuple[int, str | None]]:
        """For each row its number from 1, and its fault or None."""
        return ((row + 1, self._texts.get(row)) for row in range(num_rows))


def check_is_utf8(data: bytes) -> None:
    """Refuse text of another encoding, and compressed text, by name.

    Raises:
        ValueError: the first bytes are those of something else.
    """
    found = next((what for mark, what in _MARKS.items() if data.startswith(mark)), None)
    if found is None and len(data) > 1 and (data[0] == 0) != (data[1] == 0):
        found = "UTF-16 text: save it again as UTF-8"
    if found is not None:
        raise ValueError(f"it is {found}")


def block_size(data: bytes) -> int:
    """Size in bytes of the blocks in which Arrow reads a file whose lines are longer than its default of 1 MiB."""
    return min(max(1 << 20, len(data) + 1), (1 << 31) - 1)


def valid_texts(table: pa.Table, faults: RowFaults) -> pa.Table:
    """The table with null in place of texts that are not UTF-8, which are faults of their rows."""
    for at, column in enumerate(table.schema):
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            continue
        try:
            table[at].validate(full=True)
        except pa.ArrowInvalid:
            texts = _decoded(table[at], column.name, faults)
            table = table.set_column(at, column.with_nullable(True), pa.chunked_array([pa.array(texts, column.type)]))
    return table


def _decoded(column: pa.ChunkedArray, name: str, faults: RowFaults) -> list[str | None]:
    """The texts of a column of strings or bytes; None for one that is not UTF-8."""
    wide = pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type)
    texts: list[str | None] = []
    for chunk in column.chunks:
        for data in chunk.view(pa.large_binary() if wide else pa.binary()).to_pylist():
            try:
                texts.append(None if data is None else data.decode())
            except UnicodeDecodeError:
                faults.add(len(texts), f"'{readable(name, 40)}' is not UTF-8 text")
                texts.append(None)
    return texts
