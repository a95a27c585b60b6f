"""Whole runs as processes of their own, on storage that misbehaves or fills up, and two of them at once."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from pipeline import storage
from tests.faulty_s3 import FaultyS3
from tests.processes import (
    COMMITTED_AT_ONCE,
    RUN,
    VIDSHARD,
    is_under_way,
    only_the_text_is_rejected,
    read_until,
    started,
    tokens_by_clip,
    until,
)


def test_of_two_runs_on_one_output_the_second_is_refused_and_the_first_undisturbed(
    many_spans: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    with started(many_spans, "--out", out, *RUN, *COMMITTED_AT_ONCE) as process:
        until(process, lambda: is_under_way(out))
        process.send_signal(signal.SIGSTOP)  # or it might be at its end first; alive it is all the same
        with started(many_spans, "--out", out, *RUN) as second:
            refused, _ = second.communicate(timeout=100)
        process.send_signal(signal.SIGCONT)
        assert second.returncode == 2, refused
        assert f"process {process.pid}) is at work on this output since" in " ".join(refused.split())
        printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert tokens_by_clip(out) == undisturbed


def test_a_run_on_object_storage_that_misbehaves_gives_what_any_run_gives(
    many_spans: Path, undisturbed: dict[str, bytes], faulty_s3: FaultyS3, tmp_path: Path
) -> None:
    root = f"s3://videos/{tmp_path.name}"
    for path in many_spans.iterdir():
        storage.write_atomic(f"{root}/in/{path.name}", path.read_bytes())
    kinds = ["slow_down", "unavailable", "internal_error", "reset_before", "reset_after", "lost_answer", "truncate"]
    faulty_s3.seen.clear()
    faulty_s3.misbehave_at_random(7, 0.15, kinds)
    with started(f"{root}/in/", "--out", f"{root}/out", *RUN, *COMMITTED_AT_ONCE) as process:
        printed, _ = process.communicate(timeout=400)
    faulty_s3.behave()
    spoilt = [kind for _, _, kind in faulty_s3.seen if kind]
    assert process.returncode == 0, printed
    assert "a-secret-that-must-not-be-seen" not in printed
    assert set(spoilt) == set(kinds)
    for shard in storage.list_files(f"{root}/out/shards", ".parquet"):
        storage.write_atomic(f"{tmp_path}/out/shards/{shard.rsplit('/', 1)[-1]}", storage.read_bytes(shard))
    assert tokens_by_clip(tmp_path / "out") == undisturbed
    assert only_the_text_is_rejected(f"{root}/out")


@pytest.mark.slow
def test_a_disk_that_fills_up_stops_the_run_in_order_and_it_goes_on_when_there_is_space(
    many_spans: Path, undisturbed: dict[str, bytes], tmp_path: Path
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
    full = tokens_by_clip(tmp_path / "full")  # whole shards, each clip once
    assert 0 < len(full) < len(undisturbed)
    assert full.items() <= undisturbed.items()
    assert not list((tmp_path / "full").rglob("*.tmp"))
    assert "the second ended with 0" in printed, printed
    assert tokens_by_clip(tmp_path / "whole") == undisturbed


def test_an_interrupted_run_finishes_what_is_begun(
    many_spans: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    with started(many_spans, "--out", out, *RUN, "--grace-seconds", "120") as process:
        read_until(process, "tokenizing:")
        process.terminate()
        printed, _ = process.communicate(timeout=150)
    assert process.returncode == 143, printed
    assert "finishing what is begun, for 120 s at most" in printed
    done = tokens_by_clip(out)
    assert done.items() <= undisturbed.items()
    assert done
    with started(many_spans, "--out", out, *RUN) as process:
        printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert tokens_by_clip(out) == undisturbed
