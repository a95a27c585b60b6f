"""Other libraries read the frozen shards of every kind and find the values that the document's reader finds."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

FIXTURES = Path(__file__).parents[2] / "fixtures"
EXAMPLES = sorted(FIXTURES.glob("format_*/*/shards"))
COLUMNS = ("clip_id", "num_valid_frames", "frame_pts_seconds", "source_fps", "actions", "poses")

Rows = dict[str, dict[str, Any]]
"""Values of each clip, by column."""


def truth(folder: Path) -> tuple[Rows, list[str]]:
    """Table that PyArrow reads, and the names of the payload columns."""
    rows: Rows = {}
    payload: list[str] = []
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path)
        payload = [field.name for field in table.schema if b"shape" in (field.metadata or {})]
        names = [name for name in (*COLUMNS, *payload) if name in table.column_names]
        rows |= {row["clip_id"]: row for row in table.select(names).to_pylist()}
    return rows, payload


def as_dictionaries(folder: Path, read: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.parquet")):  # shards of several frame sizes have several payload types
        yield from read(str(path))


def by_datasets(path: str) -> Any:
    import datasets

    cache = Path(path).parent / "cache"
    return datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=str(cache))


def by_datasets_streaming(path: str) -> Any:
    import datasets

    return datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)


def by_duckdb(path: str) -> Any:
    import duckdb

    relation: Any = duckdb.sql(f"from '{path}'")
    return [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]


def by_polars(path: str) -> Any:
    import polars

    return polars.read_parquet(path).to_dicts()


def by_pandas(path: str) -> Any:
    pandas: Any = pytest.importorskip("pandas")
    return pandas.read_parquet(path).to_dict("records")


def by_litdata(path: str) -> Any:
    litdata = pytest.importorskip("litdata", reason="the package litdata is not installed")
    from litdata.streaming.item_loader import ParquetLoader

    folder = Path(path).parent / Path(path).stem
    folder.mkdir()
    shutil.copy(path, folder)
    litdata.index_parquet_dataset(str(folder), num_workers=1)
    return iter(litdata.StreamingDataset(str(folder), item_loader=ParquetLoader()))


def by_grain(path: str) -> Any:
    pytest.importorskip("grain", reason="the package grain is not installed")
    import grain.experimental

    return iter(grain.experimental.ParquetIterDataset(path))


def plain(value: Any) -> Any:
    """Nested lists of Python values; NaN for None in no case."""
    if isinstance(value, np.ndarray):
        return [plain(entry) for entry in value.tolist()]
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value.item() if hasattr(value, "item") else value


READERS = {
    f.__name__.removeprefix("by_"): f
    for f in (by_datasets, by_datasets_streaming, by_duckdb, by_polars, by_pandas, by_litdata, by_grain)
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: "/".join(path.parts[-3:-1]))
def test_every_library_reads_the_values_of_every_kind_of_shard(reader: str, example: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(example, tmp_path / "shards"))
    rows, payload = truth(folder)
    found = 0
    for row in as_dictionaries(folder, READERS[reader]):
        wanted = rows[row["clip_id"] if isinstance(row["clip_id"], str) else row["clip_id"].item()]
        for name, value in wanted.items():
            assert plain(row[name]) == value, name
        assert len(payload) > 0
        found += 1
    assert found == len(rows) == sum(pq.read_metadata(path).num_rows for path in glob.glob(f"{folder}/*.parquet"))
