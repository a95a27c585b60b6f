"""Training job: raw videos in, a trained tokenizer out, for ``vidshard tokenize --weights``.

:func:`train` is the main line; ``jobs.training.worker`` is what each worker does. Everything that can be checked is
checked before the first step. The folder of a run:

    run.json                          complete resolved run, versions of code and libraries
    rejects.json                      videos that were rejected, and why
    summary.md                        what was done and its result, for people
    STAGE/tokenizer.safetensors       result of the stage: averaged weights, with the model's configuration
    STAGE/checkpoints/                states that the stage can resume from
    STAGE/metrics.jsonl, tensorboard/, pictures/
    STAGE/videos.parquet, held_out.parquet      videos that it trains on, clips that it is evaluated on
    STAGE/result.json                 metrics of the stage, digests of its videos and of its first and last weights
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import TypeAdapter, ValidationError
from ray.data import Dataset, ExecutionOptions
from ray.data.exceptions import UserCodeException
from ray.exceptions import RayError
from rich.console import Console

from vidshard.jobs.report.job import add_report
from vidshard.jobs.runtime.cluster import Cluster, ray_cluster
from vidshard.jobs.runtime.errors import cause_of, innermost
from vidshard.jobs.runtime.events import reported
from vidshard.jobs.runtime.interrupts import Interrupts
from vidshard.jobs.runtime.new_output import no_empty_output
from vidshard.jobs.runtime.node_watch import nodes_watched
from vidshard.jobs.runtime.progress import PhaseProgress, warn
from vidshard.jobs.training.metrics_file import read_metrics
from vidshard.jobs.training.report import trained_page
from vidshard.jobs.training.resolve import (
    ResolvedTraining,
    begin_run,
    lengthened,
    plan_resources,
    print_run,
    read_record,
    resolve,
)
from vidshard.jobs.training.stage_job import EXPORT, HELD_OUT, StageJob
from vidshard.jobs.training.status import RunStatus
from vidshard.jobs.training.summary import (
    REJECTS,
    Result,
    StageResult,
    print_result,
    why_unmeasured,
    write_summary,
)
from vidshard.jobs.training.worker import train_worker
from vidshard.pipeline import storage
from vidshard.pipeline.flow import ENCODER_ENVIRONMENT
from vidshard.pipeline.output.lease import Lease, LeaseLostError
from vidshard.pipeline.resources import cpus_beside_decoding
from vidshard.pipeline.training_data.cache import fill_cache
from vidshard.pipeline.training_data.checkpoints import Checkpoints
from vidshard.pipeline.training_data.loader import ClipReader, held_out_clips, rows_per_block, training_clips
from vidshard.pipeline.training_data.sampler import ClipSampler
from vidshard.pipeline.training_data.variation import Variation
from vidshard.pipeline.training_data.videos import (
    TrainingVideos,
    UnusableError,
    open_training_videos,
    read_training_videos,
)
from vidshard.schemas.errors import EXIT_AGAIN, UserError, VidshardError
from vidshard.schemas.rejections import Rejection
from vidshard.schemas.text import counted
from vidshard.schemas.training import StageConfig, TrainRun

STAGE_RESULT = "result.json"
VIDEOS = "videos.parquet"

_LEASE_SECONDS = 60.0
_FAILED_TO_DECODE = (RayError, UserCodeException)


def train(run: TrainRun, console: Console) -> Result:
    """Train the stages of a run that are not finished yet, and print the result.

    Raises:
        VidshardError: the run cannot be carried out as it stands; nothing was trained.
    """
    with reported(console, run, command="train", out=run.out) as events:
        training = resolve(run)
        with no_empty_output(training.run.out):
            result = _train_stages(training, console)
        print_result(result, training.run.out, console)
        problems = [] if result.problem is None else [result.problem]
        events.will_end(result.exit_code, problems, result.interruption)
        if result.interruption is None:
            add_report(training.run.out, run.report, console, trained_page)
    return result


def resume(out: str, changes: dict[str, Any], console: Console, *, steps: int | None = None) -> Result:
    """Resume a run from its folder alone, and print the result.

    Args:
        out: folder of the run.
        changes: settings of its execution that differ from the stored ones, such as ``workers``.
        steps: number of steps of the stage that the run has come to, more than it has; None for those it has.

    Raises:
        VidshardError: there is no run in the folder, it cannot be made longer so, or as `train` raises.
    """
    out = storage.absolute(out)
    record = read_record(out)
    run = TrainRun.model_validate({**record["run"], **changes, "out": out})
    with reported(console, run, command="train resume", out=out) as events:
        training = resolve(run)
        if steps is not None:
            training = replace(training, run_id=record["run_id"])
            training = lengthened(training, steps, lambda name: _finished(training, name) is not None, console)
        result = _train_stages(training, console)
        print_result(result, training.run.out, console)
        problems = [] if result.problem is None else [result.problem]
        events.will_end(result.exit_code, problems, result.interruption)
        if result.interruption is None:
            add_report(training.run.out, run.report, console, trained_page)
    return result


def _train_stages(training: ResolvedTraining, console: Console) -> Result:
    run = training.run
    storage.check_writable(run.out)
    lease = Lease.acquire(run.out, ttl_seconds=_LEASE_SECONDS, on_wait=lambda text: console.print(text, markup=False))
    with (
        lease,
        ray_cluster(address=run.ray_address, object_store_bytes=run.object_store, verbose=run.verbose) as cluster,
        nodes_watched(console, is_own=cluster.is_own),
    ):
        workers = plan_resources(training, cluster)
        training = begin_run(training)
        print_run(training, cluster, workers, console)
        result = Result()
        for name, stage in run.stages.items():
            done = _finished(training, name)
            if done is not None:
                result.stages.append(done)
                console.print(f"{name} is finished: {storage.join(run.out, name, EXPORT)}", highlight=False)
                continue
            videos, sampler = prepare_data(training, name, stage, cluster, console)
            job = StageJob(
                run=run,
                name=name,
                run_id=training.run_id,
                tokenizer=training.tokenizer,
                epoch_length=sampler.epoch_length,
                threads=run.threads or max(1, cluster.num_cpus // cluster.num_nodes // workers),
                status=RunStatus(),
                **_start_of(training, name),
            )
            _write_rejects(job, videos.rejections)
            lease.check()
            outcome = _train_stage(job, sampler, workers, cluster, lease, result, console)
            lease.check()  # what follows would overwrite files of the run that took over
            if not outcome.measured:
                outcome.unmeasured = why_unmeasured(run.validation_share)
            outcome.digests["videos_sha256"] = videos.digest
            result.stages.append(outcome)
            storage.write_atomic(storage.join(job.folder, STAGE_RESULT), json.dumps(asdict(outcome), indent=1).encode())
            _write_rejects(job, videos.rejections)
            write_summary(training, result, videos)
            if result.problem or result.interruption or not outcome.is_finished:
                break
    return result


# The videos


def prepare_data(
    training: ResolvedTraining, name: str, stage: StageConfig, cluster: Cluster, console: Console
) -> tuple[TrainingVideos, ClipSampler]:
    """Open the videos of a stage, decode clips of its held-out videos, and fill the cache if there is to be one.

    A stage with a checkpoint keeps the videos that it began with, since its clips are numbered by them: newer videos
    play no part, and those that are gone are rejections.

    Raises:
        UnusableError: no video can be used, or too few for a batch.
    """
    run = training.run
    spec = stage.clip_spec(clips_per_video=run.clips_per_video)
    try:
        videos, before, has_trained = _videos_of(training, name, stage, cluster, console)
        held_out, videos = held_out_clips(
            videos,
            stage.clip_spec(clips_per_video=1, placement="even"),
            run.eval_clips,
            run.limits,
            replacing=not has_trained,
            before=before,
            variation=Variation.of(stage, held_out=True),
        )
        if videos.train.num_rows < stage.batch_size:
            raise UnusableError(
                f"{name}: {counted(videos.train.num_rows, 'clip')} in an epoch of "
                f"{counted(videos.num_videos, 'video')} ({videos.held_out.num_rows} held out), "
                f"fewer than a batch of {stage.batch_size}: give more videos, raise "
                "--clips-per-video, or lower --batch-size"
            )
        items = videos.train if run.cache is None else _cached(run.cache, videos, run, stage, console)
    except _FAILED_TO_DECODE as error:
        raise UnusableError(f"{name}: {cause_of(error)}") from error
    weights = [weight for _, weight in run.corpora if weight is not None]
    sampler = ClipSampler(items=items, weights=tuple(weights) or None, seed=stage.seed)
    console.print(
        f"{counted(videos.num_videos, 'video')}: {counted(sampler.epoch_length, 'clip')} an epoch of "
        f"{spec.num_frames}x{spec.bucket} at {spec.fps} per second, {counted(held_out.num_rows, 'held-out clip')}, "
        f"{counted(len(videos.rejections), 'rejection')}",
        highlight=False,
    )
    if not held_out.num_rows:
        warn(console, f"{name}: nothing will be measured: {why_unmeasured(run.validation_share)}")
    folder = storage.join(run.out, name)
    videos.write(storage.join(folder, VIDEOS))
    buffer = pa.BufferOutputStream()
    pq.write_table(held_out, buffer, compression="lz4", row_group_size=8)
    storage.write_atomic(storage.join(folder, HELD_OUT), buffer.getvalue().to_pybytes())
    return videos, sampler


def _videos_of(
    training: ResolvedTraining, name: str, stage: StageConfig, cluster: Cluster, console: Console
) -> tuple[TrainingVideos, TrainingVideos | None, bool]:
    """Videos that the stage began with, if it has a checkpoint; otherwise those that the run names now.

    Returns:
        The videos, those of the stage that it starts from, and whether the stage has a checkpoint.
    """
    run = training.run
    folder = storage.join(run.out, name)
    kept = storage.join(folder, VIDEOS)
    if Checkpoints(folder, training.run_id).latest() is not None and storage.exists(kept):
        console.print(f"{name}: goes on with the videos that it began with", highlight=False)
        return read_training_videos(kept), None, True
    previous, _ = _start_of(training, name)["previous"] or (None, None)
    path = storage.join(previous, VIDEOS) if previous else None
    before = read_training_videos(path) if path and storage.exists(path) else None
    with PhaseProgress(console, f"{name}: opening videos", 1000) as progress:
        videos = open_training_videos(
            [path for path, _ in run.corpora],
            spec=stage.clip_spec(clips_per_video=run.clips_per_video),
            validation_share=run.validation_share,
            limits=run.limits,
            num_tasks=4 * cluster.num_cpus,
            before=before,
            on_video=lambda done, total: progress.update(1000 * done / total, f"{done} of {total}"),
            keep_short=stage.short_videos != "reject",
        )
    return videos, before, False


def _cached(folder: str, videos: TrainingVideos, run: TrainRun, stage: StageConfig, console: Console) -> pa.Table:
    """Fill the cache of a stage's clips; returns the items that have a clip, and adds rejections of the others."""
    spec = stage.clip_spec(clips_per_video=run.clips_per_video)
    variation = Variation.of(stage)
    choices = f" {variation.decoded}".replace(" ", "-").replace("=", "_").rstrip("-")
    path = storage.join(folder, f"{spec.num_frames}x{spec.bucket}-{spec.digest()}{choices}")
    total = videos.train.num_rows
    with PhaseProgress(console, "caching clips", total) as progress:
        items, broken = fill_cache(
            path,
            videos.train,
            spec,
            run.limits,
            stage.seed,
            lambda n: progress.update(n, f"{n:,} of {counted(total, 'clip')}"),
            variation,
        )
    videos.rejections.extend(broken)
    return items


