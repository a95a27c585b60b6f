"""Runs that end before their work is done: interrupted, or without their lease. Nothing is lost, or written late."""

from __future__ import annotations

import io
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tests.support.cli import tokenize
from tests.support.held_back import HeldBack, held_back
from tests.support.processes import (
    COMMITTED_AT_ONCE,
    RUN,
    SETTINGS,
    SLOWER_RUN,
    inputs,
    is_under_way,
    only_the_text_is_rejected,
    read_until,
    started,
    until,
)
from tests.support.shards import Tokens, shard_bytes, tokens_by_clip
from vidshard.jobs.tokenization.job import tokenize as tokenize_job
from vidshard.jobs.tokenization.summary import Summary
from vidshard.pipeline import storage
from vidshard.pipeline.cancel import LocalCancelToken
from vidshard.pipeline.decode_stage import SpanDecoder
from vidshard.pipeline.output.layout import LEASES
from vidshard.schemas.errors import EXIT_AGAIN
from vidshard.schemas.runs import TokenizeRun


def test_an_interrupted_run_keeps_what_it_began_and_the_same_command_goes_on(
    many_spans: Path, undisturbed: Tokens, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    with held_back(many_spans / "2.mp4", out) as held:
        arguments = (*inputs(many_spans, held), "--out", out, *RUN, *COMMITTED_AT_ONCE)
        with started(*arguments, "--grace-seconds", "300", "--local") as process:
            until(process, lambda: is_under_way(out) and held.is_reached)
            process.send_signal(signal.SIGTERM)
            read_until(process, "finishing what is begun, for 300 s at most")
            held.let_go()
            rest, _ = process.communicate(timeout=300)
        assert process.returncode == 143, rest
        assert "interrupted: what is committed is valid" in rest
        assert "Traceback" not in rest
        committed, found = shard_bytes(out), tokens_by_clip(out)
        assert found.items() < undisturbed.items()
        assert len(undisturbed) - len(found) >= 10  # of the 12 clips of the video that was held back two at most
        again = tokenize(*arguments)
    assert again.exit_code == 0, again.output
    assert committed.items() < shard_bytes(out).items()
    assert tokens_by_clip(out) == undisturbed
    assert only_the_text_is_rejected(out)


def test_a_second_signal_ends_a_run_while_its_encoder_computes(many_spans: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    with started(many_spans, "--out", out, *SLOWER_RUN, *COMMITTED_AT_ONCE, "--local") as process:
        until(process, lambda: is_under_way(out))
        process.send_signal(signal.SIGTERM)
        read_until(process, "finishing what is begun")
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 143, rest
    assert "Traceback" not in rest


def test_a_decoder_begins_nothing_for_a_run_that_is_cancelled(many_spans: Path, tmp_path: Path) -> None:
    assert tokenize(many_spans / "0.mp4", "--out", tmp_path / "tokens", *RUN).exit_code == 0
    rows = pq.read_table(tmp_path / "tokens" / "todo.parquet")
    run = TokenizeRun.model_validate({"inputs": [str(many_spans)], "out": "unused", **SETTINGS})
    stop = LocalCancelToken()
    decoder = SpanDecoder(spec=run.clip_specs[0], max_clips=10, clips_per_pass=1, stop=stop)
    decoded = decoder(rows)
    assert next(decoded).num_rows == 1
    stop.cancel()
    assert list(decoded) == []
    assert rows.num_rows > 2


@contextmanager
def under_way(many_spans: Path, out: Path) -> Iterator[tuple[Future[Summary], HeldBack]]:
    """A run in this process that has committed something and waits for its last video."""
    with held_back(many_spans / "2.mp4", out) as held, ThreadPoolExecutor(1) as beside:
        uris = [str(uri) for uri in inputs(many_spans, held)]
        run = TokenizeRun.model_validate({"inputs": uris, "out": str(out), **SETTINGS, "commit_minutes": 0.0001})
        future = beside.submit(tokenize_job, run, Console(file=io.StringIO(), width=200), local=True)
        while not (is_under_way(out) and held.is_reached):
            assert not future.done(), future.result()
            time.sleep(0.01)
        yield future, held
        # a decoder that reads from a server that is gone would try again for minutes, and others wait for its sandbox
        for thread in threading.enumerate():
            if thread.name == "feed":
                thread.join(timeout=60)


@pytest.mark.parametrize("loss", ["removed", "taken over"])
def test_a_run_that_lost_its_lease_writes_nothing_more(many_spans: Path, tmp_path: Path, loss: str) -> None:
    out = tmp_path / "tokens"
    with under_way(many_spans, out) as (run, held):
        [lease] = storage.list_files(storage.join(str(out), LEASES), ".json")
        if loss == "removed":
            storage.remove(lease)
        else:
            storage.write_atomic(storage.join(str(out), LEASES, "000002.json"), storage.read_bytes(lease))
        time.sleep(0.2)  # whatever is on its way to a file arrives there
        before = shard_bytes(out)
        held.let_go()
        summary = run.result()
    assert summary.exit_code == EXIT_AGAIN
    words = "the lease of this run" if loss == "removed" else "another run has taken over this output"
    assert any(words in problem for problem in summary.problems)
    assert shard_bytes(out) == before
