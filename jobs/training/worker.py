"""Training worker: the loop that every worker of a stage runs; :func:`train_worker` is its entry point.

Ray Train starts it on every worker, and restarts all of them when one dies. They then resume from the last checkpoint,
with the clip that comes after it. Checkpoints are our own (``pipeline.training_data.checkpoints``) rather than Ray's:
they keep the last few and the best, lie on any storage that fsspec supports, and outlive the Ray cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.exceptions import RayTaskError
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vidshard.jobs.runtime.errors import cause_of
from vidshard.jobs.training.measuring import evaluate, read_held_out
from vidshard.jobs.training.recorder import IntervalMeans, Recorder
from vidshard.jobs.training.speed import Speed, flops_per_clip, peak_flops
from vidshard.jobs.training.stage_job import EXPORT, StageJob, Worker
from vidshard.jobs.training.start import Start, last_state, read_start, write_tokenizer
from vidshard.models.training.generator import Generator, shard_generator, start_tokenizer
from vidshard.models.training.perceptual import load_perceptual
from vidshard.models.training.state import TrainState, begin_stage
from vidshard.models.training.step import DivergedError, NonFiniteError, train_step
from vidshard.models.weights import weights_digest
from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import RUN
from vidshard.pipeline.training_data.checkpoints import CheckpointError, CheckpointWriter
from vidshard.pipeline.training_data.loader import Batch, batches
from vidshard.pipeline.training_data.variation import Variation
from vidshard.pipeline.training_data.videos import UnusableError
from vidshard.schemas.errors import one_line
from vidshard.schemas.training import StageConfig


def train_worker(config: Mapping[str, Any]) -> None:
    """Train a stage to its end, from its last checkpoint if there is one.

    The stage's status says how it ended: finished, stopped on request, or failed in a way that a restart would repeat.
    Any other exception makes Ray Train restart the workers.
    """
    job: StageJob = config["job"]
    worker = _this_worker(job)
    if job.status.begin(worker.is_first):
        return  # it failed before, and would fail again
    try:
        _train(job, worker)
    except (NonFiniteError, DivergedError) as error:  # on all workers at once
        job.status.end(failed=str(error))
    except torch.OutOfMemoryError as error:
        job.status.end(failed=_out_of_memory_text(job, error))
        raise
    except CheckpointError as error:
        job.status.end(failed=str(error))
        raise
    except RayTaskError as error:
        cause = cause_of(error)
        if cause.startswith(UnusableError.__name__):  # the same clip would not be there after a restart either
            job.status.end(failed=cause.partition(": ")[2])
        raise


def _train(job: StageJob, worker: Worker) -> None:
    run, stage = job.run, job.stage
    held_out = read_held_out(job)
    state, digests, interval, before = begin(job, worker)
    flops = 0.0 if state.device.type == "cpu" and run.compile else flops_per_clip(state, stage)
    speed = Speed(flops, peak_flops(worker.device, stage.precision), worker.count, before=before)
    ways = Variation.of(stage).ways
    tables = ray.train.get_dataset_shard("train").iter_batches(
        batch_size=stage.batch_size // worker.count, batch_format="pyarrow", prefetch_batches=2
    )
    feed = batches(iter(tables), stage.clip_spec(clips_per_video=1), first=state.step * stage.batch_size)
    with ExitStack() as at_end:
        recorder = at_end.enter_context(_recorder(job, state.step)) if worker.is_first else None
        writer = at_end.enter_context(CheckpointWriter(job.checkpoints))
        measured = evaluate(job, worker, state, held_out, recorder) if state.step == 0 else {}
        metrics: dict[str, float] = {}
        is_last, stopping = state.step >= stage.steps, False
        if is_last:  # an earlier start ended between the last checkpoint and the export
            measured = evaluate(job, worker, state, held_out, None)
        while not is_last and not stopping:
            batch = next(feed, None)
            if batch is None:
                raise RuntimeError(f"the clips ended at step {state.step} of {stage.steps}")
            _check_position(batch, state, stage)
            interval.add(train_step(state, torch.from_numpy(batch.frames)) | _ways_made(batch, ways, worker))
            speed.step(stage.batch_size, batch.wait_seconds)
            if batch.rejected:
                job.status.reject(batch.rejected)
            is_last = state.step >= stage.steps
            if is_last or state.step % run.log_steps == 0:
                metrics = interval.take() | speed.recent() | _gpu_memory(worker)
                metrics["epoch"] = batch.samples[-1] / job.epoch_length
                stopping = _report(job, worker, state, metrics, recorder)
            if is_last or state.step % run.evaluate_steps == 0:
                measured = evaluate(job, worker, state, held_out, recorder)
            if is_last or stopping or state.step % run.checkpoint_steps == 0:
                was_measured = is_last or state.step % run.evaluate_steps == 0
                save(job, worker, state, writer, digests, measured if was_measured else {}, interval, speed)
                if recorder is not None:
                    recorder.flush()
        writer.wait()
        figures = export(job, worker, state, digests) if is_last else {}
    if worker.is_first:
        job.status.end(
            finished=is_last,
            step=state.step,
            metrics=metrics | speed.overall(),
            seconds=speed.seconds,
            measured=measured,
            **figures,
        )


def _this_worker(job: StageJob) -> Worker:
    context = ray.train.get_context()
    worker = Worker(rank=context.get_world_rank(), count=context.get_world_size(), device=ray.train.torch.get_device())
    if worker.device.type == "cpu":
        torch.set_num_threads(job.threads)
    else:
        torch.set_float32_matmul_precision("high")
    record = storage.join(job.run.out, RUN)
    if not storage.exists(record) or job.run_id.encode() not in storage.read_bytes(record):
        raise RuntimeError(
            f"a worker on node {context.get_node_rank()} does not see the run in {storage.public_uri(job.run.out)}: "
            "on several machines --out must be storage that all of them reach"
        )
    return worker


# Starting and resuming


def begin(job: StageJob, worker: Worker) -> tuple[TrainState, dict[str, str], IntervalMeans, dict[str, Any]]:
    """Restore the stage's last checkpoint, or make its first state.

    Returns:
        The state, digests of the weights that the stage began with and of those that it must not change, the figures of
        the steps since the last record, and `Speed.record` of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another run.
        ValueError: the earlier stage or the weights that this one starts from do not fit.
    """
    stage = job.stage
    perceptual = None
    if stage.perceptual_weight:
        with storage.local_copy(stage.vgg_weights) as vgg:
            perceptual = load_perceptual(vgg)
    tokenizer = start_tokenizer(job.tokenizer, stage.seed)
    checkpoint = job.checkpoints.latest()
    start = Start()
    if checkpoint is None and job.previous is not None:
        start = Start(state=last_state(*job.previous)["state"])
    elif checkpoint is None and job.weights is not None:
        start = read_start(job.weights, job.tokenizer)
    if start.weights is not None:
        tokenizer.load_state_dict(start.weights)

    def wrap(network: nn.Module) -> nn.Module:
        if job.run.compile and isinstance(network, Generator):
            network.compile()
        if job.run.parallel == "fsdp":
            return shard_generator(network)
        if worker.count == 1:
            return network
        return DistributedDataParallel(network, device_ids=[worker.device] if worker.device.type == "cuda" else None)

    state = begin_stage(
        stage,
        tokenizer,
        perceptual=perceptual,
        device=worker.device,
        wrap=wrap,
        previous=start.state,
        loss=start.loss,
    )
    if checkpoint is None:
        started = weights_digest(state.weights(averaged=False))
        return state, {"start_sha256": started, "frozen_sha256": state.frozen_digest()}, IntervalMeans(), {}
    saved = job.checkpoints.load(checkpoint)
    try:
        state.load_state_dict(saved["state"])
        if state.step != checkpoint.step:
            raise ValueError(f"a checkpoint of step {checkpoint.step} holds the state of step {state.step!r:.80}")
        data = saved["data"]  # of earlier versions without the last two
        digests, interval = dict(saved["digests"]), IntervalMeans(**data.get("interval", {}))
        return state, digests, interval, dict(data.get("speed", {}))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    except (LookupError, TypeError, AttributeError, NotImplementedError) as error:  # a restart would repeat it
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} is not what a training writes ({type(error).__name__}: "
            f"{one_line(error, 200)}): choose another --out"
        ) from error


def _out_of_memory_text(job: StageJob, error: BaseException) -> str:
    text = str(error).split(".")[0]
    stage = job.stage
    return (
        f"{job.name} does not fit the device ({text}): {stage.batch_size} clips of {stage.frames}x{stage.size[0]}x"
        f"{stage.size[1]}. Take more --workers, --gradient-accumulation, --activation-checkpointing, or smaller clips"
    )


# During training


def _check_position(batch: Batch, state: TrainState, stage: StageConfig) -> None:
    first = state.step * stage.batch_size
    if not all(first <= sample < first + stage.batch_size for sample in batch.samples):
        raise RuntimeError(f"step {state.step} takes clips from {first} on, got {batch.samples}")


def _recorder(job: StageJob, from_step: int) -> Recorder:
    record = job.run.model_dump(mode="json")
    name = f"{job.run_id}-{job.name}"
    return Recorder(job.folder, from_step=from_step, run=record, name=name, wandb=job.run.wandb)


def _report(
    job: StageJob, worker: Worker, state: TrainState, metrics: Mapping[str, float], recorder: Recorder | None
) -> bool:
    """Record metrics of a step, and ask the driver whether to stop.

    Returns:
        Whether to stop; the same on all workers.
    """
    stopping = False
    if recorder is not None:
        recorder.write(state.step, metrics)
        stopping = job.status.show({"step": state.step, **metrics})
    if worker.count > 1:
        flag = torch.tensor(float(stopping), device=worker.device)
        dist.broadcast(flag, 0)
        stopping = bool(flag)
    return stopping


def _ways_made(batch: Batch, ways: Sequence[str], worker: Worker) -> dict[str, float]:
    """Number of clips of a step, over all workers, that were made in each of the ways."""
    if not ways:
        return {}
    counts = torch.tensor([batch.made.count(way) for way in ways], dtype=torch.float64, device=worker.device)
    if worker.count > 1:
        dist.all_reduce(counts)
    return {f"clips_{way}": count for way, count in zip(ways, counts.tolist(), strict=True)}


def _gpu_memory(worker: Worker) -> dict[str, float]:
    """Largest memory of this worker's tensors on its GPU since the last call, in GiB; empty on a CPU."""
    if worker.device.type != "cuda":
        return {}
    most = torch.cuda.max_memory_allocated(worker.device)
    torch.cuda.reset_peak_memory_stats(worker.device)
    return {"gpu_memory_gib": most / 2**30}


