"""Measuring a running stage: averaged weights beside those of the last step, and the memory of a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from vidshard.jobs.training import worker as training_worker
from vidshard.jobs.training.measuring import evaluate
from vidshard.jobs.training.stage_job import Worker
from vidshard.models.tokenizer import PRESETS
from vidshard.models.training.evaluation import evaluate_batch
from vidshard.models.training.generator import start_tokenizer
from vidshard.models.training.state import begin_stage
from vidshard.schemas.training import StageConfig

CPU = Worker(rank=0, count=1, device=torch.device("cpu"))


@pytest.mark.parametrize("ema_decay", [0.9, 0.0])
def test_weights_of_the_last_step_are_measured_beside_averaged_ones(ema_decay: float) -> None:
    settings = {"frames": 5, "size": (32, 32), "batch_size": 2, "ema_decay": ema_decay, "precision": "float32"}
    stage = StageConfig.model_validate({**settings, "perceptual_weight": 0, "gan_weight": 0})
    state = begin_stage(stage, start_tokenizer(PRESETS["tiny"], 0))
    with torch.no_grad():
        for average in state.averages.values():
            average.mul_(0.5)
    clips = np.random.default_rng(0).integers(0, 256, (2, 5, 32, 32, 3), np.uint8)
    job = cast(Any, SimpleNamespace(stage=stage, run=SimpleNamespace(pictures=1)))
    figures = evaluate(job, CPU, state, clips, None)
    last = evaluate_batch(state, torch.from_numpy(clips)).metrics()
    with state.averaged():
        averaged = evaluate_batch(state, torch.from_numpy(clips)).metrics()
    assert {name: figures[name] for name in averaged} == averaged
    raw = {f"raw_{name}": last[name] for name in ("psnr", "ssim")}
    assert {name: value for name, value in figures.items() if name.startswith("raw_")} == (raw if ema_decay else {})
    assert (averaged["psnr"] != last["psnr"]) == bool(ema_decay)


def test_memory_is_the_peak_of_a_gpu_since_the_last_record(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [3 << 30]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: peaks[-1])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _device: peaks.append(1 << 30))
    gpu = Worker(rank=0, count=1, device=torch.device("cuda", 0))
    assert training_worker._gpu_memory(gpu) == {"gpu_memory_gib": 3.0}
    assert training_worker._gpu_memory(gpu) == {"gpu_memory_gib": 1.0}
    assert training_worker._gpu_memory(CPU) == {}
