"""Sample of an output: columns of some shards and counts of some tokens, bounded however large the output is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from vidshard.models.codebook_use import MAX_CODEBOOK, CodebookUse
from vidshard.pipeline.output.shard_reader import decodable, open_shard, payload_arrays
from vidshard.schemas.tokens import Provenance

MAX_SHARDS = 48
"""Most shards that a report reads, evenly spread over all."""
MAX_CLIPS = 200_000
"""Most clips whose columns are read."""
MAX_TOKENS = 1 << 24
"""Most tokens that are counted, about 40 MB of shards."""

COLUMNS = {
    "clip_id": pa.string(),
    "video_id": pa.string(),
    "uri": pa.string(),
    "start_seconds": pa.float64(),
    "num_valid_frames": pa.int32(),
    "fps": pa.float64(),
    "source_width": pa.int32(),
    "source_height": pa.int32(),
    "source_codec": pa.string(),
    "source_fps": pa.float64(),
    "bucket": pa.string(),
    "audit_psnr": pa.float32(),
    "audit_ssim": pa.float32(),
    "audit_lpips": pa.float32(),
}
"""Columns that are read; null where a shard has none."""


@dataclass(kw_only=True)
class Sample:
    """Clips of some shards."""

    provenance: Provenance | None = None
    clips: pa.Table = field(default_factory=lambda: pa.schema(list(COLUMNS.items())).empty_table())
    """Columns of ``COLUMNS``, and ``path``, the shard of each clip."""
    num_clips: int = 0
    """Number of clips in all shards that were opened."""
    num_shards: int = 0
    """Number of shards that were opened."""
    uses: dict[str, CodebookUse] = field(default_factory=dict)
    """Counts of tokens by payload column; empty for latents."""


def read_sample(paths: Sequence[str]) -> Sample:
    """Read a sample of shards.

    Args:
        paths: all shards of an output.

    Raises:
        ShardError: a shard is damaged.
        storage.StorageError: a shard cannot be read.
    """
    chosen = [
        paths[n] for n in np.unique(np.linspace(0, len(paths) - 1, min(len(paths), MAX_SHARDS)).round().astype(int))
    ]
    sample, tables = Sample(), []
    left = MAX_CLIPS
    for path in chosen:
        with open_shard(path) as (parquet, provenance):
            sample.provenance = sample.provenance or provenance
            sample.num_shards += 1
            sample.num_clips += parquet.metadata.num_rows
            names = [name for name in COLUMNS if name in parquet.schema_arrow.names]
            for group in range(parquet.metadata.num_row_groups):
                if left > 0:
                    table = parquet.group(group, names)
                    left -= table.num_rows
                    columns = [
                        table[name].cast(kind) if name in names else pa.nulls(table.num_rows, kind)
                        for name, kind in COLUMNS.items()
                    ]
                    rows = pa.Table.from_arrays(columns, schema=pa.schema(list(COLUMNS.items())))
                    tables.append(rows.append_column("path", pa.array([path] * table.num_rows, pa.string())))
            _count(sample, parquet, provenance, budget=MAX_TOKENS // len(chosen))
    if tables:
        sample.clips = pa.concat_tables(tables)
    return sample


def _count(sample: Sample, parquet: pa.Table, provenance: Provenance, *, budget: int) -> None:
    """Count tokens of a shard, the first ``budget`` of each column at most by a row group."""
    columns = [c for c in decodable(provenance.payload) if c.codebook_size is not None]
    columns = [c for c in columns if c.codebook_size is not None and c.codebook_size <= MAX_CODEBOOK]
    for group in range(parquet.metadata.num_row_groups):
        if not columns or budget <= 0:
            return
        arrays = payload_arrays(parquet.group(group, [c.name for c in columns]), tuple(columns))
        for column in columns:
            assert column.codebook_size is not None
            use = sample.uses.setdefault(column.name, CodebookUse(column.codebook_size))
            if column.codebook_size == use.codebook_size:
                use.update(arrays[column.name])
            budget -= arrays[column.name].size
