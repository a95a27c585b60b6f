"""Training worker: the loop that every worker of a stage runs; :func:`train_worker` is its entry point.

Ray Train starts it on every worker, and restarts all of them when one dies. They then resume from the last checkpoint,
with the clip that comes after it. Checkpoints are our own (``pipeline.training_data.checkpoints``) rather than Ray's:
they keep the last few and the best, lie on any storage that fsspec supports, and outlive the Ray cluster.
"""

from __future__ import annotations

import math
import operator
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.exceptions import RayTaskError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from vidshard.jobs.runtime.errors import cause_of
from vidshard.jobs.training.recorder import Recorder, Speed
from vidshard.jobs.training.status import RunStatus
from vidshard.models.tokenizer import output_to_frames
from vidshard.models.training.evaluation import Evaluation, evaluate_batch, reconstruct
from vidshard.models.training.perceptual import load_perceptual
from vidshard.models.training.state import Generator, TrainState, begin_stage, shard_generator, start_tokenizer
from vidshard.models.training.step import DivergedError, NonFiniteError, train_step
from vidshard.models.vidtok.config import PRESETS, VidTokConfig
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import load_weights, network_differences, preset_in_name, save_tokenizer, weights_digest
from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import RUN
from vidshard.pipeline.training_data.checkpoints import CheckpointError, Checkpoints, CheckpointWriter
from vidshard.pipeline.training_data.loader import Batch, batches
from vidshard.pipeline.training_data.videos import UnusableError
from vidshard.schemas.training import StageConfig, TrainRun

