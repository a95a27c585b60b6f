"""The order of an epoch: each unit once, the same for any ranks and batches, resumed by one number."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidshard.pipeline.reader.order import Atoms, Order, num_steps, positions, steps, turns


@st.composite
def atoms_of(draw: st.DrawFn, most: int = 60) -> Atoms:
    """Any units: atoms of any sizes in shards of up to three payload shapes."""
    shards = draw(st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=most // 6))
    sizes = [size for shard in shards for size in shard] or [3]
    shard = [at for at, groups in enumerate(shards) for _ in groups] or [0]
    num_shapes = draw(st.integers(1, 3))
    return Atoms(
        ends=np.cumsum(np.array(sizes, np.int64)),
        shard=np.array(shard, np.int64),
        shape=np.array(shard, np.int64) % num_shapes,
        num_bytes=1000 * sum(sizes),
    )


def order_of(atoms: Atoms, **options: Any) -> Order:
    return Order(atoms, **{"shuffle": True, "seed": 0, "epoch": 0, "lanes": 4, **options})


def step_units(order: Order, start: int, ranks: int, batch_size: int, **options: Any) -> list[list[list[int]]]:
    """Units of each rank's batches, by step."""
    found = []
    for rank in range(ranks):
        of_rank = steps(order, start, batch_size=batch_size, rank=rank, world_size=ranks, **options)
        found.append([(step.end, positions(order, step).tolist()) for step in of_rank])
    assert len({tuple(end for end, _ in batches) for batches in found}) == 1, "ranks agree on every step"
    return [[batches[at][1] for batches in found] for at in range(len(found[0]))]


