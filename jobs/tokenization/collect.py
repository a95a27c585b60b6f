"""Collection of encoded rows: counts them against the plan, commits them as shards, and handles interrupts."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Collection, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from vidshard.jobs.runtime.executor import Executor, LocalExecutor
from vidshard.jobs.runtime.interrupts import Feed, Interrupts
from vidshard.jobs.runtime.progress import PhaseProgress
from vidshard.jobs.tokenization.history import Timeline
from vidshard.jobs.tokenization.placement import bfloat16_pays
from vidshard.jobs.tokenization.planning import uri_columns
from vidshard.jobs.tokenization.quality import QualityWatch
from vidshard.jobs.tokenization.resources import plan_resources
from vidshard.jobs.tokenization.summary import Summary, too_many_internal_errors
from vidshard.jobs.tokenization.telemetry import Telemetry
from vidshard.jobs.tokenization.usage import Usage
from vidshard.pipeline import storage
from vidshard.pipeline.cancel import CancelToken
from vidshard.pipeline.decode_stage import SpanDecoder
from vidshard.pipeline.output.lease import Lease, LeaseLostError
from vidshard.pipeline.output.shard_writer import TokenShardSink
from vidshard.pipeline.output.work_list import WorkList
from vidshard.pipeline.recut import Recutting
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.resources import StageResources
from vidshard.pipeline.rows import WORK_NUMBER, manifest_fields
from vidshard.pipeline.video.signals import signal_fields
from vidshard.schemas.errors import OutageError, RunFailedError
from vidshard.schemas.rejections import Reason
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.tokens import AUDIT_FIELDS
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
    sink = open_sink(resolved, work, lease)
    started = time.monotonic()
    try:
        _collect(resolved, work, executor, lease, sink, counter, summary, rejected, console, telemetry, limits)
    except KeyboardInterrupt as interrupt:
        summary.interruption = interrupt
    except (RunFailedError, LeaseLostError) as error:
        summary.problems.append(str(error))
    except (storage.StorageError, OutageError) as error:
        summary.problems.append(f"{error}; what is committed before it is valid: run the same command again")
    finally:
        _close(sink, summary)
        counter.report(summary, time.monotonic() - started)
        summary.usage = counter.usage(resolved, executor, summary)
    if counter.num_awaited and not summary.problems and summary.interruption is None:
        summary.problems.append(
            f"{counter.num_awaited} of {work.num_spans} planned spans came out neither as tokens nor as rejections "
            f"(the first: row {int(np.argmax(counter.is_awaited))} of todo.parquet); run the same command again, and "
            "report this with the log of -v"
        )


WRITER_THREADS = 2
"""Threads that compress and write shards. Compression leaves Python's lock to the thread that takes the rows."""


def open_sink(resolved: ResolvedRun, work: WorkList, lease: Lease | None = None) -> TokenShardSink:
    """Make the writer of a run's shards; with a lease it is checked before each commit."""
    run = resolved.run
    return TokenShardSink(
        run.out,
        buckets=[(spec, resolved.payload_of(spec)) for spec in resolved.clip_specs],
        provenance=resolved.provenance,
        manifest_fields=[
            *(AUDIT_FIELDS if run.audit else ()),
            *(field for field in manifest_fields(work.schema) if field.name not in uri_columns(run)),
        ],
        signal_fields=[field for name, rule in run.signals or [] for field in signal_fields(name, rule)],
        shard_bytes=run.shard_size,
        commit_seconds=60 * run.commit_minutes,
        before_commit=(lambda: None) if lease is None else lease.check,
        num_threads=1 if lease is None else WRITER_THREADS,
    )


def _collect(
    resolved: ResolvedRun,
    work: WorkList,
    executor: Executor,
    lease: Lease,
    sink: TokenShardSink,
    counter: SpanCounter,
    summary: Summary,
    rejected: set[str],
    console: Console,
    telemetry: Telemetry,
    limits: Limits,
) -> None:
    """Take encoded rows until all have come, an interrupt, or too many rejections."""
    run = resolved.run
    stop = executor.cancel_token()
    broken: set[str] = set()
    watch = QualityWatch(min_psnr=run.audit_min_psnr, console=console)
    clips_per_row = summary.expected_clips / summary.planned_spans
    resources, encoder = plan_resources(resolved, work.num_spans, clips_per_row, executor)
    counter.resources = resources
    decoder = span_decoder(resolved, limits, stop)
    rows_out = executor.run(work.source, decoder=decoder, encoder=encoder, resources=resources)
    with (
        Interrupts() as interrupts,
        PhaseProgress(console, "tokenizing", work.num_spans) as display,
        closing(until_interrupted(rows_out, interrupts, stop, run.grace_seconds, console)) as taken,
    ):
        for rows in taken:
            if rows is None:
                lease.check(now=False)
                sink.commit_if_due()
                continue
            rows, rejections = counter.take(rows)
            telemetry.took(rows, rejections)
            watch.take(rows)
            sink.add(rows)
            summary.reasons.update(r["reason"] for r in rejections)
            rejected |= {r["uri"] for r in rejections}
            speed = counter.clips / display.seconds
            display.update(
                work.num_spans - counter.num_awaited,
                f"{counter.videos} videos · {counter.clips} clips · {speed:.2f} clips/s · "
                f"{summary.reasons.total()} rejects",
            )
            broken |= {r["uri"] for r in rejections if r["reason"] == Reason.INTERNAL_ERROR}
            check_reject_share(summary, rejected, run)
            check_internal_errors(summary, broken, run)
            if summary.problems:
                break
        summary.interruption = interrupts.first


