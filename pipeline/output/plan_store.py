"""The plan of an output: one row for each span of the videos that were opened, in ``plan/*.parquet``.

Rows are added and never changed. A video that could not be opened has one row, without a span. Each commit of planning
is a file of its own, numbered upward, so that the latest rows come last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import PLANNED, plan_paths
from vidshard.pipeline.output.parquet import BoundedParquet, ShardError, named_if_damaged, write_table
from vidshard.pipeline.output.rejects import read_reject_files, update_rejects, write_rejects
from vidshard.pipeline.rows import PLAN_FIELDS, row_rejection
from vidshard.schemas.rejections import Rejection

ENTRY_TYPE = pa.binary(16)
PLAN_SCHEMA = pa.schema(
    [
        pa.field("entry", ENTRY_TYPE, nullable=False),
        pa.field("seen_entry", ENTRY_TYPE, nullable=False),
        pa.field("place", ENTRY_TYPE, nullable=False),
        *(field.with_nullable(True) for field in PLAN_FIELDS),
    ]
)
"""Columns of ``plan/``. ``entry`` is the digest of what the input says about the file, ``seen_entry`` that of what the
process that opened it found, and ``place`` the location key: the digest of the complete URI. URLs that differ in their
query have the same ``uri`` here, which shows no query, and different location keys."""


_WHOLE_IDS = {b"vidshard.ids_of_small_files": b"whole"}
"""Metadata of a file of the plan whose ids of small files digest them whole; earlier versions digested samples."""


def write_planned(out: str, rows: pa.Table, *, sampled_ids: bool = True) -> None:
    """Add rows, of at least the columns of ``PLAN_SCHEMA``, to the plan as a new file.

    Args:
        out: the output.
        rows: the rows.
        sampled_ids: whether their ids of small files digest samples, as in outputs of earlier versions.

    Raises:
        storage.StorageError: it could not be written.
    """
    names = [path.rsplit("/", 1)[-1].removesuffix(".parquet") for path in plan_paths(out)]
    number = 1 + max((int(name) for name in names if name.isascii() and name.isdigit()), default=0)
    table = rows.select(PLAN_SCHEMA.names).cast(PLAN_SCHEMA)
    if not sampled_ids:
        table = table.replace_schema_metadata(_WHOLE_IDS)
    write_table(storage.join(out, PLANNED, f"{number:06d}.parquet"), table)


def has_sampled_ids(out: str) -> bool:
    """Whether the ids of small files in the plan digest samples of them; True also where no file of it says so.

    Raises:
        storage.StorageError: the output could not be read.
    """
    for path in plan_paths(out):
        with suppress(ShardError), named_if_damaged(path), storage.open_binary(path) as file:
            if (BoundedParquet(file).schema_arrow.metadata or {}).items() >= _WHOLE_IDS.items():
                return False
    return True


def record_opened(out: str, rows: pa.Table, *, sampled_ids: bool = True) -> list[Rejection]:
    """Write what opening videos gave: their rejections, then their rows of the plan.

    The rejections come first: a row without a span and without a rejection counts as a video not opened yet, so a crash
    between the two writes costs nothing. A new rejection of a video replaces the former one of the same location.

    Args:
        out: the output.
        rows: ``PLAN_SCHEMA`` and ``rejection``, as ``pipeline.plan.open_videos`` gives them.
        sampled_ids: as :func:`write_planned` takes it.

    Returns:
        The rejections.

    Raises:
        ShardError: a file of rejections is damaged.
        storage.StorageError: the output could not be read or written.
    """
    rejections = [row_rejection(row) for row in rows["rejection"].to_pylist() if row is not None]
    if rejections:
        keys = pa.array(sorted({rejection.place for rejection in rejections if rejection.place}), pa.string())
        former = read_reject_files(out)
        is_replaced = pc.and_(pc.is_null(former.table["span_id"]), pc.is_in(former.table["place"], keys))
        update_rejects(former, np.asarray(pc.invert(is_replaced).to_numpy(), np.bool_))
        write_rejects(out, rejections)
    write_planned(out, rows, sampled_ids=sampled_ids)
    return rejections


def read_planned(out: str, columns: Sequence[str] = PLAN_SCHEMA.names) -> pa.Table:
    """Read columns of the plan, oldest rows first.

    Raises:
        ShardError: a file of the plan is damaged.
        storage.StorageError: the output could not be read.
    """
    schema = pa.schema([PLAN_SCHEMA.field(name) for name in columns])
    tables = [table for _, table in planned_groups(out, columns)]
    return pa.concat_tables([schema.empty_table(), *tables])


def planned_groups(
    out: str, columns: Sequence[str], wanted: Callable[[int, int], bool] = lambda _first, _end: True
) -> Iterator[tuple[int, pa.Table]]:
    """Read row groups of the plan one by one, oldest first.

    Args:
        out: the output.
        columns: the columns to read.
        wanted: told the range of rows of each group; groups for which it is false are not read.

    Yields:
        The number of the first row in the whole plan, and the rows.

    Raises:
        ShardError: a file of the plan is damaged.
        storage.StorageError: the output could not be read.
    """
    first = 0
    schema = pa.schema([PLAN_SCHEMA.field(name) for name in columns])
    for path in plan_paths(out):
        with named_if_damaged(path), storage.open_binary(path) as file:
            parquet = BoundedParquet(file)
            for group in range(parquet.num_row_groups):
                end = first + parquet.metadata.row_group(group).num_rows
                if wanted(first, end):
                    yield first, parquet.group(group, columns).select(list(columns)).cast(schema)
                first = end


def check_plan_file(path: str) -> None:
    """Read one file of the plan whole.

    Raises:
        ShardError: it is damaged.
        storage.StorageError: it could not be read.
    """
    with named_if_damaged(path), storage.open_binary(path) as file:
        parquet = BoundedParquet(file)
        for group in range(parquet.num_row_groups):
            parquet.group(group).select(PLAN_SCHEMA.names).cast(PLAN_SCHEMA)
