"""Source of batches: the rows of units, gathered from row groups. `pipeline.reader.read_ahead` has them in time."""

from __future__ import annotations

import difflib
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vidshard.pipeline import storage
from vidshard.pipeline.output.parquet import named_if_damaged
from vidshard.pipeline.reader.catalog import Catalog, Paths, paths_of, read_catalog
from vidshard.pipeline.reader.columns import Column, PayloadValues, column_of, shaped, signal_of
from vidshard.pipeline.reader.files import ShardFiles
from vidshard.pipeline.reader.latents import LatentRule, latent_rule
from vidshard.pipeline.reader.pages import Spare
from vidshard.pipeline.reader.units import Units, check_sequence, find_units, names_of
from vidshard.schemas.errors import UserError
from vidshard.schemas.tokens import payload_bytes
from vidshard.schemas.uris import shown_uri

Integers = npt.NDArray[np.int64]
Loaded = list[Any]
"""Loaded columns of a row group, by the number of the column."""
SOURCE = "_source"
"""Entry of a batch of a mixture: the path that each clip or sequence is from, as it was given."""
Picks = list[tuple[int, Integers, Integers]]
"""Rows of a batch by row group: its number, rows in it, and rows of the batch."""

_OTHER_BYTES = 16 << 10
"""Bytes of a row in shared memory for columns beside the payload, such as signals."""


@dataclass(frozen=True)
class Plan:
    """A batch to be made."""

    units: Integers
    noise: tuple[int, int]
    """Seed and epoch, which decide the noise of sampled latents."""
    mark: int
    """Handed back with the batch."""
    stop: int
    """Position after its last unit."""
    block_end: int
    """Position up to which row groups that it needs may be needed again."""


class Content(TypedDict, total=False):
    """Columns and rows that a training reader gives: the arguments that `TokenShards` and `TokenShardsMap` share.

    `TokenShards` says what each of them means.
    """

    columns: str | Sequence[str] | None
    where: str | None
    sequence: int | None
    stride: int | None
    signals: str | Sequence[str] | None
    signals_per: str
    normalize: bool | Mapping[str, Any]
    sample: bool
    allow_mixed: bool | str | Collection[str]


def _check_names(content: Content) -> None:
    """Raise TypeError for an argument that `Content` has not."""
    for name in content.keys() - Content.__annotations__.keys():
        near = difflib.get_close_matches(name, Content.__annotations__, n=1)
        raise TypeError(f"there is no argument {name!r}" + (f": is {near[0]!r} meant?" if near else ""))


