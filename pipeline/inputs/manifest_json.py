"""JSON lines manifests as Arrow tables, in which one malformed row does not cost the others.

Arrow reads the file whole, and that is the end of it for files without a fault: 0.25 s for a million rows. If Arrow
refuses, the malformed rows are found one by one. Arrow's parser calls itself for each level of nesting and ends the
process where the stack does, so lines are measured before it sees them.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from vidshard.pipeline.inputs.manifest_file import MAX_COLUMNS, RowFaults, block_size, check_is_utf8
from vidshard.schemas.errors import one_line
from vidshard.schemas.text import readable

_DEEPEST = 64
"""Most levels of nesting of a row."""
_EXACT = 1 << 53
"""Up to here float64 holds every integer."""
_BLOCK = 1 << 23
"""Bytes that are looked at at once."""
_BLANKS = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?')


def read_json_lines(data: io.BytesIO, faults: RowFaults, kinds: Mapping[str, str]) -> pa.Table:
    """Read JSON lines; text that looks like a date stays text, and so do integers that float64 would round.

    Args:
        data: the file.
        faults: gets those of its rows.
        kinds: the kind of value that columns should hold, "text" or "a number"; of others the most frequent one.

    Raises:
        pa.ArrowException, ValueError: none of its lines is a JSON object, or they do not agree.
    """
    text = data.getvalue()
    check_is_utf8(text)
    text = text.removeprefix(b"\xef\xbb\xbf")
    if text.lstrip()[:1] == b"[":
        raise ValueError("it is a JSON array: write one object a line, without commas between them")
    if not _is_plain(text):
        text = _objects(text)
    if _is_plain(text):
        try:
            table = _read_json(text)
            if table.num_columns <= MAX_COLUMNS:
                return _with_exact_integers(table, text)
        except (pa.ArrowException, ValueError):  # UnicodeDecodeError is a ValueError
            pass
    lines = [line for line in text.split(b"\n") if line.strip()]
    lines = _repaired_lines(lines, faults, kinds)
    if all(line == b"{}" for line in lines):
        first = next((fault for _, fault in faults.column(len(lines)) if fault is not None), "it is empty")
        raise ValueError(f"none of its lines is a JSON object; of the first: {first}")
    for row, error in _unreadable(lines, 0):
        faults.add(row, f"it is no JSON object that can be read: {one_line(error, 120)}")
        lines[row] = b"{}"
    text = b"\n".join(lines)
    return _with_exact_integers(_read_json(text), text)


def _is_plain(text: bytes) -> bool:
    """Whether each line that is not empty begins and ends as an object does, and cannot be nested too deep."""
    at = 0
    while at < len(text):
        end = text.find(b"\n", at + _BLOCK) + 1 or len(text)
        block = np.frombuffer(text, np.uint8, end - at, at)
        ends = np.append(np.flatnonzero(block == ord("\n")), len(block) - (block[-1] == ord("\n")))
        starts = np.append(0, ends[:-1] + 1)
        lasts = ends - 1 - ((ends > starts) & (block[ends - 1] == ord("\r")))
        is_line = lasts >= starts
        starts, lasts = starts[is_line], lasts[is_line]
        if (block[starts] != ord("{")).any() or (block[lasts] != ord("}")).any():
            return False
        opened = (block == ord("{")) | (block == ord("["))
        if len(starts) and (np.add.reduceat(opened, starts, dtype=np.int32) > _DEEPEST).any():
            return False
        at = end
    return True


def _objects(text: bytes) -> bytes:
    """A file of nothing but objects, with each on a line of its own; any other as it is."""
    decoder = json.JSONDecoder(object_pairs_hook=lambda _pairs: None)
    found = []
    try:
        rest = text.decode()
        at = _after_blanks(rest, 0)
        while at < len(rest):
            if rest[at] != "{":
                return text
            end = decoder.raw_decode(rest, at)[1]
            found.append(re.sub(r"[\r\n]", " ", rest[at:end]).encode())
            at = _after_blanks(rest, end)
    except (ValueError, RecursionError):
        return text
    return b"\n".join(found)


def _after_blanks(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    return at if found is None else found.end()


def _depth(line: bytes) -> int:
    """Deepest level of nesting on a line."""
    steps = np.frombuffer(_STRING.sub(b"", line), np.uint8)
    opened = np.isin(steps, np.frombuffer(b"[{", np.uint8)).astype(np.int64)
    closed = np.isin(steps, np.frombuffer(b"]}", np.uint8)).astype(np.int64)
    return int(np.cumsum(opened - closed).max(initial=0))


def _with_exact_integers(table: pa.Table, text: bytes) -> pa.Table:
    """The table with text, as written, in place of columns whose integers float64 has rounded: ids of 64 bits."""
    for name in table.column_names:
        column = table[name]
        if column.type != pa.float64() or not pc.any(pc.greater_equal(pc.abs(column), _EXACT), min_count=0).as_py():
            continue
        written = [_written(line).get(name) for line in text.split(b"\n") if line.strip()]
        integers = [value for value in written if value is not None and re.fullmatch(r"-?\d{16,400}", value)]
        if len(written) == table.num_rows and any(abs(int(value)) > _EXACT for value in integers):
            at = table.column_names.index(name)
            table = table.set_column(at, name, pa.array(written, pa.string()))
    return table


def _written(line: bytes) -> dict[str, str | None]:
    """The numbers of an object as they are written."""
    row = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
    return {name: value if isinstance(value, str) else None for name, value in row.items()}


def _unreadable(lines: Sequence[bytes], first: int) -> Iterator[tuple[int, Exception]]:
    """The lines that Arrow cannot read, found by halving: it refuses some of what Python takes, such as 1e400."""
    try:
        _read_json(b"\n".join(lines))
    except (pa.ArrowException, ValueError) as error:
        if len(lines) == 1:
            yield first, error
        else:
            half = len(lines) // 2
            yield from _unreadable(lines[:half], first)
            yield from _unreadable(lines[half:], first + half)


def _read_json(text: bytes) -> pa.Table:
    reading = pyarrow.json.ReadOptions(block_size=block_size(text)) if _longest_line(text) > 1 << 19 else None
    table = pyarrow.json.read_json(io.BytesIO(text), read_options=reading)
    schema = pa.schema([pa.field(field.name, _without_times(field.type)) for field in table.schema])
    if schema.types == table.schema.types:
        return table
    parsing = pyarrow.json.ParseOptions(explicit_schema=schema)
    return pyarrow.json.read_json(io.BytesIO(text), read_options=reading, parse_options=parsing)


def _longest_line(text: bytes) -> int:
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == 10)
    return int(np.diff(np.concatenate([[-1], ends, [len(text)]])).max())


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


def _repaired_lines(lines: list[bytes], faults: RowFaults, kinds: Mapping[str, str]) -> list[bytes]:
    """The lines of a file, with ``{}`` or the URI alone in place of each that does not fit the others."""
    lines = list(lines)
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
        if _depth(line) > _DEEPEST:
            return {}, [], f"it is nested too deep, more than {_DEEPEST} levels"
        row = json.loads(line.decode(), object_pairs_hook=_without_repeats)
        if not isinstance(row, dict):
            return {}, [], f"it is {_kind(row)}, and not a JSON object"
        found = list(_kinds_in(row, ""))
        if len(set(found)) > MAX_COLUMNS:
            return {}, [], f"it has {len(set(found))} different values, and {MAX_COLUMNS} are the most"
        return row, found, None
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
