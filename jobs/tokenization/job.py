"""The main job: videos in, token shards out.

Read :func:`main` for the whole of it. Everything that can be wrong with the request is found out before Ray
starts; from then on a bad video is a rejection and only bugs and lost storage end the run. Whatever ends it, the
output then says by itself what is left to do (``pipeline.output.committed``), and the same command goes on.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from ray.data.exceptions import UserCodeException
from ray.exceptions import RayError
from rich.console import Console
from rich.text import Text

from vidshard.jobs.runtime.cluster import Cluster, ray_cluster
from vidshard.jobs.runtime.errors import exit_code_of, print_error, what_broke
from vidshard.jobs.runtime.interrupts import Feed, Interrupts
from vidshard.jobs.runtime.progress import PhaseProgress
from vidshard.jobs.tokenization.planning import make_plan, uri_columns
from vidshard.jobs.tokenization.resolve import ResolvedRun, check_output, encoder_spec, print_run, record_run, resolve
from vidshard.jobs.tokenization.summary import Summary, print_summary, save_summary
from vidshard.pipeline import storage
from vidshard.pipeline.cancel import CancelToken
from vidshard.pipeline.decode_stage import SpanDecoder
from vidshard.pipeline.discover import InputError, discover
from vidshard.pipeline.encode import EncoderSpec
from vidshard.pipeline.flow import StageResources, build_flow
from vidshard.pipeline.output.lease import Lease, LeaseHeldError, LeaseLostError
from vidshard.pipeline.output.rejects import forget_retried
from vidshard.pipeline.output.resume import WorkList
from vidshard.pipeline.output.shard_reader import ShardError
from vidshard.pipeline.output.shard_writer import TokenShardSink, WriteStats
from vidshard.pipeline.plan import clips_per_span
from vidshard.pipeline.rows import WORK_NUMBER, manifest_fields
from vidshard.pipeline.video.signals import signal_fields
from vidshard.schemas.errors import EXIT_FAILED, EXIT_REFUSED, UserError
from vidshard.schemas.runs import TokenizeRun


def main(request: ResolvedRun, console: Console) -> Summary:
    """Tokenize videos.

    Raises:
        UserError, InputError, StorageError, LeaseHeldError, ShardError: the request cannot be carried out as it stands;
            no video was tokenized.
        KeyboardInterrupt: interrupted before anything was tokenized; what was planned is kept.
    """
    started = time.monotonic()
    run = request.run
    check_output(request)
    signals = [name for name, _ in run.signals or []]
    found = discover(run.inputs, signals=signals, limit=run.limit, ask_remote=run.recheck)
    print_run(request, found, console)
    lease = Lease.acquire(
        run.out, ttl_seconds=run.lease_seconds, on_wait=lambda text: console.print(text, markup=False)
    )
    with (
        lease,
        ray_cluster(address=run.ray_address, object_store_bytes=run.object_store, verbose=run.verbose) as cluster,
    ):
        console.print(f"running on {cluster}", highlight=False)
        ready = time.monotonic()
        record_run(request, check_output(request))  # once more: another first run may just have ended
        planned = make_plan(request, found, cluster, lease, console)
        plan, todo, rejected = planned.plan, planned.work, planned.rejected_videos
        summary = Summary(
            out=run.out,
            num_videos=pc.count_distinct(found.videos["uri"]).as_py(),
            num_rejected_videos=0,
            planned_spans=plan.num_spans,
            expected_clips=plan.expected_clips,
            reused_spans=plan.num_committed,
            rejected_before=plan.num_rejected,
            written=WriteStats(),
            reasons=Counter(str(r.reason) for r in planned.new_rejections),
            seconds={"start": ready - started, "plan": time.monotonic() - ready},
            batch_fill=1.0,
            example_clip_id=None,
            notice=request.notice,
        )
        check_reject_share(summary, rejected, run)
        if todo.num_spans and not summary.problems:
            tokenize_spans(request, todo, cluster, lease, summary, rejected, console)
        summary.seconds["total"] = time.monotonic() - started
        try:
            lease.check()
            if not summary.problems and summary.interruption is None:
                forget_retried(run.out)
            save_summary(summary)
        except (storage.StorageError, LeaseLostError) as error:
            summary.problems += [str(error)] if str(error) not in summary.problems else []
    return summary


def run_and_report(run: TokenizeRun, console: Console) -> int:
    """Tokenize, print the summary, and give the exit code."""
    try:
        request = resolve(run)
        summary = main(request, console)
    except (UserError, InputError, storage.StorageError, LeaseHeldError, ShardError) as error:
        print_error(error)
        return EXIT_REFUSED
    except LeaseLostError as error:
        print_error(error)
        return EXIT_FAILED
    except KeyboardInterrupt as interrupt:
        console.print("interrupted before any clip was tokenized; run the same command again", highlight=False)
        return exit_code_of(interrupt)
    print_summary(summary, request.payload, console)
    if summary.interruption is not None:
        again = "what is committed is valid; run the same command again to go on"
        console.print(Text(f"interrupted: {again}", style="bold"))
        return exit_code_of(summary.interruption)
    return EXIT_FAILED if summary.problems else 0


def tokenize_spans(
    request: ResolvedRun,
    todo: WorkList,
    cluster: Cluster,
    lease: Lease,
    summary: Summary,
    rejected: set[str],
    console: Console,
) -> None:
    """Run the flow into the sink, and hold what came out against the plan."""
    run = request.run
    stop = CancelToken()
    rows_out = run_flow(request, todo, cluster, stop, summary)
    sink = TokenShardSink(
        run.out,
        buckets=[(spec, request.payload_of(spec)) for spec in request.clip_specs],
        provenance=request.provenance,
        manifest_fields=[field for field in manifest_fields(todo.schema) if field.name not in uri_columns(run)],
        signal_fields=[field for name, rule in run.signals or [] for field in signal_fields(name, rule)],
        shard_bytes=run.shard_size,
        commit_seconds=60 * run.commit_minutes,
        before_commit=lease.check,
    )
    account = _SpanCounter(is_awaited=np.ones(todo.num_spans, np.bool_))
    started = time.monotonic()
    try:
        with Interrupts() as interrupts, PhaseProgress(console, "tokenizing", todo.num_spans) as display:
            for rows in until_interrupted(rows_out, interrupts, stop, run.grace_seconds, console):
                if rows is None:
                    lease.check(now=False)
                    sink.commit_if_due()
                    continue
                rows, rejections = account.take(rows)
                sink.add(rows)
                summary.reasons.update(r["reason"] for r in rejections)
                rejected |= {r["uri"] for r in rejections}
                speed = account.clips / display.seconds
                display.update(
                    todo.num_spans - account.num_awaited,
                    f"{account.videos} videos · {account.clips} clips · {speed:.2f} clips/s · "
                    f"{summary.reasons.total()} rejects",
                )
                check_reject_share(summary, rejected, run)
                if summary.problems:
                    break
            summary.interruption = interrupts.first
    except KeyboardInterrupt as interrupt:
        summary.interruption = interrupt
    except (RayError, UserCodeException) as error:
        summary.problems.append(what_broke(error))
    except storage.StorageError as error:
        summary.problems.append(f"{error}; what is committed before it is valid")
    except LeaseLostError as error:
        summary.problems.append(str(error))
    finally:
        try:
            sink.close()
        except storage.StorageError as error:
            summary.problems.append(f"{error}; the clips of that shard are not saved: run the same command again")
        except LeaseLostError as error:
            summary.problems += [str(error)] if str(error) not in summary.problems else []
        summary.written = sink.committed
        summary.seconds |= {
            "tokenize": time.monotonic() - started,
            "decoding, all workers": account.seconds["decode_seconds"],
            "encoding, all workers": account.seconds["encode_seconds"],
            "encoders waiting for frames": account.seconds["encode_wait_seconds"],
            "writing shards": summary.written.seconds,
        }
        summary.batch_fill = account.clips / account.slots if account.slots else 1.0
        summary.example_clip_id = sink.last_clip_id
    if account.num_awaited and not summary.problems and summary.interruption is None:
        summary.problems.append(
            f"{account.num_awaited} of {todo.num_spans} planned spans came out neither as tokens nor as rejections "
            f"(the first: row {int(np.argmax(account.is_awaited))} of todo.parquet); run the same command again, and "
            "report this with the log of -v"
        )


def run_flow(
    request: ResolvedRun, todo: WorkList, cluster: Cluster, stop: CancelToken, summary: Summary
) -> Iterator[pa.Table]:
    """Encoded rows as they come out of the cluster, which starts at the first one."""
    run = request.run
    resources, encoder = plan_resources(
        request, todo.num_spans, summary.expected_clips / summary.planned_spans, cluster
    )
    span_clips = clips_per_span(request.largest, run.clips_per_span)
    decoder = SpanDecoder(
        spec=request.largest,
        max_clips=4 * span_clips + 16,
        clips_per_pass=span_clips,
        limits=run.limits,
        keep_undamaged=run.damaged == "keep",
        signals=tuple(run.signals or ()),
        stop=stop,
    )
    flow = build_flow(todo.source, decoder=decoder, encoder=encoder, resources=resources)
    rows: Iterator[pa.Table] = flow.iter_batches(batch_format="pyarrow", batch_size=None)
    return rows


def until_interrupted(
    rows: Iterator[pa.Table], interrupts: Interrupts, stop: CancelToken, grace_seconds: float, console: Console
) -> Iterator[pa.Table | None]:
    """The rows, with None each time that none came for a second; after an interrupt, for a while, what is begun."""
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
class _SpanCounter:
    """What has come out of the flow, held against what was planned."""

    is_awaited: npt.NDArray[np.bool_]
    """For each row of the plan that is to be done whether it has not come out yet."""
    clips: int = 0
    videos: int = 0
    """Videos whose last span came out."""
    slots: int = 0
    seconds: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.num_awaited = int(self.is_awaited.sum())

    def take(self, rows: pa.Table) -> tuple[pa.Table, list[dict[str, Any]]]:
        """Count rows of the encoder; gives those that are awaited, each once, and the rejections among them.

        Ray computes again what a lost node held; that a row comes out twice then is not ruled out, only harmless here.
        """
        for name in ("decode_seconds", "encode_seconds", "encode_wait_seconds"):
            self.seconds[name] += pc.sum(rows[name]).as_py() or 0
        self.slots += pc.sum(rows["encode_slots"]).as_py() or 0
        new = []
        for number in rows[WORK_NUMBER.name].to_pylist():
            new.append(bool(self.is_awaited[number]))
            self.is_awaited[number] = False
        self.num_awaited -= sum(new)
        rows = rows.filter(pa.array(new, pa.bool_()))
        self.clips += pc.sum(pc.list_value_length(rows["clips"])).as_py() or 0
        self.videos += rows["end_clip"].null_count
        return rows, [r for r in rows["rejection"].to_pylist() if r is not None]


def check_reject_share(summary: Summary, rejected: set[str], run: TokenizeRun) -> None:
    """Note a problem when more of the videos were rejected than the user allows."""
    summary.num_rejected_videos = len(rejected)
    share = len(rejected) / summary.num_videos
    if share > run.max_reject_share:
        summary.problems = [
            f"{len(rejected)} of {summary.num_videos} videos ({share:.0%}) were rejected, more than "
            f"--max-reject-share {run.max_reject_share:g} allows; see rejects/ in {run.out}"
        ]


def plan_resources(
    request: ResolvedRun, num_spans: int, clips_per_row: float, cluster: Cluster
) -> tuple[StageResources, EncoderSpec]:
    """How many encoders with how many threads, and what they are fed at once.

    Args:
        clips_per_row: in the plan, on average.
    """
    run = request.run
    on_gpu = cluster.num_gpus > 0
    if on_gpu:
        workers = run.encode_workers or max(1, int(cluster.num_gpus / run.gpus_per_worker))
        threads = run.encode_threads or 1
    else:
        workers = run.encode_workers or max(1, cluster.num_cpus // 4)
        threads = run.encode_threads or max(1, cluster.num_cpus // cluster.num_nodes // workers)
    batch_size = run.batch_size or (8 if on_gpu else 1)
    span_clips = clips_per_span(request.largest, run.clips_per_span)
    span_bytes = (span_clips + request.largest.halo_clips) * request.largest.clip_bytes
    # a call of four batches leaves at most one of them not full; 1 GiB if by chance all its spans are long ones
    rows_per_batch = max(1, min(math.ceil(4 * batch_size / max(1.0, clips_per_row)), (1 << 30) // span_bytes))
    if run.continuous:  # each span is a stream, and a batch takes as many of them
        rows_per_batch = max(1, min(batch_size, (1 << 30) // span_bytes))
    # on CPUs one is left for decoding however many encoders are asked for: a pool that takes all stops the run
    cpus = 0.0 if on_gpu else min(max(1, threads - 1), (cluster.num_cpus - 1) / workers)
    resources = StageResources(
        encode_workers=workers,
        gpus_per_worker=run.gpus_per_worker if on_gpu else 0.0,
        cpus_per_worker=cpus if cpus < 1 else float(int(cpus)),
        decode_workers=run.decode_workers,
        # eight units of work at most, by their clips: rows of parts may hold a clip or two each
        rows_per_task=max(
            1, min(math.ceil(8 * span_clips / max(1.0, clips_per_row)), math.ceil(num_spans / (8 * cluster.num_cpus)))
        ),
        rows_per_batch=rows_per_batch if batch_size > 1 else 1,
    )
    return resources, encoder_spec(request, batch_size=batch_size, num_threads=threads)
