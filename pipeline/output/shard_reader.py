"""Shard reader: lists the shards of an output, and reads one clip, all clips or the payload.

Reading needs only pyarrow. A reader fetches only the row groups that may hold a requested clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import RUN, SHARDS, shard_paths
from vidshard.pipeline.output.parquet import ShardError as ShardError
from vidshard.schemas.tokens import LATER_COLUMNS, Payload, Provenance, shard_schema


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredClip:
    """One row of a shard."""

    values: dict[str, Any]
    """All columns except the payload, by name."""
    payload: dict[str, np.ndarray]
    """Payload columns except log-variances, by name: token ids (T', H', W'), latents float16 (C, T', H', W')."""

    @property
    def clip_id(self) -> str:
        """Id of the clip."""
        return str(self.values["clip_id"])


def output_shards(out: str) -> list[str]:
    """List the paths of the shards of an output folder, of a folder of shards, or of a single shard.

    Raises:
        ShardError: there is no shard.
    """
    out = storage.absolute(out)
    if out.endswith(".parquet"):
        if not storage.exists(out):
            raise ShardError(f"there is no file {out}")
        return [out]
    started = storage.exists(storage.join(out, RUN))
    paths = shard_paths(out) or ([] if started else storage.list_files(out, ".parquet"))
    if not paths:
        why = f"its {SHARDS}/ is empty: the run committed nothing" if started else "it is not an output of vidshard"
        raise ShardError(f"no token shards in {out}: {why}")
    return paths


@contextmanager
def open_shard(path: str) -> Iterator[tuple[pq.ParquetFile, Provenance]]:
    """Open a shard; yields its Parquet file and its provenance.

    Raises:
        ShardError: the file is not Parquet, not a token shard, or of an unknown format version.
    """
    with storage.open_binary(path) as file:
        try:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            yield parquet, Provenance.from_metadata(parquet.schema_arrow.metadata, name=path)
        except storage.StorageError:
            raise  # a failure of the storage does not mean that the shard is damaged
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ShardError(f"cannot read {path}: {error}") from error


def find_clips(paths: Sequence[str], prefix: str) -> list[tuple[str, str]]:
    """List (path, clip id) of the clips whose id starts with ``prefix``; only the id column is read.

    Raises:
        ShardError: a shard cannot be read.
    """
    found: list[tuple[str, str]] = []
    for path in paths:
        with open_shard(path) as (parquet, _):
            for group in _groups_with(parquet, prefix):
                ids = parquet.read_row_group(group, columns=["clip_id"])["clip_id"].to_pylist()
                found += [(path, clip_id) for clip_id in ids if clip_id.startswith(prefix)]
    return found


def read_clips(path: str, prefix: str = "") -> Iterator[StoredClip]:
    """Read the clips of a shard whose ids start with ``prefix``, row group by row group.

    Raises:
        ShardError: the shard is damaged, or a value is outside the codebook.
    """
    with open_shard(path) as (parquet, provenance):
        for group in _groups_with(parquet, prefix):
            table = parquet.read_row_group(group)
            arrays = payload_arrays(table, decodable(provenance.payload), name=path)
            rows = table.drop_columns([column.name for column in provenance.payload]).to_pylist()
            for number, values in enumerate(rows):
                if values["clip_id"].startswith(prefix):
                    yield StoredClip(values=values, payload={name: array[number] for name, array in arrays.items()})


def decodable(payload: Payload) -> Payload:
    """Payload columns that decoding needs: all except log-variances."""
    return tuple(column for column in payload if not column.is_logvar)


def read_payloads(path: str) -> Iterator[dict[str, np.ndarray]]:
    """Read the payload of a shard, row group by row group: (rows, *shape) by column; no other column is read.

    Raises:
        ShardError: as :func:`read_clips`.
    """
    with open_shard(path) as (parquet, provenance):
        for group in range(parquet.metadata.num_row_groups):
            columns = decodable(provenance.payload)
            table = parquet.read_row_group(group, columns=[column.name for column in columns])
            yield payload_arrays(table, columns, name=path)


def payload_arrays(table: pa.Table, payload: Payload, *, name: str) -> dict[str, np.ndarray]:
    """Convert the payload columns of a table to arrays (rows, *shape), and check the range of tokens.

    Args:
        payload: payload columns to convert.
        name: name of the file for the error.

    Raises:
        ValueError: a token id is not below the codebook size.
    """
    arrays: dict[str, np.ndarray] = {}
    for column in payload:
        flat = table[column.name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        array = np.asarray(flat.reshape(table.num_rows, *column.shape))
        if column.codebook_size is not None and array.size and int(array.max()) >= column.codebook_size:
            raise ValueError(f"{name} holds token {int(array.max())}, the codebook ends at {column.codebook_size - 1}")
        arrays[column.name] = array
    return arrays


def check_shard(path: str) -> int:
    """Read a shard whole and check it against its metadata; returns its number of clips.

    Raises:
        ShardError: the shard is damaged, has another schema, or has impossible values.
    """
    with open_shard(path) as (parquet, provenance):
        table = parquet.read()
        expected = shard_schema([], provenance)
        for field in expected:
            if field.name in LATER_COLUMNS and field.name not in table.schema.names:
                continue
            if field.name not in table.schema.names or table.schema.field(field.name).type != field.type:
                raise ValueError(f"column '{field.name}' is missing or not {field.type}")
        ids = table["clip_id"].to_pylist()
        if len(set(ids)) != len(ids):
            raise ValueError("a clip id stands in it twice")
        payload_arrays(table, provenance.payload, name=path)
        times = table["frame_pts_seconds"].combine_chunks()
        if not all(np.all(np.diff(t.values.to_numpy()) >= 0) for t in times):
            raise ValueError("frame times run backwards")
        return int(table.num_rows)


def _groups_with(parquet: pq.ParquetFile, prefix: str) -> list[int]:
    """Numbers of the row groups that may hold an id with the prefix, by their statistics; rows are sorted by id."""
    if not prefix:
        return list(range(parquet.metadata.num_row_groups))
    column = parquet.schema_arrow.get_field_index("clip_id")
    groups = []
    for group in range(parquet.metadata.num_row_groups):
        statistics = parquet.metadata.row_group(group).column(column).statistics
        bounded = statistics is not None and statistics.has_min_max
        if not bounded or (statistics.min[: len(prefix)] <= prefix <= statistics.max[: len(prefix)]):
            groups.append(group)
    return groups