def _write_rejects(job: StageJob, rejections: list[Rejection]) -> None:
    """Add to ``rejects.json``: videos rejected when opened, and clips that could not be decoded during training."""
    path = storage.join(job.run.out, REJECTS)
    entries = {}
    if storage.exists(path):
        try:
            entries = {(entry["uri"], entry["reason"]): entry for entry in json.loads(storage.read_bytes(path))}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{storage.public_uri(path)} is damaged ({error!r}): take it away, and it is written anew with what is "
                "rejected from now on"
            ) from error
    for r in rejections:
        entry = {"uri": storage.public_uri(r.uri), "video_id": r.video_id, "reason": str(r.reason), "detail": r.detail}
        entries.setdefault((entry["uri"] or "", entry["reason"] or ""), entry)
    for seen in job.status.read()["rejected"]:
        entries.setdefault((seen["uri"], seen["reason"]), seen)
    storage.write_atomic(path, json.dumps(list(entries.values()), indent=1).encode())


# The stages


def _start_of(training: ResolvedTraining, name: str) -> dict[str, Any]:
    """Start of a stage, as arguments of `StageJob`: the stage before it, or what ``--init-from`` names."""
    names = list(training.run.stages)
    at = names.index(name)
    if at == 0:
        return {"previous": training.previous, "weights": training.weights}
    return {"previous": (storage.join(training.run.out, names[at - 1]), training.run_id), "weights": None}


