"""Names of the files and folders of an output, and of the metadata keys of its shards.

    run.json            the run's settings, and its identity
    plan/*.parquet      videos that were opened, and their spans
    todo.parquet        the spans that the latest run had to do
    shards/*.parquet    clips of finished spans
    rejects/*.parquet   spans, and whole videos, that gave no clips
    lease/*.json        which process may write
    staged/NUMBER/      shards that the run of this lease has written and not committed; gone when it ends
    retry.json          what ``--retry-rejected`` still has to try again
    summary.json        figures of the latest run
    history/*.json      figures of each run, and its speed over time
    report.html         a page about the output, by the latest run or ``vidshard report``
    stats.json          statistics of the latents, by ``vidshard stats``
    forecast.json       what ``vidshard plan --out`` expected of it

There is no separate state database. Every file is written atomically.
"""

from __future__ import annotations

from vidshard.pipeline import storage
from vidshard.schemas.tokens import METADATA_PREFIX

RUN = "run.json"
PLANNED = "plan"
WORK_FILE = "todo.parquet"
SHARDS = "shards"
REJECTS = "rejects"
LEASES = "lease"
STAGED = "staged"
RETRY_FILE = "retry.json"
SUMMARY = "summary.json"
HISTORY = "history"
REPORT = "report.html"
STATS = "stats.json"
FORECAST_FILE = "forecast.json"

DATA_FOLDERS = (PLANNED, SHARDS, REJECTS)
"""The folders of Parquet files: the state of an output."""

SPANS_KEY = f"{METADATA_PREFIX}spans"
"""Metadata of a shard, JSON: ids of the spans that are complete in it."""
SPAN_CLIPS_KEY = f"{METADATA_PREFIX}span_clips"
"""Metadata of a shard, JSON: the number of clips of each of these spans."""
SPAN_SECONDS_KEY = f"{METADATA_PREFIX}span_seconds"
"""Metadata of a shard, JSON: seconds of video in the clips of each span, without repeats of a last frame."""

AUDIT_KEY = f"{METADATA_PREFIX}audit"
"""Metadata of a shard made with ``--audit``, JSON: figures of its audited clips (`pipeline.output.quality`)."""
TOKEN_COUNTS_KEY = f"{METADATA_PREFIX}token_counts"
"""Metadata of a shard made with ``--audit``, JSON: how often each token occurs, by payload column."""


def plan_paths(out: str) -> list[str]:
    """Paths of the files of an output's plan, oldest first."""
    return storage.list_files(storage.join(out, PLANNED), ".parquet")


def shard_paths(out: str) -> list[str]:
    """Paths of an output's shards, sorted."""
    return storage.list_files(storage.join(out, SHARDS), ".parquet")


def reject_paths(out: str) -> list[str]:
    """Paths of an output's files of rejections, sorted."""
    return storage.list_files(storage.join(out, REJECTS), ".parquet")


def remove_leftovers(out: str) -> int:
    """Remove what a killed run had begun; returns the number of files.

    Whatever it had staged can be published by nobody from then on, so call it before the state of the output is read,
    and only while holding its lease.
    """
    left = storage.remove_areas(storage.join(out, STAGED), storage.join(out, SHARDS))
    return left + sum(storage.remove_leftovers(storage.join(out, folder)) for folder in DATA_FOLDERS)
