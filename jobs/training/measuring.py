"""Measuring a running stage on its held-out clips: figures, and pictures of the reconstructions."""

from __future__ import annotations

import operator
from functools import reduce

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from vidshard.jobs.training.recorder import Recorder
from vidshard.jobs.training.stage_job import HELD_OUT, StageJob, Worker
from vidshard.models.tokenizer import output_to_frames
from vidshard.models.training.evaluation import Evaluation, evaluate_batch, reconstruct
from vidshard.models.training.state import TrainState
from vidshard.pipeline import storage


def evaluate(
    job: StageJob, worker: Worker, state: TrainState, held_out: npt.NDArray[np.uint8], recorder: Recorder | None
) -> dict[str, float]:
    """Measure the averaged weights on held-out clips, shared among the workers, and record metrics and pictures.

    Args:
        held_out: clips, uint8 (N, T, H, W, 3); the same on all workers.
        recorder: None on workers that record nothing.

    Returns:
        Metrics by name, the same on all workers; empty without held-out clips. Where averages are kept, those of the
        last step's weights are ``raw_psnr``, ``raw_ssim`` and ``raw_lpips``.
    """
    if not len(held_out):
        return {}
    raw: dict[str, float] = {}
    if state.averages:
        of_last_step = _over_workers(worker, _evaluate_share(job, worker, state, held_out)).metrics()
        raw = {f"raw_{name}": of_last_step[name] for name in ("psnr", "ssim", "lpips") if name in of_last_step}
    with state.averaged():
        own = _evaluate_share(job, worker, state, held_out)
        pictures = _pictures(state, held_out[: job.run.pictures])
    figures = _over_workers(worker, own).metrics() | raw
    if recorder is not None:
        recorder.write(state.step, figures, group="held_out")
        recorder.picture(state.step, pictures)
        job.status.measured({"step": state.step, **figures})
    return figures


def _over_workers(worker: Worker, own: Evaluation | None) -> Evaluation:
    """Sum of the evaluations of all workers' shares."""
    all_shares: list[Evaluation | None] = [own]
    if worker.count > 1:
        all_shares = [None] * worker.count
        dist.all_gather_object(all_shares, own)
    return reduce(operator.add, (share for share in all_shares if share is not None))


def _pictures(state: TrainState, clips: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.uint8]]:
    """Clips, their reconstructions, and those from each part of the latents alone: uint8 (N, T, H, W, 3) by name."""
    rows: dict[str, list[npt.NDArray[np.uint8]]] = {"clip": list(clips)}
    for clip in clips:  # one by one, as every worker holds them all
        made = reconstruct(state, torch.from_numpy(clip[None]))
        named = {"reconstruction": made.video} | {f"{name} only": video for name, video in made.parts.items()}
        for name, video_BCTHW in named.items():
            rows.setdefault(name, []).append(output_to_frames(video_BCTHW).cpu().numpy()[0])
    return {name: np.stack(videos) for name, videos in rows.items() if videos}


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


def read_held_out(job: StageJob) -> npt.NDArray[np.uint8]:
    """Read the stage's held-out clips: uint8 (N, T, H, W, 3)."""
    stage = job.stage
    with storage.open_binary(storage.join(job.folder, HELD_OUT)) as file:
        frames = storage.ParquetFile(file).read(["frames"])["frames"].to_pylist()
    shape = (len(frames), stage.frames, *stage.size, 3)
    return np.frombuffer(bytearray().join(frames), np.uint8).reshape(shape) if frames else np.empty(shape, np.uint8)
