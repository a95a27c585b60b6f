"""The command killed again and again, and run again each time: exactly once all the same.

The driver, an encoder and a decoder's worker are killed, once each in ``make test-deaths``, dozens of times at seeded
moments in the slow test. Whatever a kill leaves is read as a stranger would: every shard whole, no clip twice. What
stands there at the end is what an undisturbed run gives, clip for clip and byte for byte.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support.cli import tokenize
from tests.support.held_back import held_back
from tests.support.processes import (
    COMMITTED_AT_ONCE,
    DECODING,
    ENCODER,
    ENCODING,
    RUN,
    SLOWER_RUN,
    busy_with,
    inputs,
    is_held_up,
    is_under_way,
    kill_one,
    only_the_text_is_rejected,
    processes_below,
    read_rows,
    started,
    until,
)
from tests.support.shards import Tokens, tokens_by_clip


def kill_in_turn(many_spans: Path, folder: Path, undisturbed: Tokens, *, num_kills: int, seed: int) -> Counter[str]:
    """Kill ``num_kills`` processes of runs on one output after another; gives what was killed how often, and found."""
    rng = random.Random(seed)
    victims = ["driver", "encoder", "decoder"]
    figures: Counter[str] = Counter()
    output = 0
    while figures["kills"] < num_kills:
        out = folder / f"{output}"
        with started(many_spans, "--out", out, *SLOWER_RUN, *COMMITTED_AT_ONCE) as process:
            while process.poll() is None and figures["kills"] < num_kills:
                victim = victims[figures["kills"] % len(victims)]
                if victim == "driver":
                    # anywhere between its start and its end
                    deadline = time.monotonic() + rng.uniform(0.5, 20)
                    while process.poll() is None and time.monotonic() < deadline:
                        time.sleep(0.01)
                    if process.poll() is None:
                        process.kill() if rng.random() < 0.5 else os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
                        figures["kills"] += 1
                        figures["drivers"] += 1
                else:
                    wanted = rng.randrange(1, len(undisturbed) // 2)
                    while process.poll() is None and not (is_under_way(out) and len(read_rows(out)) >= wanted):
                        time.sleep(0.01)
                    work = ENCODING if victim == "encoder" else DECODING
                    found: list[int] = []
                    while process.poll() is None and not found:
                        found = busy_with(process.pid, work)
                    if found:
                        os.kill(found[0], signal.SIGKILL)
                        figures["kills"] += 1
                        figures[f"{victim}s"] += 1
            if process.poll() is None:
                process.communicate(timeout=300)
            elif process.returncode != -signal.SIGKILL:
                assert process.returncode == 0, process.communicate()[0]
        figures["runs"] += 1
        left = tokens_by_clip(out)  # whole shards, no clip twice
        assert left.items() <= undisturbed.items()
        if process.returncode == 0:
            figures["outputs"] += 1
            figures["lost"] += len(undisturbed) - len(left)
            assert only_the_text_is_rejected(out)
            output += 1
    with started(many_spans, "--out", out, *SLOWER_RUN) as process:
        printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert tokens_by_clip(out) == undisturbed
    assert only_the_text_is_rejected(out)
    assert figures["lost"] == 0
    return figures


@pytest.mark.deaths
def test_a_run_whose_driver_encoder_and_decoder_are_killed_gives_what_an_undisturbed_one_gives(
    many_spans: Path, undisturbed: Tokens, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    with held_back(many_spans / "2.mp4", out) as held:
        arguments = (*inputs(many_spans, held), "--out", out, *RUN, *COMMITTED_AT_ONCE)
        with started(*arguments) as process:
            until(process, lambda: is_under_way(out) and is_held_up(process, held))
            process.kill()
            process.wait()
        left = tokens_by_clip(out)  # whole shards, no clip twice
        assert left.items() < undisturbed.items()
        held.hold()
        with started(*arguments) as process:
            until(process, lambda: is_held_up(process, held) and bool(busy_with(process.pid, ENCODER)))
            for work in (DECODING, ENCODER):
                kill_one(process, work)
            held.let_go()
            printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert left.items() <= tokens_by_clip(out).items()
    assert tokens_by_clip(out) == undisturbed
    assert only_the_text_is_rejected(out)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_runs_that_are_killed_dozens_of_times_give_what_undisturbed_ones_give(many_spans: Path, tmp_path: Path) -> None:
    assert tokenize(many_spans, "--out", tmp_path / "undisturbed", *SLOWER_RUN).exit_code == 0
    undisturbed = tokens_by_clip(tmp_path / "undisturbed")
    figures = kill_in_turn(many_spans, tmp_path, undisturbed, num_kills=30, seed=2)
    print(figures)
    assert min(figures["drivers"], figures["encoders"], figures["decoders"]) >= 8


@pytest.mark.slow
def test_what_a_killed_driver_started_ends_by_itself(many_spans: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    with (
        held_back(many_spans / "2.mp4", out) as held,
        started(*inputs(many_spans, held), "--out", out, *RUN, *COMMITTED_AT_ONCE) as process,
    ):
        until(process, lambda: is_under_way(out) and is_held_up(process, held))
        orphans = set(processes_below(process.pid))
        process.kill()
        process.wait()
        deadline = time.monotonic() + 120
        while alive := {pid for pid in orphans if Path(f"/proc/{pid}/stat").exists()}:
            assert time.monotonic() < deadline, {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in alive}
            time.sleep(0.1)
