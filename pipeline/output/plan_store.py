"""The plan of an output: one row for each span of the videos that were opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import PLANNED
from vidshard.pipeline.output.parquet import named_if_damaged, write_table
from vidshard.pipeline.rows import PLAN_FIELDS

ENTRY_TYPE = pa.binary(16)
PLAN_SCHEMA = pa.schema(
    [
        pa.field("entry", ENTRY_TYPE, nullable=False),
        pa.field("seen_entry", ENTRY_TYPE, nullable=False),
        pa.field("place", ENTRY_TYPE, nullable=False),
        *(field.with_nullable(True) for field in PLAN_FIELDS),
    ]
)
"""A row of ``plan/``: a span; or a video without any, which was rejected when it was opened. ``entry`` is made of what
the input says of the file, ``seen_entry`` of what whoever opened it found, ``place`` of where it is alone: URLs that
differ in a query, which ``uri`` does not show, are two places."""


def write_planned(out: str, rows: pa.Table) -> None:
    """Add rows to the plan, ``PLAN_SCHEMA``, as a file of their own after those that are there."""
    paths = storage.list_files(storage.join(out, PLANNED), ".parquet")
    names = [path.rsplit("/", 1)[-1].removesuffix(".parquet") for path in paths]
    number = 1 + max((int(name) for name in names if name.isdigit()), default=0)
    table = rows.select(PLAN_SCHEMA.names).cast(PLAN_SCHEMA)
    write_table(storage.join(out, PLANNED, f"{number:06d}.parquet"), table)


def read_planned(out: str, columns: Sequence[str] = PLAN_SCHEMA.names) -> pa.Table:
    """The plan, oldest rows first.

    Raises:
        ShardError: a file of it is damaged.
    """
    schema = pa.schema([PLAN_SCHEMA.field(name) for name in columns])
    tables = [batch for _, batch in planned_groups(out, columns)]
    return pa.concat_tables([schema.empty_table(), *tables])


def planned_groups(
    out: str, columns: Sequence[str], wanted: Callable[[int, int], bool] = lambda _first, _end: True
) -> Iterator[tuple[int, pa.Table]]:
    """(number of the first row, rows) of the plan's row groups, oldest first, those whose range of rows is wanted.

    Raises:
        ShardError: a file of the plan is damaged.
    """
    first = 0
    for path in storage.list_files(storage.join(out, PLANNED), ".parquet"):
        with named_if_damaged(path), storage.open_binary(path) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            for group in range(parquet.num_row_groups):
                end = first + parquet.metadata.row_group(group).num_rows
                if wanted(first, end):
                    yield first, parquet.read_row_group(group, columns=list(columns)).select(list(columns))
                first = end