def _finished(training: ResolvedTraining, name: str) -> StageResult | None:
    """Result of a stage that is finished: its tokenizer is there, and a result or checkpoint says so.

    Raises:
        UserError: its result is damaged, and there is no checkpoint either.
    """
    folder = storage.join(training.run.out, name)
    if not storage.exists(storage.join(folder, EXPORT)):
        return None
    path = storage.join(folder, STAGE_RESULT)
    checkpoint = Checkpoints(folder, training.run_id).latest()
    if storage.exists(path):
        try:
            known = TypeAdapter(StageResult).validate_json(storage.read_bytes(path))
        except ValidationError as error:
            if checkpoint is None:
                raise UserError(
                    f"{storage.public_uri(path)} is damaged, and there is no checkpoint that tells whether {name} is "
                    f"finished. To train it anew, take {storage.public_uri(folder)} away"
                ) from error
        else:
            if known.is_finished and known.steps >= training.run.stages[name].steps:
                return known  # even if its checkpoints, which are large, were deleted
    if checkpoint is None or checkpoint.step < training.run.stages[name].steps:
        return None
    return StageResult(name=name, steps=checkpoint.step, measured=checkpoint.metrics, is_finished=True)


def _train_stage(
    job: StageJob,
    sampler: ClipSampler,
    workers: int,
    cluster: Cluster,
    lease: Lease,
    result: Result,
    console: Console,
) -> StageResult:
    """Train a stage on the workers, with progress, and stop it in order on an interrupt or a lost lease.

    Args:
        result: gets the problem or interruption that ended the stage.
    """
    fit = _Background(trainer_of(job, sampler, workers, cluster).fit)
    checkpoint = job.checkpoints.latest()
    start = checkpoint.step if checkpoint else 0
    outcome = StageResult(name=job.name, steps=start)
    restarts_before = _restarts_before(job) if checkpoint else 0
    began = time.monotonic()
    with Interrupts() as interrupts, PhaseProgress(console, job.name, job.stage.steps, begun=start) as progress:
        fit.start()
        asked = False
        while fit.runs(0.5):
            note = job.status.read()
            if note["latest"]:
                progress.update(note["latest"]["step"], _progress_text(note, job.stage))
            if note["held_out"].get("step") == 0:
                outcome.before = note["held_out"]
            if interrupts.first is not None and not asked:
                job.status.stop()
                asked = True
                console.print("interrupted: keeping a checkpoint; once more to end at once", highlight=False)
            try:
                lease.check(now=False)
            except LeaseLostError as error:
                job.status.stop()
                result.problem, result.may_pass = str(error), True
        result.interruption = interrupts.first
    outcome.seconds = time.monotonic() - began
    ended = _fill_outcome(outcome, job)
    outcome.restarts += restarts_before
    if "failed" in ended:
        result.problem = f"{job.name} stopped: {ended['failed']}"
    elif fit.failure is not None and result.interruption is None:
        result.problem = f"{job.name} stopped after {outcome.restarts} restarts: {cause_of(fit.failure)}"
        cause = innermost(fit.failure)
        result.may_pass = isinstance(cause, VidshardError) and cause.exit_code == EXIT_AGAIN
    return outcome


