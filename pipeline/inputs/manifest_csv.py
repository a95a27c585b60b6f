"""CSV manifests as Arrow tables, in which one malformed row does not cost the others.

Arrow reads the file whole, and that is the end of it for files without a fault: 0.25 s for a million rows. If quotes
occur, each row is held against RFC 4180 first: a stray quote would make one field of all rows up to the next quote.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from vidshard.pipeline.inputs.manifest_file import RowFaults, block_size, check_is_utf8
from vidshard.schemas.text import readable

_FIELD = rb'(?:"[^"]*+(?:""[^"]*+)*+"[ \t]*+|[^",\r\n][^,\r\n]*+|)'
_ROW = re.compile(rb"%b(?:,%b)*+(?:\r\n|\n|\r|\Z)" % (_FIELD, _FIELD))
_LINE = re.compile(rb"[^\r\n]*+(?:\r\n|\n|\r|\Z)")
_ENDINGS = b"\r\n"


def read_csv(data: io.BytesIO, faults: RowFaults, texts: Sequence[str]) -> pa.Table:
    """Read a CSV file; a column holds numbers only where each of them reads back as it was written.

    Arrow's own inference makes 1 of 0001, 7.0 of 007 beside 1.5, and null of NA: names that people join on. Columns
    without a name in which nothing stands, as lines that end in commas make them, are left out.

    Args:
        data: the file.
        faults: gets those of its rows.
        texts: columns that stay text.

    Raises:
        pa.ArrowException, ValueError: it is no CSV file.
    """
    text = data.getvalue()
    check_is_utf8(text)
    text = text.removeprefix(b"\xef\xbb\xbf")
    repaired = _without_stray_quotes(text, faults)
    try:
        if repaired != text:
            raise ValueError("quotes")
        parsing = _parsing(text)
        names = pyarrow.csv.open_csv(io.BytesIO(text), parse_options=parsing).schema.names
        table = pyarrow.csv.read_csv(io.BytesIO(text), parse_options=parsing, convert_options=_csv_types(names))
    except (pa.ArrowException, ValueError):
        table = _read_malformed_csv(repaired, faults)
    kept = [
        at
        for at, name in enumerate(table.column_names)
        if name or not pc.all(pc.equal(table[at], ""), min_count=0).as_py()
    ]
    names = [table.column_names[at] for at in kept]
    columns = [table[at] if name in texts else _as_written(table[at]) for at, name in zip(kept, names, strict=True)]
    return pa.Table.from_arrays(columns, names=names)


def _parsing(text: bytes) -> pyarrow.csv.ParseOptions:
    # without this option Arrow cuts a quoted field of several lines where one of its blocks of 1 MiB ends
    return pyarrow.csv.ParseOptions(newlines_in_values=b'"' in text)


def _csv_types(names: Sequence[str]) -> pyarrow.csv.ConvertOptions:
    return pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)


def _without_stray_quotes(text: bytes, faults: RowFaults) -> bytes:
    """The file with an empty row in place of each line whose quotes are not those of RFC 4180; these are faults.

    A quote that is opened and not closed, or closed by the quote of another row, takes in the rows in between. So a
    field of several lines is refused if one of the lines could be a row: it has as many fields, and a URI of the same
    kind.
    """
    if b'"' not in text:
        return text
    header = _row_at(text, 0)
    names = [] if header is None else _fields(header)
    if "uri" not in names:
        return text  # an error of the whole file
    assert header is not None
    pieces, copied, at, number = [], 0, len(header), 0
    while at < len(text):
        row = _row_at(text, at)
        fault = None
        if row is None:
            fault = "a quote in it is not closed, or more follows on the closing one: double quotes that belong to text"
        elif _takes_in_rows(row, names.index("uri"), len(names)):
            fault = "a quote in it takes in the rows after it: close it, or double it if it belongs to the text"
        if row is None or fault is not None:
            row = _line_at(text, at)
            faults.add(number, fault or "")
            pieces += [text[copied:at], b"," * (len(names) - 1) or b'""', b"\n"]
            copied = at + len(row)
        number += bool(row.strip(_ENDINGS))  # Arrow leaves out empty lines
        at += len(row)
    return b"".join([*pieces, text[copied:]])


def _row_at(text: bytes, at: int) -> bytes | None:
    found = _ROW.match(text, at)
    return None if found is None else found.group()


def _line_at(text: bytes, at: int) -> bytes:
    found = _LINE.match(text, at)
    assert found is not None
    return found.group()


def _fields(row: bytes) -> list[str]:
    limit = csv.field_size_limit(max(len(row), csv.field_size_limit()))  # else 131,073 characters are an error
    try:
        return next(csv.reader(io.StringIO(row.decode(errors="replace").strip("\r\n"), newline="")), [])
    finally:
        csv.field_size_limit(limit)


def _takes_in_rows(row: bytes, uri_column: int, num_columns: int) -> bool:
    """Whether a line within a row of several lines could be a row of its own."""
    row = row.strip(_ENDINGS)
    if b"\n" not in row and b"\r" not in row:
        return False
    fields = _fields(row)
    if len(fields) <= uri_column:
        return False
    first, *others = row.splitlines()
    if uri_column >= len(_fields(first)):
        others = others[:-1]  # the last line has the row's own URI
    kind = _kind_of_uri(fields[uri_column])
    for line in others:
        inner = _fields(line)
        if len(inner) == num_columns and inner[uri_column] and _kind_of_uri(inner[uri_column]) == kind:
            return True
    return False


def _kind_of_uri(uri: str) -> tuple[str, str, bool]:
    """Scheme and extension of a URI, and whether it has blanks where it has neither."""
    uri = uri.strip(' "\r\n')
    scheme = uri.partition("://")[0].lower() if "://" in uri else ""
    stem, dot, extension = uri.rpartition("/")[2].rpartition(".")
    extension = extension.lower() if dot and stem and extension.isalnum() else ""
    return scheme, extension, not (scheme or extension) and " " in uri


def _read_malformed_csv(text: bytes, faults: RowFaults) -> pa.Table:
    """Read a CSV file that has rows of another width, or texts that are not UTF-8; those rows are faults."""
    malformed: list[pyarrow.csv.InvalidRow] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        malformed.append(row)
        return "skip"

    parsing = _parsing(text)
    parsing.invalid_row_handler = note
    # Latin-1 has a character for each byte; rows are numbered without threads alone
    reading = pyarrow.csv.ReadOptions(use_threads=False, encoding="latin-1", block_size=block_size(text))
    names = pyarrow.csv.open_csv(io.BytesIO(text), reading, parsing).schema.names
    malformed.clear()
    table = pyarrow.csv.read_csv(io.BytesIO(text), reading, parsing, _csv_types(names))
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
    return f"it has {row.actual_columns} fields, and the header has {row.expected_columns}"


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
