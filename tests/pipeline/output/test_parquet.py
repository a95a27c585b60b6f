"""Parquet files of others: whatever their bytes are, reading them ends in a table or an error, never in an abort."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.markdown import ROOT
from vidshard.pipeline.output.parquet import BoundedParquet
from vidshard.pipeline.output.parquet_footer import row_groups

TABLE = pa.table(
    {
        "uri": ["a.mp4", "é", None, "d"],
        "clip_id": ["a", "b", "c", "d"],
        "nested": [[{"x": 1, "y": True}], [], None, [{"x": 2, "y": None}]],
        "fixed": pa.array([b"abc"] * 4, pa.binary(3)),
        "time": [1.0, 2.0, None, 4.0],
        "empty": pa.nulls(4),
    }
)


def encoded(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=2)
    return sink.getvalue()


def test_a_footer_says_here_what_it_says_to_arrow() -> None:
    data = encoded(TABLE)
    metadata = pq.read_metadata(io.BytesIO(data))
    for number, chunks in enumerate(row_groups(io.BytesIO(data), metadata.num_columns)):
        for at, chunk in enumerate(chunks):
            expected = metadata.row_group(number).column(at)
            assert chunk.path == expected.path_in_schema
            assert chunk.num_values == expected.num_values
            assert chunk.total_uncompressed_size == expected.total_uncompressed_size
            if chunk.path == "clip_id":
                assert chunk.least == expected.statistics.min.encode()
                assert chunk.greatest == expected.statistics.max.encode()


def test_a_footer_whose_histograms_do_not_fit_its_schema_aborts_nothing() -> None:
    read = 0
    data = bytearray(encoded(pa.table({"a": [1, None]})))
    for at in range(len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data) - 8):
        damaged = bytearray(data)
        damaged[at] ^= 4  # among others the length of a histogram
        try:
            read += BoundedParquet(pa.BufferReader(bytes(damaged))).whole().num_rows
        except (pa.ArrowException, OSError, ValueError, LookupError):
            continue
    assert read


@pytest.mark.parametrize("footer", [b"\x19" * 200, b"\x1c" * 200, b"\xff" * 200, b"", b"\x49\xfc\xff\xff\xff\xff\x0f"])
def test_a_footer_that_is_none_is_refused(footer: bytes) -> None:
    data = b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    with pytest.raises(ValueError, match="footer"):
        row_groups(io.BytesIO(data), 1)


def mutated(data: bytes, random_: random.Random) -> bytes:
    """One to three bytes changed, left out or put in, mostly in the footer."""
    out = bytearray(data)
    footer = len(out) - int.from_bytes(out[-8:-4], "little") - 8
    for _ in range(random_.randrange(1, 4)):
        at = random_.randrange(footer if random_.random() < 0.8 else 0, len(out))
        out[at : at + 1] = bytes(random_.randrange(256) for _ in range(random_.choice((1, 1, 1, 0, 2))))
    return bytes(out)


def outcomes(mutations: int) -> Counter[str]:
    """Outcomes of reading mutated files, counted."""
    data, random_, found = encoded(TABLE), random.Random(0), Counter[str]()
    for _ in range(mutations):
        try:
            BoundedParquet(pa.BufferReader(mutated(data, random_))).whole()
            found["read"] += 1
        except (pa.ArrowException, OSError, ValueError, LookupError) as error:
            found[type(error).__name__] += 1
    return found


def test_mutated_parquet_ends_no_process() -> None:
    code = "from tests.pipeline.output.test_parquet import outcomes; print(outcomes(1500))"
    here = {"PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert "read" in done.stdout


def test_a_damaged_manifest_of_parquet_is_refused_by_name(tmp_path: Path) -> None:
    from vidshard.pipeline.inputs.manifest import InputError, read_manifest

    data = encoded(TABLE)
    (tmp_path / "m.parquet").write_bytes(data[:-90] + b"\xff" * 82 + data[-8:])
    with pytest.raises(InputError, match=r"m\.parquet cannot be read"):
        read_manifest(str(tmp_path / "m.parquet"), extension="parquet")
