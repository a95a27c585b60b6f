"""Batch sizes by frame size: halved when memory runs out, raised again after a while."""

from __future__ import annotations

from vidshard.pipeline.batch_sizes import PATIENCE, BatchSizes

LARGE, SMALL = (512, 512), (64, 64)


def test_a_size_is_halved_by_itself_down_to_one_clip() -> None:
    sizes = BatchSizes(8, {})
    assert [sizes.halve(LARGE) for _ in range(5)] == [4, 2, 1, 1, 1]
    assert sizes.of(SMALL) == 8


def test_a_reduced_size_grows_again_after_a_while_up_to_its_limit() -> None:
    sizes = BatchSizes(8, {})
    sizes.halve(LARGE)
    sizes.halve(LARGE)
    seen = []
    for _ in range(2 * PATIENCE + 2):
        sizes.succeeded(LARGE, 1)
        seen.append(sizes.of(LARGE))
    assert seen[PATIENCE - 2] == 2
    assert seen[PATIENCE - 1] == 4
    assert seen[-1] == 8
    assert not any(sizes.succeeded(LARGE, PATIENCE) for _ in range(20))


def test_trials_that_fail_become_rare() -> None:
    sizes = BatchSizes(8, {})
    sizes.halve(LARGE)
    trials, batches = 0, 0
    while batches < 100 * PATIENCE:
        batches += 1
        if sizes.succeeded(LARGE, 1):
            trials += 1
            assert sizes.of(LARGE) == 8
            assert sizes.halve(LARGE) == 4
    assert 5 <= trials <= 7


def test_a_limit_of_one_frame_size_holds_from_the_start_and_after_growth() -> None:
    sizes = BatchSizes(8, {LARGE: 3, SMALL: 100})
    assert (sizes.of(LARGE), sizes.of(SMALL)) == (3, 8)
    sizes.halve(LARGE)
    for _ in range(PATIENCE + 1):
        sizes.succeeded(LARGE, 1)
    assert sizes.of(LARGE) <= 3
    assert BatchSizes(8, {LARGE: 0}).of(LARGE) == 1