@settings(max_examples=60, deadline=None)
@given(atoms=atoms_of(), shuffle=st.booleans(), lanes=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_unit_has_one_position(atoms: Atoms, shuffle: bool, lanes: int, seed: int) -> None:
    order = order_of(atoms, shuffle=shuffle, lanes=lanes, seed=seed)
    whole = order.at(0, len(order))
    assert sorted(whole.tolist()) == list(range(atoms.num_units))
    for cut in range(0, len(order), 7):
        assert order.at(cut, min(cut + 5, len(order))).tolist() == whole[cut : cut + 5].tolist()


@settings(max_examples=150, deadline=None)
@given(
    atoms=atoms_of(),
    ranks=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    batch_size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    cut=st.integers(0, 40),
    drop_last=st.booleans(),
)
def test_a_job_resumed_on_other_ranks_sees_exactly_what_was_not_seen(
    atoms: Atoms, ranks: tuple[int, int], batch_size: tuple[int, int], cut: int, drop_last: bool
) -> None:
    order = order_of(atoms)
    options: dict[str, Any] = {"uneven": "drop", "drop_last": drop_last}
    before = step_units(order, 0, ranks[0], batch_size[0], **options)[:cut]
    marks = [0]
    for step in steps(order, 0, batch_size=batch_size[0], rank=0, world_size=ranks[0], **options):
        marks.append(step.end)
    position = marks[min(cut, len(before))]
    after = step_units(order, position, ranks[1], batch_size[1], **options)
    seen = [unit for step in before for batch in step for unit in batch]
    rest = [unit for step in after for batch in step for unit in batch]
    assert len(seen + rest) == len(set(seen + rest)), "no unit twice"
    consumed = set(order.at(0, position).tolist())
    assert set(seen) <= consumed
    assert not consumed & set(rest)
    left_out = atoms.num_units - len(seen) - len(rest)
    most = (ranks[0] + ranks[1] - 2) if not drop_last else ranks[0] * batch_size[0] + ranks[1] * batch_size[1]
    assert left_out <= most * len(order.segment_ends), "only what cannot be shared out equally is left out"


@settings(max_examples=80, deadline=None)
@given(
    atoms=atoms_of(), ranks=st.integers(1, 6), batch_size=st.integers(1, 9), uneven=st.sampled_from(["drop", "repeat"])
)
def test_ranks_are_equal_in_length_and_batches_of_one_shape(
    atoms: Atoms, ranks: int, batch_size: int, uneven: str
) -> None:
    order = order_of(atoms)
    found = step_units(order, 0, ranks, batch_size, uneven=uneven, drop_last=False)
    assert len(found) == num_steps(order, batch_size=batch_size, world_size=ranks, uneven=uneven, drop_last=False)
    shape_of = atoms.shape[np.searchsorted(atoms.ends, np.arange(atoms.num_units), side="right")]
    for step in found:
        assert len({len(batch) for batch in step}) == 1
        assert all(batch for batch in step)
        assert len({int(shape_of[unit]) for batch in step for unit in batch}) == 1
    seen = [unit for step in found for batch in step for unit in batch]
    if uneven == "repeat":
        assert set(seen) == set(range(atoms.num_units)), "each at least once"
        assert len(seen) - len(set(seen)) < ranks * max(1, len(order.segment_ends))
    elif ranks == 1:
        assert sorted(seen) == list(range(atoms.num_units)), "each exactly once"


def regular(groups: int, rows: int, shards: int = 8) -> Atoms:
    return Atoms(
        ends=np.arange(1, groups + 1) * rows,
        shard=np.arange(groups) * shards // groups,
        shape=np.zeros(groups, np.int64),
        num_bytes=groups * rows * 20_000,
    )


def test_seeds_and_epochs_give_other_orders() -> None:
    atoms = regular(40, 10)
    orders = {
        tuple(order_of(atoms, seed=seed, epoch=epoch).at(0, 400).tolist()) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9


def test_the_order_of_a_seed_stays_the_same_between_versions() -> None:
    order = order_of(regular(300, 10), seed=7, epoch=3, lanes=32).at(0, 3000)
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == "3aceec1fbc440d3c"


def uneven(shards: int, most: int) -> Atoms:
    """Shards of row groups of one size, but each shard's last one."""
    sizes = [size for shard in range(shards) for size in [most] * 14 + [1 + shard * 37 % most]]
    return Atoms(
        ends=np.cumsum(np.array(sizes)),
        shard=np.repeat(np.arange(shards), 15),
        shape=np.zeros(len(sizes), np.int64),
        num_bytes=sum(sizes) * 20_000,
    )


def reads_of_workers(order: Order, atoms: Atoms, workers: int, batch_size: int, parts: int, start: int = 0) -> float:
    """Mean number of times that an atom is read: once by each worker that needs it."""
    found: list[set[int]] = [set() for _ in range(workers)]
    one_rank: dict[str, Any] = {"rank": 0, "world_size": 1, "uneven": "drop", "drop_last": False}
    all_steps = steps(order, start, batch_size=batch_size, **one_rank)
    for turn, step in turns(all_steps, cycle=order.cycle, parts=parts):
        units = positions(order, step)
        found[turn % workers] |= set(np.searchsorted(atoms.ends, units, side="right").tolist())
    return sum(map(len, found)) / len(set.union(*found))


@pytest.mark.parametrize("rows", [50, 102])
@pytest.mark.parametrize(
    ("workers", "batch_size", "parts"), [(2, 32, 2), (2, 32, 8), (4, 16, 4), (3, 8, 3), (8, 32, 8), (2, 24, 2)]
)
def test_workers_share_out_row_groups_whatever_their_sizes(
    rows: int, workers: int, batch_size: int, parts: int
) -> None:
    atoms = uneven(40, rows)
    order = order_of(atoms, lanes=32)
    for start in (0, 7 * batch_size):
        assert reads_of_workers(order, atoms, workers, batch_size, parts, start) <= 1.25


@settings(max_examples=60, deadline=None)
@given(
    atoms=atoms_of(),
    start=st.integers(0, 40),
    batch_size=st.integers(1, 7),
    ranks=st.integers(1, 4),
    cycle=st.integers(1, 60) | st.none(),
    parts=st.integers(1, 6),
)
def test_every_step_is_of_one_turn_and_turns_are_numbered_without_gaps(
    atoms: Atoms, start: int, batch_size: int, ranks: int, cycle: int | None, parts: int
) -> None:
    options: dict[str, Any] = {"batch_size": batch_size, "world_size": ranks, "uneven": "drop", "drop_last": False}
    order = order_of(atoms)
    of_rank = [
        list(turns(steps(order, start, rank=rank, **options), cycle=cycle, parts=parts)) for rank in range(ranks)
    ]
    numbers = [number for number, _ in of_rank[0]]
    assert numbers == sorted(numbers)
    assert sorted(set(numbers)) == list(range(len(set(numbers))))
    assert all([number for number, _ in found] == numbers for found in of_rank), "ranks agree on turns"
    assert [step for _, step in of_rank[0]] == list(steps(order, start, rank=0, **options))


def test_a_batch_mixes_row_groups_nearly_as_a_perfect_shuffle_does() -> None:
    """Row groups in batches of 32, and how far the mean position of a batch strays, against a uniform permutation."""
    rows, order = 50, order_of(regular(4096, 50, shards=64), lanes=32)
    perfect = np.random.default_rng(0).permutation(len(order))
    whole = order.at(0, len(order))
    groups = [
        np.mean([len({u // rows for u in o[at : at + 32]}) for at in range(0, len(o), 3200)]) for o in (whole, perfect)
    ]
    assert groups[0] >= 14
    assert groups[1] > 31
    drift = [np.std(o.reshape(-1, 32).mean(axis=1)) for o in (whole, perfect)]
    assert drift[0] < 2.5 * drift[1]


def test_a_block_is_no_larger_than_allowed_however_large_row_groups_are() -> None:
    atoms = Atoms(
        ends=np.arange(1, 9), shard=np.zeros(8, np.int64), shape=np.zeros(8, np.int64), num_bytes=8 << 30
    )  # fmt: skip
    order = order_of(atoms)
    assert [order.block_end(at) for at in range(8)] == list(range(1, 9))


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_dataset_without_units_has_an_empty_order(shuffle: bool) -> None:
    none = np.empty(0, np.int64)
    order = order_of(Atoms(ends=none, shard=none, shape=none, num_bytes=0), shuffle=shuffle)
    assert len(order) == 0
    assert not list(steps(order, 0, batch_size=1, rank=0, world_size=1, uneven="drop", drop_last=False))