EXPORT = "tokenizer.safetensors"
HELD_OUT = "held_out.parquet"


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """One stage of a run, as the driver sends it to the workers."""

    run: TrainRun
    name: str
    run_id: str
    tokenizer: VidTokConfig
    previous: tuple[str, str] | None
    """Folder and run id of the stage whose last checkpoint this one starts from; None without one."""
    weights: str | None
    """Weights file that the stage starts from; None without one."""
    epoch_length: int
    """Number of clips in an epoch."""
    threads: int
    """Number of threads of a worker on CPUs."""
    status: RunStatus

    @property
    def stage(self) -> StageConfig:
        """Settings of the stage."""
        return self.run.stages[self.name]

    @property
    def folder(self) -> str:
        """Folder that the stage writes to."""
        return storage.join(self.run.out, self.name)

    @property
    def checkpoints(self) -> Checkpoints:
        """Checkpoints of the stage."""
        return Checkpoints(self.folder, self.run_id, keep_last=self.run.keep_last, best_by=self.run.best_by)


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Rank and device of this worker."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this worker writes checkpoints, metrics and the result."""
        return self.rank == 0


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
    held_out = _read_held_out(job)
    state, digests = begin(job, worker)
    flops = 0.0 if state.device.type == "cpu" and run.compile else flops_per_clip(state, stage)
    speed = Speed(flops, peak_flops(worker.device, stage.precision), worker.count)
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
            metrics = train_step(state, torch.from_numpy(batch.frames))
            speed.step(stage.batch_size, batch.wait_seconds)
            if batch.rejected:
                job.status.reject(batch.rejected)
            is_last = state.step >= stage.steps
            if is_last or state.step % run.log_steps == 0:
                metrics |= speed.recent()
                metrics["epoch"] = batch.samples[-1] / job.epoch_length
                stopping = _report(job, worker, state, metrics, recorder)
            if is_last or state.step % run.evaluate_steps == 0:
                measured = evaluate(job, worker, state, held_out, recorder)
            if is_last or stopping or state.step % run.checkpoint_steps == 0:
                was_measured = is_last or state.step % run.evaluate_steps == 0
                save(job, worker, state, writer, digests, measured if was_measured else {})
                if recorder is not None:
                    recorder.flush()
        writer.wait()
        figures = export(job, worker, state, digests) if is_last else {}
    if worker.is_first:
        job.status.end(
            finished=is_last, step=state.step, metrics=metrics | speed.overall(), measured=measured, **figures
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


def begin(job: StageJob, worker: Worker) -> tuple[TrainState, dict[str, str]]:
    """Restore the stage's last checkpoint, or make its first state.

    Returns:
        The state, and digests of the weights that the stage began with and of those that it must not change.

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
    previous = None
    if checkpoint is None and job.previous is not None:
        previous = last_state(*job.previous)["state"]
    elif checkpoint is None and job.weights is not None:
        tokenizer.load_state_dict(start_weights(job.weights, job.tokenizer))

    def wrap(network: nn.Module) -> nn.Module:
        if job.run.compile and isinstance(network, Generator):
            network.compile()
        if job.run.parallel == "fsdp":
            return shard_generator(network)
        if worker.count == 1:
            return network
        return DistributedDataParallel(network, device_ids=[worker.device] if worker.device.type == "cuda" else None)

    state = begin_stage(stage, tokenizer, perceptual=perceptual, device=worker.device, wrap=wrap, previous=previous)
    if checkpoint is None:
        started = weights_digest(state.weights(averaged=False))
        return state, {"start_sha256": started, "frozen_sha256": state.frozen_digest()}
    saved = job.checkpoints.load(checkpoint)
    try:
        state.load_state_dict(saved["state"])
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return state, saved["digests"]


def last_state(folder: str, run_id: str) -> dict[str, Any]:
    """Load the last checkpoint of a stage.

    Raises:
        CheckpointError: the stage has none, or it is damaged.
    """
    checkpoints = Checkpoints(folder, run_id)
    checkpoint = checkpoints.latest()
    if checkpoint is None:
        raise CheckpointError(f"{storage.public_uri(folder)} has no checkpoint: train that stage first")
    return checkpoints.load(checkpoint)


def start_weights(path: str, config: VidTokConfig) -> dict[str, Tensor]:
    """Load weights from a file to start training from, named as in the model's state dict.

    They may belong to another version (v1.0, v1.1) of the same network, since v1.1 was fine-tuned from v1.0.

    Raises:
        ValueError: the weights belong to another architecture.
        StorageError, FileNotFoundError: there is no such file.
    """
    with storage.local_copy(path) as local:
        assert local is not None
        try:
            stated, weights = load_weights(local)
        except ValueError as error:
            if "does not say which model" not in str(error):
                raise
            stated, weights = load_weights(local, PRESETS.get(preset_in_name(path) or "", config))
    variant = getattr(stated, "variant", config.variant)
    differing = network_differences(stated, config.model_copy(update={"variant": variant}))
    if differing:
        raise ValueError(
            f"{storage.public_uri(path)} is of {stated.name}, not {config.name} ({differing}): --tokenizer says which "
            "model is meant"
        )
    return weights


def flops_per_clip(state: TrainState, stage: StageConfig) -> float:
    """Floating-point operations of the tokenizer per clip of a step: one forward pass, and two for the backward pass.

    The usual count for MFU leaves out the networks of the losses and what activation checkpointing computes again.
    0.0 where counting would take long (a large model on a CPU).
    """
    if state.device.type == "cpu" and sum(p.numel() for p in state.tokenizer.parameters()) > 20_000_000:
        return 0.0
    x_BCTHW = torch.zeros(1, 3, stage.frames, *stage.size, device=state.device)
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        state.generator(x_BCTHW)
    by_module = whole.get_flop_counts()
    encoder = sum(sum(v.values()) for name, v in by_module.items() if name.endswith("tokenizer.encoder"))
    total = whole.get_total_flops()
    return float(3 * (total - encoder) + encoder * (3 if stage.trainable == "all" else 1))


_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12, "B200": 2250e12}
"""Peak dense bfloat16 throughput in FLOP/s, as the vendors state it (V100: float16)."""


def peak_flops(device: torch.device, precision: str) -> float:
    """Peak throughput of a device in FLOP/s, measured by matrix products on a CPU; 0.0 for an unknown GPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((peak for known, peak in _PEAKS.items() if known in name), 0.0)
        return peak if precision == "bfloat16" else peak / 2
    best = math.inf
    # some CPUs have units for bfloat16, others are slower with it; the faster type counts
    for dtype in (torch.float32, torch.bfloat16)[: 2 if precision == "bfloat16" else 1]:
        a = torch.ones(512, 512, dtype=dtype)
        for _ in range(8):
            began = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - began)
    return 2 * 512**3 / best


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


