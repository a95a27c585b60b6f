"""Recorder of a running stage: metrics, pictures and speed. Nothing here influences the training."""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.tensorboard import SummaryWriter

from vidshard.pipeline import storage

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
PICTURES = "pictures"

_GROUPS = {
    "speed": ("clips_per_second", "steps_per_second", "waiting", "mfu", "epoch"),
    "rates": ("learning_rate", "learning_rate_discriminator"),
    "gradients": ("grad_norm_generator", "grad_norm_discriminator"),
}


class Recorder:
    """Writes metrics to ``metrics.jsonl``, TensorBoard and optionally Weights & Biases, and pictures as PNG.

    A local folder is written continuously. Object stores cannot append, so :meth:`flush` uploads all files whole.
    """

    def __init__(self, folder: str, *, from_step: int, run: Mapping[str, Any], name: str, wandb: str | None) -> None:
        """Open the records of a stage.

        Args:
            folder: folder of the stage.
            from_step: step to continue from; records of later steps, from before a restart, are removed.
            run: settings of the run, for Weights & Biases.
            name: name and id of the run at Weights & Biases.
            wandb: Weights & Biases project; None logs nothing there.
        """
        self._folder = folder
        self._local: tempfile.TemporaryDirectory[str] | None = None
        if storage.is_local(folder):
            root = Path(storage.absolute(folder))
        else:
            self._local = tempfile.TemporaryDirectory(prefix="vidshard-")
            root = Path(self._local.name)
        root.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(folder) if line["step"] <= from_step] if from_step else []
        self._lines = root / METRICS
        self._lines.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
        self._root = root
        self._events = SummaryWriter(str(root / EVENTS), purge_step=from_step + 1 if from_step else 0)
        self._wandb: Any = None
        if wandb is not None:
            import wandb as package

            self._wandb = package.init(project=wandb, name=name, config=dict(run), resume="allow", id=name)

    def write(self, step: int, figures: Mapping[str, float], *, group: str = "train") -> None:
        """Write figures of a step; ``group`` is "train" or "held_out"."""
        named = {f"{_group_of(name, group)}/{name}": value for name, value in figures.items()}
        for name, value in named.items():
            self._events.add_scalar(name, value, step)
        with self._lines.open("a") as file:
            file.write(json.dumps({"step": step, "group": group, **figures}) + "\n")
        if self._wandb is not None:
            self._wandb.log(named, step=step)

    def picture(self, step: int, real_BTHWC: npt.NDArray[np.uint8], fake_BTHWC: npt.NDArray[np.uint8]) -> None:
        """Draw clips above their reconstructions, frames from left to right; both uint8 (B, T, H, W, 3)."""
        if not len(real_BTHWC):
            return
        strip = picture_strip(real_BTHWC, fake_BTHWC)
        folder = self._root / PICTURES
        folder.mkdir(exist_ok=True)
        (folder / f"step-{step:08d}.png").write_bytes(png(strip))
        self._events.add_image("held out: clip above, reconstruction below", strip, step, dataformats="HWC")

    def flush(self) -> None:
        """Make everything written so far readable in the folder."""
        self._events.flush()
        if self._local is not None:
            for path in self._root.rglob("*"):
                if path.is_file():
                    name = storage.join(self._folder, *path.relative_to(self._root).parts)
                    storage.write_atomic(name, path.read_bytes())

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.flush()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._local is not None:
            self._local.cleanup()


def read_metrics(folder: str) -> list[dict[str, Any]]:
    """Read a stage's ``metrics.jsonl``: step, group and figures of each line; a line that a kill cut off is skipped."""
    path = storage.join(folder, METRICS)
    known = []
    for line in storage.read_bytes(path).decode(errors="replace").splitlines() if storage.exists(path) else ():
        with suppress(ValueError):
            known.append(json.loads(line))
    return [line for line in known if isinstance(line, dict) and "step" in line and "group" in line]


def _group_of(name: str, group: str) -> str:
    return next((known for known, names in _GROUPS.items() if name in names), group)


MAX_STRIP_FRAMES = 9
"""Most frames of a clip in a picture."""


def picture_strip(real_BTHWC: npt.NDArray[np.uint8], fake_BTHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Picture of each clip, at most nine frames evenly apart, above its reconstruction: uint8 (H', W', 3)."""
    num_frames = real_BTHWC.shape[1]
    shown = np.unique(np.linspace(0, num_frames - 1, min(num_frames, MAX_STRIP_FRAMES)).round().astype(int))
    rows = [
        np.concatenate(list(video[shown]), axis=1)
        for pair in zip(real_BTHWC, fake_BTHWC, strict=True)
        for video in pair
    ]
    return np.concatenate(rows)


def png(picture: npt.NDArray[np.uint8]) -> bytes:
    """Encode a picture, uint8 (H, W, 3), as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return buffer.getvalue()


class Speed:
    """Throughput of a stage: clips and steps per second, share of time spent waiting for data, and MFU."""

    def __init__(self, flops_per_clip: float, peak_flops: float, workers: int) -> None:
        """Start counting.

        Args:
            flops_per_clip: floating-point operations of a step per clip; 0.0 if unknown.
            peak_flops: peak FLOP/s of one worker; 0.0 if unknown.
            workers: number of workers.
        """
        self._flops, self._peak = flops_per_clip, peak_flops * workers
        self._now = _Count(began=time.perf_counter())
        self._whole: _Count | None = None

    def step(self, clips: int, wait_seconds: float) -> None:
        """Count a step: clips of the batch over all workers, and seconds that this worker waited for its part."""
        for count in (self._now, self._whole):
            if count is not None:
                count.steps += 1
                count.clips += clips
                count.waited += wait_seconds

    def recent(self) -> dict[str, float]:
        """Throughput since the last call; ``mfu``, the share of the devices' peak, only where it is known."""
        figures = self._figures(self._now)
        self._now = _Count(began=time.perf_counter())
        if self._whole is None:
            self._whole = _Count(began=time.perf_counter())
        return figures

    def overall(self) -> dict[str, float]:
        """Throughput since the first call of `recent`; empty before.

        Until then pipelines fill and kernels are chosen.
        """
        return self._figures(self._whole) if self._whole is not None and self._whole.steps else {}

    def _figures(self, count: _Count) -> dict[str, float]:
        seconds = max(time.perf_counter() - count.began, 1e-9)
        figures = {
            "clips_per_second": count.clips / seconds,
            "steps_per_second": count.steps / seconds,
            "waiting": count.waited / seconds,
        }
        if self._flops and self._peak:
            figures["mfu"] = figures["clips_per_second"] * self._flops / self._peak
        return figures


@dataclass(kw_only=True)
class _Count:
    began: float
    steps: int = 0
    clips: int = 0
    waited: float = 0.0
