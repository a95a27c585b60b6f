"""Order of an epoch: which unit (a row, or a window of rows) has which position.

Pure arithmetic over counts: no file is opened here. The order depends on the dataset, the seed, the epoch and the
number of lanes alone. It never depends on ranks, loader workers or batch sizes, so what a job has consumed is always a
prefix of the order, and one number is its whole state.

A shuffled order is made in four steps, each of which keeps together what is read together:

1. shards are permuted, and taken in windows of ``SHARDS_AT_ONCE``;
2. the atoms (row groups, or runs of them) of a window are permuted;
3. consecutive units form a block, which is cut into lanes; the units of a lane are permuted;
4. a block takes ``CHUNK`` units of each lane in turn; one round of all lanes is a cycle.

All lanes of a block end in the same cycle, and a block is a whole number of cycles, whatever the sizes of the atoms. So
a worker that makes the batches of the same part of each cycle (`turns`) meets the same lanes again, and reads only
their atoms. Batches have one payload shape: the atoms of each shape form segments, and no batch crosses the end of a
segment.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

ORDER_VERSION = 2
"""Raised with every change of the order, so that a state of another one is refused."""
SHARDS_AT_ONCE = 32
"""Shards whose row groups are shuffled together: a reader keeps as many footers in memory."""
CHUNK = 8
"""Units of one lane that follow one another in a block."""
ATOMS_PER_LANE = 4
"""Atoms of one lane of a block: units of so many row groups are mixed within a chunk."""
BLOCK_BYTES = 256 << 20
"""Largest size of a block's payload in memory, where atoms are so large that fewer of them make a block."""
SEGMENTS_PER_SHAPE = 8
"""Largest number of segments that the units of one payload shape form in an epoch."""


