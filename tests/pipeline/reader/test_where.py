"""Filters of rows, as text."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vidshard
from tests.support.token_outputs import write_output
from vidshard.pipeline.reader.files import ShardFiles
from vidshard.pipeline.reader.units import _groups_that_may_pass
from vidshard.pipeline.reader.where import parse_where
from vidshard.schemas.errors import UserError

TABLE = pa.table(
    {
        "n": pa.array([1, 2, 3, 4, None], pa.int32()),
        "x": pa.array([0.5, 1.0, -2.0, None, 3.0]),
        "text": ["a", "it's", 'say "x"', None, "and"],
        "yes": [True, False, True, None, False],
        "day": pa.array([datetime.date(2026, 1, day) for day in range(1, 6)]),
        "at": pa.array([datetime.datetime(2026, 1, day, 12) for day in range(1, 6)], pa.timestamp("us")),
        "zoned": pa.array([datetime.datetime(2026, 1, day, 12) for day in range(1, 6)], pa.timestamp("ms", "UTC")),
        "geometry": [{"policy": "crop", "left": at} for at in range(5)],
        "my column": list(range(5)),
        "a`b.c": list(range(5)),
    }
)


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("n = 2", [1]),
        ("n == 2 or n == 4", [1, 3]),
        ("n <> 2 and n != 3", [0, 3]),
        ("n >= 2 AND NOT n > 3", [1, 2]),
        ("not (n = 1 or n = 2)", [2, 3]),
        ("n = 1 or n = 2 and x > 0.9", [0, 1]),
        ("(n = 1 or n = 2) and x > 0.9", [1]),
        ("x < -1.5e0", [2]),
        ("n in (1, 3, 9)", [0, 2]),
        ("n not in (1, 3) and n is not null", [1, 3]),
        ("n not in (1, 3)", [1, 3]),
        ("not (n in (1, 3))", [1, 3]),
        ("n not in (1) or yes = false", [1, 2, 3, 4]),
        ("n is null", [4]),
        ("text = 'it''s'", [1]),
        ('text = "say ""x"""', [2]),
        ("text in ('a', \"and\")", [0, 4]),
        ("yes", [0, 2]),
        ("yes = false", [1, 4]),
        ("not yes and n < 3", [1]),
        ("geometry.left >= 3", [3, 4]),
        ("n = 2.0", [1]),
        ("day >= '2026-01-04'", [3, 4]),
        ("day in ('2026-01-01', '2026-01-05')", [0, 4]),
        ("at < '2026-01-02 12:00:00'", [0]),
        ("at = '2026-01-02T12:00:00'", [1]),
        ("zoned > '2026-01-03T13:00:00+01:00'", [3, 4]),
        ("zoned > '2026-01-03 12:00'", [3, 4]),
        ("`my column` >= 3 and `n` = 4", [3]),
        ("`a``b.c` in (1)", [1]),
    ],
)
def test_conditions_mean_what_they_mean_in_sql(where: str, rows: list[int]) -> None:
    expression, _ = parse_where(where, TABLE.schema)
    numbered = TABLE.append_column("row", pa.array(range(5)))
    assert numbered.filter(expression)["row"].to_pylist() == rows


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("txt = 'a'", "did you mean text"),
        ("geometry.lef = 1", "no column 'geometry.lef'"),
        ("`geometry.left` = 1", "no column 'geometry.left'"),
        ("`my colum` = 1", "did you mean my column"),
        ("`n = 1", "cannot be read"),
        ("n = `n`", "type int32"),
        ("n = 'a'", "type int32"),
        ("n = 1.5", "whole numbers"),
        ("n = 99999999999", "does not fit"),
        ("text = 3", "type string"),
        ("n", "comparison"),
        ("n >=", "the end"),
        ("n = 1 n = 2", "not expected"),
        ("(n = 1", r"'\)' is expected"),
        ("n in 1", r"'\(' is expected"),
        ("n ; drop", "cannot be read"),
        ("", "a column is expected"),
        ("(" * 60 + "n = 1", "nested"),
        ("day > 2026", "date32"),
        ("day > 'soon'", "is no date such as '2026-01-31'"),
        ("day > '2026-01-03 13:00'", "is no date such as"),
        ("at > 'soon'", "is no time such as"),
        ("at > '2026-01-03T13:00:00+01:00'", "no time zone"),
        ("\x1b]52;c;x\x07 = 1", r"\\x1b"),
    ],
)
def test_what_is_no_condition_is_refused_with_the_reason(where: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_where(where, TABLE.schema)


@pytest.mark.parametrize("where", ["x != 0.5", "x <> 0.5", "not x = 0.5", "not (x < 1)", "x not in (0.5)", "not x > 1"])
def test_rows_with_nan_pass_no_comparison_as_statistics_do_not_know_of_them(where: str, tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    table = pa.table({"x": [0.5, float("nan"), 0.5, 2.0, float("nan"), 2.0], "row": range(6)})
    pq.write_table(table, file, row_group_size=3)
    exact, _ = parse_where(where, table.schema)
    by_statistics, _ = parse_where(where, table.schema, for_statistics=True)
    kept = _groups_that_may_pass(str(file), by_statistics)
    assert kept == ([0] if where == "not x > 1" else [1])
    everywhere = table.filter(exact)["row"].to_pylist()
    assert everywhere == pq.ParquetFile(file).read_row_groups(kept).filter(exact)["row"].to_pylist()
    assert everywhere == ([0, 2] if where == "not x > 1" else [3, 5])


@pytest.mark.parametrize("where", [5, True, b"n = 1", ["n = 1"]])
def test_a_condition_that_is_no_text_is_refused(where: Any) -> None:
    with pytest.raises(UserError, match="where must be a text"):
        parse_where(where, TABLE.schema)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("where") / "tokens"
    write_output(folder, num_shards=5)
    return folder


def test_a_filter_passes_the_rows_that_meet_it(out: Path) -> None:
    rows = list(vidshard.TokenShards(str(out), columns=["source_fps", "clip_index"]))
    some = list(vidshard.TokenShards(str(out), columns=["clip_index"], where="source_fps >= 24 and clip_index = 1"))
    assert 0 < len(some) == sum(row["source_fps"] >= 24 and row["clip_index"] == 1 for row in rows)


def test_row_groups_that_cannot_pass_are_not_read(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int, tuple[str, ...]]] = []
    group, load = ShardFiles.group, ShardFiles.row_groups

    def counted(self: ShardFiles, shard: int, number: int, columns: list[str]) -> pa.Table:
        reads.append((shard, number, tuple(columns)))
        return group(self, shard, number, columns)

    def counted_load(self: ShardFiles, shard: int, groups: list[tuple[int, int]], *others: Any) -> Any:
        reads.extend((shard, number, ("tokens",)) for number, _ in groups)
        return load(self, shard, groups, *others)

    monkeypatch.setattr(ShardFiles, "group", counted)
    monkeypatch.setattr(ShardFiles, "row_groups", counted_load)
    found = list(vidshard.TokenShards(str(out), where="video_id = 'a000000'"))
    assert len(found) == 2
    assert {shard for shard, _, _ in reads} == {0}
    assert ("video_id",) in {columns for _, _, columns in reads}
    assert [columns for _, _, columns in reads].count(("tokens",)) == 1


def test_a_filter_that_no_row_passes_and_unknown_columns_are_named(out: Path) -> None:
    with pytest.raises(UserError, match="passes none of the 70 rows"):
        vidshard.TokenShards(str(out), where="source_fps > 1000")
    with pytest.raises(UserError, match="did you mean source_fps"):
        vidshard.TokenShards(str(out), where="sorce_fps > 1")
    with pytest.raises(UserError, match="did you mean caption"):
        vidshard.TokenShards(str(out), columns=["captoin"])
