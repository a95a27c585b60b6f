"""Rows of CSV and JSON lines files as Arrow tables, in which one malformed row does not cost the others.

Arrow reads each file whole, and that is the end of it for files without a fault: 0.25 s for a million rows. If Arrow
refuses, the malformed rows are found one by one; they stay in the table, empty, and their faults are recorded.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from vidshard.schemas.errors import one_line
from vidshard.schemas.text import readable


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


# Text of all formats.


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


# CSV.

_MOST_OPEN_QUOTES = 20
"""Number of quotes without an end that are looked for; each costs reading the file again."""


def read_csv(data: io.BytesIO, faults: RowFaults, texts: Sequence[str]) -> pa.Table:
    """Read a CSV file; a column holds numbers only where each of them reads back as it was written.

    Arrow's own inference makes 1 of 0001, 7.0 of 007 beside 1.5, and null of NA: names that people join on.

    Args:
        data: the file.
        faults: gets those of its rows.
        texts: columns that stay text.

    Raises:
        pa.ArrowException: it is no CSV file.
    """
    try:
        names = pyarrow.csv.open_csv(data).schema.names
        data.seek(0)
        table = pyarrow.csv.read_csv(data, convert_options=_csv_types(names))
    except (pa.ArrowException, ValueError):
        table = _read_malformed_csv(data.getvalue(), faults)
    columns = [
        column if name in texts else _as_written(column)
        for name, column in zip(table.column_names, table.columns, strict=True)
    ]
    return pa.Table.from_arrays(columns, names=table.column_names)


def _csv_types(names: Sequence[str]) -> pyarrow.csv.ConvertOptions:
    return pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)


def _read_malformed_csv(text: bytes, faults: RowFaults) -> pa.Table:
    """Read a CSV file that has rows of another width, or texts that are not UTF-8; those rows are faults."""
    text = text.removeprefix(b"\xef\xbb\xbf")
    malformed: list[pyarrow.csv.InvalidRow] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        malformed.append(row)
        return "skip"

    parsing = pyarrow.csv.ParseOptions(invalid_row_handler=note)
    # Latin-1 has a character for each byte; rows are numbered without threads alone
    reading = pyarrow.csv.ReadOptions(use_threads=False, encoding="latin-1")
    names = pyarrow.csv.open_csv(io.BytesIO(text), reading, parsing).schema.names
    for _ in range(_MOST_OPEN_QUOTES):
        malformed.clear()
        table = pyarrow.csv.read_csv(io.BytesIO(text), reading, parsing, _csv_types(names))
        opened = next((row for row in malformed if "\n" in row.text), None)
        start = -1 if opened is None else text.find(opened.text.encode("latin-1"))
        if opened is None or start < 0:
            break
        # a quote without an end took in the rows after it: without its line they are rows again
        faults.add(opened.number - 2, _width_fault(opened))
        text = text[:start] + (b"," * (len(names) - 1) or b'""') + text[text.index(b"\n", start) :]
    table = _with_empty_rows(table, {row.number - 2: _width_fault(row) for row in malformed}, faults)
    columns = [
        pa.array(_utf8(texts.to_pylist(), name, faults), pa.string())
        for texts, name in zip(table.columns, names, strict=True)
    ]
    return pa.Table.from_arrays(columns, names=[name.encode("latin-1").decode() for name in names])


def _utf8(texts: Sequence[str | None], name: str, faults: RowFaults) -> list[str | None]:
    """The UTF-8 texts behind Latin-1 ones; None for one that is none."""
    found: list[str | None] = []
    for row, text in enumerate(texts):
        try:
            found.append(text if text is None or text.isascii() else text.encode("latin-1").decode())
        except UnicodeDecodeError:
            faults.add(row, f"'{readable(name, 40)}' is not UTF-8 text")
            found.append(None)
    return found


def _width_fault(row: pyarrow.csv.InvalidRow) -> str:
    more = ": is the end of a quote missing?" if row.text.count('"') % 2 else ""
    return f"it has {row.actual_columns} fields, and the header has {row.expected_columns}{more}"


def _with_empty_rows(table: pa.Table, empty: Mapping[int, str], faults: RowFaults) -> pa.Table:
    """Insert rows of nulls, which are faults, at these numbers of the result."""
    num_rows = table.num_rows + len(empty)
    source = iter(range(table.num_rows))
    take = [table.num_rows if row in empty else next(source) for row in range(num_rows)]
    for row, text in empty.items():
        faults.add(row, text)
    nulls = pa.Table.from_arrays([pa.nulls(1, kind) for kind in table.schema.types], schema=table.schema)
    return pa.concat_tables([table, nulls]).take(pa.array(take, pa.int64()))


def _as_written(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text as int64 or float64 where that loses nothing; empty fields of such a column are null."""
    texts = pc.if_else(pc.equal(column, ""), None, column)
    if texts.null_count == len(texts):
        return column
    for kind in (pa.int64(), pa.float64()):
        try:
            numbers = texts.cast(kind)
        except pa.ArrowException:
            continue
        back = numbers.cast(pa.string())
        if kind == pa.float64():  # 2.0 is written by Python, and 2 by Arrow
            whole = pc.match_substring_regex(texts, r"^-?(0|[1-9]\d*)\.0$")
            texts = pc.if_else(whole, pc.replace_substring_regex(texts, r"\.0$", ""), texts)
        if pc.all(pc.equal(back, texts), min_count=0).as_py():
            return numbers
    return column


