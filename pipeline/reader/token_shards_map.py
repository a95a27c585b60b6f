"""Training reader of clips by number: the map-style twin of `TokenShards`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
from torch.utils.data import Dataset

from vidshard.pipeline.reader.catalog import Paths
from vidshard.pipeline.reader.source import Content, GroupCache, Plan, Source
from vidshard.pipeline.reader.units import whole_number

Batch = dict[str, Any]
"""Columns by name."""
_CACHE_BYTES = 64 << 20


class TokenShardsMap(Dataset[Batch]):
    """Clips of one or several outputs by number: the map-style twin of `TokenShards`."""

    def __init__(
        self,
        paths: Paths,
        *,
        seed: int = 0,
        cache_bytes: int = _CACHE_BYTES,
        **content: Unpack[Content],
    ) -> None:
        """Open outputs.

        Args:
            paths: one or several output folders, folders of shards or shards; local paths or URLs.
            seed: seed of the noise of sampled latents.
            cache_bytes: payload of row groups that is kept in memory, as neighbors are often wanted too.
            content: ``columns``, ``where``, ``sequence``, ``stride``, ``signals``, ``signals_per``, ``normalize``,
                ``sample`` and ``allow_mixed``, as those of `TokenShards`; see `Content`.

        Raises:
            UserError, ShardError, TypeError: as `TokenShards`.
        """
        self._source = Source(paths, **content)
        self._seed = whole_number("seed", seed)
        self._cache_bytes = whole_number("cache_bytes", cache_bytes, least=0)
        self._groups = GroupCache(self._source, self._cache_bytes)

    def __len__(self) -> int:
        """Number of clips, or of sequences."""
        return len(self._source)

    def __getitem__(self, index: int) -> Batch:
        """A clip or sequence by its number, negative ones from the end.

        Raises:
            IndexError: there is no such number.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        """Several clips or sequences; a `DataLoader` asks for a batch this way.

        Raises:
            IndexError: one of the numbers does not exist.
        """
        found: dict[int, Batch] = {}
        units = np.array([self._number(index) for index in indices], np.int64)
        shapes = self._shapes(units)
        for shape in np.unique(shapes):
            places = np.flatnonzero(shapes == shape)
            plan = Plan(units[places], (self._seed, 0), 0, 0, 0)
            batch = self._source.batch(plan, *self._source.picks(plan.units), self._groups)
            for at, place in enumerate(places.tolist()):
                found[place] = {name: values[at] for name, values in batch.items()}
        return [found[place] for place in range(len(units))]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": GroupCache(self._source, self._cache_bytes)}

    def _shapes(self, units: Any) -> Any:
        atoms = self._source.units.atoms
        return atoms.shape[np.searchsorted(atoms.ends, units, side="right")]

    def _number(self, index: int) -> int:
        index = operator.index(index)  # which refuses slices and fractions
        number = index + (len(self) if index < 0 else 0)
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self):,} clips, got the number {index}")
        return number
