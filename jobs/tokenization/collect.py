"""Collection of receipts: counts them against the plan, commits the shards of the writers, and handles interrupts."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from vidshard.jobs.runtime.executor import LOOKS_BEFORE_ABANDONING, Executor, LocalExecutor
from vidshard.jobs.runtime.interrupts import Feed, Interrupts, LastAnswer
from vidshard.jobs.runtime.progress import PhaseProgress, warn
from vidshard.jobs.tokenization.history import Timeline
from vidshard.jobs.tokenization.placement import bfloat16_pays
from vidshard.jobs.tokenization.planning import uri_columns
from vidshard.jobs.tokenization.quality import QualityWatch
from vidshard.jobs.tokenization.resources import plan_resources
from vidshard.jobs.tokenization.summary import Summary, too_many_internal_errors, too_many_not_finite
from vidshard.jobs.tokenization.telemetry import Telemetry
from vidshard.jobs.tokenization.usage import Usage
from vidshard.pipeline import storage
from vidshard.pipeline.cancel import CancelToken
from vidshard.pipeline.decode_stage import SpanDecoder
from vidshard.pipeline.encode_stage import EncoderSpec
from vidshard.pipeline.output.commit import Committer, SpanAccount
from vidshard.pipeline.output.lease import Lease, LeaseLostError
from vidshard.pipeline.output.shard_writer import ShardSettings
from vidshard.pipeline.output.work_list import WorkList, rows_of_spans
from vidshard.pipeline.recut import Recutting
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.resources import StageResources
from vidshard.pipeline.rows import WORK_NUMBER, manifest_fields, row_rejection
from vidshard.pipeline.video.sampling import clips_of_last_span
from vidshard.pipeline.video.signals import signal_fields
from vidshard.schemas.errors import OutageError, RunFailedError, VidshardError
from vidshard.schemas.rejections import Reason
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.text import counted
from vidshard.schemas.tokens import QUALITY_FIELDS
from vidshard.schemas.video import Limits


def tokenize_spans(
    resolved: ResolvedRun,
    work: WorkList,
    executor: Executor,
    lease: Lease,
    summary: Summary,
    rejected: set[str],
    console: Console,
    telemetry: Telemetry,
    *,
    limits: Limits,
) -> None:
    """Run the stages, commit their rows as shards, and compare these with the plan.

    Failures and interrupts are recorded in ``summary.problems`` and ``summary.interruption``, not raised.

    Args:
        work: spans to process, at least one.
        lease: lease on the output, checked before each commit.
        summary: summary of the run; updated in place.
        rejected: URIs of the videos with rejections so far; new ones are added in place.
        telemetry: what the run tells while it goes on.
        limits: largest cost of one video.
    """
    counter = SpanCounter(is_awaited=np.ones(work.num_spans, np.bool_))
    account = SpanAccount(work.num_spans)
    settings = shard_settings(resolved, work, run_number=lease.number)
    started = time.monotonic()
    committer: Committer | None = None
    try:
        committer = Committer(
            settings,
            executor.open_writers(settings),
            account,
            before_commit=lease.check,
            on_published=telemetry.committed,
        )
        run = _Collection(
            resolved=resolved,
            work=work,
            executor=executor,
            lease=lease,
            committer=committer,
            account=account,
            counter=counter,
            summary=summary,
            rejected=rejected,
            console=console,
            telemetry=telemetry,
        )
        run.collect(limits)
    except KeyboardInterrupt as interrupt:
        summary.interruption = interrupt
    except (RunFailedError, LeaseLostError) as error:
        summary.fail(str(error), error)
        if committer is not None and isinstance(error, RunFailedError) and error.has_lost_workers:
            committer.give_up_writers()
    except (storage.StorageError, OutageError) as error:
        _fail_for_storage(summary, error, "what is committed before it is valid")
    finally:
        if committer is not None:
            _close(committer, summary, resolved.run.grace_seconds)
        counter.report(summary, time.monotonic() - started)
        threads = 1 if committer is None else committer.writers.num_threads
        summary.usage = counter.usage(resolved, executor, summary, writer_threads=threads)
    if account.num_open and not summary.problems and summary.interruption is None:
        summary.fail(
            f"{account.num_open} of {work.num_spans} planned spans came out neither as tokens nor as rejections "
            f"(the first: row {int(np.argmax(account.is_open))} of todo.parquet); run the same command again, and "
            "report this with the log of -v"
        )


def shard_settings(resolved: ResolvedRun, work: WorkList, *, run_number: int = 0) -> ShardSettings:
    """Make the settings of a run's shards.

    Args:
        run_number: number of the run's lease.
    """
    run = resolved.run
    fields = [
        *(QUALITY_FIELDS if run.audit else ()),
        *(field for field in manifest_fields(work.schema) if field.name not in uri_columns(run)),
    ]
    return ShardSettings(
        out=run.out,
        run_number=run_number,
        buckets=tuple((spec, resolved.payload_of(spec)) for spec in resolved.clip_specs),
        provenance=resolved.provenance,
        manifest_fields=tuple(fields),
        signal_fields=tuple(field for name, rule in run.signals or [] for field in signal_fields(name, rule)),
        shard_bytes=run.shard_size,
        commit_seconds=60 * run.commit_minutes,
    )


MAX_PASSES = 6
"""Passes over the work list: each after the first does what writers held that were lost."""
_AGAIN = "run the same command again"


@dataclass(kw_only=True)
class _Collection:
    """Collection of the receipts of one run."""

    resolved: ResolvedRun
    work: WorkList
    executor: Executor
    lease: Lease
    committer: Committer
    account: SpanAccount
    counter: SpanCounter
    summary: Summary
    rejected: set[str]
    console: Console
    telemetry: Telemetry
    broken: set[str] = field(default_factory=set)
    not_finite: set[str] = field(default_factory=set)
    shrunk: LastAnswer[Executor] = field(default_factory=LastAnswer)

    def __post_init__(self) -> None:
        self.watch = QualityWatch(min_psnr=self.resolved.run.audit_min_psnr, console=self.console)

    def collect(self, limits: Limits) -> None:
        """Run the stages until every span is settled, an interrupt, or too many rejections."""
        summary, work = self.summary, self.work
        stop = self.executor.cancel_token(self.committer.writers)
        decoder = span_decoder(self.resolved, limits, stop)
        source = work.source
        losses = 0
        with Interrupts() as interrupts, PhaseProgress(self.console, "tokenizing", work.num_spans) as display:
            while True:
                resources, encoder = self._planned()
                rows = self.executor.run(
                    source, decoder=decoder, encoder=encoder, resources=resources, writers=self.committer.writers
                )
                smaller = self._take(rows, resources, interrupts, stop, display)
                if summary.problems or interrupts.first is not None:
                    break
                self.committer.finish()
                if not self.account.num_open:
                    break
                if smaller is None:
                    losses += 1
                    if losses == MAX_PASSES:
                        break
                    text = f"{self.account.num_open} spans were lost with their writers before their commit"
                    self.console.print(f"{text}, and are done again", highlight=False)
                else:
                    self.executor = smaller
                self.summary.reasons -= self.counter.await_again(self.account.is_open)
                self.telemetry.begun_again(self.counter.num_awaited)
                source = rows_of_spans(work, self.account.is_open)
            summary.interruption = interrupts.first
        if not summary.problems and summary.interruption is None:
            self._check_not_finite(is_over=True)

    def _check_not_finite(self, *, is_over: bool) -> None:
        has_encoded = not is_over or bool(self.counter.clips or self.summary.reused_spans)
        problem = too_many_not_finite(
            len(self.not_finite), self.summary.num_videos, self.resolved.run, has_encoded=has_encoded
        )
        if problem is not None:
            self.summary.fail(problem)

    def _planned(self) -> tuple[StageResources, EncoderSpec]:
        """Workers of the stages on the machines that are there."""
        clips_per_row = self.summary.expected_clips / self.summary.planned_spans
        resources, encoder = plan_resources(self.resolved, self.work.num_spans, clips_per_row, self.executor)
        self.counter.resources = resources
        self.telemetry.encoding(resources.encode_workers)
        return resources, encoder

    def _take(
        self,
        rows: Iterator[pa.Table],
        resources: StageResources,
        interrupts: Interrupts,
        stop: CancelToken,
        display: PhaseProgress,
    ) -> Executor | None:
        """Take the receipts of one pass.

        Returns:
            None once the pass is over; the executor as it is, if it was abandoned as machines have left.
        """
        run, counter, summary = self.resolved.run, self.counter, self.summary
        feed = until_interrupted(
            rows,
            interrupts,
            stop,
            run.grace_seconds,
            self.console,
            on_interrupt=self.committer.writers.begin_all,
            reserved_seconds=flush_seconds(run.grace_seconds),
        )
        shrunk_for = 0
        with closing(feed) as taken:
            for receipts in taken:
                if receipts is None:
                    self.lease.check(now=False)
                    self.committer.tick()
                    self.telemetry.tick()
                    smaller = self.shrunk.take(partial(self.executor.shrunk_below, resources.encoders))
                    smaller = None if interrupts.first is not None else smaller
                    shrunk_for = 0 if smaller is None else shrunk_for + 1
                    if smaller is not None and shrunk_for == LOOKS_BEFORE_ABANDONING:
                        self._abandon(smaller)
                        return smaller
                    continue
                receipts, rejections = counter.take(receipts)
                self.telemetry.took(receipts, [one for _, _, one in rejections])
                self.watch.take(receipts)
                self.committer.reject((number, row_rejection(one)) for number, clips, one in rejections if not clips)
                self.committer.tick()
                summary.reasons.update(one["reason"] for _, _, one in rejections)
                summary.has_unkept_spans |= any(not clips for _, clips, _ in rejections)
                self.rejected |= {one["uri"] for _, _, one in rejections if one["reason"] != Reason.POSSIBLE_LOSS}
                speed = counter.clips / display.seconds
                display.update(
                    self.work.num_spans - counter.num_awaited,
                    f"{counted(counter.videos, 'video')} · {counted(counter.clips, 'clip')} · {speed:.2f} clips/s · "
                    f"{counted(summary.reasons.total(), 'reject')}",
                )
                self.broken |= {one["uri"] for _, _, one in rejections if one["reason"] == Reason.INTERNAL_ERROR}
                self.not_finite |= {one["uri"] for _, _, one in rejections if one["reason"] == Reason.NOT_FINITE}
                check_reject_share(summary, self.rejected, run)
                check_internal_errors(summary, self.broken, run)
                self._check_not_finite(is_over=False)
                if summary.problems:
                    break
        return None

    def _abandon(self, smaller: Executor) -> None:
        """End the pass under way, whose encoders hold every CPU that is left."""
        warn(
            self.console,
            f"nodes left, and the encoders hold every CPU of what remains, {smaller}: the run goes on with fewer of "
            "them, and does again what was in flight. More nodes can join",
        )
        self.executor.abandon()


def flush_seconds(grace_seconds: float) -> float:
    """Share of the grace period that is left to the writers, to write what they hold."""
    return min(5.0, grace_seconds / 4)


def _close(committer: Committer, summary: Summary, grace_seconds: float) -> None:
    is_hurried = summary.interruption is not None
    try:
        committer.finish(flush_seconds(grace_seconds) if is_hurried else None)
    except storage.StorageError as error:
        _fail_for_storage(summary, error, "the clips of that shard are not saved")
    except (LeaseLostError, RunFailedError) as error:
        summary.fail(str(error), error)
    finally:
        committer.close()
    summary.written = committer.committed


def _fail_for_storage(summary: Summary, error: VidshardError, consequence: str) -> None:
    """Record that a storage failed, unless the same failure is recorded, with the remedy once."""
    if any(problem.startswith(str(error)) for problem in summary.problems):
        return
    remedy = "" if _AGAIN in str(error) else f": {_AGAIN}"
    summary.fail(f"{error}; {consequence}{remedy}", error)


def span_decoder(resolved: ResolvedRun, limits: Limits, stop: CancelToken | None = None) -> SpanDecoder:
    """Make the decode stage of a run, which ``stop`` can end early."""
    run = resolved.run
    return SpanDecoder(
        spec=resolved.largest,
        max_clips=clips_of_last_span(resolved.clips_per_span),
        clips_per_pass=resolved.clips_per_span,
        limits=limits,
        keep_undamaged=run.damaged == "keep",
        signals=tuple(run.signals or ()),
        stop=stop,
        recutting=Recutting(share=run.recut_share, seed=json.dumps(resolved.identity, sort_keys=True, default=str)),
    )


def until_interrupted(
    rows: Iterator[pa.Table],
    interrupts: Interrupts,
    stop: CancelToken,
    grace_seconds: float,
    console: Console,
    *,
    on_interrupt: Callable[[], object] = lambda: None,
    reserved_seconds: float = 0.0,
) -> Generator[pa.Table | None, None, None]:
    """Yield rows as they come, and None after each second without one.

    After an interrupt ``on_interrupt`` is called, no further work is started, and rows of started work are yielded for
    ``grace_seconds`` less ``reserved_seconds`` at most.
    """
    feed = Feed(rows)
    deadline = math.inf
    try:
        while time.monotonic() < deadline:
            if interrupts.first is not None and deadline == math.inf:
                stop.cancel()
                on_interrupt()
                deadline = time.monotonic() + grace_seconds - reserved_seconds
                console.print(
                    f"interrupted: finishing what is begun, for {grace_seconds:g} s at most; once more to end at once",
                    highlight=False,
                )
            try:
                yield feed.take(min(1.0, max(0.0, deadline - time.monotonic())))
            except StopIteration:
                return
    finally:
        feed.stop()


@dataclass(kw_only=True)
class SpanCounter:
    """Counts of the receipts that came out of the flow, compared with the work list."""

    is_awaited: npt.NDArray[np.bool_]
    """bool (number of spans,): whether each span of the work list has no receipt yet."""
    clips: int = 0
    videos: int = 0
    """Number of videos whose last span came out."""
    slots: int = 0
    """Capacity of all forward passes, in clips."""
    recut: int = 0
    """Number of spans that were decoded a second time with another cut."""
    seconds: Counter[str] = field(default_factory=Counter)
    """Summed time of all workers, by column of the rows."""
    num_frames: int = 0
    """Number of frames in all clips, without repeats of a last frame."""
    frame_bytes: int = 0
    """Bytes of decoded frames that went to encoders through Ray."""
    moved_frame_bytes: int = 0
    """Bytes of these that crossed the network."""
    resources: StageResources | None = None
    """Workers of the stages; None before they are planned."""
    timeline: Timeline = field(default_factory=Timeline)

    def __post_init__(self) -> None:
        self.num_awaited = int(self.is_awaited.sum())
        self._counts = np.zeros((len(self.is_awaited), 4), np.int32)
        """Clips, frames, 1 if it is the last of its video, and 1 if it was cut again, of each span that came out."""
        self._reasons: dict[int, str] = {}
        """Reason of each span with a rejection, by its number."""

    def take(self, receipts: pa.Table) -> tuple[pa.Table, list[tuple[int, int, dict[str, Any]]]]:
        """Count receipts, ``RECEIPT_SCHEMA``.

        Ray recomputes rows that a lost node held, so a receipt may come out twice; the second one does not count.

        Returns:
            The receipts that came for the first time, and of each rejection among them the number of its span, its
            clips, and its row.
        """
        for name in ("decode_seconds", "encode_seconds", "encode_wait_seconds"):
            self.seconds[name] += pc.sum(receipts[name]).as_py() or 0
        self.slots += pc.sum(receipts["encode_slots"]).as_py() or 0
        self.frame_bytes += pc.sum(receipts["frame_bytes"]).as_py() or 0
        self.moved_frame_bytes += pc.sum(receipts["moved_frame_bytes"]).as_py() or 0
        numbers = receipts[WORK_NUMBER.name].to_numpy()
        is_new = self.is_awaited[numbers]
        self.is_awaited[numbers] = False
        self.num_awaited -= int(is_new.sum())
        if not is_new.all():
            receipts = receipts.filter(pa.array(is_new))
        names = ("num_clips", "num_valid_frames", "is_last", "is_recut")
        counts = np.stack([receipts[name].cast(pa.int32()).to_numpy() for name in names], axis=1)
        self._counts[numbers[is_new]] = counts
        self._add(counts.sum(axis=0))
        num_rejections = receipts.num_rows - receipts["rejection"].null_count
        self.timeline.count(int(counts[:, 0].sum()), num_rejections)
        if not num_rejections:
            return receipts, []
        of_rejections = (WORK_NUMBER.name, "num_clips", "rejection")
        rows = receipts.select(of_rejections).filter(receipts["rejection"].is_valid()).to_pylist()
        rejections = [(row[WORK_NUMBER.name], row["num_clips"], row["rejection"]) for row in rows]
        self._reasons |= {number: rejection["reason"] for number, _, rejection in rejections}
        return receipts, rejections

    def await_again(self, spans: npt.NDArray[np.bool_]) -> Counter[str]:
        """Expect another receipt of these spans, and of no others: they are settled.

        What was counted of those among them that had come out is taken back.

        Returns:
            Their rejections by reason, which will come again.
        """
        lost = spans & ~self.is_awaited
        self._add(-self._counts[lost].sum(axis=0))
        self._counts[lost] = 0
        self.is_awaited = spans.copy()
        self.num_awaited = int(self.is_awaited.sum())
        return Counter(self._reasons.pop(number) for number in sorted(self._reasons) if lost[number])

    def _add(self, counts: npt.NDArray[np.integer[Any]]) -> None:
        clips, frames, videos, recut = counts.tolist()
        self.clips += clips
        self.num_frames += frames
        self.videos += videos
        self.recut += recut

    def report(self, summary: Summary, seconds: float) -> None:
        """Write times and batch fill to the summary.

        Args:
            summary: summary of the run; updated in place.
            seconds: wall time of the phase.
        """
        summary.seconds |= {
            "tokenize": seconds,
            "decoding, all workers": self.seconds["decode_seconds"],
            "encoding, all workers": self.seconds["encode_seconds"],
            "encoders waiting for frames": self.seconds["encode_wait_seconds"],
            "writing shards": summary.written.seconds,
        }
        summary.timeline = self.timeline.end()
        summary.num_recut_spans = self.recut
        summary.frame_bytes, summary.moved_frame_bytes = self.frame_bytes, self.moved_frame_bytes
        summary.batch_fill = self.clips / self.slots if self.slots else 1.0
        summary.example_clip_id = summary.written.last_clip_id

    def usage(
        self, resolved: ResolvedRun, executor: Executor, summary: Summary, *, writer_threads: int
    ) -> Usage | None:
        """Use of the machines by the phase that `report` wrote to the summary; None if nothing was encoded."""
        resources, seconds = self.resources, summary.seconds
        if resources is None or not self.clips:
            return None
        spec = resolved.largest
        encoders = 1 if isinstance(executor, LocalExecutor) else resources.encode_workers
        if resources.is_elastic and seconds["tokenize"]:  # as many as were there in the mean, if that is more
            used = seconds["encoding, all workers"] + seconds["encoders waiting for frames"]
            encoders = max(encoders, math.ceil(used / seconds["tokenize"]))
        per_frame = min(float(spec.clip_seconds), float(spec.stride_seconds or spec.clip_seconds)) / spec.num_frames
        usage = Usage(
            video_seconds=self.num_frames * per_frame,
            seconds=seconds["tokenize"],
            encode_seconds=seconds["encoding, all workers"],
            wait_seconds=seconds["encoders waiting for frames"],
            decode_seconds=seconds["decoding, all workers"],
            write_seconds=seconds["writing shards"] / writer_threads,
            encoders=encoders,
            gpus=encoders * resources.gpus_per_worker,
            cpus=executor.num_cpus,
            encoder_cpus=encoders * resources.cpus_per_worker,
            decode_workers=resources.decode_workers,
            is_local=isinstance(executor, LocalExecutor),
            precision=resolved.run.precision,
        )
        # the answer takes a count of the network's operators
        return replace(usage, bfloat16_pays=usage.limit == "encoders" and bfloat16_pays(resolved.run, resolved.config))


def check_reject_share(summary: Summary, rejected: set[str], run: TokenizeRun) -> None:
    """Count the rejected videos in the summary, with a problem if their share exceeds ``max_reject_share``."""
    summary.num_rejected_videos = len(rejected)
    share = len(rejected) / summary.num_videos
    if share > run.max_reject_share:
        summary.fail(
            f"{len(rejected)} of {summary.num_videos} videos ({share:.0%}) were rejected, more than "
            f"--max-reject-share {run.max_reject_share:g} allows; see rejects/ in {run.out}"
        )


def check_internal_errors(summary: Summary, broken: Collection[str], run: TokenizeRun) -> None:
    """Record a problem in the summary if internal errors are too many to be the fault of single videos.

    Args:
        summary: summary of the run; updated in place.
        broken: URIs of the videos that were rejected with INTERNAL_ERROR by this run.
        run: its ``max_internal_error_share`` is the limit.
    """
    problem = too_many_internal_errors(len(broken), summary.num_videos, run)
    if problem is not None:
        summary.fail(problem)
