"""Selection of the clips of an export: which ones, in which batches, and reading them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pyarrow as pa

from vidshard.jobs.export.layout import BATCH_BYTES, Clips, Field, Integers, Layout, Source
from vidshard.models.tokenizer import parse_config
from vidshard.pipeline.output.parquet import named_if_damaged
from vidshard.pipeline.output.shard_reader import payload_arrays
from vidshard.pipeline.reader.catalog import Catalog, shapes_of
from vidshard.pipeline.reader.files import ShardFiles
from vidshard.pipeline.reader.units import find_units, runs_of_rows, shards_of
from vidshard.pipeline.reader.where import near_names
from vidshard.schemas.errors import UserError
from vidshard.schemas.text import readable
from vidshard.schemas.tokens import payload_bytes
from vidshard.schemas.uris import shown_uri

_READERS = 8


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Clips that are written and recorded together."""

    key: str
    """Name that is the same in a later run as long as the batch has the same clips."""
    rows: Integers
    """int64 (clips,): numbers of the clips in the catalog, in the order in which they are written."""
    runs: Integers
    """int64 (clips,): number of the sequence of consecutive clips that each is of; non-decreasing."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Clips of an export, in batches; and what is left out before."""

    batches: list[Batch]
    num_left_out: int
    """Clips that the filter, or the limit, leaves out."""
    num_duplicates: int
    """Clips whose id another clip before them has."""

    @property
    def num_clips(self) -> int:
        """Clips of all batches."""
        return sum(len(batch.rows) for batch in self.batches)


def select(catalog: Catalog, files: ShardFiles, layout: Layout, *, where: str | None, limit: int | None) -> Selection:
    """Select the clips, and divide them into batches.

    Raises:
        UserError: the filter is wrong, or no clip passes it.
        ShardError: a shard is damaged.
    """
    units = find_units(catalog, files, where=where, sequence=None, stride=None)
    rows = np.arange(catalog.num_rows) if units.rows is None else units.rows[:, 0]
    rows = rows[:limit]
    repeated = _repeated(catalog, files, rows)
    kept = rows[~repeated]
    if layout.whole_runs:
        kept, runs = runs_of_rows(catalog, files, kept)
        batches = _whole_runs(catalog, kept, runs)
    else:
        batches = _of_shards(catalog, kept)
    return Selection(batches=batches, num_left_out=catalog.num_rows - len(rows), num_duplicates=int(repeated.sum()))