@dataclass(frozen=True, kw_only=True)
class Atoms:
    """Units that are read together, in the order of the files."""

    ends: Integers
    """int64 (atoms,): units up to the end of each atom; the units of an atom have consecutive numbers."""
    shard: Integers
    """int64 (atoms,): number of the shard of each atom."""
    shape: Integers
    """int64 (atoms,): number of the payload shape of each atom."""
    num_bytes: int
    """Payload of all atoms in memory."""

    @property
    def num_units(self) -> int:
        """Number of units."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def units(self, atom: int) -> Integers:
        """Numbers of the units of an atom."""
        return np.arange(self.ends[atom - 1] if atom else 0, self.ends[atom])


class _Block(NamedTuple):
    """Units that are in memory together."""

    atoms: Integers
    skipped: int
    """Units of the first atom that are of the block before."""
    num_units: int


class Order:
    """Order of the units of one epoch; computed block by block."""

    def __init__(
        self,
        atoms: Atoms,
        *,
        shuffle: bool,
        seed: int,
        epoch: int,
        lanes: int,
        cycle: int | None = None,
        name: str | None = None,
    ) -> None:
        """Lay out blocks and segments.

        Args:
            atoms: the units of the dataset.
            shuffle: whether to shuffle; otherwise units have the order of their numbers, by payload shape.
            seed: any integer.
            epoch: number of the epoch; each has an order of its own.
            lanes: number of lanes of a block, at least 1.
            cycle: units that a block takes from all lanes in turn; None for ``CHUNK`` of each.
            name: tells apart the orders of several outputs.
        """
        self._atoms = atoms
        self._shuffle = shuffle
        self._key = f"{seed}/{epoch}" if name is None else f"{seed}/{epoch}/{name}"
        self._lanes = lanes
        self.cycle: int = lanes * CHUNK if cycle is None else cycle
        """Units of a block that come from all lanes in turn, before the first lane comes again."""
        mean_bytes = max(1, atoms.num_bytes // max(1, len(atoms.ends)))
        self._atoms_per_block = max(1, min(lanes * ATOMS_PER_LANE, BLOCK_BYTES // mean_bytes))
        segments = self._segments()
        self._blocks = [block for segment in segments for block in segment]
        lengths = [sum(block.num_units for block in segment) for segment in segments]
        self.segment_ends: Integers = np.cumsum(np.array(lengths, np.int64))
        """int64 (segments,): positions at which the segments end."""
        self._block_ends = np.cumsum(np.array([block.num_units for block in self._blocks], np.int64))
        self._units_of = lru_cache(maxsize=3)(self._block_units)

    def __len__(self) -> int:
        return self._atoms.num_units

    def at(self, start: int, stop: int) -> Integers:
        """Units at the positions [start, stop)."""
        first, last = np.searchsorted(self._block_ends, [start, stop - 1], side="right")
        found = [np.empty(0, np.int64)]
        for block in range(first, last + 1 if stop > start else first):
            begin = int(self._block_ends[block - 1]) if block else 0
            found.append(self._units_of(block)[max(0, start - begin) : stop - begin])
        return np.concatenate(found)

    def block_end(self, position: int) -> int:
        """Position at which the block of a position ends."""
        return int(self._block_ends[np.searchsorted(self._block_ends, position, side="right")])

    def segment_of(self, position: int) -> tuple[int, int]:
        """Positions at which the segment of a position begins and ends."""
        segment = int(np.searchsorted(self.segment_ends, position, side="right"))
        return (int(self.segment_ends[segment - 1]) if segment else 0), int(self.segment_ends[segment])

    def _segments(self) -> list[list[_Block]]:
        """Blocks of each segment, in order."""
        atoms = self._atoms
        segments: list[list[_Block]] = []
        for shape in np.unique(atoms.shape):
            of_shape = np.flatnonzero((atoms.shape == shape) & (np.diff(atoms.ends, prepend=0) > 0))
            if not len(of_shape):
                continue
            order = self._shuffled_atoms(of_shape, int(shape)) if self._shuffle else of_shape
            blocks = self._cut_into_blocks(order)
            parts = min(SEGMENTS_PER_SHAPE, len(blocks)) if self._shuffle else 1
            cuts = np.linspace(0, len(blocks), parts + 1).round().astype(int)
            segments += [blocks[a:b] for a, b in itertools.pairwise(cuts)]
        if len(np.unique(atoms.shape)) < 2:
            return [[block for segment in segments for block in segment]] if segments else []
        if not self._shuffle:
            return segments
        return [segments[at] for at in self._permutation(len(segments), "segments")]

    def _shuffled_atoms(self, atoms: Integers, shape: int) -> Integers:
        shards = np.unique(self._atoms.shard[atoms])
        rank = np.empty(int(shards.max()) + 1, np.int64)
        rank[shards[self._permutation(len(shards), f"shards {shape}")]] = np.arange(len(shards))
        window = rank[self._atoms.shard[atoms]] // SHARDS_AT_ONCE
        return atoms[np.lexsort((self._keys(len(atoms), f"atoms {shape}"), window))]

    def _cut_into_blocks(self, atoms: Integers) -> list[_Block]:
        """Blocks of atoms in their order: shuffled a whole number of cycles each, but the last one."""
        sizes = np.diff(self._atoms.ends, prepend=0)[atoms]
        ends = np.cumsum(sizes)
        total = int(ends[-1])
        if not self._shuffle:
            cuts = [0, *ends[self._atoms_per_block - 1 : -1 : self._atoms_per_block].tolist(), total]
        else:
            size = max(1, int(sizes.mean() * self._atoms_per_block))
            size = max(size // self.cycle * self.cycle, min(size, self.cycle))
            cuts = [*range(0, total, size), total]
        blocks = []
        for start, stop in itertools.pairwise(cuts):
            first, last = np.searchsorted(ends, [start, stop - 1], side="right")
            skipped = start - int(ends[first] - sizes[first])
            blocks.append(_Block(atoms[first : last + 1], skipped, stop - start))
        return blocks

    def _block_units(self, block: int) -> Integers:
        atoms, skipped, num_units = self._blocks[block]
        found = np.concatenate([self._atoms.units(int(atom)) for atom in atoms])[skipped : skipped + num_units]
        if not self._shuffle:
            return found
        chunks = self._chunks(min(self._lanes, len(atoms)))
        whole, rest = divmod(num_units, int(chunks.sum()))
        ends = np.append(0, np.cumsum(chunks))
        sizes = chunks * whole + np.diff(ends * rest // ends[-1])
        lane = np.repeat(np.arange(len(chunks)), sizes)
        mixed = np.lexsort((self._keys(num_units, f"units {block}"), lane))
        rank = np.arange(num_units) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        chunk = chunks[lane]
        return found[mixed][np.lexsort((rank % chunk, lane, rank // chunk))]

    def _chunks(self, lanes: int) -> Integers:
        """Units that each lane gives in its turn."""
        if self.cycle == self._lanes * CHUNK:
            return np.full(lanes, CHUNK, np.int64)
        return np.maximum(1, np.diff(np.arange(lanes + 1) * self.cycle // lanes))

    def _keys(self, count: int, purpose: str) -> npt.NDArray[np.uint64]:
        """Random keys to sort by. Raw numbers of a bit generator are the same in every version of NumPy."""
        key = int.from_bytes(hashlib.blake2b(f"{self._key}/{purpose}".encode(), digest_size=16).digest(), "little")
        return np.random.Philox(key=key).random_raw(count).astype(np.uint64, copy=False)

    def _permutation(self, count: int, purpose: str) -> Integers:
        return np.argsort(self._keys(count, purpose), kind="stable")


class Positions(Protocol):
    """An order of units: `Order`, or that of a mixture."""

    segment_ends: Integers
    cycle: int

    def __len__(self) -> int: ...

    def at(self, start: int, stop: int) -> Integers:
        """Units at the positions [start, stop)."""

    def segment_of(self, position: int) -> tuple[int, int]:
        """Positions at which the segment of a position begins and ends."""


@dataclass(frozen=True, slots=True)
class Step:
    """One batch of one rank."""

    start: int
    """Position of its first unit."""
    stop: int
    """Position after its last unit."""
    end: int
    """Positions below this one are consumed once every rank has had this step."""
    begin: int
    """Position of the first unit of all ranks."""


def steps(
    order: Positions, position: int, *, batch_size: int, rank: int, world_size: int, uneven: str, drop_last: bool
) -> Iterator[Step]:
    """Batches of one rank from a position on; every rank has equally many, of equal sizes at the same step.

    Step s of all ranks covers ``world_size * batch_size`` consecutive positions, of which each rank takes a stretch.
    At the end of a segment what remains is shared out equally. With ``uneven="drop"`` the last
    ``remaining % world_size`` units are left out; with ``"repeat"`` units from the segment's start fill them up.

    Args:
        order: of the epoch.
        position: first position that is not consumed.
        batch_size: units of a batch.
        rank: number of this rank.
        world_size: number of ranks.
        uneven: ``drop`` or ``repeat``.
        drop_last: leave out the shorter batches at the end of a segment.
    """
    total = len(order)
    while position < total:
        _, end = order.segment_of(position)
        whole = (end - position) // (batch_size * world_size)
        for _ in range(whole):
            begin = position
            position += batch_size * world_size
            rest = end - position
            is_last = (
                rest == 0 or (drop_last and rest < batch_size * world_size) or (uneven == "drop" and rest < world_size)
            )
            start = begin + rank * batch_size
            yield Step(start, start + batch_size, end if is_last else position, begin)
        rest = end - position
        if rest and not drop_last:
            share = rest // world_size if uneven == "drop" else -(-rest // world_size)
            start = position + rank * share
            if share:
                yield Step(start, start + share, end, position)
        position = end


def turns(all_steps: Iterator[Step], *, cycle: int | None, parts: int) -> Iterator[tuple[int, Step]]:
    """Number the turns in which loader workers make batches: worker w of n makes the turns w, w + n ...

    A turn is the steps that begin in one part of a cycle. With as many parts as workers, or a multiple, a worker has
    the same parts of every cycle.

    Args:
        all_steps: of one rank.
        cycle: positions of a cycle; see `Order.cycle`. None for turns of one step.
        parts: equal parts of a cycle.
    """
    if cycle is None:
        yield from enumerate(all_steps)
        return
    number, before = -1, None
    for step in all_steps:
        place = divmod(step.begin, cycle)
        part = place[0], place[1] * parts // cycle
        number += part != before
        before = part
        yield number, step


def positions(order: Positions, step: Step) -> Integers:
    """Units of a step; positions beyond the end of the segment continue at its start."""
    begin, end = order.segment_of(min(step.start, step.end - 1))
    if step.stop <= end:
        return order.at(step.start, step.stop)
    wrapped = begin + (np.arange(step.start, step.stop) - begin) % (end - begin)
    return np.array([order.at(int(at), int(at) + 1)[0] for at in wrapped], np.int64)


def num_steps(order: Positions, *, batch_size: int, world_size: int, uneven: str, drop_last: bool) -> int:
    """Number of batches of each rank in a whole epoch."""
    total = 0
    for length in np.diff(order.segment_ends, prepend=0):
        total += int(length) // (batch_size * world_size)
        rest = int(length) % (batch_size * world_size)
        total += bool(rest and not drop_last and (rest >= world_size or uneven == "repeat"))
    return total
