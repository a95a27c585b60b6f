"""Parquet files that the calling thread reads alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def test_reading_starts_no_thread_that_may_outlive_it(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1, 2], "b": ["x", "y"], "c": [0.5, 1.5]}), tmp_path / "t.parquet")
    script = """
import os, sys
import pyarrow as pa
from vidshard.pipeline import storage
from vidshard.pipeline.output.parquet import BoundedParquet

pa.set_cpu_count(4)
before = os.listdir("/proc/self/task")
for open_file in (storage.ParquetFile, BoundedParquet):
    with storage.open_binary(sys.argv[1]) as file:
        parquet = open_file(file)
        tables = [parquet.read(), parquet.read_row_group(0), parquet.read_row_groups([0]), parquet.read(["a", "c"])]
    with storage.open_binary(sys.argv[1]) as file:
        tables += [BoundedParquet(file).group(0), BoundedParquet(file).whole(["b"])]
print(sorted({table.num_columns for table in tables}), os.listdir("/proc/self/task") == before)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "t.parquet")]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert printed == "[1, 2, 3] True\n"
