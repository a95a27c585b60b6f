"""Catalog of what is read: the shards of one or several outputs, their row groups, columns and provenance.

Only the ends of the shards are read. Outputs that should not be mixed are refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vidshard.pipeline.output.parquet import BoundedParquet, named_if_damaged
from vidshard.pipeline.output.parquet_footer import ColumnRanges, column_ranges
from vidshard.pipeline.output.shard_reader import ShardError, checked_provenance, output_shards
from vidshard.pipeline.reader.files import open_end
from vidshard.pipeline.reader.where import near_names
from vidshard.schemas.errors import UserError
from vidshard.schemas.tokens import Payload, PayloadColumn, Provenance
from vidshard.schemas.uris import shown_uri

_READERS = 16

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
"""One path or several."""

MIXES = ("weights", "rates", "lengths", "geometries", "versions")
"""Kinds of differences between shards that are refused unless they are allowed."""


def _identity(*names: str) -> Callable[[Provenance], str]:
    def values(provenance: Provenance) -> str:
        found = {name: provenance.identity.get(name, provenance.run.get(name)) for name in names}
        return ", ".join(f"{k} {json.dumps(v, sort_keys=True)}" for k, v in found.items() if v is not None)

    return values


_FACTS: Mapping[str, tuple[str, Callable[[Provenance], str]]] = {
    "weights": ("weights", lambda p: f"{p.tokenizer.get('name')} {p.weights_sha256[:16]}"),
    "rates": ("frame rate", _identity("fps")),
    "lengths": ("clip length", _identity("frames", "pad_frames", "stride_seconds", "continuous")),
    "geometries": ("frame geometry", _identity("size", "buckets", "resize")),
    "versions": ("format version", lambda p: str(p.format_version)),
}
"""By kind of difference: its name in the error, and what is compared."""


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Shards, in order, and what their ends say."""

    paths: list[str]
    group_shard: npt.NDArray[np.int64]
    """int64 (row groups,): number of the shard."""
    group_number: npt.NDArray[np.int64]
    """int64 (row groups,): number of the row group in its shard."""
    group_ends: npt.NDArray[np.int64]
    """int64 (row groups,): rows up to the end of each row group; rows are numbered through all shards."""
    shard_provenance: list[Provenance]
    """Provenance of each shard; equal ones are one object."""
    shard_schema: list[pa.Schema]
    """Columns of each shard; equal ones are one object."""
    shard_output: npt.NDArray[np.int64]
    """int64 (shards,): number of the path in `outputs` that names the shard."""
    outputs: list[str]
    """The paths that were given: outputs, folders of shards, or shards."""
    shard_bytes: npt.NDArray[np.int64]
    """int64 (shards,): size of the file."""
    shard_ranges: list[Mapping[str, ColumnRanges]]
    """Place of the payload columns in each shard, as far as it could be found."""

    @property
    def num_rows(self) -> int:
        """Rows of all shards."""
        return int(self.group_ends[-1]) if len(self.group_ends) else 0

    @property
    def schema(self) -> pa.Schema:
        """Columns of the first shard."""
        return self.shard_schema[0]

    @property
    def provenance(self) -> Provenance:
        """Provenance of the first shard."""
        return self.shard_provenance[0]

    @cached_property
    def shapes(self) -> list[tuple[tuple[str, tuple[int, ...]], ...]]:
        """Payload shapes that occur: (column, shape) of each column."""
        return list(dict.fromkeys(shapes_of(p.payload) for p in self.shard_provenance))

    @cached_property
    def shard_shape(self) -> npt.NDArray[np.int64]:
        """int64 (shards,): number of the payload shapes in `shapes`."""
        number = {shapes: at for at, shapes in enumerate(self.shapes)}
        return np.array([number[shapes_of(p.payload)] for p in self.shard_provenance], np.int64)

    def payload_column(self, name: str) -> PayloadColumn | None:
        """Payload column of this name, as the first shard has it; None for another column."""
        return next((column for column in self.provenance.payload if column.name == name), None)

    def check_column(self, name: str, what: str) -> None:
        """Check that every shard has a column.

        Args:
            name: the column.
            what: kind of column, for the error.

        Raises:
            UserError: a shard lacks it; the message has the nearest names.
        """
        for path, schema in zip(self.paths, self.shard_schema, strict=True):
            if name not in schema.names:
                raise UserError(f"{shown_uri(path)} has no {what} '{name}': {near_names(name, schema.names)}")

    @cached_property
    def digests(self) -> tuple[str, str]:
        """Digest of names, row groups, weights and identities of the shards, and that of before, without identities.

        They are the same for a copy at another place.
        """
        before = hashlib.blake2b(digest_size=8)
        for at, (path, provenance) in enumerate(zip(self.paths, self.shard_provenance, strict=True)):
            ends = self.group_ends[self.group_shard == at] if len(self.paths) < 256 else self._ends_of(at)
            before.update(f"{path.rsplit('/', 1)[-1]} {provenance.weights_sha256} {ends.tolist()}\n".encode())
        now = before.copy()
        identities = {
            id(p.identity): json.dumps(p.identity, sort_keys=True, default=str) for p in self.shard_provenance
        }
        for provenance in self.shard_provenance:
            now.update(identities[id(provenance.identity)].encode())
        return now.hexdigest(), before.hexdigest()

    def _ends_of(self, shard: int) -> npt.NDArray[np.int64]:
        first, last = np.searchsorted(self.group_shard, [shard, shard + 1])
        return self.group_ends[first:last]


