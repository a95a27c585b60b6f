"""Statistics of latents: mean and standard deviation by channel, over an output; ``stats.json`` beside its shards."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import STATS
from vidshard.pipeline.output.parquet import named_if_damaged
from vidshard.pipeline.reader.catalog import Catalog, read_catalog
from vidshard.pipeline.reader.columns import PayloadValues
from vidshard.pipeline.reader.files import ShardFiles
from vidshard.schemas.errors import UserError
from vidshard.schemas.uris import shown_uri

_MAX_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class ChannelStats:
    """Mean and standard deviation of each channel of a payload column."""

    count: int
    """Values of each channel."""
    mean: Sequence[float]
    std: Sequence[float]

    def joined(self, other: ChannelStats) -> ChannelStats:
        """Statistics of both together (Chan, Golub and LeVeque 1983, equation 1.5)."""
        count = self.count + other.count
        means = [np.asarray(s.mean, np.float64) for s in (self, other)]
        moved = means[1] - means[0]
        squares = sum(np.asarray(s.std, np.float64) ** 2 * s.count for s in (self, other))
        squares = squares + moved**2 * (self.count * other.count / count)
        mean = means[0] + moved * (other.count / count)
        return ChannelStats(count=count, mean=mean.tolist(), std=np.sqrt(squares / count).tolist())


def channel_axis(name: str) -> int:
    """Axis of the channels of a payload column: 0 for ``latents`` (C, T', H', W'), else the last one."""
    return 0 if name.startswith("latents") else -1


def compute_stats(path: str) -> tuple[Catalog, dict[str, ChannelStats]]:
    """Compute the statistics of the latents of an output, by column; its shards are read once.

    Raises:
        UserError: it holds no latents.
        ShardError: a shard is damaged, or holds values that are not finite.
    """
    catalog = read_catalog(path)
    columns = [PayloadValues(c) for c in catalog.provenance.payload if c.codebook_size is None and not c.is_logvar]
    if not columns:
        raise UserError(f"{shown_uri(path)} holds tokens: there are no latents to normalize")
    files = ShardFiles(catalog.paths, catalog.shard_bytes)
    found: dict[str, ChannelStats] = {}
    for group, shard in enumerate(catalog.group_shard.tolist()):
        table = files.group(shard, int(catalog.group_number[group]), [c.column.name for c in columns])
        shapes = dict(catalog.shapes[int(catalog.shard_shape[shard])])
        with named_if_damaged(catalog.paths[shard], remedy=""):
            for column in columns:
                name = column.column.name
                for values in _parts(column.load(table), shapes[name], channel_axis(name)):
                    if not np.isfinite(values).all():
                        raise ValueError(f"column '{name}' holds values that are not finite")
                    stats = ChannelStats(
                        count=values.shape[1], mean=values.mean(axis=1).tolist(), std=values.std(axis=1).tolist()
                    )
                    found[name] = found[name].joined(stats) if name in found else stats
    return catalog, found


def _parts(values: np.ndarray, shape: tuple[int, ...], axis: int) -> Iterator[np.ndarray]:
    """Values by channel, float64 (channels, values), some rows at a time."""
    step = max(1, (1 << 22) // max(1, values.shape[1]))
    for at in range(0, len(values), step):
        rows = values[at : at + step].reshape(-1, *shape).astype(np.float64)
        rows = np.moveaxis(rows, axis % len(shape) + 1, 0)
        yield rows.reshape(len(rows), -1)


def write_stats(path: str, catalog: Catalog, stats: Mapping[str, ChannelStats]) -> str:
    """Write statistics beside the shards that they are of; returns the path of the file.

    Raises:
        UserError: the path is a single shard.
        storage.StorageError: the file could not be written.
    """
    target = stats_path(path)
    record = {"shards": catalog.digests[0], "columns": {name: asdict(s) for name, s in stats.items()}}
    storage.write_atomic(target, json.dumps(record, indent=1).encode())
    return target


def stats_path(path: str) -> str:
    """Path of the statistics of an output.

    Raises:
        UserError: the path is a single shard.
    """
    path = storage.absolute(path)
    if path.endswith(".parquet"):
        raise UserError(f"{shown_uri(path)} is a single shard: statistics are those of an output's folder")
    return storage.join(path, STATS)


def read_stats(catalog: Catalog, paths: Sequence[str]) -> dict[str, ChannelStats]:
    """Statistics of the latents of several outputs together, by column.

    Raises:
        UserError: an output has no statistics, or they are of other shards.
        ShardError: they are damaged.
    """
    joined: dict[str, ChannelStats] = {}
    for path in paths:
        target = stats_path(path)
        remedy = f"write them by: vidshard stats {shown_uri(path)}"
        if not storage.exists(target):
            raise UserError(f"normalize=True: {shown_uri(path)} has no statistics; {remedy}")
        with named_if_damaged(target, remedy=remedy):
            record = json.loads(storage.read_bytes(target, max_bytes=_MAX_BYTES))
            own = catalog if len(paths) == 1 else read_catalog(path)
            if record["shards"] not in own.digests:
                raise UserError(f"{shown_uri(target)} is of other shards, as the output has changed; {remedy}")
            for name, values in record["columns"].items():
                stats = ChannelStats(count=int(values["count"]), mean=values["mean"], std=values["std"])
                _check(name, stats, own)
                joined[name] = joined[name].joined(stats) if name in joined else stats
    return joined


def _check(name: str, stats: ChannelStats, catalog: Catalog) -> None:
    column = catalog.payload_column(name)
    if column is None or stats.count < 1:
        raise ValueError(f"it has statistics of '{name}'")
    channels = column.shape[channel_axis(name)]
    for numbers in (stats.mean, stats.std):
        if len(numbers) != channels or not all(isinstance(n, float | int) and math.isfinite(n) for n in numbers):
            raise ValueError(f"its statistics of '{name}' are not {channels} numbers")