class Source:
    """Shards opened for reading in units: which columns, of which rows, in which form."""

    def __init__(self, paths: Paths, **content: Unpack[Content]) -> None:
        """Open the shards.

        Args:
            paths: one or several output folders, folders of shards or shards.
            content: see `Content`.

        Raises:
            UserError, ShardError: as `TokenShards`.
            TypeError: an argument has another name.
        """
        _check_names(content)
        columns, where, signals = content.get("columns"), content.get("where"), content.get("signals")
        sequence, stride = content.get("sequence"), content.get("stride")
        signals_per = content.get("signals_per", "frame")
        check_sequence(sequence, stride)
        if signals_per not in ("frame", "latent"):
            raise UserError(f"signals_per is 'frame' or 'latent', got {signals_per!r:.40}")
        paths = paths_of(paths)
        mixed = content.get("allow_mixed")
        mixed = mixed if isinstance(mixed, bool) else names_of("allow_mixed", mixed)
        self.catalog: Catalog = read_catalog(paths, allow_mixed=mixed)
        self.files = ShardFiles(self.catalog.paths, self.catalog.shard_bytes)
        payload = self.catalog.provenance.payload
        names = [c.name for c in payload if not c.is_logvar] if columns is None else names_of("columns", columns)
        self._columns: list[Column] = [column_of(self.catalog, name) for name in dict.fromkeys(names)]
        signal_names = list(dict.fromkeys(names_of("signals", signals)))
        if repeated := set(signal_names) & set(names):
            raise UserError(f"'{sorted(repeated)[0]}' is in columns and in signals: leave it in one of them")
        for name in signal_names:
            self.catalog.check_column(name, "signal")
            values = self._first_values(name)
            self._columns.append(signal_of(self.catalog, name, values, per_latent=signals_per == "latent"))
        if not self._columns:
            raise UserError("columns is empty: name at least one column")
        self.rule: LatentRule | None = latent_rule(
            self.catalog,
            paths,
            names,
            normalize=content.get("normalize", False),
            sample=content.get("sample", False),
        )
        if self.rule is not None:
            have = set(names)
            self._columns += [column_of(self.catalog, n) for n in self.rule.more_columns if n not in have]
        self._payload_names = {c.column.name for c in self._columns if isinstance(c, PayloadValues)}
        self.reusable = [isinstance(column, PayloadValues) for column in self._columns]
        """For each loaded column, whether its memory can be given to the next row group."""
        others = [column for column in self._columns if not isinstance(column, PayloadValues)]
        self._reads = list(dict.fromkeys(name for column in others for name in column.reads))
        self.group_starts = np.concatenate([[0], self.catalog.group_ends[:-1]])
        self.units: Units = find_units(self.catalog, self.files, where=where, sequence=sequence, stride=stride)
        self.sequence = sequence
        self.names_sources = False
        """Whether batches say which path each unit is from."""
        self._is_continuous = bool(self.catalog.provenance.run.get("continuous"))
        order = f"{where}|{sequence}|{stride if stride is not None else sequence}"
        self.digest, self.digest_before = (
            hashlib.blake2b(f"{digest}|{order}".encode(), digest_size=8).hexdigest() for digest in self.catalog.digests
        )
        self.is_remote = not all(storage.is_local(path) for path in self.catalog.paths)
        """Whether reading waits for a network."""

    def make_mixture(self) -> None:
        """Name the source of each unit in the batches, after a check that the outputs can be mixed in one batch.

        Raises:
            UserError: their payload shapes differ, or none of an output's clips passes the filter.
        """
        catalog, atoms = self.catalog, self.units.atoms
        if len(catalog.shapes) > 1:
            other = int(np.flatnonzero(catalog.shard_shape)[0])
            shapes = [", ".join(f"{name} {list(shape)}" for name, shape in shapes) for shapes in catalog.shapes[:2]]
            raise UserError(
                f"{shown_uri(catalog.paths[0])} and {shown_uri(catalog.paths[other])} have other payload shapes "
                f"({shapes[0]}; {shapes[1]}): outputs with weights are mixed within a batch, and need one shape"
            )
        has_units = np.isin(np.arange(len(catalog.outputs)), catalog.shard_output[atoms.shard])
        if not has_units.all():
            path = catalog.outputs[int(np.flatnonzero(~has_units)[0])]
            raise UserError(f"{shown_uri(path)} has a weight, and none of its clips passes where= and sequence=")
        self.names_sources = True

    @property
    def row_bytes(self) -> int:
        """Bytes of a unit in a batch, at most: payload, and other columns of a usual size."""
        payload = [
            sum(
                c.num_values * max(4, PayloadValues(c).dtype.itemsize)
                for c in p.payload
                if c.name in self._payload_names
            )
            for p in {id(p): p for p in self.catalog.shard_provenance}.values()
        ]
        return (max(payload) + _OTHER_BYTES) * (self.sequence or 1)

    def __len__(self) -> int:
        """Number of units."""
        return self.units.atoms.num_units

    def load(self, groups: Sequence[int], spare: Spare | None = None) -> list[Loaded]:
        """Read row groups of one shard.

        Args:
            groups: their numbers.
            spare: memory for payload values.

        Raises:
            ShardError: the shard is damaged.
            storage.StorageError: the storage failed.
        """
        catalog = self.catalog
        shard = int(catalog.group_shard[groups[0]])
        rows = [int(catalog.group_ends[group] - self.group_starts[group]) for group in groups]
        payload = [
            (column, catalog.shard_ranges[shard].get(column.name))
            for column in catalog.shard_provenance[shard].payload
            if column.name in self._payload_names
        ]
        numbers = [int(catalog.group_number[group]) for group in groups]
        found = self.files.row_groups(shard, list(zip(numbers, rows, strict=True)), payload, self._reads, spare)
        with named_if_damaged(catalog.paths[shard], remedy=""):
            if any(table is not None and table.num_rows != n for (_, table), n in zip(found, rows, strict=True)):
                raise ValueError("it was replaced since it was opened")
            return [[self._loaded(column, *group) for column in self._columns] for group in found]

    @staticmethod
    def _loaded(column: Column, values: Mapping[str, np.ndarray], table: pa.Table | None) -> Any:
        if isinstance(column, PayloadValues) and column.column.name in values:
            return column.checked(values[column.column.name])
        return column.load(table)

    def picks(self, units: Integers) -> tuple[Integers, Picks]:
        """Rows of units, flat, and the same rows by row group."""
        rows = self.units.rows_of(units).reshape(-1)
        groups = np.searchsorted(self.catalog.group_ends, rows, side="right")
        order = np.argsort(groups, kind="stable")
        groups, inside = groups[order], rows[order] - self.group_starts[groups[order]]
        cuts = [0, *(np.flatnonzero(groups[1:] != groups[:-1]) + 1).tolist(), len(rows)]
        return rows, [(int(groups[a]), inside[a:b], order[a:b]) for a, b in itertools.pairwise(cuts)]

    def batch(self, plan: Plan, rows: Integers, picks: Picks, loaded: Callable[[int], Loaded]) -> dict[str, Any]:
        """Make a batch of units that have one payload shape.

        Args:
            plan: its units.
            rows: rows of the units, as from `picks`.
            picks: the same rows by row group.
            loaded: gives what was loaded of a row group.

        Raises:
            ShardError: values are not those of the column.
        """
        parts = [(loaded(group), inside, places) for group, inside, places in picks]
        shard = int(self.catalog.group_shard[picks[0][0]])
        found: dict[str, Any] = {}
        with named_if_damaged(self.catalog.paths[shard], remedy=""):
            for at, column in enumerate(self._columns):
                found |= column.gather([(values[at], picked, places) for values, picked, places in parts], len(rows))
        shapes = dict(self.catalog.shapes[int(self.catalog.shard_shape[shard])])
        if self.names_sources:
            found[SOURCE] = self._sources_of(picks, rows)
        if self.rule is not None:
            found = self.rule.apply(found, shapes, rows, plan.noise)
        for column in self._columns:
            for name in column.names if not isinstance(column, PayloadValues) else ():
                found[name] = self._windowed(found[name])
        for name, shape in shapes.items():
            if name in found:
                found[name] = shaped(found[name], shape, self.sequence, self._time_axis(name))
        return found

    def _sources_of(self, picks: Picks, rows: Integers) -> list[str]:
        """Path, as it was given, of each unit."""
        numbers = np.empty(len(rows), np.int64)
        for group, _, places in picks:
            numbers[places] = self.catalog.shard_output[self.catalog.group_shard[group]]
        return [self.catalog.outputs[number] for number in numbers[:: self.sequence or 1].tolist()]

    def _windowed(self, values: Any) -> Any:
        if self.sequence is None:
            return values
        if isinstance(values, list):
            return [values[at : at + self.sequence] for at in range(0, len(values), self.sequence)]
        return values.reshape(-1, self.sequence, *values.shape[1:])

    def _time_axis(self, name: str) -> int | None:
        """Axis along which the rows of a continuous sequence are joined."""
        if not self._is_continuous:
            return None
        return {"tokens": 0, "latents": 1, "latents_logvar": 1}.get(name)

    def _first_values(self, name: str) -> Any:
        """Values of a column in the first row group that has samples, or at least values; None if none has."""
        found = None
        for group in range(len(self.catalog.group_ends)):
            shard = int(self.catalog.group_shard[group])
            table = self.files.group(shard, int(self.catalog.group_number[group]), [name])
            values = table[name].combine_chunks().drop_null()
            if len(values):
                found = values if found is None else found
                samples = values
                while pa.types.is_list(samples.type):
                    samples = samples.flatten()
                if len(samples):
                    return values
        return found


class GroupCache:
    """The row groups that were used last, for reading in any order."""

    def __init__(self, source: Source, max_bytes: int) -> None:
        """Start empty.

        Args:
            source: what is read.
            max_bytes: payload to keep; at least one row group is kept.
        """
        self._source = source
        self._max_bytes = max_bytes
        self._groups: OrderedDict[int, Loaded] = OrderedDict()
        catalog = source.catalog
        mean_rows = catalog.num_rows / len(catalog.group_ends)
        self._most = max(1, int(max_bytes / max(1.0, mean_rows * payload_bytes(catalog.provenance.payload))))

    def __call__(self, group: int) -> Loaded:
        """Columns of a row group that are loaded."""
        if group not in self._groups:
            [self._groups[group]] = self._source.load([group])
            while len(self._groups) > self._most:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group]
