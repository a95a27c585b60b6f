"""Planning: opens the videos that an output does not know, and finds out which spans are left to do."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from vidshard.jobs.runtime.executor import Executor, StageFailedError
from vidshard.jobs.runtime.progress import PhaseProgress
from vidshard.pipeline import storage
from vidshard.pipeline.discover import Discovery
from vidshard.pipeline.output.committed import committed_spans
from vidshard.pipeline.output.entries import location_keys, with_entries
from vidshard.pipeline.output.layout import remove_leftovers
from vidshard.pipeline.output.lease import Lease
from vidshard.pipeline.output.plan_store import PLAN_SCHEMA, write_planned
from vidshard.pipeline.output.rejects import drop_rejects, read_rejects, rejected_spans, write_rejects
from vidshard.pipeline.output.resume import (
    Plan,
    WorkList,
    reconcile,
    retry_rejected,
    settle_rejects,
    take_out_superseded,
    videos_to_open,
    write_work_list,
)
from vidshard.pipeline.plan import open_videos
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.rows import row_rejection, signal_source
from vidshard.schemas.errors import UserError
from vidshard.schemas.rejections import Reason, Rejection, Stage
from vidshard.schemas.runs import TokenizeRun

MAX_PLANNED_ROWS = 50_000
"""Rows of the plan that are held before they are written: what a driver that dies has to open again, at most."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The work of a run, and what planning it found out."""

    plan: Plan
    work: WorkList
    new_rejections: list[Rejection]
    """Videos that were opened, or found to be copies of others, this time."""
    rejected_videos: set[str]
    """URIs of all videos of the inputs with rejections, without copies of others."""


def make_plan(resolved: ResolvedRun, found: Discovery, executor: Executor, lease: Lease, console: Console) -> Planned:
    """Open the videos that the output does not know, and find out what is left to do.

    Raises:
        UserError: opening videos failed for another reason than the videos.
        ShardError: a file of the output is damaged.
        LeaseLostError: another run has taken over the output.
        storage.StorageError: the output could not be read or written.
    """
    run, out = resolved.run, resolved.run.out
    remove_leftovers(out)
    videos, repeated = with_entries(found.videos, run.part)
    retried = None
    if run.retry_rejected is not None:
        uris = {storage.public_uri(uri) for uri in videos["uri"].to_pylist()}
        retried = retry_rejected(out, run.retry_rejected or None, uris)
    unknown = videos_to_open(out, videos, retried)
    refused = _open_unknown(resolved, unknown, executor, lease, console) if unknown.num_rows else []
    committed = committed_spans(out)
    plan = reconcile(out, videos, committed, rejected_spans(read_rejects(out)), retried, unknown)
    copies = [*plan.copies, *(_repeated(uri) for uri in repeated)]
    lease.check()
    taken_out = take_out_superseded(out, plan.superseded)
    refused += settle_rejects(out, videos, committed, plan, copies)
    todo = write_work_list(out, videos, plan, uri_columns(run))
    if videos.num_rows > unknown.num_rows:
        console.print(
            f"{videos.num_rows - unknown.num_rows} of {videos.num_rows} videos are known from an earlier run; of "
            f"{plan.num_spans} planned spans {plan.num_committed} are finished, {plan.num_rejected} were rejected, "
            f"{plan.num_left} are to be done now",
            highlight=False,
        )
    if taken_out:
        console.print(f"{len(plan.superseded)} videos were replaced since: {taken_out} spans of theirs are taken out")
    if retried is not None:
        console.print(f"trying again {len(retried.spans)} rejected spans and {len(retried.uris)} rejected videos")
    return Planned(plan=plan, work=todo, new_rejections=refused, rejected_videos=_rejected_videos(out, videos))


def _repeated(uri: str) -> Rejection:
    [place] = location_keys([uri]).to_pylist()
    uri = storage.public_uri(uri)
    return Rejection(
        uri=uri,
        video_id=None,
        span_id=None,
        start_seconds=None,
        stage=Stage.DISCOVER,
        reason=Reason.DUPLICATE,
        place=place.hex(),
        detail=f"the same content as {uri}, which the inputs name twice",
    )


def _open_unknown(
    resolved: ResolvedRun, videos: pa.Table, executor: Executor, lease: Lease, console: Console
) -> list[Rejection]:
    """Open videos and write their spans to the plan as they come; gives the rejections."""
    run = resolved.run
    refused: list[Rejection] = []
    held: list[pa.Table] = []
    opened = 0
    oldest = time.monotonic()

    def commit() -> None:
        nonlocal oldest
        if held:
            lease.check()
            refused.extend(_write_planned(run.out, pa.concat_tables(held)))
        held.clear()
        oldest = time.monotonic()

    rows = open_videos(
        videos,
        resolved.clip_specs,
        part=run.part,
        span_clips=resolved.clips_per_span,
        num_tasks=4 * executor.num_cpus,
        map_videos=executor.map_videos,
        limits=run.limits,
    )
    with PhaseProgress(console, "opening videos", videos.num_rows) as display:
        try:
            for table in rows:
                held.append(table)
                opened += pc.count_distinct(table["entry"]).as_py()
                display.update(opened, f"{opened} of {videos.num_rows} videos")
                waiting = sum(part.num_rows for part in held)
                if waiting >= MAX_PLANNED_ROWS or time.monotonic() - oldest > 60 * run.commit_minutes:
                    commit()
        except StageFailedError as error:
            raise UserError(str(error)) from error
        finally:
            commit()
    return refused


def _write_planned(out: str, rows: pa.Table) -> list[Rejection]:
    """Write what opening videos gave; the rejections first, without which a video counts as not opened."""
    rejections = [row_rejection(r) for r in rows["rejection"].to_pylist() if r is not None]
    places = {rejection.place for rejection in rejections}
    if places:
        former = {row["place"] for row in read_rejects(out).to_pylist() if row["span_id"] is None}
        if not places.isdisjoint(former):
            drop_rejects(out, lambda row: row["span_id"] is not None or row["place"] not in places)
        write_rejects(out, rejections)
    write_planned(out, rows.select(PLAN_SCHEMA.names))
    return rejections


def _rejected_videos(out: str, videos: pa.Table) -> set[str]:
    """URIs of those of the videos that have rejections, without copies of others."""
    rejected = {row["uri"] for row in read_rejects(out).to_pylist() if row["reason"] != Reason.DUPLICATE}
    if not rejected:
        return set()
    return {uri for uri in map(storage.public_uri, videos["uri"].to_pylist()) if uri in rejected}


def uri_columns(run: TokenizeRun) -> list[str]:
    """Columns of the plan that hold paths or URLs, perhaps with credentials."""
    return ["uri", *(signal_source(name) for name, _ in run.signals or [])]
