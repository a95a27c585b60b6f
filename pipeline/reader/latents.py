"""Values of latents in a batch: samples from mean and log-variance, and normalization by stored statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vidshard.pipeline.reader.catalog import Catalog
from vidshard.pipeline.reader.stats import ChannelStats, channel_axis, read_stats
from vidshard.schemas.errors import UserError
from vidshard.schemas.tokens import Normalization

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LatentRule:
    """Treatment of latents, in this order: sampling, then normalization. Results are float32."""

    sampled: tuple[str, ...]
    """Latents that are sampled."""
    stats: Mapping[str, ChannelStats]
    """Statistics of the latents that are normalized."""
    given: Normalization | None
    """Numbers of the tokenizer's trainers, which take the place of statistics."""
    dropped: tuple[str, ...]
    """Log-variances that are read for sampling alone."""

    @property
    def more_columns(self) -> list[str]:
        """Columns that are needed beside those that were asked for."""
        return [f"{name}_logvar" for name in self.sampled]

    def apply(
        self,
        batch: dict[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        rows: Integers,
        noise: tuple[int, int],
    ) -> dict[str, Any]:
        """Apply the rule to a batch.

        Args:
            batch: payload columns are (rows, values).
            shapes: shape of a row of each payload column.
            rows: numbers of the rows.
            noise: seed and epoch. With the number of a row they decide its noise, whatever batch it is in.
        """
        for name in self.sampled:
            mean, logvar = batch[name].float(), batch[f"{name}_logvar"].float()
            batch[name] = mean + torch.exp(0.5 * logvar) * _noise(mean.shape, name, rows, noise)
        for name, stats in self.stats.items():
            batch[name] = _normalized(batch[name].float(), stats, shapes[name], channel_axis(name))
        if self.given is not None and "latents" in batch:
            batch["latents"] = _standardized(batch["latents"].float(), self.given, shapes["latents"])
        return {name: values for name, values in batch.items() if name not in self.dropped}


def _noise(shape: torch.Size, name: str, rows: Integers, noise: tuple[int, int]) -> Tensor:
    values = np.empty(tuple(shape), np.float32)
    for at, row in enumerate(rows.tolist()):
        key = hashlib.blake2b(f"{noise[0]}/{noise[1]}/{name}/{row}".encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        generator.standard_normal(dtype=np.float32, out=values[at])
    return torch.from_numpy(values)


def _normalized(values: Tensor, stats: ChannelStats, shape: tuple[int, ...], axis: int) -> Tensor:
    view = [1] * len(shape)
    view[axis] = shape[axis]
    mean = torch.tensor(stats.mean, dtype=torch.float32).reshape(view)
    scale = torch.tensor(stats.std, dtype=torch.float32).reshape(view).clamp_min(1e-12)
    return ((values.reshape(-1, *shape) - mean) / scale).reshape(values.shape)


def _standardized(values: Tensor, numbers: Normalization, shape: tuple[int, ...]) -> Tensor:
    """Apply the numbers of the trainers to latents (rows, C * T' * H' * W') of a shape (C, T', H', W').

    Raises:
        UserError: the latents have other channels, or more latent frames than there are numbers.
    """
    mean, std = (torch.tensor(table, dtype=torch.float32)[:, :, None, None] for table in (numbers.mean, numbers.std))
    if len(shape) != 4 or mean.shape[0] != shape[0] or (numbers.per_latent_frame and mean.shape[1] < shape[1]):
        raise UserError(
            f"normalize=True: the shards state numbers of {mean.shape[0]} channels and {mean.shape[1]} latent frames, "
            f"which do not fit latents of {list(shape)}: give (mean, std) by column, or normalize=False"
        )
    mean, std = mean[:, : shape[1]], std[:, : shape[1]]
    standardized = ((values.reshape(-1, *shape) - mean) / std - numbers.shift) * numbers.scale
    return standardized.reshape(values.shape)


def latent_rule(
    catalog: Catalog,
    paths: Sequence[str],
    names: Sequence[str],
    *,
    normalize: bool | Mapping[str, Any],
    sample: bool,
) -> LatentRule | None:
    """Make the treatment of latents; None for nothing.

    Args:
        catalog: the shards.
        paths: outputs, whose ``stats.json`` holds the statistics.
        names: columns of the batches.
        normalize: True for the numbers that the shards state, as those of diffusers do, or else the statistics of
            ``vidshard stats``; or (mean, std) by column, a number or one a channel.
        sample: sample from mean and log-variance.

    Raises:
        UserError: there are no latents, no log-variances, or no statistics of these shards.
    """
    latents = [
        column.name
        for column in catalog.provenance.payload
        if column.codebook_size is None and not column.is_logvar and column.name in names
    ]
    if not isinstance(normalize, bool | Mapping | None):
        raise UserError(f"normalize is True, False or {{column: (mean, std)}}, got {normalize!r:.80}")
    if not sample and not normalize:
        return None
    if not latents:
        raise UserError("normalize and sample are for latents, and the columns hold none")
    if sample:
        for name in latents:
            catalog.check_column(f"{name}_logvar", "log-variance (kept by --keep-logvar)")
    stats: dict[str, ChannelStats] = {}
    given: Normalization | None = None
    if isinstance(normalize, Mapping):
        if unknown := [name for name in normalize if name not in latents]:
            raise UserError(f"normalize: there is no latent column {unknown[0]!r:.80}; there are: {', '.join(latents)}")
        for name, numbers in normalize.items():
            stats[name] = _given(name, numbers, catalog)
    elif normalize and catalog.provenance.normalization is not None:
        given = catalog.provenance.normalization
    elif normalize:
        read = read_stats(catalog, paths)
        stats = {name: read[name] for name in latents}
    dropped = tuple(f"{name}_logvar" for name in latents if sample and f"{name}_logvar" not in names)
    return LatentRule(sampled=tuple(latents) if sample else (), stats=stats, given=given, dropped=dropped)


def _given(name: str, numbers: Any, catalog: Catalog) -> ChannelStats:
    column = catalog.payload_column(name)
    assert column is not None
    channels = column.shape[channel_axis(name)]
    try:
        mean, std = (np.broadcast_to(np.asarray(value, np.float64), (channels,)) for value in numbers)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"normalize[{name!r}] must be (mean, std), each a number or {channels} of them, one a channel"
        ) from error
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise UserError(f"normalize[{name!r}]: means must be finite and standard deviations positive")
    return ChannelStats(count=1, mean=mean.tolist(), std=std.tolist())