# Checkpoints and the result


def save(
    job: StageJob,
    worker: Worker,
    state: TrainState,
    writer: CheckpointWriter,
    digests: Mapping[str, str],
    measured: Mapping[str, float],
    interval: IntervalMeans,
    speed: Speed,
) -> None:
    """Start writing a checkpoint on the first worker; sharded weights need every worker to take part.

    Args:
        measured: metrics of held-out clips at this step; empty where none were taken.
        interval: figures of the steps since the last record.
        speed: throughput so far.
    """
    if not worker.is_first and job.run.parallel != "fsdp":
        return
    kept = state.state_dict()
    if worker.is_first:
        sample = state.step * job.stage.batch_size
        epoch, count = divmod(sample, job.epoch_length)
        place = {"sample": sample, "epoch": epoch, "count": count}
        data = {**place, "interval": asdict(interval), "speed": speed.record()}
        writer.save({"state": kept, "stage": job.name, "data": data, "digests": dict(digests)}, state.step, measured)


def export(job: StageJob, worker: Worker, state: TrainState, digests: Mapping[str, str]) -> dict[str, Any]:
    """Write the weights, averaged where averages are kept, as a tokenizer for ``vidshard tokenize --weights``.

    Returns:
        Digests of the weights, on the first worker; empty on the others.

    Raises:
        RuntimeError: weights changed that the stage does not train.
    """
    if state.frozen_digest() != digests["frozen_sha256"]:
        raise RuntimeError(f"{job.name} changed weights that it must leave alone: this is a bug")
    weights = state.weights(averaged=bool(state.averages))
    if not worker.is_first:
        return {}
    write_tokenizer(storage.join(job.folder, EXPORT), job.tokenizer, weights)
    return {"digests": {**digests, "weights_sha256": weights_digest(weights)}}
