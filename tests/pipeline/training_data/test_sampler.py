"""Clips by position in a training: every epoch, every corpus, from any position on."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from vidshard.pipeline.training_data.sampler import ClipSampler
from vidshard.pipeline.training_data.videos import (
    ITEM_SCHEMA,
)


def items(*sizes: int) -> pa.Table:
    """Made-up items of corpora of so many items each."""
    rows = []
    for corpus, size in enumerate(sizes):
        for number in range(size):
            row = dict.fromkeys(ITEM_SCHEMA.names, 0) | {"corpus": corpus, "number": number, "part_start_seconds": None}
            text = dict.fromkeys(("span_id", "video_id", "uri", "source_codec", "fingerprint"), "x")
            rows.append(row | text | {"part_end_seconds": None, "shard": None, "shard_row": None})
    return pa.Table.from_pylist(rows, schema=ITEM_SCHEMA)


def test_every_epoch_shows_every_clip_once_in_another_order() -> None:
    draws = ClipSampler(items=items(30), weights=None, seed=1)
    first, second = draws.epoch(0)[0], draws.epoch(1)[0]
    assert sorted(first) == sorted(second) == list(range(30))
    assert list(first) != list(second)
    assert list(first) != list(ClipSampler(items=items(30), weights=None, seed=2).epoch(0)[0])


def test_weights_are_kept_and_a_corpus_repeats_nothing_before_it_is_through() -> None:
    draws = ClipSampler(items=items(40, 10), weights=(0.3, 0.7), seed=0)
    shown = np.concatenate([draws.epoch(number)[0] for number in range(8)])
    per_epoch = [int((draws.epoch(number)[0] < 40).sum()) for number in range(8)]
    assert per_epoch == [15] * 8  # 0.3 of 50
    large, small = np.bincount(shown[shown < 40], minlength=40), np.bincount(shown[shown >= 40] - 40)
    assert set(large) == {3}  # 120 draws of 40
    assert set(small) == {28}  # 280 of 10


def test_a_corpus_of_little_weight_has_its_turn_in_the_end() -> None:
    draws = ClipSampler(items=items(20, 20, 3), weights=(0.985, 0.01, 0.005), seed=0)
    counts = np.zeros(3, int)
    for number in range(200):
        shown = draws.epoch(number)[0]
        assert len(shown) == 43
        counts += np.bincount(np.digitize(shown, (20, 40)), minlength=3)
        assert np.abs(counts - np.array(draws.weights) * 43 * (number + 1)).max() < 1
    assert counts.tolist() == [8471, 86, 43]


def test_rounds_of_a_corpus_take_other_places() -> None:
    draws = ClipSampler(items=items(4), weights=None, seed=0)
    seeds = [row["candidates"][0]["placement_seed"] for row in draws.rows(range(12)).to_pylist()]
    assert [len(set(seeds[at : at + 4])) for at in (0, 4, 8)] == [1, 1, 1]
    assert len(set(seeds)) == 3


def test_draws_do_not_depend_on_what_was_asked_before() -> None:
    draws = ClipSampler(items=items(7, 5), weights=(1.0, 2.0), seed=0)
    whole = draws.rows(range(100)).to_pylist()
    assert ClipSampler(items=items(7, 5), weights=(1.0, 2.0), seed=0).rows(range(61, 73)).to_pylist() == whole[61:73]


def test_what_stands_in_for_a_clip_is_another_one_each_time() -> None:
    for row in ClipSampler(items=items(100, 5), weights=None, seed=0).rows(range(60)).to_pylist():
        candidates = [(item["corpus"], item["number"]) for item in row["candidates"]]
        assert len(set(candidates)) == len(candidates) == (16 if candidates[0][0] == 0 else 5)
        assert len({corpus for corpus, _ in candidates}) == 1
