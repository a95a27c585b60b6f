"""Clip cache: decodes the clips of one epoch once and stores them as uint8 Parquet, for all epochs of all runs.

FOLDER/cache.json               what the cached clips were made of; other videos or settings are refused
FOLDER/clips-00000000.parquet   clips from item 0 on, one row group each
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from vidshard.pipeline import storage
from vidshard.pipeline.training_data.loader import BLOCK_BYTES, CLIP_SCHEMA, REJECTED_TYPE, ClipReader, rejections_in
from vidshard.pipeline.training_data.sampler import placement_seed
from vidshard.pipeline.training_data.variation import Variation
from vidshard.pipeline.training_data.videos import ITEM_SCHEMA, UnusableError, no_usable_video
from vidshard.schemas.rejections import Rejection
from vidshard.schemas.video import ClipSpec, Limits

CACHE = "cache.json"
_CACHE_FORMAT = 1


def fill_cache(
    folder: str,
    items: pa.Table,
    spec: ClipSpec,
    limits: Limits,
    seed: int,
    on_clips: Callable[[int], None],
    variation: Variation = Variation(),  # noqa: B008  frozen
) -> tuple[pa.Table, list[Rejection]]:
    """Decode every item once and store the clips; clips that an earlier run stored are not decoded again.

    Args:
        items: ``ITEM_SCHEMA``.
        seed: seed of the clips' places, the same in every epoch.
        on_clips: called with the number of clips done so far.
        variation: crops and short videos; mirroring is left to who reads the cache.

    Returns:
        The items that have a clip, with its file and row, and rejections of those that could not be decoded.

    Raises:
        UnusableError: the folder holds clips of other videos or settings, or nothing could be decoded.
        StorageError: the folder cannot be reached.
    """
    folder = storage.absolute(folder)
    variation = replace(variation, flip_share=0.0)
    _claim_folder(folder, items, spec, seed, variation)
    clips_per_file = max(1, 2 * BLOCK_BYTES // spec.clip_bytes)
    reader = ClipReader(spec=spec, limits=limits, required=False, variation=variation)
    writer = _CacheWriter(folder=folder, reader=reader, seed=seed)
    numbered = items.append_column("item", pa.array(range(items.num_rows), pa.int64()))
    parts = [numbered.slice(at, clips_per_file).combine_chunks() for at in range(0, items.num_rows, clips_per_file)]
    dataset = ray.data.from_arrow(parts).map_batches(writer, batch_format="pyarrow", batch_size=None, num_cpus=1)
    tables = []
    for table in dataset.iter_batches(batch_format="pyarrow", batch_size=None):
        tables.append(table)
        on_clips(sum(part.num_rows for part in tables))
    places = pa.concat_tables(tables).sort_by("item")
    at = items.schema.get_field_index("shard")
    filled = items.set_column(at, ITEM_SCHEMA.field("shard"), places["shard"])
    filled = filled.set_column(at + 1, ITEM_SCHEMA.field("shard_row"), places["shard_row"])
    filled = filled.filter(pc.is_valid(places["shard_row"]))
    rejections = rejections_in(places)
    if not filled.num_rows:
        raise UnusableError(no_usable_video(folder, rejections))
    return filled, rejections


def _claim_folder(folder: str, items: pa.Table, spec: ClipSpec, seed: int, variation: Variation) -> None:
    """Write ``cache.json`` into the folder.

    Raises:
        UnusableError: it is there already, of other videos or settings.
    """
    columns = ["video_id", "number", "part_start_seconds", "part_end_seconds"]
    rows = (
        " ".join(str(value) for value in row.values() if value is not None) for row in items.select(columns).to_pylist()
    )
    digest = hashlib.sha256("\n".join(rows).encode()).hexdigest()
    identity = {"format": _CACHE_FORMAT, "clips": spec.digest(), "seed": seed, "items": digest}
    if variation.decoded:
        identity["variation"] = variation.decoded
    record = storage.join(folder, CACHE)
    storage.check_writable(folder)
    there: Any = identity
    if storage.exists(record):
        try:
            there = json.loads(storage.read_bytes(record))
        except ValueError:
            there = None
    if there != identity:
        known = there if isinstance(there, dict) else {}
        differing = ", ".join(name for name in sorted({*identity, *known}) if known.get(name) != identity.get(name))
        raise UnusableError(
            f"--cache {storage.public_uri(folder)} holds clips of other videos or settings ({differing} differ): "
            "choose another folder, or delete it"
        )
    storage.write_atomic(record, json.dumps(identity).encode())


@dataclass(frozen=True, kw_only=True, slots=True)
class _CacheWriter:
    """Writes one file of the cache: takes items, and returns where each item's clip is."""

    folder: str
    reader: ClipReader
    seed: int

    def __call__(self, items: pa.Table) -> pa.Table:
        rows = items.to_pylist()
        path = storage.join(self.folder, f"clips-{rows[0]['item']:08d}.parquet")
        known = self._read_index(path) if storage.exists(path) else None
        if known is None or known["item"].to_pylist() != [row["item"] for row in rows]:
            self._write(path, rows)
            known = self._read_index(path)
            assert known is not None
        shard_rows = [row if kept else None for row, kept in enumerate(known["kept"].to_pylist())]
        return pa.table(
            {
                "item": known["item"],
                "shard": pa.array([path] * len(rows), pa.string()),
                "shard_row": pa.array(shard_rows, pa.int32()),
                "rejected": known["rejected"].cast(REJECTED_TYPE),
            }
        )

    def _read_index(self, path: str) -> pa.Table | None:
        """Read a cache file without the frames; None if it is damaged."""
        try:
            with storage.open_binary(path) as file:
                return storage.ParquetFile(file).read(["item", "kept", "rejected"])
        except (pa.ArrowException, OSError):
            return None

    def _write(self, path: str, rows: list[dict[str, Any]]) -> None:
        schema = CLIP_SCHEMA.append(pa.field("item", pa.int64())).append(pa.field("kept", pa.bool_()))
        buffer = io.BytesIO()
        place = placement_seed(self.seed, 0)
        # One row group per clip, so that each is read without the others; lz4, since noise hardly compresses.
        with pq.ParquetWriter(buffer, schema, compression="lz4") as file:
            for row in rows:
                table = self.reader(
                    pa.Table.from_pylist([{"sample": row["item"], "candidates": [row | {"placement_seed": place}]}])
                )
                kept = table["frames"].null_count == 0
                table = table.append_column("item", pa.array([row["item"]], pa.int64()))
                file.write_table(table.append_column("kept", pa.array([kept])).cast(schema))
        storage.write_atomic(path, buffer.getvalue())
