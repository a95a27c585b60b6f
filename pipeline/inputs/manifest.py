"""Manifests: Parquet, CSV and JSON lines files that list videos, one a row, with parts, signals and further columns.

A row that names no video, or holds something else than it should, is a fault of that row: it keeps its place in the
table, with the fault in a column. A fault of the file or of a column as a whole is an error.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from vidshard.pipeline import storage
from vidshard.pipeline.inputs.manifest_csv import read_csv
from vidshard.pipeline.inputs.manifest_file import MAX_COLUMNS, RowFaults, valid_texts
from vidshard.pipeline.inputs.manifest_json import read_json_lines
from vidshard.pipeline.output.entries import row_fault
from vidshard.pipeline.output.parquet import BoundedParquet
from vidshard.pipeline.rows import INTERNAL_COLUMNS, signal_source
from vidshard.schemas.errors import VidshardError, one_line
from vidshard.schemas.locations import map_locations
from vidshard.schemas.text import readable
from vidshard.schemas.video import Part

REF_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("fingerprint", pa.string()),
    ]
)
"""URI of a video; its size in bytes, -1 where it is unknown; its size and time stamp, or tag, as the storage states
them, null where the storage was not asked."""

MAX_MANIFEST_BYTES = 2 << 30
"""Largest manifest that is read; a million rows of some columns take about 100 MB."""

PART_COLUMNS = {"start_seconds": "part_start_seconds", "end_seconds": "part_end_seconds"}
"""Columns of a manifest that name the part of a video, in seconds after its first frame, and the columns that they
become."""

_ROWS_AT_ONCE = 1 << 16
_TIMES = (
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_null,
)


class InputError(VidshardError):
    """The inputs name nothing that could be tokenized; the message names the input and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The rows of a manifest."""

    videos: pa.Table
    """``REF_SCHEMA``, the part's times, ``NAME_source`` of each signal, and the further columns. If a row has a fault,
    also a column ``fault``: why it names no video, null for the others. A row without a usable ``uri`` has the
    manifest's name and its own number instead."""
    renamed_columns: dict[str, str]
    """Columns that would clash with a shard's own, and their new names."""


def read_manifest(path: str, signals: Sequence[str] = (), *, extension: str) -> Manifest:
    """Read a manifest.

    Args:
        path: the file, absolute or at a URL. Relative paths in it start at its folder.
        signals: columns that hold paths of signal files; they come back as ``NAME_source``.
        extension: "parquet", "csv" or "jsonl".

    Raises:
        InputError: it cannot be read, lacks the column ``uri``, or a column as a whole is not what it should be.
    """
    faults = RowFaults()
    table = _read_table(path, storage.public_uri(path), extension, faults, ("uri", *signals))
    return manifest_of(table, faults, path, signals)