def _repeated(catalog: Catalog, files: ShardFiles, rows: Integers) -> np.ndarray:
    """Rows whose clip id a row before them has: bool (rows,)."""
    groups = np.searchsorted(catalog.group_ends, rows, side="right")
    wanted = np.unique(groups)

    def ids_of(group: int) -> list[str]:
        table = files.group(int(catalog.group_shard[group]), int(catalog.group_number[group]), ["clip_id"])
        here = rows[groups == group] if len(wanted) == 1 else rows[slice(*np.searchsorted(groups, [group, group + 1]))]
        ids: list[str] = table["clip_id"].take(pa.array(here - _start(catalog, group))).to_pylist()
        return ids

    # hashes, as the texts of a hundred million ids take 10 GB; equal hashes are compared by their texts
    hashes = np.empty(len(rows), np.int64)
    with ThreadPoolExecutor(_READERS) as pool:
        for group, ids in zip(wanted, pool.map(ids_of, wanted), strict=True):
            first, last = np.searchsorted(groups, [group, group + 1])
            hashes[first:last] = [hash(clip_id) for clip_id in ids]
    order = np.argsort(hashes, kind="stable")
    again = np.zeros(len(rows), bool)
    again[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
    if again.any():
        suspects = np.flatnonzero(np.isin(hashes, hashes[again]))
        found: set[str] = set()
        texts: dict[int, list[str]] = {}
        for at in suspects:
            group = int(groups[at])
            ids = texts.setdefault(group, ids_of(group))
            clip_id = ids[int(at - np.searchsorted(groups, group))]
            again[at] = clip_id in found
            found.add(clip_id)
    return again


def _start(catalog: Catalog, group: int) -> int:
    return int(catalog.group_ends[group - 1]) if group else 0


def _bytes_of(catalog: Catalog, rows: Integers) -> Integers:
    """Payload of each row in bytes."""
    sizes = np.array([payload_bytes(provenance.payload) for provenance in catalog.shard_provenance])
    return np.asarray(sizes[shards_of(catalog, rows)], np.int64)


def _of_shards(catalog: Catalog, rows: Integers) -> list[Batch]:
    """Batches of clips of one shard, in the order of the shards."""
    shards = shards_of(catalog, rows)
    batches: list[Batch] = []
    for shard in np.unique(shards):
        here = rows[shards == shard]
        start = _start(catalog, int(np.searchsorted(catalog.group_shard, shard)))
        per_batch = max(1, BATCH_BYTES // int(_bytes_of(catalog, here[:1])[0]))
        for first in range(0, len(here), per_batch):
            some = here[first : first + per_batch]
            name = catalog.paths[shard].rsplit("/", 1)[-1]
            key = f"{name} {int(some[0]) - start} to {int(some[-1]) - start}: {len(some)}"
            batches.append(Batch(key=key, rows=some, runs=np.zeros(len(some), np.int64)))
    return batches


def _whole_runs(catalog: Catalog, rows: Integers, runs: Integers) -> list[Batch]:
    """Batches of whole sequences of consecutive clips."""
    if not len(rows):
        return []
    ends = np.flatnonzero(np.append(np.diff(runs) != 0, True)) + 1
    until = np.cumsum(_bytes_of(catalog, rows))
    batches: list[Batch] = []
    first = 0
    while first < len(rows):
        before = until[first - 1] if first else 0
        fitting = ends[(ends > first) & (until[ends - 1] - before <= BATCH_BYTES)]
        last = int(fitting[-1]) if len(fitting) else int(ends[np.searchsorted(ends, first, side="right")])
        batches.append(Batch(key=str(len(batches)), rows=rows[first:last], runs=runs[first:last]))
        first = last
    return batches


def read_clips(catalog: Catalog, files: ShardFiles, source: Source, batch: Batch, number: int) -> Clips:
    """Read the clips of a batch, all columns.

    Raises:
        ShardError: a shard is damaged, or holds impossible values.
        storage.StorageError: the storage failed.
    """
    groups = np.searchsorted(catalog.group_ends, batch.rows, side="right")
    tables: list[pa.Table] = []
    payloads: list[dict[str, np.ndarray]] = []
    places: list[Integers] = []
    for group in np.unique(groups):
        places.append(np.flatnonzero(groups == group))
        here = batch.rows[places[-1]] - _start(catalog, int(group))
        shard = int(catalog.group_shard[group])
        table = files.group(shard, int(catalog.group_number[group]), catalog.shard_schema[shard].names)
        with named_if_damaged(catalog.paths[shard], remedy=""):
            payload = payload_arrays(table, catalog.shard_provenance[shard].payload)
            payloads.append({name: values[here] for name, values in payload.items()})
            table = table.take(pa.array(here))
            for name in ("clip_id", "frame_pts_seconds", "num_valid_frames", "fps"):
                if table[name].null_count:
                    raise ValueError(f"a clip lacks its '{name}'")
            columns = [
                table[f.name] if f.name in table.column_names else pa.nulls(len(here), f.type) for f in source.schema
            ]
            tables.append(pa.Table.from_arrays(columns, schema=source.schema))
    order = np.argsort(np.concatenate(places))
    names = list(payloads[0])
    return Clips(
        number=number,
        table=pa.concat_tables(tables).take(pa.array(order)).combine_chunks(),
        payload={name: np.concatenate([payload[name] for payload in payloads])[order] for name in names},
        runs=batch.runs,
    )


def source_of(catalog: Catalog, selection: Selection, layout: Layout, dest: str, named: Mapping[str, str]) -> Source:
    """Facts about the selected clips.

    Args:
        named: columns that fill fields of the layout, by field.

    Raises:
        UserError: a field or a column is unknown, a needed one is missing, or the tokenizer is unknown.
    """
    rows = np.concatenate([np.empty(0, np.int64), *(batch.rows for batch in selection.batches)])
    shards = np.unique(shards_of(catalog, rows))
    provenance = catalog.shard_provenance[shards[0]] if len(shards) else catalog.provenance
    payload = {column.name for column in provenance.payload}
    found = {id(schema): schema for schema in (catalog.shard_schema[shard] for shard in shards)}
    others = [pa.schema([f for f in schema if f.name not in payload]) for schema in found.values()]
    try:
        schema = pa.unify_schemas(others or [catalog.schema])
    except pa.ArrowException as error:
        raise UserError(
            f"shards of {shown_uri(catalog.paths[0])} and others differ in columns: {error!s:.200}"
        ) from error
    try:
        config = parse_config(provenance.tokenizer)
        fps = Fraction(str(provenance.run["fps"]))
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{shown_uri(catalog.paths[0])} cannot be exported: {error!s:.300}") from error
    return Source(
        dest=dest,
        provenance=provenance,
        payload=provenance.payload,
        shapes=list(dict.fromkeys(shapes_of(catalog.shard_provenance[shard].payload) for shard in shards)),
        schema=schema.remove_metadata(),
        columns=columns_of(layout.name, layout.fields, schema, named),
        fps=fps,
        is_continuous=bool(provenance.run.get("continuous")),
        time_stride=config.time_stride,
        is_causal=config.is_causal,
    )


def columns_of(layout: str, fields: Sequence[Field], schema: pa.Schema, named: Mapping[str, str]) -> dict[str, str]:
    """Column that fills each field of a layout: the one that is named for it, else the one of its own name.

    Raises:
        UserError: a field or a column is unknown or of another type, or a needed one is missing.
    """
    known = {field.name: field for field in fields}
    for name in named:
        if name not in known:
            takes = f"it has {', '.join(known)}" if known else "it takes every column as it is"
            raise UserError(f"--map {readable(name, 80)}: --to {layout} has no such field; {takes}")
    columns: dict[str, str] = {}
    for name, field in known.items():
        column = named.get(name, name)
        if column not in schema.names:
            if name in named:
                near = near_names(column, schema.names)
                raise UserError(f"--map {name}={readable(column, 80)}: the shards have no such column: {near}")
            if field.is_required:
                raise UserError(
                    f"--to {layout} needs {field.meaning} ({name}): name the column with --map {name}=COLUMN. "
                    "Signals get into the shards with `vidshard tokenize --signals`"
                )
            continue
        kind = schema.field(column).type
        if not _fits(field, kind):
            raise UserError(
                f"--to {layout}: column '{readable(column, 80)}' is {readable(kind, 80)}, and {name} takes "
                f"{_TAKES[field.kind]}: --map {name}=COLUMN names another one"
            )
        columns[name] = column
    return columns


_TAKES = {"text": "text", "signal": "a list with numbers for each frame", "matrix": "a list of lists of numbers"}


def _fits(field: Field, kind: pa.DataType) -> bool:
    if field.kind == "text":
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
    depth = 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    is_number = pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    return is_number and (depth == 2 or (depth == 1 and field.kind == "signal"))
