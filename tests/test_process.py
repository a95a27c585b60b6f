"""The command as a process of its own, with a Ray of its own: interrupted, terminated, short of memory."""

from __future__ import annotations

import json
import os
import signal
from fractions import Fraction
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.ledger import committed_spans
from pipeline.read import check_shard
from pipeline.shards import shard_paths
from tests.processes import read_until, started
from tests.videos import Recipe, write_video

SMALL = ("--tokenizer", "tiny", "--fps", "25", "--frames", "17", "--size", "64", "--clips-per-span", "1")


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """71 clips in as many spans: more than the machine tokenizes before it is interrupted."""
    recipe = Recipe(num_frames=1200, rate=Fraction(25), codec="mpeg4", width=96, height=64)
    return write_video(tmp_path_factory.mktemp("long") / "long.mp4", recipe)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_what_is_committed_and_goes_on_later(
    long_video: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "tokens"
    arguments = (long_video, "--out", out, *SMALL, "--commit-minutes", "0.0001")
    with started(*arguments) as process:
        read_until(process, "tokenizing:")
        if number is signal.SIGINT:
            os.killpg(process.pid, number)  # a terminal's Ctrl-C reaches Ray's processes too
        else:
            process.send_signal(number)
        rest, _ = process.communicate(timeout=120)
    assert process.returncode == code, rest
    assert "interrupted" in rest
    assert "Traceback" not in rest
    before = {path: Path(path).read_bytes() for path in shard_paths(str(out))}
    assert before, rest
    clips = sum(check_shard(path) for path in before)
    assert 0 < len(committed_spans(str(out))) < pq.read_table(out / "plan").num_rows
    assert not [p for p in (out / "shards").iterdir() if p.suffix != ".parquet"]

    with started(*arguments) as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert all(Path(path).read_bytes() == data for path, data in before.items())
    ids = [i for path in shard_paths(str(out)) for i in pq.read_table(path, columns=["clip_id"])["clip_id"].to_pylist()]
    assert len(ids) == len(set(ids)) == -(-1200 // 17)
    assert clips < len(ids)


def test_a_corpus_larger_than_the_object_store_runs_in_it(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for number in range(12):
        recipe = Recipe(num_frames=120, codec="mpeg4", width=256, height=256, gop=10 + number)
        write_video(tmp_path / "videos" / f"{number}.mp4", recipe)
    out = tmp_path / "tokens"
    sizes = ("--tokenizer", "tiny", "--fps", "25", "--frames", "5", "--size", "256", "--object-store", "100MB")
    with started(tmp_path / "videos", "--out", out, *sizes) as process:
        output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    written = json.loads((out / "summary.json").read_text())["written"]
    assert written["num_clips"] == 12 * 24
    assert written["num_clips"] * 5 * 256 * 256 * 3 > 2 * 100e6


@pytest.mark.slow
def test_a_killed_run_leaves_whole_shards_only_and_goes_on_later(long_video: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    arguments = (long_video, "--out", out, *SMALL, "--commit-minutes", "0.0001")
    with started(*arguments) as process:
        read_until(process, "tokenizing:")
        os.killpg(process.pid, signal.SIGKILL)
    for path in shard_paths(str(out)):
        check_shard(path)
    with started(*arguments) as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    ids = [i for path in shard_paths(str(out)) for i in pq.read_table(path, columns=["clip_id"])["clip_id"].to_pylist()]
    assert len(ids) == len(set(ids)) == -(-1200 // 17)