def manifest_of(table: pa.Table, faults: RowFaults, path: str, signals: Sequence[str] = ()) -> Manifest:
    """Check the rows of a manifest, or of another file that lists videos.

    Args:
        table: its columns.
        faults: of its rows, found so far.
        path: the file, absolute or at a URL. Relative paths in it start at its folder.
        signals: columns that hold paths of signal files; they come back as ``NAME_source``.

    Raises:
        InputError: it lacks the column ``uri``, or a column as a whole is not what it should be.
    """
    shown = storage.public_uri(path)
    repeated = [name for name, count in Counter(table.column_names).items() if count > 1]
    if repeated:
        raise InputError(f"manifest {shown} has more than one column named {', '.join(repeated)}")
    if table.num_columns > MAX_COLUMNS:
        raise InputError(f"manifest {shown} has {table.num_columns} columns, and {MAX_COLUMNS} are the most")
    if "uri" not in table.column_names:
        shown_names = ", ".join(f"'{readable(name, 40)}'" for name in table.column_names[:20])
        raise InputError(f"manifest {shown} has no column 'uri'; its columns are {shown_names}")
    if "" in table.column_names:
        raise InputError(f"manifest {shown} has a column without a name: give it one, or take it away")
    folder = path.rsplit("/", 1)[0]
    uris = _uris(_as_text(table, "uri", shown), folder, faults)
    table = _with_signal_sources(table, signals, folder, shown)
    parts = _parts(table, shown, faults)
    extras, renamed = _further_columns(table, shown)
    names = [uri if uri is not None else f"{shown} row {row}" for row, uri in enumerate(uris, start=1)]
    refs = pa.Table.from_arrays(
        [pa.array(names, pa.string()), pa.repeat(-1, len(names)), pa.nulls(len(names), pa.string())], schema=REF_SCHEMA
    )
    fields = [*refs.schema, *(pa.field(name, pa.float64()) for name in PART_COLUMNS.values())]
    fields += [field.with_nullable(True).remove_metadata() for field in extras.schema]
    columns = [*refs.columns, *parts, *extras.columns]
    if faults:
        texts = [None if text is None else row_fault(row, shown, text) for row, text in faults.column(len(names))]
        fields.append(pa.field("fault", pa.string()))
        columns.append(pa.array(texts, pa.string()))
    refs = pa.Table.from_arrays(columns, schema=pa.schema(fields))
    try:
        pq.write_table(refs.slice(0, 0), io.BytesIO())
    except pa.ArrowException as error:
        raise InputError(f"manifest {shown} has a column that Parquet cannot store: {error}") from error
    return Manifest(videos=refs, renamed_columns=renamed)


def _read_table(path: str, shown: str, extension: str, faults: RowFaults, texts: Sequence[str]) -> pa.Table:
    """Read a Parquet, CSV or JSON lines file.

    Args:
        texts: names of the columns that should hold text.
    """
    try:
        data = io.BytesIO(storage.read_bytes(path, max_bytes=MAX_MANIFEST_BYTES))
    except storage.StorageError as error:
        raise InputError(f"{error} (given as a manifest)") from error
    try:
        match extension:
            case "parquet":
                # in pieces: reading a million rows at once takes 290 MB for a table of 90, so 200
                BoundedParquet(data).check_size()
                parquet = pq.ParquetFile(data, pre_buffer=False)
                table = pa.Table.from_batches(
                    parquet.iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False), parquet.schema_arrow
                )
            case "csv":
                table = read_csv(data, faults, texts)
            case _:
                kinds = dict.fromkeys(texts, "text") | dict.fromkeys(PART_COLUMNS, "a number")
                table = read_json_lines(data, faults, kinds)
        table = valid_texts(table, faults)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"manifest {shown} cannot be read: {one_line(error)}") from error
    return table


def _as_text(table: pa.Table, name: str, shown: str) -> pa.ChunkedArray:
    """A column as text.

    Raises:
        InputError: it holds something else.
    """
    column = table[name]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise InputError(f"manifest {shown}: column '{name}' must hold text, and holds {column.type}")
    return column.cast(pa.string())


MAX_URI_CHARACTERS = 32 << 10
"""Longest location of a row. Paths have up to 4 KiB, keys of object stores 1 KiB; signed URLs are the longest."""


def _uris(column: pa.ChunkedArray, folder: str, faults: RowFaults) -> list[str | None]:
    """A manifest's paths made absolute; None where a row has none."""
    uris: list[str | None] = []
    for row, uri in enumerate(_values(column)):
        if uri is None or not uri.strip():
            faults.add(row, "it has no 'uri'" if uri is None else "its 'uri' is empty")
            uris.append(None)
        elif len(uri) > MAX_URI_CHARACTERS:
            faults.add(row, f"its 'uri' has {len(uri):,} characters, and {MAX_URI_CHARACTERS:,} are the most")
            uris.append(None)
        else:
            try:
                uris.append(_located(uri.strip() if "://" in uri else uri, folder))
            except Exception as error:  # noqa: BLE001  whatever an address does, it is this row's fault
                faults.add(row, f"its 'uri' is no location ({type(error).__name__})")
                uris.append(None)
    return uris


def _located(uri: str, folder: str) -> str:
    """A location, and those in its options, made absolute."""
    return map_locations(uri, lambda path: _resolve(path, folder)) if "#" in uri else _resolve(uri, folder)


