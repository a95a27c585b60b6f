"""A reader written from docs/shard-format.md alone, with pyarrow, reads the frozen examples of every format version."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vidshard
from vidshard.pipeline.output.shard_reader import read_clips

FIXTURES = Path(__file__).parents[2] / "fixtures"
EXAMPLES = sorted(FIXTURES.glob("format_*/*/shards/*.parquet"))
MISSING = {
    "continues_previous": False,
    "decode_errors": 0,
    "part_start_seconds": None,
    "part_end_seconds": None,
    "bucket": None,
}
PRESENT = (
    "clip_id", "video_id", "uri", "clip_index", "start_seconds", "fps", "frame_pts_seconds", "num_valid_frames",
    "source_width", "source_height", "source_codec", "source_fps", "source_rotation", "geometry",
)  # fmt: skip


def read_shard(path: Path) -> list[dict[str, Any]]:
    """Clips of a shard, by what the document says: refusals, payload in its shape, later columns."""
    table = pq.ParquetFile(path, page_checksum_verification=True).read()
    stated = {k[9:].decode(): v.decode() for k, v in table.schema.metadata.items() if k.startswith(b"vidshard.")}
    if stated.get("format_version") == "1":
        names = [stated["payload"], *(["latents_logvar"] if stated["keep_logvar"] == "true" else [])]
        size = json.loads(stated["codebook_size"])
        dtype = "float16" if size is None else str(np.min_scalar_type(size - 1))
        shape = json.loads(stated["shape"])
        columns = [{"name": n, "shape": shape, "codebook_size": size, "dtype": dtype} for n in names]
    elif stated.get("format_version") == "2":
        columns = json.loads(stated["payloads"])
    else:
        raise ValueError(f"format version {stated.get('format_version')}")
    if lacking := {*PRESENT, *(column["name"] for column in columns)} - set(table.column_names):
        raise ValueError(f"no column {min(lacking)}")
    arrays = {}
    for column in columns:
        field, count = table.schema.field(column["name"]), math.prod(column["shape"])
        wanted = pa.list_(pa.from_numpy_dtype(np.dtype(column["dtype"])), count)
        if field.type != wanted or json.loads(field.metadata[b"shape"]) != column["shape"]:
            raise ValueError(f"{field.name} is {field.type}, not {wanted}")
        values = table[field.name].combine_chunks().flatten().to_numpy().reshape(-1, *column["shape"])
        if column["codebook_size"] is not None and values.max(initial=0) >= column["codebook_size"]:
            raise ValueError(f"token {values.max()} of {column['codebook_size']}")
        arrays[field.name] = values
    rows = table.drop_columns(list(arrays)).to_pylist()
    for row in rows:
        if not 1 <= row["num_valid_frames"] <= len(row["frame_pts_seconds"]):
            raise ValueError(f"{row['clip_id']}: {row['num_valid_frames']} valid frames")
    return [{**MISSING, **row, **{n: a[at] for n, a in arrays.items()}} for at, row in enumerate(rows)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: "/".join(path.parts[-4:-2]))
def test_a_stranger_reads_what_we_read(path: Path) -> None:
    theirs, ours = read_shard(path), list(read_clips(str(path)))
    assert len(theirs) == len(ours) > 0
    for mine, clip in zip(theirs, ours, strict=True):
        assert all(np.array_equal(mine[name], values) for name, values in clip.payload.items())
        assert all(mine[name] == value for name, value in clip.values.items())


def test_examples_of_both_versions_stay_what_they_are() -> None:
    frozen = json.loads((FIXTURES / "payload_digests.json").read_text())
    found = {}
    for path in EXAMPLES:
        for row in read_shard(path):
            arrays = {name: v for name, v in row.items() if isinstance(v, np.ndarray)}
            for name, values in sorted(arrays.items()):
                digest = hashlib.sha256(values.astype(values.dtype.newbyteorder("<")).tobytes()).hexdigest()[:16]
                found["/".join([*path.parts[-4:-2], row["clip_id"], name])] = (
                    f"{values.dtype} {list(values.shape)} {digest}"
                )
    assert found == frozen
    assert {name.split("/")[0] for name in found} == {"format_1", "format_2"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: "/".join(path.parts[-4:-2]))
def test_the_training_reader_reads_every_example(path: Path) -> None:
    stranger = read_shard(path)
    names = [name for name, value in stranger[0].items() if isinstance(value, np.ndarray)]
    rows = list(vidshard.TokenShards(str(path), columns=names))
    assert len(rows) == len(stranger)
    for row, mine in zip(rows, stranger, strict=True):
        assert all(np.array_equal(row[name].numpy(), mine[name]) for name in names)


def rewritten(path: Path, to: Path, *, metadata: dict[bytes, bytes | None] | None = None, drop: str = "") -> Path:
    """The shard written again by pyarrow's defaults, with other metadata or without a column."""
    table = pq.read_table(path)
    table = table.drop_columns([drop]) if drop else table
    changed = {k: v for k, v in {**table.schema.metadata, **(metadata or {})}.items() if v is not None}
    pq.write_table(table.replace_schema_metadata(changed), to)
    return to


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: "/".join(path.parts[-4:-2]))
def test_a_shard_that_another_program_wrote_again_is_as_good(path: Path, tmp_path: Path) -> None:
    again = read_shard(rewritten(path, tmp_path / "s.parquet"))
    names = [name for name, value in again[0].items() if isinstance(value, np.ndarray)]
    ours = list(vidshard.TokenShards(str(tmp_path / "s.parquet"), columns=names))
    for row, mine, first in zip(ours, again, read_shard(path), strict=True):
        assert all(np.array_equal(row[n].numpy(), mine[n]) and np.array_equal(mine[n], first[n]) for n in names)