class _Background:
    """A function run in a thread; what it raises is kept."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.failure: BaseException | None = None
        self._function = function
        self._thread = threading.Thread(target=self._run, name="ray-train", daemon=True)

    def _run(self) -> None:
        try:
            self._function()
        except BaseException as error:  # noqa: BLE001  read by who waits for the thread
            self.failure = error

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def runs(self, seconds: float) -> bool:
        """Whether it still runs, after waiting for its end at most so many seconds."""
        self._thread.join(seconds)
        return self._thread.is_alive()


def _fill_outcome(outcome: StageResult, job: StageJob) -> dict[str, Any]:
    """Complete a stage's result from the workers' last reports, and return how they said that it ended."""
    note = job.status.read()
    ended: dict[str, Any] = note["outcome"]
    outcome.restarts = max(0, note["starts"] - 1)
    outcome.is_finished = bool(ended.get("finished"))
    outcome.steps = ended.get("step", note["latest"].get("step", outcome.steps))
    outcome.measured = ended.get("measured") or note["held_out"]
    outcome.metrics = ended.get("metrics") or note["latest"]
    outcome.digests = ended.get("digests", {})
    outcome.seconds = ended.get("seconds", outcome.seconds)
    outcome.made = _clips_made(job)
    if not outcome.before:
        outcome.before = _measured_at_first(job)
    return ended


def _restarts_before(job: StageJob) -> int:
    """Restarts in earlier commands of the stage, as far as they came to write a result."""
    path = storage.join(job.folder, STAGE_RESULT)
    try:
        return TypeAdapter(StageResult).validate_json(storage.read_bytes(path)).restarts if storage.exists(path) else 0
    except ValidationError:
        return 0


def _clips_made(job: StageJob) -> dict[str, int]:
    """Number of clips of all steps by the way that they were made, from the records, which a resumed stage continues.

    Empty where the stage takes clips in one way only.
    """
    lines = [line for line in read_metrics(job.folder) if line["group"] == "train"]
    ways = Variation.of(job.stage).ways if lines else ()
    return {way: int(sum(line.get(f"clips_{way}", 0) for line in lines)) for way in ways}


def _measured_at_first(job: StageJob) -> dict[str, float]:
    """Metrics before the first step, as an earlier run of the command recorded them."""
    lines = read_metrics(job.folder)
    first = next((line for line in lines if line["group"] == "held_out" and line["step"] == 0), {})
    return {name: value for name, value in first.items() if name != "group"}


def trainer_of(job: StageJob, sampler: ClipSampler, workers: int, cluster: Cluster) -> Any:
    """Ray Train's trainer of a stage: resources of its workers, their clips, and restarts."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")  # read when ray.train is imported
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")  # a minute is short where many import torch
    if cluster.is_own:
        os.environ.setdefault(
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0"
        )  # our own Ray is not preempted: one process less
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    stage, on_gpu = job.stage, cluster.num_gpus > 0
    resources = (
        {"CPU": 1.0, "GPU": 1.0} if on_gpu else {"CPU": cpus_beside_decoding(job.threads, workers, cluster.num_cpus)}
    )
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=f"start-{uuid.uuid4().hex[:8]}",
            failure_config=FailureConfig(max_failures=job.run.max_failures),
            worker_runtime_env={"env_vars": {} if on_gpu else ENCODER_ENVIRONMENT},
            **_ray_storage(storage.join(job.folder, "ray")),
        ),
        datasets={"train": _clips_of(job, sampler, rows_per_worker=stage.batch_size // workers)},
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True), enable_shard_locality=False),
    )


