"""Units of a dataset: rows that pass a filter, or windows of consecutive rows; and the atoms that hold them."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from vidshard.pipeline import storage
from vidshard.pipeline.output.parquet import named_if_damaged
from vidshard.pipeline.reader.catalog import Catalog
from vidshard.pipeline.reader.files import RangeFile, ShardFiles
from vidshard.pipeline.reader.order import Atoms
from vidshard.pipeline.reader.where import parse_where
from vidshard.schemas.errors import UserError
from vidshard.schemas.text import readable
from vidshard.schemas.tokens import payload_bytes

Integers = npt.NDArray[np.int64]

_READERS = 8
_SEAM_FRAMES = 0.01
"""Frames by which the end of a row may miss the start of the next one: rounding of float64 seconds."""
_WINDOWS_PER_ATOM = 4
"""Windows of rows that an atom should hold at least, so that few of them reach into another row group."""
_SEQUENCE_COLUMNS = (
    "video_id", "part_start_seconds", "part_end_seconds", "start_seconds", "fps", "frame_pts_seconds",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Units:
    """Units of a dataset; a unit is one row, or ``sequence`` rows."""

    rows: Integers | None
    """int64 (units, rows of a unit): numbers of the rows, by the first row; None where unit n is row n."""
    atoms: Atoms
    num_left_out: int
    """Rows that pass the filter and are in no window."""

    def rows_of(self, units: Integers) -> Integers:
        """Numbers of the rows of units: int64 (units, rows of a unit)."""
        return units[:, None] if self.rows is None else self.rows[units]


def find_units(
    catalog: Catalog, files: ShardFiles, *, where: str | None, sequence: int | None, stride: int | None
) -> Units:
    """Find the units of a dataset. Without a filter and a sequence no row is read.

    Args:
        catalog: the shards.
        files: of the same shards.
        where: filter of the rows; see `parse_where`.
        sequence: rows of a window; None for single rows.
        stride: rows from the start of a window to that of the next one; None for ``sequence``.

    Raises:
        UserError: the filter is wrong or passes no row, or no video has as many consecutive rows as a window.
        ShardError: a shard is damaged.
    """
    rows = None if where is None else _passing_rows(catalog, files, where)
    if rows is not None and not len(rows):
        raise UserError(f"where={readable(where, 200)!r} passes none of the {catalog.num_rows:,} rows")
    if sequence is None:
        units = None if rows is None else rows[:, None]
        return Units(rows=units, atoms=_atoms(catalog, units, min_units=1), num_left_out=0)
    num_rows = catalog.num_rows if rows is None else len(rows)
    windows, longest = _windows(catalog, files, rows, sequence, sequence if stride is None else stride)
    if not len(windows):
        raise UserError(
            f"sequence={sequence}: no video has so many consecutive rows; the longest has {longest}. Rows are "
            "consecutive where one begins at the time at which the other ends"
        )
    return Units(
        rows=windows,
        atoms=_atoms(catalog, windows, min_units=_WINDOWS_PER_ATOM * sequence),
        num_left_out=num_rows - len(np.unique(windows)),
    )


def _atoms(catalog: Catalog, units: Integers | None, *, min_units: int) -> Atoms:
    """Row groups with units, or runs of them in one shard with at least ``min_units`` units, as far as there are."""
    if units is None:
        ends = catalog.group_ends
        group = np.arange(len(ends))
    else:
        homes = np.searchsorted(catalog.group_ends, units[:, 0], side="right")
        group, counts = np.unique(homes, return_counts=True)
        ends = np.cumsum(counts)
    shard = catalog.group_shard[group]
    if min_units > 1 and len(ends):
        in_shard = ends - np.concatenate([[0], ends])[np.searchsorted(shard, shard)]
        is_last = np.append(shard[1:] != shard[:-1], True)
        run = (in_shard - 1) // min_units
        keep = is_last | np.append(run[1:] != run[:-1], True)
        ends, shard = ends[keep], shard[keep]
    num_rows = (int(ends[-1]) if len(ends) else 0) * (1 if units is None else units.shape[1])
    return Atoms(
        ends=ends.astype(np.int64),
        shard=shard,
        shape=catalog.shard_shape[shard],
        num_bytes=num_rows * payload_bytes(catalog.provenance.payload),
    )


def _passing_rows(catalog: Catalog, files: ShardFiles, where: str) -> Integers:
    """Numbers of the rows that pass a filter; row groups that cannot hold one, by their statistics, are not read."""
    schemas = list({id(schema): schema for schema in catalog.shard_schema}.values())
    parsed = {id(schema): parse_where(where, schema) for schema in schemas}
    by_statistics = {id(schema): parse_where(where, schema, for_statistics=True)[0] for schema in schemas}

    def of_shard(shard: int) -> list[Integers]:
        path = catalog.paths[shard]
        schema = id(catalog.shard_schema[shard])
        expression, columns = parsed[schema]
        first, last = np.searchsorted(catalog.group_shard, [shard, shard + 1])
        with named_if_damaged(path, remedy=""):
            kept = set(_groups_that_may_pass(path, by_statistics[schema]))
            found = []
            for at in range(first, last):
                if int(catalog.group_number[at]) not in kept:
                    continue
                table = files.group(shard, int(catalog.group_number[at]), columns)
                start = int(catalog.group_ends[at]) - table.num_rows
                table = table.append_column("__row", pa.array(np.arange(start, start + table.num_rows)))
                found.append(table.filter(expression)["__row"].to_numpy())
            return found

    with ThreadPoolExecutor(_READERS) as pool:
        parts = [rows for found in pool.map(of_shard, range(len(catalog.paths))) for rows in found]
    return np.concatenate([np.empty(0, np.int64), *parts])


def _groups_that_may_pass(path: str, expression: pc.Expression) -> list[int]:
    parquet = ds.ParquetFileFormat()
    if storage.is_local(path):
        fragment = parquet.make_fragment(storage.absolute(path), filesystem=pa.fs.LocalFileSystem())
    else:
        file = RangeFile(path)
        file.hold_tail()
        fragment = parquet.make_fragment(file)
    return [group.id for group in fragment.subset(filter=expression).row_groups]


def _windows(
    catalog: Catalog, files: ShardFiles, rows: Integers | None, sequence: int, stride: int
) -> tuple[Integers, int]:
    """Windows of consecutive rows: int64 (windows, sequence), by their first row; and the longest run of rows."""
    numbers, following, at = _linked_rows(catalog, files, rows)
    # position of each row in its run, and the run itself, by walking all runs at once
    place, chain = 0, []
    while len(at):
        chain.append(at)
        place += 1
        at = following[at]
        at = at[at >= 0]
    position = np.empty(len(numbers), np.int64)
    for depth, members in enumerate(chain):
        position[members] = depth
    starts = np.flatnonzero(position % stride == 0)
    window = np.empty((len(starts), sequence), np.int64)
    window[:, 0] = starts
    for step in range(1, sequence):
        before = window[:, step - 1]
        window[:, step] = np.where(before >= 0, following[before], -1)
    windows = numbers[window[(window >= 0).all(axis=1)]].reshape(-1, sequence)
    return windows[np.argsort(windows[:, 0], kind="stable")], len(chain)


def runs_of_rows(catalog: Catalog, files: ShardFiles, rows: Integers) -> tuple[Integers, Integers]:
    """Order rows by runs: maximal sequences of consecutive rows of one video.

    Args:
        catalog: the shards.
        files: of the same shards.
        rows: int64 (rows,), numbers of rows in ascending order, each once.

    Returns:
        The rows, run after run and in the order of time within each; and the number of the run of each, from 0,
        non-decreasing. Runs are ordered by their first row.

    Raises:
        ShardError: a shard is damaged.
    """
    if not len(rows):
        return rows, rows
    numbers, following, at = _linked_rows(catalog, files, rows)
    run, place = np.full(len(numbers), -1), np.zeros(len(numbers), np.int64)
    of, depth = at, 0
    while len(at):
        run[at], place[at] = of, depth
        at, depth = following[at], depth + 1
        at, of = at[at >= 0], of[at >= 0]
        new = run[at] < 0  # each row is in one run, also where two rows end when it begins
        at, of = at[new], of[new]
    alone = run < 0
    run[alone] = np.flatnonzero(alone)
    order = np.lexsort((place, run))
    return numbers[order], np.unique(run[order], return_inverse=True)[1].astype(np.int64)


def shards_of(catalog: Catalog, rows: Integers) -> Integers:
    """Number of the shard of each row: int64 (rows,), for numbers of rows in the catalog."""
    return catalog.group_shard[np.searchsorted(catalog.group_ends, rows, side="right")]


def _linked_rows(catalog: Catalog, files: ShardFiles, rows: Integers | None) -> tuple[Integers, Integers, Integers]:
    """Numbers of the rows, the place of the row that follows each in its video or -1, and the places of first rows."""
    table, numbers = _sequence_table(catalog, files, rows)
    shards = shards_of(catalog, numbers)
    following = _following(table, catalog.shard_shape[shards], _folders(catalog)[shards])
    is_first = np.ones(len(numbers), bool)
    is_first[following[following >= 0]] = False
    return numbers, following, np.flatnonzero(is_first)


def _sequence_table(catalog: Catalog, files: ShardFiles, rows: Integers | None) -> tuple[pa.Table, Integers]:
    """Video, time and length of the rows that pass the filter, and their numbers."""

    def of_group(at: int) -> tuple[pa.Table, Integers] | None:
        end = int(catalog.group_ends[at])
        start = int(catalog.group_ends[at - 1]) if at else 0
        here = np.arange(start, end)
        if rows is not None:
            first, last = np.searchsorted(rows, [start, end])
            here = rows[first:last]
        if not len(here):
            return None
        shard = int(catalog.group_shard[at])
        names = [name for name in _SEQUENCE_COLUMNS if name in catalog.shard_schema[shard].names]
        table = files.group(shard, int(catalog.group_number[at]), names)
        with named_if_damaged(catalog.paths[shard], remedy=""):
            if table.num_rows != end - start:
                raise ValueError("it was replaced since it was opened")
            table = table.take(pa.array(here - start))
            columns = {
                "video": table["video_id"],
                "start": pc.fill_null(table["start_seconds"], float("nan")),
                "fps": pc.fill_null(table["fps"], float("nan")),
                "frames": pc.fill_null(pc.list_value_length(table["frame_pts_seconds"]), 0),
            }
            for name in ("part_start_seconds", "part_end_seconds"):
                columns[name] = table[name] if name in names else pa.nulls(len(here), pa.float64())
        return pa.table(columns), here

    with ThreadPoolExecutor(_READERS) as pool:
        parts = [part for part in pool.map(of_group, range(len(catalog.group_ends))) if part is not None]
    return pa.concat_tables([table for table, _ in parts]), np.concatenate([here for _, here in parts])


def _folders(catalog: Catalog) -> Integers:
    """Number of the folder of each shard: a video may be in several outputs, and a window is of one of them."""
    return np.unique([path.rpartition("/")[0] for path in catalog.paths], return_inverse=True)[1].astype(np.int64)


def _following(table: pa.Table, shape: Integers, folder: Integers) -> Integers:
    """For each row the row that begins where it ends, in the same part of the same video, of the same shape and output.

    Returns:
        int64 (rows,): -1 where there is none.
    """
    videos = table["video"].combine_chunks().dictionary_encode().indices.to_numpy()
    columns: list[np.ndarray] = [videos, shape, folder]
    columns += [
        pc.fill_null(table[name], -1.0).to_numpy() for name in ("part_start_seconds", "part_end_seconds", "fps")
    ]
    group = np.zeros(table.num_rows, np.int64)
    for values in columns:
        _, codes = np.unique(values, return_inverse=True)
        _, group = np.unique(group * (int(codes.max(initial=0)) + 1) + codes, return_inverse=True)
    fps, start = table["fps"].to_numpy(), table["start"].to_numpy()
    end = start + table["frames"].to_numpy() / fps
    order = np.lexsort((start, group))
    # one key for group and time: groups lie further apart than any two times of one of them
    low = np.nanmin(start, initial=0.0)
    span = float(np.nanmax(end, initial=0.0) - low) + 1.0
    keys = _key(group[order], start[order], low, span)
    slack = _SEAM_FRAMES / fps
    at = np.searchsorted(keys, _key(group, end - slack, low, span))
    at = np.minimum(at, len(order) - 1)
    found = order[at]
    with np.errstate(invalid="ignore"):
        fits = (group[found] == group) & (np.abs(start[found] - end) <= slack) & (found != np.arange(len(order)))
    return np.where(fits, found, -1)


def _key(group: np.ndarray, seconds: np.ndarray, low: float, span: float) -> np.ndarray:
    return group.astype(np.longdouble) * span + (seconds - low)


def check_sequence(sequence: int | None, stride: int | None) -> None:
    """Check the arguments of a sequence.

    Raises:
        UserError: one is not positive, or there is a stride without a sequence.
    """
    for name, value in (("sequence", sequence), ("stride", stride)):
        if value is not None:
            whole_number(name, value, least=1)
    if stride is not None and sequence is None:
        raise UserError("stride is that of a sequence: give sequence= too")


def whole_number(name: str, value: Any, *, least: int | None = None) -> int:
    """A whole number of any integer type, such as NumPy's.

    Raises:
        UserError: it is none, or smaller than ``least``.
    """
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or (least is not None and found < least):
        more = "" if least is None else f" of at least {least}"
        raise UserError(f"{name} must be a whole number{more}, got {value!r:.40}")
    return found


def names_of(argument: str, values: str | Collection[str] | None) -> list[str]:
    """A list of names from one name, several or none.

    Raises:
        UserError: the argument holds something else.
    """
    names = [values] if isinstance(values, str) else values or []
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{argument} must be a name or a list of names, got {values!r:.80}")
    return list(names)
