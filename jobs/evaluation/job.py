"""Evaluation job: reconstructs clips with several tokenizers, scores them, and writes tables.

:func:`evaluate` is the main line. The folder of an evaluation:

    run.json            settings, and the identity of the scores
    scores/*.parquet    scores of every clip, with the counts of its tokens
    scores.json         figures over all clips
    scores.md, .csv     the same as tables

The same command again continues: spans that are in ``scores/`` are not decoded again.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from rich.console import Console

from vidshard.jobs.evaluation.report import evaluated_page
from vidshard.jobs.evaluation.resolve import Group, ResolvedEvaluation, resolve
from vidshard.jobs.evaluation.tables import SCORES_CSV, SCORES_JSON, SCORES_MARKDOWN, record_of, render
from vidshard.jobs.report.job import add_report
from vidshard.jobs.report.wall import WALL_SHARE, WallSettings
from vidshard.jobs.runtime.events import reported
from vidshard.jobs.runtime.executor import (
    LOOKS_BEFORE_ABANDONING,
    ClusterExecutor,
    Executor,
    LocalExecutor,
    open_executor,
)
from vidshard.jobs.runtime.interrupts import Feed, LastAnswer
from vidshard.jobs.runtime.new_output import no_empty_output
from vidshard.jobs.runtime.progress import PhaseProgress
from vidshard.pipeline import storage
from vidshard.pipeline.decode_stage import SpanDecoder
from vidshard.pipeline.discover import Discovery, discover
from vidshard.pipeline.evaluation.decoder import WindowDecoder, in_windows
from vidshard.pipeline.evaluation.local import score_locally
from vidshard.pipeline.evaluation.scorer import ClipScorer, ScoredGroup, ScorerSpec, load, span_key
from vidshard.pipeline.evaluation.scores import ScoredSpans, figures_of, read_scores, write_scores
from vidshard.pipeline.evaluation.stored import STORED_SCHEMA, StoredScorer, StoredSpec
from vidshard.pipeline.output.entries import Inputs
from vidshard.pipeline.output.layout import RUN
from vidshard.pipeline.output.lease import Lease
from vidshard.pipeline.output.shard_reader import find_clips
from vidshard.pipeline.plan import open_videos
from vidshard.pipeline.resources import WorkerPool, cpus_beside_decoding
from vidshard.pipeline.versions import code_version, library_versions
from vidshard.pipeline.video.sampling import clips_of_last_span
from vidshard.schemas.errors import RunCutShortError, RunFailedError, UserError, one_line
from vidshard.schemas.evaluation import EvaluateRun
from vidshard.schemas.fields import differences
from vidshard.schemas.text import counted
from vidshard.schemas.video import Part

_FORMAT = 1
_LEASE_SECONDS = 60.0
_MAX_RECORD_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Rows that are left to score, and the stages that score them."""

    blocks: Sequence[pa.Table]
    """Rows by task: whole windows of spans, or stored clips."""
    decoder: WindowDecoder | None
    make: type[ClipScorer] | type[StoredScorer]
    spec: ScorerSpec | StoredSpec
    expected: Mapping[str, int]
    """Expected number of clips by id of the span, as `ScoredSpans` names it; fewer where a video has no whole clip."""
    workers: int
    threads: int
    gpus: float

    @property
    def clips(self) -> int:
        """Expected number of clips of all rows."""
        return sum(self.expected.values())


def evaluate(run: EvaluateRun, console: Console, *, local: bool = False) -> dict[str, Any]:
    """Measure reconstructions, write scores and tables, and print the table.

    Args:
        local: run every stage in this process, without Ray.

    Returns:
        The content of ``scores.json``.

    Raises:
        VidshardError: the evaluation cannot be carried out as it stands, or failed; what is stored stays valid.
    """
    if local and run.ray_address is not None:
        raise UserError("--local runs without Ray: leave --ray-address out, or --local")
    out = storage.absolute(run.out)
    if out != storage.public_uri(out):
        raise UserError(f"--out {storage.public_uri(out)}: put the credentials into the environment, not the URL")
    progress = Console(stderr=True, quiet=console.quiet) if run.format != "text" else console
    started = time.monotonic()
    with reported(progress, run, command="evaluate", out=out), no_empty_output(out):
        record = _evaluate(run, out, progress, local=local)
    console.print(render(record, run.format), highlight=False, markup=False, soft_wrap=True, end="")
    wall = WallSettings(seconds=WALL_SHARE * (time.monotonic() - started))
    add_report(out, run.report, progress, evaluated_page, wall=wall)
    return record


