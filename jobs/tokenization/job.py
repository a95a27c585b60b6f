"""Tokenization job: videos in, token shards out.

Settings are checked completely before any work starts. After that a bad video is a rejection, and only defects and
failures of the storage end the run. However it ends, the output records what is left (``pipeline.output.resume``), and
the same command resumes the run.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace

import pyarrow.compute as pc
from rich.console import Console

from vidshard.jobs.report.job import add_report
from vidshard.jobs.runtime.events import reported
from vidshard.jobs.runtime.executor import open_executor
from vidshard.jobs.runtime.new_output import no_empty_output
from vidshard.jobs.runtime.run_record import check_output, write_run_record
from vidshard.jobs.tokenization.calibration import SpeedWatch, is_one_machine
from vidshard.jobs.tokenization.collect import check_internal_errors, check_reject_share, tokenize_spans
from vidshard.jobs.tokenization.forecast import Forecast
from vidshard.jobs.tokenization.placement import place, with_gpus
from vidshard.jobs.tokenization.planning import Planned, discover_inputs, make_plan
from vidshard.jobs.tokenization.quality import QualitySummary
from vidshard.jobs.tokenization.report import tokenized_page
from vidshard.jobs.tokenization.summary import Summary, print_run, print_summary, save_summary, summary_record
from vidshard.jobs.tokenization.telemetry import Telemetry
from vidshard.pipeline import storage
from vidshard.pipeline.decode_stage import confinement_lacks
from vidshard.pipeline.discover import Discovery
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.lease import Lease, LeaseLostError
from vidshard.pipeline.output.parquet import ShardError
from vidshard.pipeline.output.quality import read_quality
from vidshard.pipeline.output.rejects import forget_retry_set
from vidshard.pipeline.output.shard_writer import WriteStats
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.video.decoders import refuse_unknown_decoders
from vidshard.schemas.errors import UserError
from vidshard.schemas.rejections import Reason
from vidshard.schemas.runs import TokenizeRun


def tokenize(run: TokenizeRun, console: Console, *, local: bool = False) -> Summary:
    """Tokenize videos and print a summary.

    Args:
        local: run every stage in this process, without Ray.

    Returns:
        The summary; if the run failed after tokenization had started, its ``problems`` say why.

    Raises:
        VidshardError: the run cannot start as requested; no video was tokenized.
        KeyboardInterrupt: interrupted before tokenization started; the plan so far is kept.
    """
    if local and run.ray_address is not None:
        raise UserError("--local runs without Ray: leave --ray-address out, or --local")
    with reported(console, run, command="tokenize", out=run.out) as events:
        resolved = ResolvedRun.of(run)
        summary = run_job(resolved, console, local=local)
        print_summary(summary, resolved.payload, console)
        events.emit("summary", result=summary_record(summary))
        events.will_end(summary.exit_code, summary.problems, summary.interruption)
        if summary.interruption is None:
            add_report(summary.out, run.report, console, tokenized_page)
    return summary


def run_job(resolved: ResolvedRun, console: Console, *, local: bool = False) -> Summary:
    """Discover, plan, tokenize, and save the summary without printing it; otherwise as :func:`tokenize`."""
    storage.restrict_addresses(resolved.run.limits.private_hosts)
    try:
        with no_empty_output(resolved.run.out):
            return _run_restricted(resolved, console, local=local)
    finally:
        storage.restrict_addresses(None)


def _run_restricted(resolved: ResolvedRun, console: Console, *, local: bool) -> Summary:
    """As :func:`run_job`, where only some hosts may have private addresses."""
    started = time.monotonic()
    run = resolved.run
    refuse_unknown_decoders(run.decoders)
    check_output(resolved)
    found = discover_inputs(run)
    lease = Lease.acquire(
        run.out, ttl_seconds=run.lease_seconds, on_wait=lambda text: console.print(text, markup=False)
    )
    forecast = Forecast.of_output(run.out)
    with ExitStack() as stack:
        stack.enter_context(lease)
        executor = with_gpus(stack.enter_context(open_executor(run, local=local)), run, console)
        stack.enter_context(executor.watched(console))
        watch = None
        if forecast is not None and forecast.machine_speed is not None and is_one_machine(executor):
            watch = stack.enter_context(SpeedWatch(every_seconds=10))
        record = check_output(resolved)  # checked again: another first run may just have ended
        resolved = place(resolved, record, executor, console)
        run = resolved.run
        print_run(resolved, found, console)
        console.print(f"running on {executor}", highlight=False)
        warn_of_confinement(run, console)
        telemetry = Telemetry(console)
        telemetry.started(resolved, executor)
        ready = time.monotonic()
        write_run_record(resolved, record)
        limits = replace(run.limits, sampled_ids=record.sampled_ids, storage_hosts=found.storage_hosts)
        planned = make_plan(resolved, found, executor, lease, console, limits=limits)
        work, rejected = planned.work, set(planned.resume.rejected_uris)
        summary = _summary_of_plan(resolved, found, planned)
        summary.seconds |= {"start": ready - started, "plan": time.monotonic() - ready}
        summary.forecast = forecast
        telemetry.planned(summary, planned.new_rejections, work.num_spans)
        check_reject_share(summary, rejected, run)
        broken = {r.uri for r in planned.new_rejections if r.reason is Reason.INTERNAL_ERROR}
        check_internal_errors(summary, broken, run)
        if work.num_spans and not summary.problems:
            tokenize_spans(resolved, work, executor, lease, summary, rejected, console, telemetry, limits=limits)
        summary.seconds["total"] = time.monotonic() - started
        summary.machine_speed = None if watch is None else watch.speed
        _save(summary, resolved, lease)
    return summary


def _summary_of_plan(resolved: ResolvedRun, found: Discovery, planned: Planned) -> Summary:
    """Summary of a run that has not begun to tokenize."""
    resume = planned.resume
    return Summary(
        out=resolved.run.out,
        num_videos=pc.count_distinct(found.videos["uri"]).as_py(),
        num_rejected_videos=0,
        planned_spans=resume.num_spans,
        expected_clips=resume.expected_clips,
        reused_spans=resume.num_committed,
        rejected_before=resume.num_rejected,
        written=WriteStats(),
        reasons=Counter(str(r.reason) for r in planned.new_rejections),
        seconds={},
        batch_fill=1.0,
        example_clip_id=None,
        notice=resolved.notice,
    )


def _save(summary: Summary, resolved: ResolvedRun, lease: Lease) -> None:
    """Save the summary, if the run still holds the lease; a failure of that is one of its problems."""
    run = resolved.run
    try:
        lease.check()
        if not summary.problems and summary.interruption is None:
            forget_retry_set(run.out)
        if run.audit:
            summary.quality = QualitySummary.of(run, read_quality(shard_paths(run.out), resolved.payload))
        save_summary(summary)
    except (storage.StorageError, ShardError, LeaseLostError) as error:
        summary.fail(str(error), error)


def warn_of_confinement(run: TokenizeRun, console: Console) -> None:
    """Say what this machine's kernel lacks to confine decoding.

    Raises:
        UserError: it lacks something, and the run requires it.
    """
    lacking = " and ".join(confinement_lacks(run.limits))
    if lacking and run.sandbox == "required":
        raise UserError(
            f"--sandbox required, and the kernel of this machine lacks {lacking}: use Linux 5.13 or later with "
            "landlock among its security modules (/sys/kernel/security/lsm), or --sandbox auto"
        )
    if lacking:
        console.print(f"decoding is not wholly confined: the kernel lacks {lacking}", highlight=False)