REFUSED: dict[str, dict[str, Any]] = {
    "unknown version": {"metadata": {b"vidshard.format_version": b"3"}},
    "no version": {"metadata": {b"vidshard.format_version": None}},
    "no payload column": {"drop": "tokens"},
    "no clip column": {"drop": "start_seconds"},
    "another shape": {"metadata": {b"vidshard.shape": b"[2, 4, 5]"}},
    "another dtype": {"metadata": {b"vidshard.codebook_size": b"200"}},
    "a smaller codebook": {"metadata": {b"vidshard.codebook_size": b"300"}},
    "no key": {"metadata": {b"vidshard.shape": None}},
}


@pytest.mark.parametrize("change", REFUSED)
def test_readers_refuse_what_the_document_says_they_must(change: str, tmp_path: Path) -> None:
    path = rewritten(next(p for p in EXAMPLES if p.parts[-3] == "tokens"), tmp_path / "s.parquet", **REFUSED[change])
    with pytest.raises((ValueError, KeyError)):
        read_shard(path)
    with pytest.raises(vidshard.VidshardError, match=r"s\.parquet"):
        list(vidshard.TokenShards(str(path)))


def test_later_columns_may_be_missing_and_unknown_ones_are_ignored(tmp_path: Path) -> None:
    path = rewritten(
        next(p for p in EXAMPLES if p.parts[-3] == "tokens"),
        tmp_path / "s.parquet",
        metadata={b"vidshard.later": b"1"},
        drop="bucket",
    )
    assert read_shard(path)[0]["bucket"] is None
    assert len(vidshard.TokenShards(str(path))) == len(read_shard(path))


def test_every_kind_of_payload_and_of_row_is_among_the_examples() -> None:
    rows = [row for path in EXAMPLES for row in read_shard(path)]
    dtypes = {str(v.dtype) for row in rows for v in row.values() if isinstance(v, np.ndarray)}
    assert dtypes == {"uint8", "uint16", "uint32", "float16"}
    assert len({row["bucket"] for row in rows}) > 1
    assert any(row["continues_previous"] for row in rows)
    assert any(row["num_valid_frames"] < len(row["frame_pts_seconds"]) for row in rows)
    assert any(row["part_end_seconds"] for row in rows)
    with_signals = [row for row in rows if row.get("actions")]
    for row in with_signals:
        assert len(row["actions"]) == len(row["poses"]) == len(row["frame_pts_seconds"])
        assert [len(frame) for frame in row["poses"]] == [len(frame) for frame in row["poses_seconds"]]
    assert with_signals
