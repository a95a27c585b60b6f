"""Whole runs on storage that misbehaves or fills up, and two of them at once."""

from __future__ import annotations

import io
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec.config
import pytest
from rich.console import Console

from tests.support.cli import tokenize_on_ray
from tests.support.faulty_s3 import FaultyS3
from tests.support.held_back import held_back
from tests.support.processes import (
    COMMITTED_AT_ONCE,
    PATIENCE,
    RUN,
    SETTINGS,
    VIDSHARD,
    inputs,
    only_the_text_is_rejected,
    started,
)
from tests.support.shards import Tokens, tokens_by_clip
from vidshard.jobs.tokenization.job import tokenize
from vidshard.pipeline import storage
from vidshard.schemas.runs import TokenizeRun


@pytest.mark.usefixtures("ray_session")
def test_of_two_runs_on_one_output_the_second_is_refused_and_the_first_undisturbed(
    many_spans: Path, undisturbed: Tokens, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    with held_back(many_spans / "2.mp4", out) as held, ThreadPoolExecutor(1) as beside:
        uris = [str(uri) for uri in inputs(many_spans, held)]
        run = TokenizeRun.model_validate({"inputs": uris, "out": str(out), **SETTINGS, "commit_minutes": 0.0001})
        printed = io.StringIO()
        first = beside.submit(tokenize, run, Console(file=printed, width=200))
        while not held.is_reached:
            assert not first.done(), printed.getvalue()
            time.sleep(0.01)
        with started(many_spans, "--out", out, *RUN) as second:
            refused, _ = second.communicate(timeout=100)
        held.let_go()
        assert second.returncode == 2, refused
        assert f"process {os.getpid()}) is at work on this output since" in " ".join(refused.split())
        assert first.result().exit_code == 0, printed.getvalue()
    assert tokens_by_clip(out) == undisturbed


@pytest.mark.usefixtures("ray_session")
def test_a_run_on_object_storage_that_misbehaves_gives_what_any_run_gives(
    many_spans: Path, undisturbed: Tokens, faulty_s3: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # clients with their own retries, as in a command
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": faulty_s3.url})
    monkeypatch.setattr("vidshard.pipeline.storage.retry.RETRY_SECONDS", float(PATIENCE))
    root = f"s3://videos/{tmp_path.name}"
    for name in ("0.mp4", "text.mp4"):
        storage.write_atomic(f"{root}/in/{name}", (many_spans / name).read_bytes())
    kinds = ["slow_down", "unavailable", "internal_error", "reset_before", "reset_after", "lost_answer", "truncate"]
    faulty_s3.seen.clear()
    for number, kind in enumerate(kinds):  # each at least once, whatever chance says
        faulty_s3.misbehave(kind, skip=5 * number)
    faulty_s3.misbehave_at_random(7, 0.15, kinds)
    result = tokenize_on_ray(f"{root}/in/", "--out", f"{root}/out", *RUN, *COMMITTED_AT_ONCE)
    faulty_s3.behave()
    spoilt = [kind for _, _, kind in faulty_s3.seen if kind]
    assert result.exit_code == 0, result.output
    assert "a-secret-that-must-not-be-seen" not in result.output
    assert set(spoilt) == set(kinds)
    assert len(spoilt) > 2 * len(kinds)
    for shard in storage.list_files(f"{root}/out/shards", ".parquet"):
        storage.write_atomic(f"{tmp_path}/out/shards/{shard.rsplit('/', 1)[-1]}", storage.read_bytes(shard))
    found = tokens_by_clip(tmp_path / "out")
    [video] = {clip.rsplit("-", 1)[0] for clip in found}
    assert found == {clip: tokens for clip, tokens in undisturbed.items() if clip.startswith(video)}
    assert only_the_text_is_rejected(f"{root}/out")


@pytest.mark.slow
def test_a_disk_that_fills_up_stops_the_run_in_order_and_it_goes_on_when_there_is_space(
    many_spans: Path, undisturbed: Tokens, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = " ".join([VIDSHARD, "tokenize", str(many_spans), "--out", f"{disk}/out", *RUN, *COMMITTED_AT_ONCE])
    script = f"""
mount -t tmpfs -o size=120k none {disk} || exit 99
{command}; echo "the first ended with $?"
cp -r {disk}/out {tmp_path}/full
mount -o remount,size=64m {disk}
{command}; echo "the second ended with $?"
cp -r {disk}/out {tmp_path}/whole
"""
    result = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=500,
    )
    if result.returncode == 99 or "unshare failed" in result.stderr:
        pytest.skip("no small file system can be mounted here")
    printed = result.stdout + result.stderr
    assert "the first ended with 1" in printed, printed
    assert "No space left on device: make space, then run the same command again" in " ".join(printed.split())
    failures = [line for line in printed.split("the first ended")[0].splitlines() if line.startswith("!! cannot")]
    assert len(failures) == len({line.split(":")[0] for line in failures}), failures
    assert all(line.count("run the same command again") == 1 for line in failures), failures
    full = tokens_by_clip(tmp_path / "full")  # whole shards, each clip once
    assert 0 < len(full) < len(undisturbed)
    assert full.items() <= undisturbed.items()
    assert not list((tmp_path / "full").rglob("*.tmp"))
    assert "the second ended with 0" in printed, printed
    assert tokens_by_clip(tmp_path / "whole") == undisturbed