def evaluate(
    job: StageJob, worker: Worker, state: TrainState, held_out: npt.NDArray[np.uint8], recorder: Recorder | None
) -> dict[str, float]:
    """Measure the averaged weights on held-out clips, shared among the workers, and record metrics and pictures.

    Args:
        held_out: clips, uint8 (N, T, H, W, 3); the same on all workers.
        recorder: None on workers that record nothing.

    Returns:
        Metrics by name, the same on all workers; empty without held-out clips.
    """
    if not len(held_out):
        return {}
    shown = held_out[: job.run.pictures]
    with state.averaged():
        own = _evaluate_share(job, worker, state, held_out)
        fakes = []
        for clip in shown:
            _, video_BCTHW, _ = reconstruct(state, torch.from_numpy(clip[None]))
            fakes.append(output_to_frames(video_BCTHW).cpu().numpy()[0])
    all_shares = [own]
    if worker.count > 1:
        gathered: list[Evaluation | None] = [None] * worker.count
        dist.all_gather_object(gathered, own)
        all_shares = gathered
    figures = reduce(operator.add, (share for share in all_shares if share is not None)).metrics()
    if recorder is not None:
        recorder.write(state.step, figures, group="held_out")
        recorder.picture(state.step, shown, np.stack(fakes) if fakes else shown)
        job.status.measured({"step": state.step, **figures})
    return figures


def _evaluate_share(
    job: StageJob, worker: Worker, state: TrainState, held_out: npt.NDArray[np.uint8]
) -> Evaluation | None:
    """Evaluate this worker's share of the held-out clips; None if it has none.

    Every worker takes part in every round, as sharded weights need all of them; one without a clip takes the first.
    """
    size = max(1, job.stage.batch_size // worker.count // job.stage.gradient_accumulation)
    total: Evaluation | None = None
    for at in range(worker.rank * size, _rounded_up(len(held_out), size * worker.count), size * worker.count):
        part = held_out[at : at + size]
        evaluation = evaluate_batch(state, torch.from_numpy(part if len(part) else held_out[:1]))
        if len(part):
            total = evaluation if total is None else total + evaluation
    return total


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _read_held_out(job: StageJob) -> npt.NDArray[np.uint8]:
    """Read the stage's held-out clips: uint8 (N, T, H, W, 3)."""
    stage = job.stage
    with storage.open_binary(storage.join(job.folder, HELD_OUT)) as file:
        frames = pq.ParquetFile(file).read(columns=["frames"])["frames"].to_pylist()
    shape = (len(frames), stage.frames, *stage.size, 3)
    return np.frombuffer(bytearray().join(frames), np.uint8).reshape(shape) if frames else np.empty(shape, np.uint8)


# Checkpoints and the result


def save(
    job: StageJob,
    worker: Worker,
    state: TrainState,
    writer: CheckpointWriter,
    digests: Mapping[str, str],
    measured: Mapping[str, float],
) -> None:
    """Start writing a checkpoint on the first worker; sharded weights need every worker to take part.

    Args:
        measured: metrics of held-out clips at this step; empty where none were taken.
    """
    if not worker.is_first and job.run.parallel != "fsdp":
        return
    kept = state.state_dict()
    if worker.is_first:
        sample = state.step * job.stage.batch_size
        epoch, count = divmod(sample, job.epoch_length)
        data = {"sample": sample, "epoch": epoch, "count": count}
        writer.save({"state": kept, "stage": job.name, "data": data, "digests": dict(digests)}, state.step, measured)


def export(job: StageJob, worker: Worker, state: TrainState, digests: Mapping[str, str]) -> dict[str, Any]:
    """Write the averaged weights as a tokenizer for ``vidshard tokenize --weights``.

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
    tokenizer = VidTok(job.tokenizer)
    tokenizer.load_state_dict(weights)
    with tempfile.TemporaryDirectory(prefix="vidshard-") as folder:
        path = Path(folder) / EXPORT
        save_tokenizer(path, tokenizer)
        storage.write_atomic(storage.join(job.folder, EXPORT), path.read_bytes())
    return {"digests": {**digests, "weights_sha256": weights_digest(weights)}}
