"""Weighted mixtures: shares, passes, one number that resumes, sources by name, and refusals."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vidshard
from tests.support.token_outputs import Made, provenance, write_output, write_shard
from vidshard.pipeline.reader.mixture import Mixture, Shares
from vidshard.pipeline.reader.order import Atoms, positions, steps
from vidshard.schemas.errors import UserError
from vidshard.schemas.tokens import tokens_payload


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, Any]:
    """Any mixture of up to three sources of any sizes and weights."""
    sizes = draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=8), min_size=1, max_size=3))
    weights = draw(st.lists(st.floats(0.05, 20), min_size=len(sizes), max_size=len(sizes)))
    lanes = draw(st.integers(1, 5))
    flat = [size for source in sizes for size in source]
    number = np.repeat(np.arange(len(sizes)), [len(source) for source in sizes])
    atoms = Atoms(ends=np.cumsum(flat), shard=number, shape=np.zeros(len(flat), np.int64), num_bytes=sum(flat) * 100)
    shares = Shares.of_weights(weights, lanes)
    return {"atoms": atoms, "source": number, "shares": shares, "lanes": lanes, "seed": draw(st.integers(0, 9))}


def stream(made: dict[str, Any], epochs: int, *, shuffle: bool = True) -> list[int]:
    return [
        int(unit)
        for epoch in range(epochs)
        for mixture in [Mixture(**made, shuffle=shuffle, epoch=epoch)]
        for unit in mixture.at(0, len(mixture))
    ]


@settings(max_examples=60, deadline=None)
@given(made=mixtures(), shuffle=st.booleans())
def test_every_source_is_passed_through_whole_again_and_again(made: dict[str, Any], shuffle: bool) -> None:
    units = stream(made, 3, shuffle=shuffle)
    ends = made["atoms"].ends
    source = made["source"][np.searchsorted(ends, units, side="right")]
    for number in np.unique(made["source"]):
        size = int(np.diff(ends, prepend=0)[made["source"] == number].sum())
        own = [unit for unit, of in zip(units, source, strict=True) if of == number]
        for start in range(0, len(own), size):
            one_pass = own[start : start + size]
            assert len(set(one_pass)) == len(one_pass), "no clip twice in a pass"
    total = made["shares"].total
    for start in range(0, len(units) - total, total):
        counts = np.bincount(source[start : start + total], minlength=len(made["shares"].slots))
        assert counts.tolist() == list(made["shares"].slots), "each stretch has the shares of the weights"


@settings(max_examples=60, deadline=None)
@given(
    made=mixtures(),
    ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    batch_size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    cut=st.integers(0, 12),
)
def test_a_mixture_resumed_on_other_ranks_goes_on_where_it_was(
    made: dict[str, Any], ranks: tuple[int, int], batch_size: tuple[int, int], cut: int
) -> None:
    mixture = Mixture(**made, shuffle=True, epoch=1)
    whole = mixture.at(0, len(mixture)).tolist()

    def read(start: int, world_size: int, size: int, most: int) -> tuple[list[int], int]:
        found: list[tuple[int, int]] = []
        end = start
        for rank in range(world_size):
            options: dict[str, Any] = {"uneven": "drop", "drop_last": False}
            of_rank = list(steps(mixture, start, batch_size=size, rank=rank, world_size=world_size, **options))[:most]
            for step in of_rank:
                found += zip(range(step.start, step.stop), positions(mixture, step).tolist(), strict=True)
                end = step.end
        return [unit for _, unit in sorted(found)], end

    before, position = read(0, ranks[0], batch_size[0], cut)
    after, _ = read(position, ranks[1], batch_size[1], 1 << 30)
    assert before == whole[: len(before)]
    assert after == whole[position : position + len(after)]
    assert len(whole) - len(before) - len(after) < ranks[0] + ranks[1]


@settings(max_examples=40, deadline=None)
@given(made=mixtures(), position=st.integers(0, 200))
def test_a_block_ends_after_every_position_in_it(made: dict[str, Any], position: int) -> None:
    mixture = Mixture(**made, shuffle=True, epoch=0)
    position %= len(mixture)
    assert position < mixture.block_end(position) <= len(mixture)


@pytest.mark.parametrize(
    ("weights", "shares"),
    [([3, 1], [0.75, 0.25]), ([1], [1.0]), ([7e-300, 3e-300], [0.7, 0.3]), ([1, 999], [0.001, 0.999])],
)
def test_shares_are_the_weights_to_one_percent(weights: list[float], shares: list[float]) -> None:
    slots = Shares.of_weights(weights, 32)
    assert np.allclose(np.array(slots.slots) / slots.total, shares, rtol=0.0101)


def test_workers_that_share_out_batches_share_out_row_groups_of_a_mixture_too() -> None:
    """Four workers, two outputs of 512 row groups: no row group is read by two of them."""
    ends = np.cumsum(np.full(1024, 64))
    shard = np.arange(1024) // 64
    atoms = Atoms(ends=ends, shard=shard, shape=np.zeros(1024, np.int64), num_bytes=1024 << 20)
    source = (np.arange(1024) >= 512).astype(np.int64)
    mixture = Mixture(atoms, source, Shares.of_weights([1, 1], 32), shuffle=True, seed=0, epoch=0, lanes=32)
    batches = mixture.at(0, 1 << 13).reshape(-1, 64)
    groups = [set((batches[worker::4].reshape(-1) // 64).tolist()) for worker in range(4)]
    assert sum(map(len, groups)) <= 1.5 * len(set.union(*groups))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("mixture")
    write_output(folder / "games", num_shards=3)
    write_output(folder / "robots", num_shards=2, payload=tokens_payload((2, 2, 3), 1 << 18))
    return {str(folder / "games"): 3, str(folder / "robots"): 1}


def seen(batches: Any) -> list[tuple[str, str]]:
    return [pair for batch in batches for pair in zip(batch["_source"], batch["clip_id"], strict=True)]


def mixed(outputs: dict[str, float], **options: Any) -> vidshard.TokenShards:
    return vidshard.TokenShards(outputs, columns=["tokens", "clip_id"], **{"batch_size": 4, "shuffle": True, **options})


def test_batches_name_the_source_of_each_clip_and_keep_the_shares(outputs: dict[str, float]) -> None:
    dataset = mixed(outputs)
    loader = dataset.loader()
    found = [pair for _ in range(8) for pair in seen(loader)]
    counts = Counter(source for source, _ in found)
    assert len(found) == 8 * dataset.num_samples
    assert abs(counts[next(iter(outputs))] / len(found) - 0.75) < 0.03
    for path in outputs:
        own = {row["clip_id"] for row in vidshard.TokenShards(path, columns=["clip_id"])}
        assert {clip for source, clip in found if source == path} == own, "each clip of each output comes"


@pytest.mark.parametrize(("workers", "ranks"), [(1, 1), (2, 1), (0, 3), (2, 2)])
def test_a_mixture_is_the_same_for_any_workers_and_ranks_and_resumed_by_one_number(
    outputs: dict[str, float], workers: int, ranks: int
) -> None:
    whole = seen(mixed(outputs, batch_size=1))
    dataset = mixed(outputs)
    loader = dataset.loader()
    batches = iter(loader)
    first = seen(next(batches) for _ in range(5))
    state = loader.state_dict()
    assert set(state) == {"samples", "dataset"}
    found = []
    for rank in range(ranks):
        other = mixed(outputs, batch_size=2, rank=rank, world_size=ranks).loader(workers)
        other.load_state_dict(state)
        found.append(seen(other))
    together = first + [pair for of_rank in found for pair in of_rank]
    assert first == whole[:20]
    assert not Counter(together) - Counter(whole)
    assert len(together) > len(whole) - ranks


def test_a_state_of_other_weights_is_refused(outputs: dict[str, float]) -> None:
    state = mixed(outputs).state_dict()
    with pytest.raises(UserError, match="weights"):
        mixed(dict.fromkeys(outputs, 1)).load_state_dict(state)


def test_windows_of_a_mixture_name_their_source_once(outputs: dict[str, float]) -> None:
    batch = next(iter(mixed(outputs, sequence=2)))
    assert len(batch["_source"]) == 4
    assert batch["tokens"].shape[:2] == (4, 2)


def test_what_cannot_be_mixed_by_weights_is_refused_by_name(outputs: dict[str, float], tmp_path: Path) -> None:
    games = next(iter(outputs))
    write_output(tmp_path / "large", num_shards=1, payload=tokens_payload((2, 4, 4), 1 << 18))
    with pytest.raises(UserError, match=r"games/.*large/.*other payload shapes"):
        mixed({games: 1, str(tmp_path / "large"): 1})
    write_shard(tmp_path / "b.parquet", [Made(video="b")], metadata=provenance(weights_sha256="cd" * 32))
    with pytest.raises(UserError, match=r"games/.*b\.parquet differ in weights"):
        mixed({games: 1, str(tmp_path / "b.parquet"): 1})
    assert len(mixed({games: 1, str(tmp_path / "b.parquet"): 1}, allow_mixed=["weights"])) > 1
    for weight in (0, -1, float("nan"), float("inf"), "2", True, None):
        with pytest.raises(UserError, match=r"weight of .* positive number"):
            mixed({games: weight})  # type: ignore[dict-item]
    numbers: Any = np.int64(1), np.float32(2)
    assert len(mixed(dict(zip(outputs, numbers, strict=True)))) > 1
    with pytest.raises(UserError, match="nothing to read"):
        mixed({})
    with pytest.raises(UserError, match="smallest weight"):
        mixed({games: 1, list(outputs)[1]: 1e-9})
    with pytest.raises(UserError, match=r"robots.* none of its clips"):
        mixed(outputs, where="video_id >= 'j'")
