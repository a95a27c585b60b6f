"""A job of real loader processes is killed and goes on elsewhere: every clip once, whatever the numbers are."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

import vidshard
from tests.support.token_outputs import write_output
from vidshard.pipeline.reader.token_shards import TokenShards
from vidshard.schemas.tokens import tokens_payload

TOTAL = 98


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic") / "tokens"
    assert write_output(folder, num_shards=7) == TOTAL
    return folder


def run_rank(log: Path, out: Path, state: Any, kill_at: int | None, workers: int, options: dict[str, Any]) -> None:
    """Read as one rank and write down every batch; die, with all that is going on, after so many of them."""
    # its loader workers notice that death only as children of its own
    multiprocessing.set_start_method("fork", force=True)
    loader = vidshard.TokenShards(str(out), shuffle=True, seed=3, **options).loader(workers)
    if state is not None:
        loader.load_state_dict(state)
    with log.open("w") as lines:
        for at, batch in enumerate(loader, start=1):
            print(json.dumps([batch["tokens"].flatten(1)[:, 0].tolist(), loader.state_dict()]), file=lines, flush=True)
            if at == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        print(json.dumps([[], loader.state_dict()]), file=lines)


def job(
    out: Path, folder: Path, state: Any, kill_at: int | None, *, ranks: int, workers: int, batch_size: int
) -> tuple[list[int], dict[str, Any]]:
    """Run all ranks, each in a process of its own. Clips seen, and the state after the last batch."""
    # Forked from a server without threads: a fork of the test process may wait for locks that its threads hold.
    context = multiprocessing.get_context("forkserver")
    # `vidshard` is lazy: the server has to load what it stands for, or each fork would, PyTorch first of all
    context.set_forkserver_preload([__name__, TokenShards.__module__])
    seen: list[int] = []
    states: list[dict[str, Any]] = []
    for rank in range(ranks):
        log = folder / "log"
        options = {"rank": rank, "world_size": ranks, "batch_size": batch_size}
        process = context.Process(target=run_rank, args=(log, out, state, kill_at, workers, options))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        seen += [number for numbers, _ in lines for number in numbers]
        states.append(lines[-1][1])
    assert all(found == states[0] for found in states), "one state for all ranks"
    return seen, states[0]


@pytest.mark.parametrize("number", range(4))
def test_every_clip_comes_once_over_any_chain_of_killed_jobs(out: Path, number: int, tmp_path: Path) -> None:
    """Up to four jobs in a row, each with other ranks, workers and batch sizes, each killed at another batch."""
    draw = random.Random(number)
    state: dict[str, Any] | None = None
    seen: list[int] = []
    left_out = 0
    for _ in range(draw.randint(2, 3)):
        ranks = draw.choice([1, 2, 3])
        numbers = {"ranks": ranks, "workers": draw.choice([0, 1, 2]), "batch_size": draw.randint(1, 7)}
        found, state = job(out, tmp_path, state, draw.randint(1, 3), **numbers)
        seen += found
        left_out += ranks - 1
    assert state is not None
    if state["samples"] < TOTAL:
        ranks = draw.choice([1, 2, 3])
        numbers = {"ranks": ranks, "workers": draw.choice([0, 2]), "batch_size": draw.randint(1, 9)}
        found, after = job(out, tmp_path, state, None, **numbers)
        seen += found
        left_out += ranks - 1
        assert after["samples"] == TOTAL, "the next epoch begins"
    assert len(seen) == len(set(seen)), "no clip twice"
    assert set(seen) <= set(range(TOTAL))
    assert len(seen) >= TOTAL - left_out, "only what cannot be shared out equally is left out"


def test_jobs_of_several_frame_sizes_go_on_too(tmp_path: Path) -> None:
    first = write_output(tmp_path / "small", num_shards=3)
    second = write_output(tmp_path / "large", num_shards=2, payload=tokens_payload((2, 4, 4), 1 << 18))
    both: Any = [str(tmp_path / "small"), str(tmp_path / "large")]

    def read(state: Any, workers: int, batch_size: int, most: int | None) -> tuple[list[tuple[int, int]], Any]:
        loader = vidshard.TokenShards(both, batch_size=batch_size, shuffle=True).loader(workers)
        if state:
            loader.load_state_dict(state)
        found: list[tuple[int, int]] = []
        for at, batch in enumerate(loader, start=1):
            found += [(batch["tokens"][0].numel(), number) for number in batch["tokens"].flatten(1)[:, 0].tolist()]
            if at == most:
                break
        return found, loader.state_dict()

    seen, state = read(None, 2, 3, 7)
    rest, _ = read(state, 1, 4, None)
    assert len(seen) + len(rest) == len({*seen, *rest}) == first + second
