"""Planning: opens the videos that an output does not know, and finds out which spans are left to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from vidshard.jobs.runtime.executor import Executor
from vidshard.jobs.runtime.progress import PhaseProgress
from vidshard.jobs.tokenization.summary import too_many_internal_errors
from vidshard.pipeline.discover import Discovery, discover
from vidshard.pipeline.output.entries import Inputs
from vidshard.pipeline.output.layout import remove_leftovers
from vidshard.pipeline.output.lease import Lease
from vidshard.pipeline.output.plan_store import record_opened
from vidshard.pipeline.output.rejects import RetrySet
from vidshard.pipeline.output.resume import Resume, reconcile, videos_to_open
from vidshard.pipeline.output.state import OutputState
from vidshard.pipeline.output.work_list import WorkList, begin_retry, correct_output, write_work_list
from vidshard.pipeline.plan import open_videos
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.row_access import RowAccess
from vidshard.pipeline.rows import signal_source
from vidshard.schemas.errors import RunFailedError
from vidshard.schemas.rejections import Reason, Rejection
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.text import counted
from vidshard.schemas.video import Limits

MAX_PLANNED_ROWS = 50_000
"""Rows of the plan that are held before they are written: what a driver that is killed has to open again, at most."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The work of a run, and what planning it found out."""

    resume: Resume
    work: WorkList
    new_rejections: list[Rejection]
    """Videos that were opened, or found to be copies of others, this time."""
    num_opened: int
    """Videos that the output did not know."""
    retry: RetrySet | None
    """The rejected spans and videos that are tried again, if that was asked for."""


def discover_inputs(run: TokenizeRun) -> Discovery:
    """List the videos of a run, as its settings say.

    Raises:
        InputError: an input does not exist, matches nothing or is no usable manifest.
        storage.StorageError: a file system cannot be reached.
    """
    return discover(
        run.inputs,
        signals=[name for name, _ in run.signals or []],
        limit=run.limit,
        ask_remote=run.recheck,
        access=RowAccess(schemes=tuple(run.allow_schemes), under=tuple(run.allow_under)),
        cameras=run.cameras,
        episodes=run.episodes,
    )


def make_plan(
    resolved: ResolvedRun,
    found: Discovery,
    executor: Executor,
    lease: Lease,
    console: Console,
    *,
    limits: Limits | None = None,
) -> Planned:
    """Open the videos that the output does not know, and find out what is left to do.

    Args:
        limits: largest cost of one video, and how the output makes ids; None for those of the settings.

    Raises:
        RunFailedError: internal errors are too many to be the fault of single videos, or opening them failed for
            another reason than the videos.
        ShardError: a file of the output is damaged.
        LeaseLostError: another run has taken over the output.
        storage.StorageError: the output could not be read or written.
    """
    inputs = Inputs.of(found.videos, resolved.run.part, found.manifests)
    planned = plan_output(
        resolved.run,
        inputs,
        open_videos=lambda videos: _open_videos(
            resolved, videos, executor, lease, console, limits or resolved.run.limits, inputs.num_videos
        ),
        check_lease=lease.check,
    )
    _print_planned(planned, inputs.num_videos, console)
    return planned


def plan_output(
    run: TokenizeRun,
    inputs: Inputs,
    *,
    open_videos: Callable[[pa.Table], list[Rejection]],
    check_lease: Callable[[], object] = lambda: None,
) -> Planned:
    """Compare the inputs with the output of a run, and write what is left to do.

    Args:
        run: its output, and what of it is to be tried again.
        inputs: the videos.
        open_videos: writes the plan and the rejections of videos that the output does not know; returns the rejections.
        check_lease: called before files are changed.

    Raises:
        ShardError: a file of the output is damaged.
        storage.StorageError: the output could not be read or written.
    """
    out = run.out
    remove_leftovers(out)
    state = OutputState.load(out)
    retry = None
    if run.retry_rejected is not None:
        retry = begin_retry(out, state, inputs, run.retry_rejected or None)
        state = OutputState.load(out)
    unknown = videos_to_open(state, inputs, retry)
    rejections: list[Rejection] = []
    if unknown.num_rows:
        rejections = open_videos(unknown)
        state = state.after_planning(out)
    resume = reconcile(state, inputs, retry=retry, opened=unknown)
    check_lease()
    correct_output(out, state, resume)
    del state  # some 150 MB for a million spans
    return Planned(
        resume=resume,
        work=write_work_list(out, inputs, resume, uri_columns(run)),
        new_rejections=[*rejections, *resume.new_rejects],
        num_opened=unknown.num_rows,
        retry=retry,
    )


