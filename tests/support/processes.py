"""The command as a process of its own, with a Ray of its own, and the processes of that Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq

from tests.support.held_back import HeldBack
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.rejects import read_rejects

SETTINGS = {"tokenizer": "tiny", "fps": 25, "frames": 17, "size": 32, "clips_per_span": 1}
RUN = tuple(text for key, value in SETTINGS.items() for text in (f"--{key.replace('_', '-')}", str(value)))
SLOWER_RUN = (*RUN, "--size", "128")
"""A run whose encoder is at work for seconds."""
PATIENCE = "600"
"""Seconds that storage is asked again, as a test on busy cores may hold a video back for long."""
OBJECT_STORE = 80_000_000
"""Bytes of the object store of the session's Ray; Ray takes 79 MB at least."""
COMMITTED_AT_ONCE = ("--commit-minutes", "0.0001")

VIDSHARD = str(Path(sys.executable).with_name("vidshard"))


@contextmanager
def started(*arguments: str | Path, command: str = "tokenize") -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, as a shell starts it; nothing of it is left at the end."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") or k.startswith("RAY_AUTH")}
    environment["VIDSHARD_STORAGE_RETRY_SECONDS"] = PATIENCE
    process = subprocess.Popen(
        [VIDSHARD, command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """Lines that the process prints, up to the first one with the words."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if words in line:
            return text
    raise AssertionError(f"the process ended without a line with {words!r}:\n{text}")


def until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Return as soon as something is the case; fail if the process ends before.

    Looking may read all of /proc, so there is a pause: without it the test would take a core from the run.
    """
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.03)


def is_under_way(out: Path) -> bool:
    """Whether the first shard is committed."""
    return bool(shard_paths(str(out)))


def processes_below(pid: int) -> dict[int, str]:
    """Command line of every descendant, as Ray titles it after what it does."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                titles[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue  # gone meanwhile

    def is_below(number: int) -> bool:
        while number in parents and number != pid:
            number = parents[number]
        return number == pid

    return {number: title for number, title in titles.items() if number != pid and is_below(number)}


def busy_with(pid: int, work: str) -> list[int]:
    """Workers of a Ray below a process that are doing something at the moment."""
    return [number for number, title in processes_below(pid).items() if title.startswith(f"ray::{work}")]


ENCODER, DECODING = "MapWorker(MapBatches(EncoderActor))", "MapBatches(DecodeTask)"
SCORER = "MapWorker(MapBatches(ScorerActor))"
ENCODING = f"{ENCODER}.submit"
"""The encoder at work; without the last word also one that loads its model or waits."""


def is_held_up(process: subprocess.Popen[str], held: HeldBack) -> bool:
    """Whether a decoder of this run, not one that an earlier run left behind, waits for what is held back."""
    return held.is_reached and bool(busy_with(process.pid, DECODING))


def kill_one(process: subprocess.Popen[str], work: str) -> None:
    """Kill a worker in the middle of a task."""
    found: list[int] = []

    def look() -> bool:
        found.extend(busy_with(process.pid, work))
        return bool(found)

    until(process, look)
    os.kill(found[0], signal.SIGKILL)


def only_the_text_is_rejected(out: Path | str) -> bool:
    """Whether the only rejection of the corpus ``many_spans`` is the file that is no video."""
    return [row["reason"] for row in read_rejects(str(out)).to_pylist()] == ["not_a_video"]


def inputs(many_spans: Path, held: HeldBack) -> tuple[str | Path, ...]:
    """The corpus ``many_spans``, its last video held back."""
    return (many_spans / "0.mp4", many_spans / "1.mp4", many_spans / "text.mp4", held.uri)


def read_rows(out: Path) -> list[str]:
    """Ids of the clips in shards, while others are written."""
    rows: list[str] = []
    for path in shard_paths(str(out)):
        rows += pq.read_table(path, columns=["clip_id"])["clip_id"].to_pylist()
    return rows