def _clips_of(job: StageJob, sampler: ClipSampler, rows_per_worker: int) -> Callable[[], Dataset]:
    """Factory of the dataset of clips, which Ray Train calls whenever workers start.

    The dataset begins after the checkpoint that the workers will resume from.
    """
    stage, checkpoints = job.stage, job.checkpoints
    spec = stage.clip_spec(clips_per_video=job.run.clips_per_video)
    reader = ClipReader(spec=spec, limits=job.run.limits, variation=Variation.of(stage))
    known = ray.put(sampler)
    block = rows_per_block(rows_per_worker, reader.spec)
    total = stage.steps * stage.batch_size

    def clips() -> Dataset:
        checkpoint = checkpoints.latest()
        start = checkpoint.step * stage.batch_size if checkpoint else 0
        return training_clips(known, reader, min(start, total - 1), total, rows_per_block=block)

    return clips


def _ray_storage(folder: str) -> dict[str, Any]:
    """Arguments of Ray Train's ``RunConfig`` for a folder of its own, local or remote."""
    if storage.is_local(folder):
        return {"storage_path": folder}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, inner = storage.filesystem(folder)
    return {"storage_path": inner, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


def _progress_text(note: dict[str, Any], stage: StageConfig) -> str:
    latest, held_out = note["latest"], note["held_out"]
    parts = [f"step {latest['step']} of {stage.steps}"]
    for name in ("l1", "perceptual", "gan", "hinge"):
        if name in latest:
            parts.append(f"{name} {latest[name]:.3g}")
    if "psnr" in held_out:
        parts.append(f"PSNR {held_out['psnr']:.2f} dB")
    parts.append(f"{latest['clips_per_second']:.3g} clips/s, waiting {latest['waiting']:.0%}")
    if note["starts"] > 1:
        parts.append(f"{note['starts'] - 1} restarts")
    return " · ".join(parts)
