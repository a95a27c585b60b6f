"""Paths, folders, globs and manifests to the list of videos a run is about.

Only names and sizes are read here; no video is opened. A folder gives the files with a video's extension, a
file that is named is taken whatever its name, a manifest's own columns ride along as they are.
"""

from __future__ import annotations

import glob
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.rows import INTERNAL_COLUMNS, signal_source
from schemas.video import Part

VIDEO_EXTENSIONS = frozenset(
    [
        "3gp",
        "asf",
        "avi",
        "flv",
        "f4v",
        "gif",
        "h264",
        "hevc",
        "ivf",
        "m2ts",
        "m2v",
        "m4v",
        "mkv",
        "mov",
        "mp4",
        "mpeg",
        "mpg",
        "mts",
        "mxf",
        "ogv",
        "tar",
        "ts",
        "vob",
        "webm",
        "wmv",
        "y4m",
        "zip",
    ]
)
MANIFEST_EXTENSIONS = frozenset({"parquet", "csv", "jsonl"})

REF_SCHEMA = pa.schema(
    [pa.field("uri", pa.string(), nullable=False), pa.field("num_bytes", pa.int64(), nullable=False)]
)


PART_COLUMNS = {"start_seconds": "part_start_seconds", "end_seconds": "part_end_seconds"}
"""Columns of a manifest that say which part of a video a row is about, in seconds after its first frame, and what they
are called from then on."""


class InputError(Exception):
    """The inputs name nothing that could be tokenized; the message says which and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Discovery:
    """What the inputs name."""

    videos: pa.Table
    """``REF_SCHEMA`` and the manifests' columns, one row a video; rows of manifests first, no URI twice but
    where manifests say so."""
    renamed_columns: dict[str, str]
    """Manifest columns that would clash with a shard's own, and the name they got."""
    num_passed_over: int
    """Files in folders without a video's extension."""
    passed_over_extensions: tuple[tuple[str, int], ...]
    """Their extensions and counts, the most frequent first."""


def discover(inputs: Sequence[str], *, signals: Sequence[str] = (), limit: int | None = None) -> Discovery:
    """List the videos that the inputs name.

    Args:
        inputs: files, folders, globs and manifests, local or on any file system that fsspec knows.
        signals: columns of manifests that hold paths of signal files; they come back as ``NAME_source``.
        limit: keep the first so many.

    Raises:
        InputError: an input does not exist, matches nothing or is no usable manifest.
        storage.StorageError: a file system cannot be reached.
    """
    manifests: list[pa.Table] = []
    files: dict[str, int] = {}
    passed_over: Counter[str] = Counter()
    renamed: dict[str, str] = {}
    for text in inputs:
        path = storage.absolute(text)
        if _extension(path) in MANIFEST_EXTENSIONS and not _is_glob(path):
            table, names = _read_manifest(path, signals)
            manifests.append(table)
            renamed |= names
        else:
            found = dict(_list(path, passed_over))
            if not found:
                raise InputError(_nothing_found(path, passed_over))
            files |= found
    for name in signals:
        if not any(signal_source(name) in table.column_names for table in manifests):
            raise InputError(f"no manifest among the inputs has a column '{name}' with the paths of that signal")
    listed = {uri for table in manifests for uri in table["uri"].to_pylist()}
    loose = sorted((uri, size) for uri, size in files.items() if uri not in listed)
    loose_table = pa.table([[u for u, _ in loose], [s for _, s in loose]], schema=REF_SCHEMA)
    try:
        videos = pa.concat_tables([*manifests, loose_table], promote_options="default")
    except pa.ArrowException as error:
        raise InputError(f"the manifests do not agree on their columns' types: {error}") from error
    if videos.num_rows == 0:
        raise InputError(f"no video in {', '.join(storage.public_uri(i) for i in inputs)}: the manifest has no rows")
    return Discovery(
        videos=videos.slice(0, limit),
        renamed_columns=renamed,
        num_passed_over=passed_over.total(),
        passed_over_extensions=tuple(passed_over.most_common()),
    )


def _extension(path: str) -> str:
    if path.startswith(("http://", "https://")):
        path = path.split("?", 1)[0]
    return PurePosixPath(path).suffix.lower().removeprefix(".")


def _is_glob(path: str) -> bool:
    return glob.has_magic(path) and not path.startswith(("http://", "https://"))


def _list(path: str, passed_over: Counter[str]) -> Iterator[tuple[str, int]]:
    """(uri, size) of the files that a path, folder or glob names."""
    fs, inner = storage.filesystem(path)
    try:
        fs.invalidate_cache()
        if _is_glob(path) and not fs.exists(inner):
            matches = fs.glob(inner, detail=True)
            for name, info in matches.items():
                if name.rsplit("/", 1)[-1].startswith(".") and not path.rsplit("/", 1)[-1].startswith("."):
                    continue  # as a shell does
                if info["type"] == "directory":
                    yield from _walk(fs, name, passed_over)
                elif _is_video(name, passed_over):
                    yield _uri(fs, name), _size(info)
        elif fs.isdir(inner):
            yield from _walk(fs, inner, passed_over)
        elif fs.exists(inner):
            yield path, _size(fs.info(inner))
    except FileNotFoundError:
        return  # an object store's way of saying "no such bucket or folder"
    except storage.storage_errors() as error:
        raise storage.StorageError(
            f"cannot list {storage.public_uri(path)}: {storage.describe(error)}; check the name, the network and the "
            "credentials in the environment"
        ) from error


