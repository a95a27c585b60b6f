"""The state of an output, read from its files."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import PLANNED, REJECTS
from vidshard.pipeline.output.parquet import ShardError, named_if_damaged
from vidshard.pipeline.output.plan_store import PLAN_SCHEMA


def damaged_files(out: str) -> list[tuple[str, str]]:
    """(path, what is wrong) of the files of the plan and of the rejections that cannot be read."""
    damaged = []
    for folder, names in ((PLANNED, PLAN_SCHEMA.names), (REJECTS, [])):
        for path in storage.list_files(storage.join(out, folder), ".parquet"):
            try:
                with named_if_damaged(path):
                    data = pa.BufferReader(storage.read_bytes(path))
                    pq.read_table(data, page_checksum_verification=True).select(names)
            except ShardError as error:
                damaged.append((path, str(error)))
    return damaged