def _print_planned(planned: Planned, num_videos: int, console: Console) -> None:
    resume, retry = planned.resume, planned.retry
    if num_videos > planned.num_opened:
        console.print(
            f"{num_videos - planned.num_opened:,} of {counted(num_videos, 'video')} are known from an earlier run; "
            f"{counted(resume.num_spans, 'planned span')}: {resume.num_committed:,} finished, "
            f"{resume.num_rejected:,} rejected, {resume.num_left:,} to do now",
            highlight=False,
        )
    if resume.num_superseded_spans:
        console.print(
            f"replaced since: {counted(len(resume.superseded), 'video')}; "
            f"{counted(resume.num_superseded_spans, 'span')} taken out"
        )
    if retry is not None:
        spans, uris = counted(len(retry.spans), "rejected span"), counted(len(retry.uris), "rejected video")
        console.print(f"trying again {spans} and {uris}")


def _open_videos(
    resolved: ResolvedRun,
    videos: pa.Table,
    executor: Executor,
    lease: Lease,
    console: Console,
    limits: Limits,
    num_videos: int,
) -> list[Rejection]:
    """Open videos and write their spans to the plan as they come; returns the rejections.

    Args:
        num_videos: number of videos of the inputs, those that are known already included.

    Raises:
        RunFailedError: internal errors are too many to be the fault of single videos, or opening them failed for
            another reason than the videos.
    """
    run = resolved.run
    refused: list[Rejection] = []
    held: list[pa.Table] = []
    broken: set[str] = set()
    opened = 0
    oldest = time.monotonic()

    def commit() -> None:
        nonlocal oldest
        if held:
            lease.check()
            refused.extend(record_opened(run.out, pa.concat_tables(held), sampled_ids=limits.sampled_ids))
        held.clear()
        oldest = time.monotonic()

    rows = open_videos(
        videos,
        resolved.clip_specs,
        part=run.part,
        span_clips=resolved.clips_per_span,
        num_tasks=4 * executor.num_cpus,
        map_videos=executor.map_videos,
        limits=limits,
    )
    with PhaseProgress(console, "opening videos", videos.num_rows) as display:
        try:
            for table in rows:
                held.append(table)
                opened += pc.count_distinct(table["entry"]).as_py()
                broken |= _broken(table)
                too_many = too_many_internal_errors(len(broken), num_videos, run)
                if too_many is not None:
                    raise RunFailedError(too_many)
                display.update(opened, f"{opened:,} of {counted(videos.num_rows, 'video')}")
                waiting = sum(part.num_rows for part in held)
                if waiting >= MAX_PLANNED_ROWS or time.monotonic() - oldest > 60 * run.commit_minutes:
                    commit()
        finally:
            commit()
    return refused


def _broken(rows: pa.Table) -> set[str]:
    """URIs of videos that an internal error rejected."""
    found = rows.filter(pc.is_valid(rows["rejection"]))
    return {row["uri"] for row in found["rejection"].to_pylist() if row["reason"] == Reason.INTERNAL_ERROR}


def uri_columns(run: TokenizeRun) -> list[str]:
    """Columns of the inputs' videos that hold paths or URLs, perhaps with credentials."""
    return ["uri", *(signal_source(name) for name, _ in run.signals or [])]