def _close(sink: TokenShardSink, summary: Summary) -> None:
    try:
        sink.close()
    except storage.StorageError as error:
        summary.problems.append(f"{error}; the clips of that shard are not saved: run the same command again")
    except LeaseLostError as error:
        summary.problems += [str(error)] if str(error) not in summary.problems else []
    summary.written = sink.committed


def span_decoder(resolved: ResolvedRun, limits: Limits, stop: CancelToken) -> SpanDecoder:
    """Make the decode stage of a run."""
    run = resolved.run
    return SpanDecoder(
        spec=resolved.largest,
        max_clips=4 * resolved.clips_per_span + 16,
        clips_per_pass=resolved.clips_per_span,
        limits=limits,
        keep_undamaged=run.damaged == "keep",
        signals=tuple(run.signals or ()),
        stop=stop,
        recutting=Recutting(share=run.recut_share, seed=json.dumps(resolved.identity, sort_keys=True, default=str)),
    )


def until_interrupted(
    rows: Iterator[pa.Table], interrupts: Interrupts, stop: CancelToken, grace_seconds: float, console: Console
) -> Generator[pa.Table | None, None, None]:
    """Yield rows as they come, and None after each second without one.

    After an interrupt no further work is started, and rows of started work are yielded for ``grace_seconds`` at most.
    """
    feed = Feed(rows)
    deadline = math.inf
    try:
        while time.monotonic() < deadline:
            if interrupts.first is not None and deadline == math.inf:
                stop.cancel()
                deadline = time.monotonic() + grace_seconds
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
    """Counts of the rows that came out of the flow, compared with the work list."""

    is_awaited: npt.NDArray[np.bool_]
    """bool (number of spans,): whether each span of the work list has not come out yet."""
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
    resources: StageResources | None = None
    """Workers of the stages; None before they are planned."""
    timeline: Timeline = field(default_factory=Timeline)

    def __post_init__(self) -> None:
        self.num_awaited = int(self.is_awaited.sum())

    def take(self, rows: pa.Table) -> tuple[pa.Table, list[dict[str, Any]]]:
        """Count encoded rows.

        Ray recomputes rows that a lost node held, so a row may come out twice; the second one is dropped here.

        Returns:
            The rows that were still awaited, each once, and the rejections among them.
        """
        for name in ("decode_seconds", "encode_seconds", "encode_wait_seconds"):
            self.seconds[name] += pc.sum(rows[name]).as_py() or 0
        self.slots += pc.sum(rows["encode_slots"]).as_py() or 0
        new = []
        for number in rows[WORK_NUMBER.name].to_pylist():
            new.append(bool(self.is_awaited[number]))
            self.is_awaited[number] = False
        self.num_awaited -= sum(new)
        if not all(new):  # a filter copies the payload, also where it keeps every row
            rows = rows.filter(pa.array(new, pa.bool_()))
        self.clips += pc.sum(pc.list_value_length(rows["clips"])).as_py() or 0
        self.videos += rows["end_clip"].null_count
        self.recut += pc.sum(rows["is_recut"]).as_py() or 0
        clips = pc.list_flatten(rows["clips"])
        self.num_frames += pc.sum(pc.struct_field(clips, "num_valid_frames")).as_py() or 0
        rejections = [r for r in rows["rejection"].to_pylist() if r is not None]
        self.timeline.count(len(clips), len(rejections))
        return rows, rejections

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
        summary.batch_fill = self.clips / self.slots if self.slots else 1.0
        summary.example_clip_id = summary.written.last_clip_id

    def usage(self, resolved: ResolvedRun, executor: Executor, summary: Summary) -> Usage | None:
        """Use of the machines by the phase that `report` wrote to the summary; None if nothing was encoded."""
        resources, seconds = self.resources, summary.seconds
        if resources is None or not self.clips:
            return None
        spec = resolved.largest
        encoders = 1 if isinstance(executor, LocalExecutor) else resources.encode_workers
        per_frame = min(float(spec.clip_seconds), float(spec.stride_seconds or spec.clip_seconds)) / spec.num_frames
        usage = Usage(
            video_seconds=self.num_frames * per_frame,
            seconds=seconds["tokenize"],
            encode_seconds=seconds["encoding, all workers"],
            wait_seconds=seconds["encoders waiting for frames"],
            decode_seconds=seconds["decoding, all workers"],
            write_seconds=seconds["writing shards"] / WRITER_THREADS,
            encoders=encoders,
            gpus=encoders * resources.gpus_per_worker,
            cpus=executor.num_cpus,
            encoder_cpus=encoders * resources.cpus_per_worker,
            precision=resolved.run.precision,
        )
        # the answer takes a count of the network's operators
        return replace(usage, bfloat16_pays=usage.waits_for_encoders and bfloat16_pays(resolved.run, resolved.config))


def check_reject_share(summary: Summary, rejected: set[str], run: TokenizeRun) -> None:
    """Record a problem in the summary if the share of rejected videos exceeds ``max_reject_share``."""
    summary.num_rejected_videos = len(rejected)
    share = len(rejected) / summary.num_videos
    if share > run.max_reject_share:
        summary.problems = [
            f"{len(rejected)} of {summary.num_videos} videos ({share:.0%}) were rejected, more than "
            f"--max-reject-share {run.max_reject_share:g} allows; see rejects/ in {run.out}"
        ]


def check_internal_errors(summary: Summary, broken: Collection[str], run: TokenizeRun) -> None:
    """Record a problem in the summary if internal errors are too many to be the fault of single videos.

    Args:
        summary: summary of the run; updated in place.
        broken: URIs of the videos that were rejected with INTERNAL_ERROR by this run.
        run: its ``max_internal_error_share`` is the limit.
    """
    problem = too_many_internal_errors(len(broken), summary.num_videos, run)
    if problem is not None:
        summary.problems.append(problem)
