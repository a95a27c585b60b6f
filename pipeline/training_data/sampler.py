"""Clip sampler: the endless, seeded sequence of clips that a training run takes.

Clip ``n`` of the sequence, with its video and place, follows from the items, the weights and the seed alone. Resuming
at clip ``n`` yields the same clips as an uninterrupted run and skips the earlier ones without reading them. No video
is opened here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vidshard.pipeline.training_data.videos import stable_hash

SUBSTITUTES = 15
"""Number of other items that are tried in place of one that cannot be decoded, for one clip. If all of them fail too,
training stops. In a corpus of which every third video is broken, 0.02 of a million clips are expected to fail so."""


@dataclass(frozen=True, kw_only=True)
class ClipSampler:
    """The endless sequence of draws: which item clip ``n`` of a training run shows.

    An epoch has as many draws as there are items. Without weights it is a permutation of the items. With weights each
    corpus gets its share of the draws, exact to a clip over all epochs up to any of them. A corpus goes through all of
    its items, shuffled anew each round, before it repeats one.
    """

    items: pa.Table
    """``ITEM_SCHEMA``."""
    weights: tuple[float, ...] | None
    """Weight of each corpus; None draws every item equally often."""
    seed: int

    @property
    def epoch_length(self) -> int:
        """Number of draws in an epoch."""
        return int(self.items.num_rows)

    @cached_property
    def _items_of_corpus(self) -> list[npt.NDArray[np.int64]]:
        """Item numbers of each corpus that has items."""
        corpora = self.items["corpus"].to_numpy()
        return [np.flatnonzero(corpora == corpus) for corpus in np.unique(corpora)]

    @cached_property
    def _corpus_of_item(self) -> npt.NDArray[np.int64]:
        """Corpus of each item, int64 (L,): its number among the corpora that have items."""
        number = np.empty(self.epoch_length, np.int64)
        for corpus, items in enumerate(self._items_of_corpus):
            number[items] = corpus
        return number

    def _draws_before(self, epoch: int) -> list[int]:
        """Number of draws from each corpus in all epochs before one."""
        if self.weights is None:
            return [epoch * len(items) for items in self._items_of_corpus]
        present = np.unique(self.items["corpus"].to_numpy())
        return _apportion([self.weights[corpus] for corpus in present], epoch * self.epoch_length)

    def epoch(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Draws of an epoch in order.

        Returns:
            The items, int64 (L,), and for each the round that its corpus is in, int64 (L,).
        """
        items, rounds = [], []
        bounds = zip(self._items_of_corpus, self._draws_before(number), self._draws_before(number + 1), strict=True)
        for corpus, (own, begin, end) in enumerate(bounds):
            at = np.arange(begin, end)
            for turn in np.unique(at // len(own)):
                order = self._random("round", corpus, int(turn)).permutation(own)
                items.append(order[at[at // len(own) == turn] % len(own)])
            rounds.append(at // len(own))
        order = self._random("epoch", number).permutation(self.epoch_length)
        return np.concatenate(items)[order], np.concatenate(rounds)[order]

    def rows(self, samples: Sequence[int]) -> pa.Table:
        """Draw samples: for each the item and its substitutes, with the seed of their places.

        Args:
            samples: positions in the sequence.

        Returns:
            ``sample``, int64, and ``candidates``: lists of structs of ``ITEM_SCHEMA`` with ``placement_seed``. The
            first candidate that can be decoded becomes the clip.
        """
        drawn, rounds, offsets = [], [], [0]
        for sample in samples:
            epoch, at = divmod(sample, self.epoch_length)
            items, turns = self._recent_epoch(epoch)
            same = self._items_of_corpus[self._corpus_of_item[items[at]]]
            spare = self._random("spare", sample).choice(len(same), min(len(same), SUBSTITUTES + 1), replace=False)
            candidates = [items[at], *(item for item in same[spare] if item != items[at])][: SUBSTITUTES + 1]
            drawn += candidates
            rounds += [turns[at]] * len(candidates)
            offsets.append(len(drawn))
        chosen = self.items.take(pa.array(drawn, pa.int64())).combine_chunks()
        seeds = [placement_seed(self.seed, int(turn)) for turn in rounds]
        chosen = chosen.append_column("placement_seed", pa.array(seeds, pa.int64()))
        structs = pa.StructArray.from_arrays(
            [column.combine_chunks() for column in chosen.itercolumns()], fields=list(chosen.schema)
        )
        lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), structs)
        return pa.table({"sample": pa.array(samples, pa.int64()), "candidates": lists})

    @cached_property
    def _epochs(self) -> dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        return {}

    def _recent_epoch(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The draws of an epoch; the last two epochs are kept, as a block of samples may span them."""
        if number not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[number] = self.epoch(number)
        return self._epochs[number]

    def _random(self, *what: object) -> np.random.Generator:
        return np.random.default_rng(int(stable_hash(self.seed, *what)[:16], 16))


def placement_seed(seed: int, turn: int) -> int:
    """Seed of the random places of all videos' clips in one round through a corpus."""
    return int(stable_hash(seed, "places", turn)[:15], 16)


def _apportion(weights: Sequence[float], total: int) -> list[int]:
    """Split a total into whole shares by weight; no share falls when the total grows.

    Sainte-Laguë's method: shares are rounded quotients by a common divisor (Balinski and Young, "Fair Representation",
    1982; of methods that never let a share fall it is the one without bias).
    """
    whole = sum(weights)
    shares = [round(weight / whole * total) for weight in weights]
    numbers = range(len(weights))
    while (missing := total - sum(shares)) != 0:
        if missing > 0:
            shares[max(numbers, key=lambda n: (weights[n] / (2 * shares[n] + 1), -n))] += 1
        else:
            with_some = [n for n in numbers if shares[n]]
            shares[min(with_some, key=lambda n: (weights[n] / (2 * shares[n] - 1), -n))] -= 1
    return shares
