"""Small training runs, and videos to train on."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from rich.console import Console

from vidshard.jobs.runtime.errors import print_error
from vidshard.jobs.training import job
from vidshard.jobs.training.settings import training_run
from vidshard.jobs.training.summary import Result
from vidshard.schemas.errors import VidshardError
from vidshard.schemas.training import TrainRun

SMALL = {
    "size": "32",
    "learning_rate": 3e-3,
    "ema_decay": 0.9,
    "warmup_steps": 3,
    "discriminator_width": 4,
    "log_steps": 1,
    "threads": 1,
    "eval_clips": 8,
    "pictures": 2,
    "validation_share": 0.2,
}

FIRST_STAGE: dict[str, Any] = {
    "workers": 2,
    "steps": 40,
    "gan_start": 30,
    "checkpoint_steps": 10,
    "evaluate_steps": 20,
    "keep_last": 2,
    "flip_share": 0.5,
}
"""A first stage by two workers."""


def write_motion(path: Path, seed: int) -> Path:
    """Four seconds at night: a dark gradient that drifts, and a disc on its orbit."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :64] / 48
    waves = random.uniform(0.1, 0.5, (3, 4))
    disc = random.uniform(0.2, 0.5, 3)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=6)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "18"}
        for number in range(24):
            t = number / 6
            colors = [0.15 + 0.1 * np.sin(2 * np.pi * (a * x + b * y + c) + d * t) for a, b, c, d in waves]
            picture = np.stack(colors, axis=-1)
            picture[(x - 0.7 - 0.3 * np.cos(t + seed)) ** 2 + (y - 0.5 - 0.3 * np.sin(t)) ** 2 < 0.03] = disc
            frame = av.VideoFrame.from_ndarray((picture * 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def run_of(
    videos: Path | str,
    out: Path | str,
    stages: tuple[str, ...] = ("stage1",),
    *,
    preset: str = "tiny",
    **changes: Any,
) -> TrainRun:
    return training_run(preset, stages, {"videos": [str(videos)], "out": str(out), **SMALL, **changes})


def exit_code_of(result: Callable[[], Result]) -> int:
    """The exit code of a job, as the command ends with it."""
    try:
        return result().exit_code
    except VidshardError as error:
        print_error(error)
        return error.exit_code


def resume(out: str, changes: dict[str, Any], console: Console) -> int:
    """The exit code."""
    return exit_code_of(lambda: job.resume(out, changes, console))


def train(run: TrainRun) -> tuple[int, str]:
    """The exit code and what was printed."""
    text = io.StringIO()
    code = exit_code_of(lambda: job.train(run, Console(file=text, width=200)))
    return code, text.getvalue()


def lines_of(out: Path, stage: str = "stage1", group: str = "train") -> list[dict[str, float]]:
    """Figures of a training, without those that depend on the clock."""
    clock = ("clips_per_second", "steps_per_second", "waiting", "mfu")
    lines = [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clock} for line in lines if line["group"] == group]