def _evaluate(run: EvaluateRun, out: str, progress: Console, *, local: bool) -> dict[str, Any]:
    """As :func:`evaluate`, without the printed table."""
    evaluation = resolve(run, progress)
    storage.check_writable(out)
    found = None if evaluation.stored else discover(run.inputs, limit=run.limit)
    lease = Lease.acquire(out, ttl_seconds=_LEASE_SECONDS, on_wait=lambda text: progress.print(text, markup=False))
    with lease, open_executor(run, local=local) as executor, executor.watched(progress):
        _write_record(evaluation)
        done = set(read_scores(out).spans)
        if found is None:
            work = _stored_work(evaluation, executor, done)
        else:
            work = _work(evaluation, found, executor, done, lease, progress)
        _score(evaluation, work, executor, lease, progress)
        lease.check()
        return _report(evaluation, read_scores(out))


def _write_record(evaluation: ResolvedEvaluation) -> None:
    """Write ``run.json``, or refuse a folder with scores of another identity.

    Raises:
        UserError: the identity differs (the message lists the differences), or the record is damaged.
    """
    path = storage.join(evaluation.run.out, RUN)
    identity = json.loads(json.dumps(evaluation.identity, default=str))
    if storage.exists(path):
        try:
            record = json.loads(storage.read_bytes(path, max_bytes=_MAX_RECORD_BYTES))
            before = record["evaluation"]
            known = record["format_version"] == _FORMAT and isinstance(before, dict)
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{storage.public_uri(path)} is not the record of an evaluation ({one_line(error, 200)}): choose "
                "another --out"
            ) from error
        if not known or before != identity:
            lines = "\n".join(f"  {line}" for line in differences(before, identity)) if known else "  another format"
            raise UserError(
                f"{storage.public_uri(evaluation.run.out)} holds scores of other settings:\n{lines}\nchoose another "
                "--out"
            )
    settings = evaluation.run.model_dump(mode="json")
    settings["inputs"] = [storage.public_uri(uri) for uri in evaluation.run.inputs]
    record = {
        "format_version": _FORMAT,
        "evaluation": identity,
        "settings": settings,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "code_version": code_version(),
        "libraries": library_versions(),
    }
    storage.write_atomic(path, json.dumps(record, indent=2, default=str).encode())


# Work