def _values(column: pa.ChunkedArray) -> Iterable[str | None]:
    for chunk in column.chunks:
        for start in range(0, len(chunk), _ROWS_AT_ONCE):
            yield from chunk.slice(start, _ROWS_AT_ONCE).to_pylist()


def _with_signal_sources(table: pa.Table, signals: Sequence[str], folder: str, shown: str) -> pa.Table:
    """Replace each column of a signal by ``NAME_source``, the absolute paths of its files."""
    for name in sorted(set(signals) & set(table.column_names)):
        for other in (signal_source(name), f"{name}_seconds"):
            if other in table.column_names:
                raise InputError(f"manifest {shown}: column '{other}' is where signal '{name}' goes: rename it")
        resolved = [
            None if not text or not text.strip() else map_locations(text.strip(), lambda path: _resolve(path, folder))
            for text in _values(_as_text(table, name, shown))
        ]
        at = table.column_names.index(name)
        table = table.set_column(at, signal_source(name), pa.array(resolved, pa.string()))
    return table


def _further_columns(table: pa.Table, shown: str) -> tuple[pa.Table, dict[str, str]]:
    """The user's own columns; those named as columns of ours are renamed to ``manifest_NAME``."""
    extras = table.drop_columns(["uri", *(name for name in PART_COLUMNS if name in table.column_names)])
    renamed = {name: f"manifest_{name}" for name in extras.column_names if name in INTERNAL_COLUMNS}
    taken = [name for name in renamed.values() if name in extras.column_names]
    if taken:
        raise InputError(f"manifest {shown} has a column '{taken[0]}', which another one would be stored as: rename it")
    return extras.rename_columns([renamed.get(name, name) for name in extras.column_names]), renamed


def _parts(table: pa.Table, shown: str, faults: RowFaults) -> list[pa.Array]:
    """Start and end of each row's part in seconds, float64, null for the video's own start or end.

    Raises:
        InputError: a column holds neither numbers nor text.
    """
    if not any(name in table.column_names for name in PART_COLUMNS):
        return [pa.nulls(table.num_rows, pa.float64())] * 2
    columns = [
        _seconds(table, name, shown, faults) if name in table.column_names else [None] * table.num_rows
        for name in PART_COLUMNS
    ]
    for row, (start, end) in enumerate(zip(*columns, strict=True)):
        try:
            Part.of(start, end)
        except ValueError as error:
            faults.add(row, str(error))
            columns[0][row] = columns[1][row] = None
    return [pa.array(column, pa.float64()) for column in columns]


def _seconds(table: pa.Table, name: str, shown: str, faults: RowFaults) -> list[float | None]:
    """A column of times as floats; None where a row has none, or no number.

    Raises:
        InputError: the column holds neither numbers nor text.
    """
    column = table[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not any(is_kind(column.type) for is_kind in _TIMES):
        raise InputError(f"manifest {shown}: column '{name}' must hold numbers of seconds, and holds {column.type}")
    try:
        times: list[float | None] = column.cast(pa.float64()).to_pylist()
    except pa.ArrowException:
        times = []
        for row, value in enumerate(column.to_pylist()):
            is_blank = value is None or (isinstance(value, str) and not value.strip())
            try:
                times.append(None if is_blank else pa.scalar(value).cast(pa.float64()).as_py())
            except (pa.ArrowException, OverflowError):
                faults.add(row, f"'{name}' must be a number of seconds, and is {readable(repr(value), 80)}")
                times.append(None)
    return times


def _resolve(uri: str, folder: str) -> str:
    """Make a path of a manifest absolute: relative paths are relative to the manifest's folder."""
    if "://" in uri or _is_absolute(uri):
        return storage.absolute(uri)
    return storage.absolute(f"{folder}/{uri}") if storage.is_local(folder) else f"{folder}/{uri}"


def _is_absolute(path: str) -> bool:
    """Whether a path begins at the root, or in somebody's home."""
    try:
        return os.path.expanduser(path).startswith("/")
    except ValueError:  # a NUL or a lone surrogate: nobody has such a name
        return False
