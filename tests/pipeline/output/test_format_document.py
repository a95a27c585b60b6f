"""A reader written from docs/shard-format.md alone, with pyarrow, reads the frozen examples of every format version."""

from __future__ import annotations

import hashlib
import json
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
MISSING = {"continues_previous": False, "decode_errors": 0, "part_start_seconds": None, "part_end_seconds": None}


def read_shard(path: Path) -> list[dict[str, Any]]:
    """Clips of a shard, by what the document says: refuse unknown versions, payload in its shape, defaults."""
    table = pq.read_table(path)
    stated = {k[9:].decode(): v.decode() for k, v in table.schema.metadata.items() if k.startswith(b"vidshard.")}
    if stated["format_version"] == "1":
        names = [stated["payload"], *(["latents_logvar"] if stated["keep_logvar"] == "true" else [])]
        size = json.loads(stated["codebook_size"])
        columns = [{"name": n, "shape": json.loads(stated["shape"]), "codebook_size": size} for n in names]
    elif stated["format_version"] == "2":
        columns = json.loads(stated["payloads"])
    else:
        raise ValueError(f"format version {stated['format_version']}")
    arrays = {}
    for column in columns:
        field = table.schema.field(column["name"])
        assert json.loads(field.metadata[b"shape"]) == column["shape"]
        values = table[column["name"]].combine_chunks().flatten().to_numpy().reshape(-1, *column["shape"])
        assert column["codebook_size"] is None or values.max() < column["codebook_size"]
        arrays[column["name"]] = values
    rest = table.drop_columns(list(arrays)).to_pylist()
    return [{**MISSING, **row, **{n: a[at] for n, a in arrays.items()}} for at, row in enumerate(rest)]


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


def test_other_versions_are_refused(tmp_path: Path) -> None:
    table = pq.read_table(EXAMPLES[0])
    changed: dict[bytes, bytes] = {**table.schema.metadata, b"vidshard.format_version": b"3"}
    pq.write_table(
        pa.Table.from_batches(table.to_batches(), table.schema.with_metadata(changed)), tmp_path / "s.parquet"
    )
    with pytest.raises(ValueError, match="version 3"):
        read_shard(tmp_path / "s.parquet")
    with pytest.raises(vidshard.VidshardError, match="format version 3"):
        vidshard.TokenShards(str(tmp_path / "s.parquet"))
