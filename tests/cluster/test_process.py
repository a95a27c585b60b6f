"""The command as a process of its own, with a Ray of its own: interrupted, terminated, short of memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from tests.support.cli import tokenize, tokenize_on_ray
from tests.support.held_back import held_back
from tests.support.processes import (
    COMMITTED_AT_ONCE,
    OBJECT_STORE,
    RUN,
    inputs,
    is_held_up,
    is_under_way,
    only_the_text_is_rejected,
    processes_below,
    read_until,
    started,
    until,
)
from tests.support.shards import Tokens, tokens_by_clip
from tests.support.slow_encoder import SlowSource
from tests.support.videos import Recipe, write_video
from vidshard.pipeline.output.committed import committed_spans
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.lease import Lease
from vidshard.schemas.errors import EXIT_AGAIN


def test_interrupted_runs_finish_what_is_begun_and_the_next_one_goes_on(
    many_spans: Path, undisturbed: Tokens, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    with held_back(many_spans / "2.mp4", out) as held:
        arguments = (*inputs(many_spans, held), "--out", out, *RUN, *COMMITTED_AT_ONCE, "--grace-seconds", "300")
        committed: dict[str, bytes] = {}
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            held.hold()
            with started(*arguments) as process:
                until(process, lambda: is_under_way(out) and is_held_up(process, held))
                os.killpg(process.pid, number)  # as a terminal and `timeout` do
                read_until(process, "finishing what is begun, for 300 s at most")
                held.let_go()
                rest, _ = process.communicate(timeout=300)
            assert process.returncode == code, rest
            assert "interrupted: what is committed is valid" in rest
            assert "Traceback" not in rest
            assert not [p for p in (out / "shards").iterdir() if p.suffix != ".parquet"]
            before, committed = committed, {path: Path(path).read_bytes() for path in shard_paths(str(out))}
            assert before.items() < committed.items()
            found = tokens_by_clip(out)
            assert found.items() <= undisturbed.items()
            assert 0 < len(committed_spans(str(out))) < pq.read_table(out / "plan").num_rows

        finished = tokenize(*arguments)  # in this process, as what an output lacks does not depend on who looks
    assert finished.exit_code == 0, finished.output
    assert committed.items() <= {path: Path(path).read_bytes() for path in shard_paths(str(out))}.items()
    assert tokens_by_clip(out) == undisturbed
    assert only_the_text_is_rejected(out)


def test_a_defect_while_ray_works_ends_the_process_and_gives_the_lease_back(many_spans: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    script = f"""
import sys
from vidshard.jobs import cli
from vidshard.jobs.runtime.progress import PhaseProgress
def fail(self, done, figures):
    if self._title == "tokenizing":
        raise UnicodeEncodeError("ascii", figures, 0, 1, "ordinal not in range(128)")
PhaseProgress.update = fail
sys.argv = {["vidshard", "tokenize", str(many_spans), "--out", str(out), *RUN]!r}
cli.main()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "UnicodeEncodeError: 'ascii' codec" in ended.stderr
    assert "error: a defect of vidshard (UnicodeEncodeError)" in ended.stderr
    assert "RPC error" not in ended.stderr, "a second Ray was started"
    lease = Lease.acquire(str(out), ttl_seconds=600, on_wait=lambda text: pytest.fail(text))  # given back, not expired
    lease.release()


@pytest.mark.deaths
def test_the_death_of_ray_ends_the_run_with_words_of_ours_and_commits_what_is_done(
    many_spans: Path, undisturbed: Tokens, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    with (
        held_back(many_spans / "2.mp4", out) as held,
        started(*inputs(many_spans, held), "--out", out, *RUN, *COMMITTED_AT_ONCE) as process,
    ):
        until(process, lambda: is_under_way(out) and is_held_up(process, held))
        [raylet] = [pid for pid, title in processes_below(process.pid).items() if "/raylet/raylet " in f"{title} "]
        os.kill(raylet, signal.SIGKILL)
        printed, _ = process.communicate(timeout=100)
    assert process.returncode == EXIT_AGAIN, printed
    words = " ".join(printed.split())
    assert "Ray's process raylet ended (by SIGKILL, perhaps as the machine was out of memory)" in words
    assert words.count("what is committed is valid. Run the same command again") == 1
    assert "Traceback" not in printed
    assert 0 < len(tokens_by_clip(out)) < len(undisturbed)
    Lease.acquire(str(out), ttl_seconds=600, on_wait=lambda text: pytest.fail(text)).release()


@pytest.mark.usefixtures("ray_session")
def test_a_corpus_larger_than_the_object_store_runs_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "videos").mkdir()
    for number in range(7):
        recipe = Recipe(num_frames=120, codec="mpeg4", width=256, height=256, gop=10 + number)
        write_video(tmp_path / "videos" / f"{number}.mp4", recipe)
    # decoders that are faster than the encoder fill the store
    monkeypatch.setattr("vidshard.pipeline.resolved_run.TokenizerSource", SlowSource)
    out = tmp_path / "tokens"
    sizes = ("--tokenizer", "tiny", "--fps", "25", "--frames", "5", "--size", "256")
    result = tokenize_on_ray(tmp_path / "videos", "--out", out, *sizes)
    assert result.exit_code == 0, result.output
    assert ray.cluster_resources()["object_store_memory"] <= OBJECT_STORE
    written = json.loads((out / "summary.json").read_text())["written"]
    assert written["num_clips"] == 7 * 24
    assert written["num_clips"] * 5 * 256 * 256 * 3 > 2 * OBJECT_STORE