def _resources(evaluation: ResolvedEvaluation, executor: LocalExecutor | ClusterExecutor) -> tuple[int, int, float]:
    """Number of scorers, threads of each, and GPUs of each."""
    gpus = int(executor.num_gpus)
    workers = evaluation.run.workers or (gpus or max(1, executor.num_cpus // 4))
    if isinstance(executor, LocalExecutor):
        workers = 1
    threads = max(1, executor.num_cpus // executor.num_nodes // workers)
    return workers, threads, min(1.0, gpus / workers) if gpus else 0.0


def _work(
    evaluation: ResolvedEvaluation,
    found: Discovery,
    executor: LocalExecutor | ClusterExecutor,
    done: set[str],
    lease: Lease,
    console: Console,
) -> _Work:
    """Open the videos and list the spans that are not scored yet, those of all frame rates together."""
    groups, run = evaluation.groups, evaluation.run
    specs = tuple(group.resolved.largest for group in groups)
    rows = [
        row | {"group": number}
        for number, group in enumerate(groups)
        for row in _open(evaluation, group, found, executor, done, lease, console)
    ]
    workers, threads, gpus = _resources(evaluation, executor)
    clips_per_span = max(group.resolved.clips_per_span for group in groups)
    limits = groups[0].resolved.run.limits
    decoder = SpanDecoder(
        spec=specs[0], max_clips=clips_of_last_span(clips_per_span), clips_per_pass=clips_per_span, limits=limits
    )
    rows_per_task = max(1, min(8, len(rows) // (4 * executor.num_cpus)))
    return _Work(
        blocks=_joined(in_windows(rows, specs), rows_per_task),
        decoder=WindowDecoder(specs=specs, decoder=decoder),
        make=ClipScorer,
        spec=ScorerSpec(
            groups=tuple(ScoredGroup(spec=group.resolved.largest, tokenizers=group.tokenizers) for group in groups),
            metrics=evaluation.metrics,
            precision=run.precision,
            device="cuda" if gpus else "cpu",
            batch_size=run.batch_size,
            num_threads=threads,
        ),
        expected={span_key(specs[row["group"]], row["span_id"]): row["expected_clips"] for row in rows},
        workers=workers,
        threads=threads,
        gpus=gpus,
    )


def _joined(tables: Sequence[pa.Table], num_rows: int) -> list[pa.Table]:
    """Join neighbors to tables of at most ``num_rows`` rows; larger tables stay as they are."""
    joined: list[list[pa.Table]] = []
    size = num_rows
    for table in tables:
        if size + table.num_rows > num_rows:
            joined.append([])
            size = 0
        joined[-1].append(table)
        size += table.num_rows
    return [pa.concat_tables(some).combine_chunks() for some in joined]


def _open(
    evaluation: ResolvedEvaluation,
    group: Group,
    found: Discovery,
    executor: LocalExecutor | ClusterExecutor,
    done: set[str],
    lease: Lease,
    console: Console,
) -> list[dict[str, Any]]:
    """Open the videos for one kind of clips; returns the plan rows of the spans that are not scored yet."""
    resolved, run = group.resolved, evaluation.run
    digest = resolved.largest.digest()
    inputs = Inputs.of(found.videos, Part(), found.manifests)
    spans: dict[str, dict[str, Any]] = {}
    refused = ScoredSpans()
    tables = open_videos(
        inputs.videos,
        resolved.clip_specs,
        part=Part(),
        span_clips=resolved.clips_per_span,
        num_tasks=4 * executor.num_cpus,
        map_videos=executor.map_videos,
        limits=resolved.run.limits,
    )
    with PhaseProgress(console, "opening videos", inputs.videos.num_rows) as display:
        for opened, table in enumerate(tables, start=1):
            display.update(opened, f"{counted(opened, 'group')} of videos")
            for row in table.to_pylist():
                if row["rejection"] is None:
                    spans.setdefault(row["span_id"], row)
                    continue
                span = f"{digest} video {row['seen_entry'].hex()}"
                if span not in done and span not in refused.spans:
                    refused.spans.append(span)
                    refused.rejections.append(row["rejection"])
    lease.check()
    write_scores(run.out, refused)
    return [spans[span] for span in sorted(spans) if span_key(resolved.largest, span) not in done]


def _stored_work(evaluation: ResolvedEvaluation, executor: LocalExecutor | ClusterExecutor, done: set[str]) -> _Work:
    """List the stored clips that are not scored yet."""
    [group] = evaluation.groups
    stored = evaluation.stored
    assert stored is not None
    clips = find_clips(stored.shards, "")
    if evaluation.run.limit is not None:
        videos = list(dict.fromkeys(clip.rsplit("-", 2)[0] for _, clip in sorted(clips, key=lambda c: c[1])))
        kept = set(videos[: evaluation.run.limit])
        clips = [(path, clip) for path, clip in clips if clip.rsplit("-", 2)[0] in kept]
    rows = [{"span_id": clip, "path": path} for path, clip in clips if clip not in done]
    workers, threads, gpus = _resources(evaluation, executor)
    return _Work(
        blocks=[pa.Table.from_pylist([row], schema=STORED_SCHEMA) for row in rows],
        decoder=None,
        make=StoredScorer,
        spec=StoredSpec(
            measured=group.tokenizers[0],
            resolved=group.resolved,
            paths=tuple(stored.shards),
            metrics=evaluation.metrics,
            device="cuda" if gpus else "cpu",
        ),
        expected={row["span_id"]: 1 for row in rows},
        workers=workers,
        threads=threads,
        gpus=gpus,
    )


def _score(
    evaluation: ResolvedEvaluation,
    work: _Work,
    executor: LocalExecutor | ClusterExecutor,
    lease: Lease,
    console: Console,
) -> None:
    """Score the rows and store their scores as they come; an interrupt stores what is finished."""
    if not work.blocks:
        return
    waiting, done, scored = ScoredSpans(), 0, 0
    try:
        with PhaseProgress(console, "scoring", work.clips) as display, executor.failures_named():
            for table in _scored(work, executor, lease):
                for text in table["scored"].to_pylist():
                    part = load(text)
                    waiting.add(part)
                    done += sum(work.expected[span] for span in part.spans)
                    scored += len({row["clip_id"] for row in part.rows})
                display.update(done, f"{counted(scored, 'clip')} of at most {work.clips:,}")
                if len(waiting.rows) >= evaluation.run.commit_clips:
                    lease.check()
                    write_scores(evaluation.run.out, waiting)
                    waiting = ScoredSpans()
    finally:
        lease.check()
        write_scores(evaluation.run.out, waiting)


def _scored(work: _Work, executor: LocalExecutor | ClusterExecutor, lease: Lease) -> Iterator[pa.Table]:
    """Scores as they are finished.

    Raises:
        RunCutShortError: nodes left, and scorers hold every CPU of those that remain.
    """
    make: type[Any] = work.make
    if isinstance(executor, LocalExecutor):
        yield from score_locally(work.blocks, decoder=work.decoder, make=make, spec=work.spec)
        return
    from vidshard.pipeline.evaluation.flow import score_on_ray  # imports Ray

    cpus = cpus_beside_decoding(work.threads, work.workers, executor.num_cpus)
    scorers = WorkerPool(workers=work.workers, gpus_per_worker=work.gpus, cpus_per_worker=cpus)
    feed = Feed(score_on_ray(work.blocks, decoder=work.decoder, make=make, spec=work.spec, scorers=scorers))
    shrunk: LastAnswer[Executor] = LastAnswer()
    shrunk_for = 0
    try:
        while True:
            try:
                table = feed.take(1.0)
            except StopIteration:
                return
            if table is not None:
                shrunk_for = 0
                yield table
                continue
            lease.check(now=False)
            smaller = shrunk.take(partial(executor.shrunk_below, scorers))
            shrunk_for = 0 if smaller is None else shrunk_for + 1
            if shrunk_for == LOOKS_BEFORE_ABANDONING:
                executor.abandon()
                raise RunCutShortError(
                    f"nodes left, and the scorers hold every CPU of what remains, {smaller}; what is scored is kept. "
                    "Run the same command again, which takes as many scorers as fit"
                )
    finally:
        feed.stop()


# Report


def _report(evaluation: ResolvedEvaluation, scored: ScoredSpans) -> dict[str, Any]:
    """Write the tables, and return the record.

    Raises:
        RunFailedError: no clip could be scored.
    """
    sizes = {label: config.codebook_size for label, config in evaluation.measured.items()}
    figures = figures_of(scored, sizes)
    rejections = Counter(reason for _, reason in {(r["uri"], r["reason"]) for r in scored.rejections})
    if not figures:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in sorted(rejections.items()))
        why = f"all were rejected: {reasons}" if reasons else "no video has a whole clip; give fewer --frames"
        raise RunFailedError(f"no clip could be scored: {why}")
    record = record_of(evaluation, figures, rejections)
    for name, form in ((SCORES_JSON, "json"), (SCORES_MARKDOWN, "markdown"), (SCORES_CSV, "csv")):
        text = render(record, form)  # type: ignore[arg-type]
        storage.write_atomic(storage.join(evaluation.run.out, name), text.encode())
    return record