def shapes_of(payload: Payload) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(column, shape) of each column of a payload."""
    return tuple((column.name, column.shape) for column in payload)


def paths_of(paths: Paths) -> list[str]:
    """The paths that were given, as texts.

    Raises:
        UserError: one is no path.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else paths
    if isinstance(given, Mapping | bytes) or not isinstance(given, Iterable):
        raise UserError(f"outputs are named by a path or a list of paths, got {paths!r:.200}")
    found = list(given)
    for path in found:
        if not isinstance(path, str | os.PathLike):
            raise UserError(f"{path!r:.200} is no path of an output")
    return [os.fspath(path) for path in found]


def read_catalog(paths: Paths, *, allow_mixed: bool | Collection[str] = ()) -> Catalog:
    """Read the ends of all shards of one or several outputs.

    Args:
        paths: output folders, folders of shards, or shards; local or remote.
        allow_mixed: kinds of `MIXES` that may differ between shards; True for all.

    Raises:
        ShardError: an output has no shards, or a shard is damaged.
        UserError: shards differ that may not be mixed; the message names both.
    """
    allowed = set(MIXES) if allow_mixed is True else set(allow_mixed or ())
    if unknown := allowed - set(MIXES):
        raise UserError(f"allow_mixed: there is no kind {sorted(unknown)[0]!r}; there are: {', '.join(MIXES)}")
    named = paths_of(paths)
    of_path = [output_shards(path) for path in named]
    shards = [shard for found in of_path for shard in found]
    if not shards:
        raise UserError("there is nothing to read: no output was named")
    if repeated := {path for path in shards if shards.count(path) > 1} if len(shards) > len(set(shards)) else set():
        raise UserError(f"{shown_uri(sorted(repeated)[0])} is named twice")
    with ThreadPoolExecutor(_READERS) as pool:
        ends = list(pool.map(_read_end, shards))
    provenances: dict[str, Provenance] = {}
    schemas: dict[pa.Schema, pa.Schema] = {}
    rows: list[int] = []
    group_shard: list[int] = []
    group_number: list[int] = []
    shard_provenance, shard_schema = [], []
    for at, end in enumerate(ends):
        key = json.dumps(end.provenance.to_metadata())
        shard_provenance.append(provenances.setdefault(key, end.provenance))
        shard_schema.append(schemas.setdefault(end.schema, end.schema))
        rows += end.group_rows
        group_shard += [at] * len(end.group_rows)
        group_number += range(len(end.group_rows))
    catalog = Catalog(
        paths=shards,
        group_shard=np.array(group_shard, np.int64),
        group_number=np.array(group_number, np.int64),
        group_ends=np.cumsum(np.array(rows, np.int64)),
        shard_provenance=shard_provenance,
        shard_schema=shard_schema,
        shard_output=np.repeat(np.arange(len(named)), [len(found) for found in of_path]),
        outputs=named,
        shard_bytes=np.array([end.num_bytes for end in ends], np.int64),
        shard_ranges=[end.ranges for end in ends],
    )
    if not catalog.num_rows:
        raise ShardError(f"{shown_uri(shards[0])} holds no clips")
    _refuse_mixed(catalog, allowed)
    return catalog


@dataclass(frozen=True, kw_only=True)
class _End:
    """Statements of a shard's footer."""

    provenance: Provenance
    schema: pa.Schema
    group_rows: list[int]
    num_bytes: int
    ranges: Mapping[str, ColumnRanges]


def _read_end(path: str) -> _End:
    with open_end(path) as file, named_if_damaged(path, remedy=""):
        parquet = BoundedParquet(file)
        provenance = checked_provenance(parquet, path)
        metadata = parquet.metadata
        rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
            raise ValueError("its footer states impossible numbers of rows")
        leaves = [parquet.schema.column(at).path for at in range(metadata.num_columns)]
        ranges: dict[str, ColumnRanges] = {}
        for column in provenance.payload:
            [leaf] = [leaf for leaf in leaves if leaf.rpartition(".list.")[0] == column.name]
            found = column_ranges(file, leaf, len(rows))
            if found is not None:
                ranges[column.name] = found
        return _End(
            provenance=provenance,
            schema=parquet.schema_arrow.remove_metadata(),
            group_rows=rows,
            num_bytes=file.seek(0, os.SEEK_END),
            ranges=ranges,
        )


def _refuse_mixed(catalog: Catalog, allowed: Collection[str]) -> None:
    first, first_path = catalog.provenance, catalog.paths[0]
    seen = {id(first)}
    for path, other in zip(catalog.paths, catalog.shard_provenance, strict=True):
        if id(other) in seen:
            continue
        seen.add(id(other))
        for kind, (name, fact) in _FACTS.items():
            if kind not in allowed and fact(first) != fact(other):
                raise UserError(
                    f"{shown_uri(first_path)} and {shown_uri(path)} differ in {name}: {fact(first)}; {fact(other)}. "
                    f"If they may be mixed: allow_mixed=['{kind}']"
                )
        if [c.name for c in first.payload] != [c.name for c in other.payload] or [c.dtype for c in first.payload] != [
            c.dtype for c in other.payload
        ]:
            names = [", ".join(f"{c.name} ({c.dtype})" for c in p.payload) for p in (first, other)]
            raise UserError(
                f"{shown_uri(first_path)} and {shown_uri(path)} have other payload columns: {names[0]}; {names[1]}"
            )