def _walk(fs: Any, folder: str, passed_over: Counter[str]) -> Iterator[tuple[str, int]]:
    for name, info in fs.find(folder, detail=True).items():
        below = name.removeprefix(folder).strip("/").split("/")
        if info["type"] == "file" and not any(part.startswith(".") for part in below) and _is_video(name, passed_over):
            yield _uri(fs, name), _size(info)


def _is_video(name: str, passed_over: Counter[str]) -> bool:
    extension = _extension(name)
    if any("\ud800" <= character <= "\udfff" for character in name):
        passed_over["files whose name is not UTF-8"] += 1
        return False
    if extension in VIDEO_EXTENSIONS:
        return True
    passed_over[f".{extension}" if extension else "(none)"] += 1
    return False


def _uri(fs: Any, name: str) -> str:
    return name if "file" in fs.protocol else str(fs.unstrip_protocol(name))


def _size(info: dict[str, object]) -> int:
    size = info.get("size")
    return int(size) if isinstance(size, int) else -1


def _nothing_found(path: str, passed_over: Counter[str]) -> str:
    shown = storage.public_uri(path)
    if passed_over:
        kinds = ", ".join(f"{count} {extension}" for extension, count in passed_over.most_common(5))
        return (
            f"no video in {shown}: it holds other files only ({kinds}). Files named one by one, or in a manifest, are "
            "tried whatever their extension"
        )
    if _is_glob(path):
        return f"no file matches {shown}: check the pattern, and quote it so that the shell leaves it alone"
    return f"no video in {shown}: there is no such file, or the folder is empty"


def _read_manifest(path: str, signals: Sequence[str]) -> tuple[pa.Table, dict[str, str]]:
    """A manifest as ``REF_SCHEMA`` and its further columns, and which of those were renamed."""
    shown = storage.public_uri(path)
    try:
        data = io.BytesIO(storage.read_bytes(path))
    except storage.StorageError as error:
        raise InputError(f"{error} (given as a manifest)") from error
    try:
        match _extension(path):
            case "parquet":
                table = pq.read_table(data)
            case "csv":
                table = pyarrow.csv.read_csv(data)
            case _:
                table = pyarrow.json.read_json(data)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"manifest {shown} cannot be read: {error}") from error
    if "uri" not in table.column_names:
        raise InputError(f"manifest {shown} has no column 'uri'; its columns are {', '.join(table.column_names)}")
    repeated = [name for name, count in Counter(table.column_names).items() if count > 1]
    if repeated:
        raise InputError(f"manifest {shown} has more than one column named {', '.join(repeated)}")
    uris = table["uri"].to_pylist()
    for number, uri in enumerate(uris, start=1):
        if not isinstance(uri, str) or not uri.strip():
            raise InputError(f"manifest {shown}, row {number}: 'uri' is {uri!r}, not a path or URL")
    folder = path.rsplit("/", 1)[0]
    parts = [name for name in PART_COLUMNS if name in table.column_names]
    for name in set(signals) & set(table.column_names):
        for other in (signal_source(name), f"{name}_seconds"):
            if other in table.column_names:
                raise InputError(f"manifest {shown}: column '{other}' is where signal '{name}' goes: rename it")
        try:
            paths = table[name].cast(pa.string()).to_pylist()
        except pa.ArrowException as error:
            raise InputError(f"manifest {shown}: '{name}' must hold paths of signal files: {error}") from error
        resolved = [None if not text or not text.strip() else _resolve(text.strip(), folder) for text in paths]
        at = table.column_names.index(name)
        table = table.set_column(at, signal_source(name), pa.array(resolved, pa.string()))
    extras = table.drop_columns(["uri", *parts])
    renamed = {name: f"manifest_{name}" for name in extras.column_names if name in INTERNAL_COLUMNS}
    taken = [name for name in renamed.values() if name in extras.column_names]
    if taken:
        raise InputError(f"manifest {shown} has a column '{taken[0]}', which another one would be stored as: rename it")
    extras = extras.rename_columns([renamed.get(name, name) for name in extras.column_names])
    refs = pa.table([[_resolve(u.strip(), folder) for u in uris], [-1] * len(uris)], schema=REF_SCHEMA)
    for name, column in zip(PART_COLUMNS.values(), _parts(table, shown), strict=True):
        refs = refs.append_column(name, column)
    for name in extras.column_names:
        refs = refs.append_column(extras.schema.field(name).with_nullable(True).remove_metadata(), extras[name])
    try:
        pq.write_table(refs.slice(0, 0), io.BytesIO())
    except pa.ArrowException as error:
        raise InputError(f"manifest {shown} has a column that Parquet cannot store: {error}") from error
    return refs, renamed


def _parts(table: pa.Table, shown: str) -> list[pa.Array]:
    """Where the part of each row starts and ends, float64, null where that is the video's own start or end.

    Raises:
        InputError: a time is no number, or a part ends before it starts.
    """
    columns = []
    for name in PART_COLUMNS:
        column = table[name] if name in table.column_names else pa.nulls(table.num_rows)
        try:
            columns.append(column.cast(pa.float64()))
        except pa.ArrowException as error:
            raise InputError(f"manifest {shown}: '{name}' must hold numbers of seconds: {error}") from error
    for number, (start, end) in enumerate(zip(*(c.to_pylist() for c in columns), strict=True), start=1):
        try:
            Part.of(start, end)
        except ValueError as error:
            raise InputError(f"manifest {shown}, row {number}: {error}") from error
    return columns


def _resolve(uri: str, folder: str) -> str:
    """A manifest's path as an absolute one: relative paths are relative to the manifest."""
    if "://" in uri or uri.startswith(("/", "~")):
        return storage.absolute(uri)
    return storage.absolute(f"{folder}/{uri}") if storage.is_local(folder) else f"{folder}/{uri}"
