"""Lance: one table of clips, in the order in which stable-worldmodel and LanceDB read sequences.

A sequence of consecutive clips of one video is an episode: ``episode_idx`` counts episodes, ``step_idx`` the clips of
one. The table is committed once, when all clips are written, so it is never there in part.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from vidshard.jobs.export.layout import Clips, Field, Refusal, Source, Written, signal_values, without
from vidshard.pipeline import storage
from vidshard.schemas.errors import UserError, one_line
from vidshard.schemas.text import readable
from vidshard.schemas.uris import shown_uri

TABLE = "clips.lance"


class Lance:
    """Layout of the table ``clips.lance``; see `Layout`."""

    name = "lance"
    meaning = "a Lance table of clips by episode_idx and step_idx, for stable-worldmodel, LanceDB and pylance"
    fields: Sequence[Field] = (
        Field(
            name="action", kind="signal", meaning="action at each frame; one list of frames x width numbers per clip"
        ),
        Field(name="observation", kind="signal", meaning="state at each frame, as action"),
    )
    whole_runs = True

    def check(self, source: Source) -> list[str]:
        """Check the package, the shapes and the names of columns."""
        _lance()
        source.refuse_several_shapes(self.name)
        if source.columns and source.is_continuous:
            raise UserError(
                "--to lance has one number of frames per clip for --map, and the first clip of a --continuous sequence "
                "has fewer frames than the others: leave out --map; all columns are exported in any case"
            )
        seen = {name: name for name in ("episode_idx", "step_idx", *source.columns)}
        for name, kind in zip(source.schema.names, source.schema.types, strict=True):
            for column in [] if source.columns.get(name) == name else _flat_names(name, kind):
                if column in seen:
                    of = f"of '{readable(name, 80)}' and of '{readable(seen[column], 80)}'"
                    raise UserError(f"--to lance would have two columns '{readable(column, 80)}': {of}")
                seen[column] = name
        return []

    def write(self, source: Source, clips: Clips, before: Sequence[Written], /) -> Written:
        """Write the data file of a batch; it belongs to no table before `finish`."""
        lance = _lance()
        written = Written()
        num_frames = clips.table["frame_pts_seconds"].combine_chunks().value_lengths().to_pylist()
        width: dict[str, int] = next((batch.facts["widths"] for batch in before if batch.num_clips), {})
        arrays: dict[str, list[np.ndarray | None]] = {}
        refused: dict[int, Refusal] = {}
        for name, column in source.columns.items():
            values = clips.table[column].to_pylist()
            arrays[name] = [signal_values(value, n, None) for value, n in zip(values, num_frames, strict=True)]
            width.setdefault(name, next((array.size for array in arrays[name] if array is not None), 0))
            for at, array in enumerate(arrays[name]):
                if array is None or array.size != width[name]:
                    refused.setdefault(at, Refusal.NO_VALUE if values[at] is None else Refusal.UNEVEN_SIGNAL)
        written.refused.update(refused.values())
        chosen = without(clips, list(refused))
        written.num_clips = len(chosen)
        written.facts = {"fragments": [], "widths": width, "episodes": int(chosen.runs.max(initial=-1)) + 1}
        if not len(chosen):
            return written
        signals = {
            name: np.stack(
                [array.reshape(-1) for at, array in enumerate(of_clip) if array is not None and at not in refused]
            )
            for name, of_clip in arrays.items()
        }
        table = _table(source, chosen, signals, first=sum(batch.facts.get("episodes", 0) for batch in before))
        uri, options = _place(source.dest)
        with _lance_errors_named(source.dest):
            fragments = lance.fragment.write_fragments(table, uri, schema=table.schema, storage_options=options)
        written.facts["fragments"] = [fragment.to_json() for fragment in fragments]
        written.facts["schema"] = base64.b64encode(table.schema.serialize()).decode()
        for fragment in written.facts["fragments"]:
            for file in fragment["files"]:
                written.files[f"{TABLE}/data/{file['path']}"] = int(file["file_size_bytes"] or 0)
        return written

    def finish(self, source: Source, batches: Sequence[Written], /) -> dict[str, int]:
        """Commit all data files as one version of the table, and remove those of interrupted attempts."""
        lance = _lance()
        uri, options = _place(source.dest)
        fragments = [fragment for batch in batches for fragment in batch.facts["fragments"]]
        wanted = {file["path"] for fragment in fragments for file in fragment["files"]}
        if fragments:
            schema = next(batch.facts["schema"] for batch in batches if batch.facts["fragments"])
            with _lance_errors_named(source.dest):
                if _committed(lance, uri, options) != wanted:
                    parts = [lance.FragmentMetadata.from_json(json.dumps(fragment)) for fragment in fragments]
                    opened = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(schema)))
                    operation = lance.LanceOperation.Overwrite(opened, parts)
                    lance.LanceDataset.commit(uri, operation, storage_options=options)
        for path in storage.list_files(storage.join(source.dest, TABLE, "data"), ".lance"):
            if path.rsplit("/", 1)[-1] not in wanted:
                storage.remove(path)
        return {}


def _flat_names(name: str, kind: pa.DataType) -> list[str]:
    """Columns that a column of the shards becomes: fields of a struct are columns, and dots in names are ``_``."""
    if pa.types.is_struct(kind):
        return [column for field in kind for column in _flat_names(f"{name}_{field.name}", field.type)]
    return [name.replace(".", "_")]


def _table(source: Source, clips: Clips, signals: Mapping[str, np.ndarray], *, first: int) -> pa.Table:
    """The rows of clips; ``first`` is the number of the first episode."""
    starts = np.searchsorted(clips.runs, clips.runs)
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "episode_idx": pa.array(clips.runs + first, pa.int64()),
        "step_idx": pa.array(np.arange(len(clips)) - starts, pa.int64()),
    }
    metadata: dict[str, dict[str, str]] = {}
    for name, values in signals.items():
        columns[name] = _fixed_lists(values)
    for column in source.payload:
        name = column.name.replace(".", "_")
        columns[name] = _fixed_lists(clips.payload[column.name].reshape(len(clips), -1))
        metadata[name] = {"shape": json.dumps(list(column.shape))}
    for name in clips.table.column_names:
        if source.columns.get(name) != name:
            columns |= _flattened(name, clips.table[name].combine_chunks())
    fields = [pa.field(name, values.type, metadata=metadata.get(name)) for name, values in columns.items()]
    return pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields, metadata=source.metadata))


def _fixed_lists(values: np.ndarray) -> pa.Array:
    flat = np.ascontiguousarray(values).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), values.shape[1])


def _flattened(name: str, values: pa.Array) -> dict[str, pa.Array]:
    if pa.types.is_struct(values.type):
        inner = zip(values.type, values.flatten(), strict=True)
        return {n: array for field, part in inner for n, array in _flattened(f"{name}_{field.name}", part).items()}
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return {name.replace(".", "_"): values}


def _lance() -> Any:
    """The package, which is optional.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("LANCE_LOG", "error")  # it warns of every table that is new
    try:
        return importlib.import_module("lance")
    except ImportError as error:
        raise UserError("--to lance needs the package pylance: pip install 'vidshard[export]'") from error


def _place(dest: str) -> tuple[str, dict[str, str]]:
    """URI of the table, and the options by which lance reaches the storage that fsspec is set up for."""
    uri = storage.join(dest, TABLE)
    options: dict[str, str] = {}
    fs, _ = storage.filesystem(dest)
    if hasattr(fs, "call_s3"):
        endpoint = getattr(fs, "endpoint_url", None) or (fs.client_kwargs or {}).get("endpoint_url")
        endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            options = {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}
    return uri, options


def _committed(lance: Any, uri: str, options: dict[str, str]) -> set[str] | None:
    """Names of the data files of the table; None where there is no table."""
    try:
        table = lance.dataset(uri, storage_options=options)
    except (ValueError, FileNotFoundError):
        return None
    return {file.path for fragment in table.get_fragments() for file in fragment.data_files()}


@contextmanager
def _lance_errors_named(dest: str) -> Iterator[None]:
    """Turn errors of lance, which has no classes of its own, into errors for the user."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise storage.StorageError(
            f"lance cannot write {shown_uri(dest)}: {one_line(error, 300, about=dest)}"
        ) from error