# JSON lines.


def read_json_lines(data: io.BytesIO, faults: RowFaults, kinds: Mapping[str, str]) -> pa.Table:
    """Read JSON lines; text that looks like a date stays text.

    Args:
        data: the file.
        faults: gets those of its rows.
        kinds: the kind of value that columns should hold, "text" or "a number"; of others the most frequent one.

    Raises:
        pa.ArrowException, ValueError: none of its lines is a JSON object, or they do not agree.
    """
    try:
        return _read_json(data)
    except (pa.ArrowException, ValueError):  # UnicodeDecodeError is a ValueError
        lines = _repaired_lines(data.getvalue(), faults, kinds)
        if all(line == b"{}" for line in lines):
            raise
    for row, error in _unreadable(lines, 0):
        faults.add(row, f"it is no JSON object that can be read: {one_line(error, 120)}")
        lines[row] = b"{}"
    return _read_json(io.BytesIO(b"\n".join(lines)))


def _unreadable(lines: Sequence[bytes], first: int) -> Iterator[tuple[int, Exception]]:
    """The lines that Arrow cannot read, found by halving: it refuses some of what Python takes, such as 1e400."""
    try:
        pyarrow.json.read_json(io.BytesIO(b"\n".join(lines)))
    except (pa.ArrowException, ValueError) as error:
        if len(lines) == 1:
            yield first, error
        else:
            half = len(lines) // 2
            yield from _unreadable(lines[:half], first)
            yield from _unreadable(lines[half:], first + half)


def _read_json(data: io.BytesIO) -> pa.Table:
    table = pyarrow.json.read_json(data)
    schema = pa.schema([pa.field(field.name, _without_times(field.type)) for field in table.schema])
    if schema.types == table.schema.types:
        return table
    data.seek(0)
    return pyarrow.json.read_json(data, parse_options=pyarrow.json.ParseOptions(explicit_schema=schema))


def _without_times(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_without_times(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _without_times(field.type)) for field in kind])
    return kind


_Kinds = list[tuple[str, str]]
"""Paths of the values of a row, such as ``meta.tags[]``, and the kind of each."""


def _repaired_lines(data: bytes, faults: RowFaults, kinds: Mapping[str, str]) -> list[bytes]:
    """The lines of a file, with ``{}`` or the URI alone in place of each that does not fit the others."""
    lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    rows: list[tuple[dict[str, Any], _Kinds]] = []
    votes: Counter[tuple[str, str]] = Counter()
    for number, line in enumerate(lines):
        row, found, fault = _parsed(line)
        rows.append((row, found))
        votes.update(set(found))
        if fault is not None:
            faults.add(number, fault)
    expected = {path: kind for (path, kind), _ in reversed(votes.most_common())}
    expected |= {path: kind for path, kind in kinds.items() if (path, kind) in votes}
    for number, (_, found) in enumerate(rows):
        odd = next(((path, kind) for path, kind in found if kind != expected[path]), None)
        if odd is not None:
            faults.add(number, f"'{readable(odd[0], 80)}' holds {odd[1]}, and should hold {expected[odd[0]]}")
    for (number, fault), (row, _) in zip(list(faults.column(len(lines))), rows, strict=True):
        if fault is not None:
            uri = row.get("uri")
            lines[number - 1] = json.dumps({"uri": uri}).encode() if isinstance(uri, str) and _is_text(uri) else b"{}"
    return lines


def _parsed(line: bytes) -> tuple[dict[str, Any], _Kinds, str | None]:
    """The object on a line, the kinds of its values, and its fault or None."""
    try:
        row = json.loads(line.decode(), object_pairs_hook=_without_repeats)
        if not isinstance(row, dict):
            return {}, [], f"it is {_kind(row)}, and not a JSON object"
        return row, list(_kinds_in(row, "")), None
    except UnicodeDecodeError:
        return {}, [], "it is not UTF-8 text"
    except RecursionError:
        return {}, [], "it is nested too deep"
    except ValueError as error:
        return {}, [], f"it is no JSON object that can be read: {one_line(error, 120)}"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"'{readable(repeated[0], 40)}' is there twice")
    return dict(pairs)


def _kinds_in(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if value is None:
        return
    if path:
        yield path, _kind(value)
    if isinstance(value, dict):
        for name, below in value.items():
            yield from _kinds_in(below, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for below in value:
            yield from _kinds_in(below, f"{path}[]")


def _kind(value: object) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    return "null" if value is None else "a list" if isinstance(value, list) else "an object"


def _is_text(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
