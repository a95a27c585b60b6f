"""Recorder of a running stage: metrics and pictures. Nothing here influences the training."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
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

    def picture(self, step: int, videos: Mapping[str, npt.NDArray[np.uint8]]) -> None:
        """Draw clips and what was made of them below each other, frames from left to right.

        Args:
            step: number of steps done.
            videos: clips by what they show, from top to bottom, each uint8 (B, T, H, W, 3); nothing is drawn for none.
        """
        if not videos:
            return
        strip = picture_strip(*videos.values())
        folder = self._root / PICTURES
        folder.mkdir(exist_ok=True)
        (folder / f"step-{step:08d}.png").write_bytes(png(strip))
        title = f"held out, from above: {', '.join(videos)}"
        self._events.add_image(title, strip, step, dataformats="HWC")

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


def picture_strip(*videos_BTHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Picture of each clip, at most nine frames evenly apart, above what was made of it: uint8 (H', W', 3)."""
    num_frames = videos_BTHWC[0].shape[1]
    shown = np.unique(np.linspace(0, num_frames - 1, min(num_frames, MAX_STRIP_FRAMES)).round().astype(int))
    rows = [np.concatenate(list(video[shown]), axis=1) for group in zip(*videos_BTHWC, strict=True) for video in group]
    return np.concatenate(rows)


def png(picture: npt.NDArray[np.uint8]) -> bytes:
    """Encode a picture, uint8 (H, W, 3), as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return buffer.getvalue()
