"""Order of a mixture: which unit of which output has which position, by weights.

A pattern of source numbers is laid out once for each seed and repeated without end. Each source is read in an order
of its own, pass after pass, and continues where it was when an epoch ends. So the position in this endless
sequence decides everything, as in `order`; an epoch is a stretch of it as long as all sources together.

The pattern is as long as the cycle in which an order takes units from its lanes, or a multiple of that. A worker that
takes every n-th batch therefore meets the same lanes again, in a mixture too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from vidshard.pipeline.reader.order import CHUNK, Atoms, Order
from vidshard.schemas.errors import UserError

Integers = npt.NDArray[np.int64]

_LARGEST_ERROR = 0.01
"""Relative error of a weight that a longer pattern would mend."""
_LONGEST = 1 << 16
"""Longest pattern: weights below one in so many are refused."""
_LOOK_AHEAD = 1 << 17
"""Positions for which row groups are kept at most until they are used again."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Slots of a pattern by source."""

    slots: tuple[int, ...]
    """Slots of each source, at least one."""

    @property
    def total(self) -> int:
        """Length of the pattern."""
        return sum(self.slots)

    @classmethod
    def of_weights(cls, weights: Sequence[float], lanes: int) -> Shares:
        """The shortest pattern that has every weight to one percent.

        Raises:
            UserError: a weight is too small beside the others.
        """
        scaled = [weight / max(weights) for weight in weights]
        shares = [weight / sum(scaled) for weight in scaled]
        if min(shares) < 1 / _LONGEST:
            raise UserError(f"the smallest weight is {min(shares):.2g} of all: at least 1 in {_LONGEST:,} is needed")
        length = lanes * CHUNK
        while True:
            slots = np.maximum(1, np.floor(np.array(shares) * length)).astype(int)
            rest = np.array(shares) * length - slots
            for at in np.argsort(-rest, kind="stable")[: max(0, length - int(slots.sum()))]:
                slots[at] += 1
            error = np.abs(slots / slots.sum() / np.array(shares) - 1).max()
            if (error <= _LARGEST_ERROR and slots.sum() == length) or length >= 2 * _LONGEST:
                return cls(slots=tuple(map(int, slots)))
            length *= 2


class Mixture:
    """Order of one epoch of a mixture; has the members of `Order` that `steps` and `positions` use."""

    def __init__(
        self, atoms: Atoms, source: Integers, shares: Shares, *, shuffle: bool, seed: int, epoch: int, lanes: int
    ) -> None:
        """Lay out the pattern.

        Args:
            atoms: the units of all sources, source after source.
            source: int64 (atoms,): number of the source of each atom.
            shares: slots of each source.
            shuffle: whether each source is shuffled.
            seed: any integer.
            epoch: number of the epoch.
            lanes: number of lanes of all sources together.
        """
        self._total = atoms.num_units
        self._first = epoch * self._total
        self.segment_ends: Integers = np.array([self._total], np.int64)
        """int64 (1,): a mixture has one payload shape."""
        self._shares = shares
        self.cycle: int = shares.total
        """Positions after which the pattern comes again."""
        key = int.from_bytes(hashlib.blake2b(f"{seed}/mixture".encode(), digest_size=16).digest(), "little")
        kinds = np.repeat(np.arange(len(shares.slots)), shares.slots)
        self._pattern = kinds[np.argsort(np.random.Philox(key=key).random_raw(len(kinds)), kind="stable")]
        self._places = [np.flatnonzero(self._pattern == number) for number in range(len(shares.slots))]
        self._rank = np.empty(len(kinds), np.int64)
        for places in self._places:
            self._rank[places] = np.arange(len(places))
        self._sources = [_part(atoms, np.flatnonzero(source == number)) for number in range(len(shares.slots))]
        options: Mapping[str, Any] = {"shuffle": shuffle, "seed": seed}

        def order_of(number: int, turn: int) -> Order:
            own = max(1, round(lanes * shares.slots[number] / shares.total))
            return Order(
                self._sources[number][0], epoch=turn, lanes=own, cycle=shares.slots[number], name=str(number), **options
            )

        self._order_of = lru_cache(maxsize=3 * len(shares.slots))(order_of)

    def __len__(self) -> int:
        return self._total

    def at(self, start: int, stop: int) -> Integers:
        """Units at the positions [start, stop)."""
        position = self._first + np.arange(start, stop)
        cycle, slot = np.divmod(position, len(self._pattern))
        kind = self._pattern[slot]
        found = np.empty(len(position), np.int64)
        for number in np.unique(kind).tolist():
            here = np.flatnonzero(kind == number)
            counts = cycle[here] * self._shares.slots[number] + self._rank[slot[here]]
            found[here] = self._units(number, int(counts[0]), int(counts[-1]) + 1)
        return found

    def block_end(self, position: int) -> int:
        """Position at which every source has ended the block in which it is, but not far ahead."""
        ends = [self._block_end_of(number, position) for number in range(len(self._sources))]
        return min(max(ends), position + _LOOK_AHEAD, self._total)

    def segment_of(self, position: int) -> tuple[int, int]:  # noqa: ARG002 - the interface of `Order`
        """The whole epoch."""
        return 0, self._total

    def _units(self, number: int, start: int, stop: int) -> Integers:
        """Units of a source by their place in its endless sequence of passes."""
        atoms, first = self._sources[number]
        size = atoms.num_units
        parts = []
        while start < stop:
            turn, begin = divmod(start, size)
            end = min(size, begin + stop - start)
            parts.append(self._order_of(number, turn).at(begin, end) + first)
            start += end - begin
        return np.concatenate(parts)

    def _block_end_of(self, number: int, position: int) -> int:
        slots = self._shares.slots[number]
        cycle, slot = divmod(self._first + position, len(self._pattern))
        count = cycle * slots + int(np.searchsorted(self._places[number], slot))
        size = self._sources[number][0].num_units
        turn, place = divmod(count, size)
        last = turn * size + self._order_of(number, turn).block_end(place) - 1
        cycle, rank = divmod(last, slots)
        return int(cycle * len(self._pattern) + self._places[number][rank] + 1 - self._first)


def _part(atoms: Atoms, chosen: Integers) -> tuple[Atoms, int]:
    """Atoms of one source, whose units are numbered from 0; and the number of its first unit among all."""
    first = int(atoms.ends[chosen[0] - 1]) if chosen[0] else 0
    ends = atoms.ends[chosen] - first
    share = int(ends[-1]) / max(1, atoms.num_units)
    part = Atoms(
        ends=ends, shard=atoms.shard[chosen], shape=atoms.shape[chosen], num_bytes=int(atoms.num_bytes * share)
    )
    return part, first


def check_weights(weights: Mapping[str, float]) -> None:
    """Check the weights of a mixture.

    Raises:
        UserError: one is not a positive number, or there are none.
    """
    if not weights:
        raise UserError("there is nothing to read: no output was named")
    for path, weight in weights.items():
        if not isinstance(path, str | os.PathLike):
            raise UserError(f"{path!r:.200} is no path of an output")
        if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 < weight < float("inf"):
            raise UserError(f"the weight of {path!r:.200} must be a positive number, got {weight!r:.40}")
