"""Shard reader: lists the shards of an output, and reads one clip, all clips or the payload.

Reading needs only pyarrow. A reader fetches only the row groups that may hold a requested clip.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import RUN, SHARDS, shard_paths
from vidshard.pipeline.output.parquet import BoundedParquet, named_if_damaged
from vidshard.pipeline.output.parquet import ShardError as ShardError
from vidshard.schemas.text import readable
from vidshard.schemas.tokens import CLIP_FIELDS, LATER_COLUMNS, QUALITY_FIELDS, Payload, Provenance, shard_schema
from vidshard.schemas.uris import shown_uri
from vidshard.schemas.video import Part


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredClip:
    """One row of a shard."""

    values: dict[str, Any]
    """All columns except the payload, by name."""
    payload: dict[str, np.ndarray]
    """Payload columns except log-variances, by name: token ids (T', H', W'), latents float16 (C, T', H', W')."""
    provenance: Provenance | None = None
    """Provenance of its shard; None for a clip that was not read from one."""

    @property
    def clip_id(self) -> str:
        """Id of the clip."""
        return str(self.values["clip_id"])

    def __repr__(self) -> str:
        arrays = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in self.payload.items())
        return f"StoredClip({readable(self.clip_id, 100)}, {arrays}, and {len(self.values)} columns in .values)"


def output_shards(out: str) -> list[str]:
    """List the paths of the shards of an output folder, of a folder of shards, or of a single shard.

    Raises:
        ShardError: there is no shard.
    """
    out = storage.absolute(out)
    if out.endswith(".parquet"):
        if not storage.exists(out):
            raise ShardError(f"there is no file {shown_uri(out)}")
        return [out]
    if storage.is_local(out) and os.path.isfile(out):
        raise ShardError(f"{shown_uri(out)} is a file, and no shard: name an output's folder, or a .parquet file")
    started = storage.exists(storage.join(out, RUN))
    paths = shard_paths(out) or ([] if started else storage.list_files(out, ".parquet"))
    if not paths:
        why = f"its {SHARDS}/ is empty: the run committed nothing" if started else "it is not an output of vidshard"
        if storage.is_local(out) and not os.path.exists(out):
            why = "there is no such folder"
        raise ShardError(f"no token shards in {shown_uri(out)}: {why}")
    return paths


@contextmanager
def open_shard(path: str) -> Iterator[tuple[BoundedParquet, Provenance]]:
    """Open a shard; yields its Parquet file and its provenance. Its columns are those of a shard.

    Errors of the block that reads the shard are turned into ShardError too.

    Raises:
        ShardError: the file is not Parquet, not a token shard, of an unknown format version, or damaged.
        storage.StorageError: the storage failed.
    """
    with storage.open_binary(path) as file, named_if_damaged(path, remedy=""):
        parquet = BoundedParquet(file)
        yield parquet, checked_provenance(parquet, path)


def checked_provenance(parquet: BoundedParquet, path: str) -> Provenance:
    """Provenance of an open shard, after a check that its columns are those of a shard.

    Raises:
        ShardError: its format version is unknown.
        ValueError: it is no token shard, or lacks a column.
    """
    schema = parquet.schema_arrow
    provenance = Provenance.from_metadata(schema.metadata, name=shown_uri(path))
    _check_columns(schema, provenance)
    return provenance


def _check_columns(schema: pa.Schema, provenance: Provenance) -> None:
    repeated = [name for name in set(schema.names) if schema.names.count(name) > 1] if len(schema) < 10_000 else ["*"]
    if repeated:
        raise ValueError(f"it has several columns '{readable(repeated[0], 80)}'")
    for field in shard_schema([], provenance):
        if field.name in LATER_COLUMNS and field.name not in schema.names:
            continue
        if field.name not in schema.names or schema.field(field.name).type != field.type:
            raise ValueError(f"column '{field.name}' is missing or not {field.type}")
    for field in QUALITY_FIELDS:
        if field.name in schema.names and schema.field(field.name).type != field.type:
            raise ValueError(f"column '{field.name}' is not {field.type}")


def find_clips(paths: Sequence[str], prefix: str) -> list[tuple[str, str]]:
    """List (path, clip id) of the clips whose id starts with ``prefix``; only the id column is read.

    Raises:
        ShardError: a shard cannot be read.
    """
    found: list[tuple[str, str]] = []
    for path in paths:
        with open_shard(path) as (parquet, _):
            for group in _groups_with(parquet, prefix):
                ids = parquet.group(group, columns=["clip_id"])["clip_id"].to_pylist()
                found += [(path, clip_id) for clip_id in ids if clip_id.startswith(prefix)]
    return found


def read_clips(path: str, prefix: str = "", *, with_logvar: bool = False) -> Iterator[StoredClip]:
    """Read the clips of a shard whose ids start with ``prefix``, row group by row group.

    Args:
        with_logvar: read the log-variances too, which decoding does not need.

    Raises:
        ShardError: the shard is damaged, or holds impossible values.
    """
    with open_shard(path) as (parquet, provenance):
        for group in _groups_with(parquet, prefix):
            table = parquet.group(group)
            arrays = payload_arrays(table, provenance.payload if with_logvar else decodable(provenance.payload))
            others = table.drop_columns([column.name for column in provenance.payload])
            number = 0
            for batch in others.to_batches(max_chunksize=_ROWS_AT_ONCE):
                for values in batch.to_pylist():
                    _check_row(values)
                    if values["clip_id"].startswith(prefix):
                        payload = {name: array[number] for name, array in arrays.items()}
                        yield StoredClip(values=values, payload=payload, provenance=provenance)
                    number += 1


_ROWS_AT_ONCE = 1 << 12
"""Rows that are Python objects at a time."""


def _check_row(values: Mapping[str, Any]) -> None:
    """Check the values of a row that readers rely on.

    Raises:
        ValueError: one is missing or impossible.
    """
    for field in CLIP_FIELDS:
        if not field.nullable and field.name not in LATER_COLUMNS and values[field.name] is None:
            raise ValueError(f"a row lacks its '{field.name}'")
    times, valid = values["frame_pts_seconds"], values["num_valid_frames"]
    if not times or not all(isinstance(time, float) and math.isfinite(time) for time in times):
        raise ValueError(f"clip {values['clip_id']!r:.80} has no frame times, or impossible ones")
    if not 1 <= valid <= len(times):
        raise ValueError(f"clip {values['clip_id']!r:.80} has {valid} valid frames of {len(times)}")
    if not (math.isfinite(values["fps"]) and values["fps"] > 0) or values["clip_index"] < 0:
        raise ValueError(f"clip {values['clip_id']!r:.80} has the rate {values['fps']}, index {values['clip_index']}")
    Part.of(values.get("part_start_seconds"), values.get("part_end_seconds"))


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
            table = parquet.group(group, columns=[column.name for column in columns])
            yield payload_arrays(table, columns)


def payload_arrays(table: pa.Table, payload: Payload) -> dict[str, np.ndarray]:
    """Convert the payload columns of a table to arrays (rows, *shape), and check their values.

    Args:
        payload: payload columns to convert.

    Raises:
        ValueError: a token id is not below the codebook size, or a latent is not a finite number.
    """
    arrays: dict[str, np.ndarray] = {}
    for column in payload:
        flat = table[column.name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        array = np.asarray(flat.reshape(table.num_rows, *column.shape))
        if column.codebook_size is not None and array.size and int(array.max()) >= column.codebook_size:
            raise ValueError(f"it holds token {int(array.max())}, the codebook ends at {column.codebook_size - 1}")
        if column.codebook_size is None and not np.isfinite(array).all():
            raise ValueError(f"it holds {readable(column.name, 80)} that are not finite numbers")
        arrays[column.name] = array
    return arrays


def check_shard(path: str) -> int:
    """Read a shard whole and check it against its metadata; returns its number of clips.

    Raises:
        ShardError: the shard is damaged, has another schema, or has impossible values.
    """
    ids: set[str] = set()
    with open_shard(path) as (parquet, provenance):
        names = [field.name for field in CLIP_FIELDS if field.name in parquet.schema_arrow.names]
        for group in range(parquet.metadata.num_row_groups):
            table = parquet.group(group)
            payload_arrays(table, provenance.payload)
            for batch in table.select(names).to_batches(max_chunksize=_ROWS_AT_ONCE):
                for values in batch.to_pylist():
                    _check_row(values)
                    if values["clip_id"] in ids:
                        raise ValueError("a clip id stands in it twice")
                    ids.add(values["clip_id"])
                    if any(later < earlier for earlier, later in itertools.pairwise(values["frame_pts_seconds"])):
                        raise ValueError("frame times run backwards")
    return len(ids)


def _groups_with(parquet: BoundedParquet, prefix: str) -> list[int]:
    """Numbers of the row groups that may hold an id with the prefix, by their statistics; rows are sorted by id."""
    if not prefix:
        return list(range(parquet.metadata.num_row_groups))
    groups, wanted = [], prefix.encode()
    for group in range(parquet.metadata.num_row_groups):
        ids = next((chunk for chunk in parquet.chunks(group) if chunk.path == "clip_id"), None)
        if (
            ids is None
            or ids.least is None
            or ids.greatest is None
            or ids.least[: len(wanted)] <= wanted <= ids.greatest[: len(wanted)]
        ):
            groups.append(group)
    return groups
