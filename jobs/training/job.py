"""The companion job: raw videos in, a trained tokenizer out that ``vidshard tokenize --weights`` takes.

Read :func:`main` for the whole of it, and ``jobs.training.worker`` for what the workers do. Everything that can be
wrong is found out before the first step. The folder of a run explains it:

    run.json                 the complete resolved run, code version, libraries
    rejects.json             videos that were passed over, and why
    summary.md               what was done and what came of it, for people
    STAGE/tokenizer.safetensors     what the stage gave: averaged weights, with the model's configuration
    STAGE/checkpoints/       what it can be gone on from
    STAGE/metrics.jsonl, tensorboard/, pictures/
    STAGE/videos.parquet, held_out.parquet      what it is trained on, and measured by
    STAGE/result.json        figures of the stage, and digests of its videos and of its first and last weights
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import TypeAdapter, ValidationError
from ray.data import Dataset, ExecutionOptions
from ray.data.exceptions import UserCodeException
from ray.exceptions import RayError
from rich.console import Console

from vidshard.jobs.runtime.cluster import Cluster, ray_cluster
from vidshard.jobs.runtime.errors import cause_of, exit_code_of, print_error
from vidshard.jobs.runtime.interrupts import Interrupts
from vidshard.jobs.runtime.progress import PhaseProgress, warn
from vidshard.jobs.training.recorder import read_metrics
from vidshard.jobs.training.resolve import ResolvedTraining, begin_run, plan_resources, print_run, read_record, resolve
from vidshard.jobs.training.status import RunStatus
from vidshard.jobs.training.summary import REJECTS, Result, StageResult, print_stage, write_summary
from vidshard.jobs.training.worker import EXPORT, HELD_OUT, StageJob, train_worker
from vidshard.pipeline import storage
from vidshard.pipeline.discover import InputError
from vidshard.pipeline.flow import ENCODER_ENVIRONMENT
from vidshard.pipeline.output.lease import Lease, LeaseHeldError, LeaseLostError
from vidshard.pipeline.training_data.cache import fill_cache
from vidshard.pipeline.training_data.checkpoints import CheckpointError, Checkpoints
from vidshard.pipeline.training_data.loader import ClipReader, decode_held_out, rows_per_block, training_clips
from vidshard.pipeline.training_data.sampler import ClipSampler
from vidshard.pipeline.training_data.videos import (
    TrainingVideos,
    UnusableError,
    open_training_videos,
    read_training_videos,
)
from vidshard.schemas.errors import EXIT_FAILED, EXIT_REFUSED, UserError
from vidshard.schemas.rejections import Rejection
from vidshard.schemas.training import StageConfig, TrainRun
from vidshard.schemas.video import Limits

STAGE_RESULT = "result.json"
VIDEOS = "videos.parquet"

_LEASE_SECONDS = 60.0
_FAILED_TO_DECODE = (RayError, UserCodeException)


def main(training: ResolvedTraining, console: Console) -> Result:
    """Train the stages that are not finished yet.

    Raises:
        UserError, InputError, UnusableError, StorageError, LeaseHeldError, CheckpointError: the request cannot be
            carried out as it stands; nothing was trained.
    """
    run = training.run
    storage.check_writable(run.out)
    lease = Lease.acquire(run.out, ttl_seconds=_LEASE_SECONDS, on_wait=lambda text: console.print(text, markup=False))
    with (
        lease,
        ray_cluster(address=run.ray_address, object_store_bytes=run.object_store, verbose=run.verbose) as cluster,
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
            corpora, draws = prepare_data(training, name, stage, cluster, console)
            job = StageJob(
                run=run,
                name=name,
                run_id=training.run_id,
                tokenizer=training.tokenizer,
                epoch_length=draws.epoch_length,
                threads=run.threads or max(1, cluster.num_cpus // cluster.num_nodes // workers),
                board=RunStatus(),
                **_start_of(training, name),
            )
            _write_rejects(job, corpora.rejections)
            lease.check()
            outcome = train_stage(job, draws, workers, cluster, lease, result, console)
            outcome.digests["videos_sha256"] = corpora.digest
            result.stages.append(outcome)
            storage.write_atomic(storage.join(job.folder, STAGE_RESULT), json.dumps(asdict(outcome), indent=1).encode())
            _write_rejects(job, corpora.rejections)
            write_summary(training, result, corpora)
            if result.problem or result.interruption or not outcome.is_finished:
                break
    return result


def run_and_report(run: TrainRun, console: Console) -> int:
    """Train, say what came of it, and give the exit code."""
    try:
        result = main(resolve(run), console)
    except (
        UserError,
        InputError,
        UnusableError,
        storage.StorageError,
        LeaseHeldError,
        LeaseLostError,
        CheckpointError,
    ) as error:
        print_error(error)
        return EXIT_REFUSED
    except KeyboardInterrupt as interrupt:
        console.print("interrupted; run the same command again to go on", highlight=False)
        return exit_code_of(interrupt)
    for stage in result.stages:
        print_stage(stage, console)
    again = f"vidshard train resume {run.out}"
    if result.problem is not None:
        warn(console, result.problem)
        console.print(f"the last good checkpoint is kept; to go on: {again}", highlight=False)
        return EXIT_FAILED
    if result.interruption is not None:
        console.print(f"interrupted; to go on: {again}", style="bold", highlight=False)
        return exit_code_of(result.interruption)
    last = storage.join(run.out, result.stages[-1].name, EXPORT)
    console.print(f"\nnext: vidshard tokenize VIDEOS --out tokens/ --weights {last}", style="bold", highlight=False)
    return 0


def resume(out: str, changes: dict[str, Any], console: Console) -> int:
    """Go on with a run from its folder alone; gives the exit code.

    Args:
        changes: of how it is executed, such as ``workers``.
    """
    try:
        record = read_record(storage.absolute(out))
    except (UserError, storage.StorageError) as error:
        print_error(error)
        return EXIT_REFUSED
    run = TrainRun.model_validate({**record["run"], **changes, "out": storage.absolute(out)})
    return run_and_report(run, console)


# The videos.


def prepare_data(
    training: ResolvedTraining, name: str, stage: StageConfig, cluster: Cluster, console: Console
) -> tuple[TrainingVideos, ClipSampler]:
    """Open the videos, set some aside and decode a clip of each of these, and fill the cache if there is to be one.

    A stage that has a checkpoint goes on with the videos that it began with, as its clips are numbered by them: newer
    ones play no part, and those that are gone are rejections.

    Raises:
        UnusableError: nothing usable, or too few videos for a batch.
    """
    run = training.run
    folder = storage.join(run.out, name)
    spec = stage.clip_spec(clips_per_video=run.clips_per_video)
    try:
        corpora = _videos_of(training, name, stage, cluster, console)
        items, limits = corpora.train, Limits()
        if items.num_rows < stage.clips_per_step:
            raise UnusableError(
                f"{name}: {items.num_rows} clips in an epoch of {corpora.num_videos} videos "
                f"({corpora.held_out.num_rows} held out), fewer than a batch of {stage.clips_per_step}: give more "
                "videos, raise --clips-per-video, or lower --clips-per-step"
            )
        if run.cache is not None:
            cache = storage.join(run.cache, f"{spec.num_frames}x{spec.bucket}-{spec.digest()}")
            with PhaseProgress(console, "caching clips", items.num_rows) as display:
                items, broken = fill_cache(
                    cache,
                    items,
                    spec,
                    limits,
                    stage.seed,
                    lambda n: display.update(n, f"{n} of {items.num_rows} clips"),
                )
            corpora.rejections.extend(broken)
        shown = corpora.held_out.slice(0, run.eval_clips)
        middle = stage.clip_spec(clips_per_video=1, placement="even")
        held_out, broken = decode_held_out(shown, middle, limits)
        corpora.rejections.extend(broken)
    except _FAILED_TO_DECODE as error:
        raise UnusableError(f"{name}: {cause_of(error)}") from error
    weights = [weight for _, weight in run.corpora]
    given = [weight for weight in weights if weight is not None]
    draws = ClipSampler(items=items, weights=tuple(given) if given else None, seed=stage.seed)
    console.print(
        f"{corpora.num_videos} videos: {draws.epoch_length} clips an epoch of {spec.num_frames}x{spec.bucket} at "
        f"{spec.fps} per second, {held_out.num_rows} held-out clips, {len(corpora.rejections)} rejections",
        highlight=False,
    )
    if corpora.held_out.num_rows and not held_out.num_rows:
        warn(console, f"{name}: no held-out video can be decoded, so nothing will be measured; see {REJECTS}")
    corpora.write(storage.join(folder, VIDEOS))
    buffer = pa.BufferOutputStream()
    pq.write_table(held_out, buffer, compression="lz4", row_group_size=8)
    storage.write_atomic(storage.join(folder, HELD_OUT), buffer.getvalue().to_pybytes())
    return corpora, draws


def _videos_of(
    training: ResolvedTraining, name: str, stage: StageConfig, cluster: Cluster, console: Console
) -> TrainingVideos:
    run = training.run
    folder = storage.join(run.out, name)
    kept = storage.join(folder, VIDEOS)
    if Checkpoints(folder, training.run_id).latest() is not None and storage.exists(kept):
        console.print(f"{name}: goes on with the videos that it began with", highlight=False)
        return read_training_videos(kept)
    previous, _ = _start_of(training, name)["previous"] or (None, None)
    before = storage.join(previous, VIDEOS) if previous else None
    with PhaseProgress(console, f"{name}: opening videos", 1000) as display:
        return open_training_videos(
            [path for path, _ in run.corpora],
            spec=stage.clip_spec(clips_per_video=run.clips_per_video),
            validation_share=run.held_out,
            num_tasks=4 * cluster.num_cpus,
            before=read_training_videos(before) if before and storage.exists(before) else None,
            on_video=lambda done, total: display.update(1000 * done / total, f"{done} of {total}"),
        )


def _write_rejects(job: StageJob, rejections: list[Rejection]) -> None:
    """What was rejected when opened, and what broke when it was to be trained on."""
    path = storage.join(job.run.out, REJECTS)
    entries = {}
    if storage.exists(path):
        try:
            entries = {(entry["uri"], entry["reason"]): entry for entry in json.loads(storage.read_bytes(path))}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{storage.public_uri(path)} is damaged ({error!r}): take it away, and it is written anew with what is "
                "rejected from now on"
            ) from error
    for r in rejections:
        entry = {"uri": storage.public_uri(r.uri), "video_id": r.video_id, "reason": str(r.reason), "detail": r.detail}
        entries.setdefault((entry["uri"] or "", entry["reason"] or ""), entry)
    for seen in job.board.read()["rejected"]:
        entries.setdefault((seen["uri"], seen["reason"]), seen)
    storage.write_atomic(path, json.dumps(list(entries.values()), indent=1).encode())


# The training.


def _start_of(training: ResolvedTraining, name: str) -> dict[str, Any]:
    """What a stage starts with: the one before it, or what the run was given."""
    names = list(training.run.stages)
    at = names.index(name)
    if at == 0:
        return {"previous": training.previous, "weights": training.weights}
    return {"previous": (storage.join(training.run.out, names[at - 1]), training.run_id), "weights": None}


def _finished(training: ResolvedTraining, name: str) -> StageResult | None:
    """The result of a stage that is done: it has its tokenizer, and a checkpoint of its last step.

    Raises:
        UserError: its result is damaged, and no checkpoint tells how far it is.
    """
    folder = storage.join(training.run.out, name)
    if not storage.exists(storage.join(folder, EXPORT)):
        return None
    path = storage.join(folder, STAGE_RESULT)
    mark = Checkpoints(folder, training.run_id).latest()
    if storage.exists(path):
        try:
            known = TypeAdapter(StageResult).validate_json(storage.read_bytes(path))
        except ValidationError as error:
            if mark is None:
                raise UserError(
                    f"{storage.public_uri(path)} is damaged, and there is no checkpoint that tells whether {name} is "
                    f"finished. To train it anew, take {storage.public_uri(folder)} away"
                ) from error
        else:
            if known.is_finished:
                return known  # even if its checkpoints were deleted, which are large
    if mark is None or mark.step < training.run.stages[name].steps:
        return None
    return StageResult(name=name, steps=mark.step, measured=mark.metrics, is_finished=True)


def train_stage(
    job: StageJob,
    draws: ClipSampler,
    workers: int,
    cluster: Cluster,
    lease: Lease,
    result: Result,
    console: Console,
) -> StageResult:
    """Have the workers train a stage, and show how far they are."""
    trainer = trainer_of(job, draws, workers, cluster)
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001  looked at where the thread is waited for
            failure.append(error)

    mark = job.checkpoints.latest()
    start = mark.step if mark else 0
    outcome = StageResult(name=job.name, steps=start)
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    began = time.monotonic()
    with Interrupts() as interrupts, PhaseProgress(console, job.name, job.stage.steps - start) as display:
        thread.start()
        asked = False
        while thread.is_alive():
            thread.join(0.5)
            note = job.board.read()
            if note["latest"]:
                display.update(note["latest"]["step"] - start, _figures(note, job.stage))
            if note["held_out"].get("step") == 0:
                outcome.before = note["held_out"]
            if interrupts.first is not None and not asked:
                job.board.stop()
                asked = True
                console.print("interrupted: keeping a checkpoint; once more to end at once", highlight=False)
            try:
                lease.check(now=False)
            except LeaseLostError as error:
                job.board.stop()
                result.problem = str(error)
        result.interruption = interrupts.first
    note = job.board.read()
    ended = note["outcome"]
    outcome.seconds = time.monotonic() - began
    outcome.restarts = max(0, note["starts"] - 1)
    outcome.is_finished = bool(ended.get("finished"))
    outcome.steps = ended.get("step", note["latest"].get("step", start))
    outcome.measured = ended.get("measured") or note["held_out"]
    outcome.metrics = ended.get("metrics") or note["latest"]
    outcome.digests = ended.get("digests", {})
    if not outcome.before:
        outcome.before = _measured_at_first(job)
    if "failed" in ended:
        result.problem = f"{job.name} stopped: {ended['failed']}"
    elif failure and result.interruption is None:
        result.problem = f"{job.name} stopped after {outcome.restarts} restarts: {cause_of(failure[0])}"
    return outcome


def _measured_at_first(job: StageJob) -> dict[str, float]:
    """What was measured before the first step, by a run before this one."""
    lines = read_metrics(job.folder)
    first = next((line for line in lines if line["group"] == "held_out" and line["step"] == 0), {})
    return {name: value for name, value in first.items() if name != "group"}


def trainer_of(job: StageJob, draws: ClipSampler, workers: int, cluster: Cluster) -> Any:
    """Ray Train's trainer: where workers run, what they are fed, and what happens when one dies."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")  # is asked for when it is imported
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")  # a minute is short where many import torch
    if cluster.is_own:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody preempts it: a process less
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    stage, on_gpu = job.stage, cluster.num_gpus > 0
    reader = ClipReader(spec=stage.clip_spec(clips_per_video=job.run.clips_per_video), limits=Limits())
    known = ray.put(draws)
    block = rows_per_block(stage.clips_per_step // workers, reader.spec)
    checkpoints, total = job.checkpoints, stage.steps * stage.clips_per_step

    def clips() -> Dataset:
        """Called whenever workers start: what comes after the checkpoint that they will go on from."""
        mark = checkpoints.latest()
        start = mark.step * stage.clips_per_step if mark else 0
        return training_clips(known, reader, min(start, total - 1), total, rows_per_block=block)

    resources = {"CPU": 1.0, "GPU": 1.0} if on_gpu else {"CPU": cpus_per_worker(job.threads, workers, cluster)}
    folder = storage.join(job.folder, "ray")
    where: dict[str, Any] = {"storage_path": folder}
    if not storage.is_local(folder):
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        fs, inner = storage.filesystem(folder)
        where = {"storage_path": inner, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=f"start-{uuid.uuid4().hex[:8]}",
            failure_config=FailureConfig(max_failures=job.run.max_failures),
            worker_runtime_env={"env_vars": {} if on_gpu else ENCODER_ENVIRONMENT},
            **where,
        ),
        datasets={"train": clips},
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True), enable_shard_locality=False),
    )


def cpus_per_worker(threads: int, workers: int, cluster: Cluster) -> float:
    """CPUs kept from decoding for each worker; one is left however many workers there are."""
    cpus = min(max(1, threads - 1), (cluster.num_cpus - 1) / workers)
    return cpus if cpus < 1 else float(int(cpus))


def _figures(note: dict[str, Any], stage: StageConfig) -> str:
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
