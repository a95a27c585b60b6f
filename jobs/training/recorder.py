"""Recorder of a running stage: metrics and pictures. Nothing here influences the training."""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from vidshard.jobs.training.metrics_file import METRICS, read_metrics
from vidshard.pipeline import storage
from vidshard.schemas.training import MADE

EVENTS = "tensorboard"
PICTURES = "pictures"

_GROUPS = {
    "speed": ("clips_per_second", "steps_per_second", "waiting", "mfu", "gpu_memory_gib", "epoch"),
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
        from torch.utils.tensorboard import SummaryWriter  # here, as one worker of a run needs it

        root.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(folder) if line["step"] <= from_step] if from_step else []
        self._lines = root / METRICS
        self._lines.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
        self._root = root
        self._events = SummaryWriter(str(root / EVENTS), purge_step=from_step + 1 if from_step else 0)
        self._wandb: Any = None
        self._package: Any = None
        if wandb is not None:
            import wandb as package

            self._package = package
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
        strip = labeled_strip(videos)
        folder = self._root / PICTURES
        folder.mkdir(exist_ok=True)
        (folder / f"step-{step:08d}.png").write_bytes(png(strip))
        self._events.add_image("held_out/pictures", strip, step, dataformats="HWC")
        moving = animation(videos)
        height, width = moving.shape[1:3]
        data = gif(moving, MOVING_FPS)
        from tensorboard.compat.proto.summary_pb2 import Summary

        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        writer: Any = self._events._get_file_writer()  # type: ignore[no-untyped-call]  # add_video needs moviepy
        writer.add_summary(Summary(value=[Summary.Value(tag="held_out/video", image=image)]), step)
        if self._wandb is not None:
            shown = {
                "held_out/pictures": self._package.Image(strip),
                "held_out/video": self._package.Video(io.BytesIO(data), format="gif"),
            }
            self._wandb.log(shown, step=step)

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


TOTALS = frozenset({"skipped_batches", *(f"clips_{way}" for way in MADE)})
"""Figures of which a record holds the sum over its steps."""
LAST_VALUES = frozenset({"learning_rate", "learning_rate_discriminator"})
"""Figures of which a record holds the value of its last step; of all others but `TOTALS` it holds the mean of its
steps."""


@dataclass
class IntervalMeans:
    """Figures of the steps since the last record."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, figures: Mapping[str, float]) -> None:
        """Count the figures of a step."""
        for name, value in figures.items():
            if name in LAST_VALUES:
                self.sums[name], self.counts[name] = value, 1
            else:
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """Means over the steps since the last call, for each figure over those that had it; sums of `TOTALS`."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        means |= {name: total for name, total in self.sums.items() if name in TOTALS}
        self.sums, self.counts = {}, {}
        return means


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


_MARGIN, _LINE = 8, 14
"""Pixels beside and between labels."""
SHOWN_HEIGHT = 128
"""Height in pixels to which smaller frames are enlarged, by a whole factor."""
MOVING_FPS = 8
"""Frames per second of moving pictures."""


def _enlarged(picture: npt.NDArray[np.uint8], frame_height: int) -> npt.NDArray[np.uint8]:
    """Picture (..., H, W, 3) whose pixels are repeated until a frame is `SHOWN_HEIGHT` high."""
    factor = -(-SHOWN_HEIGHT // frame_height)
    return picture.repeat(factor, axis=-3).repeat(factor, axis=-2)


def labeled_strip(videos: Mapping[str, npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """`picture_strip` of clips by what they show, enlarged, with the names of rows at the left: uint8 (H', W', 3)."""
    from PIL import Image, ImageDraw

    some = next(iter(videos.values()))
    strip = _enlarged(picture_strip(*videos.values()), some.shape[2])
    row_height = strip.shape[0] // (len(videos) * len(some))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = 2 * _MARGIN + math.ceil(max(measure.textlength(name) for name in videos))
    canvas = Image.new("RGB", (margin + strip.shape[1], strip.shape[0]), "white")
    canvas.paste(Image.fromarray(strip), (margin, 0))
    pen = ImageDraw.Draw(canvas)
    for row, name in enumerate([*videos] * len(some)):
        pen.text((_MARGIN, row * row_height + (row_height - _LINE) // 2), name, fill="black")
    return np.asarray(canvas)


def animation(videos: Mapping[str, npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """Clips that move, in the order of `labeled_strip`: a row for each clip, a column for each name; (T, H', W', 3)."""
    rows = [np.concatenate(group, axis=2) for group in zip(*videos.values(), strict=True)]
    return _enlarged(np.concatenate(rows, axis=1), next(iter(videos.values())).shape[2])


def gif(frames_THWC: npt.NDArray[np.uint8], fps: int) -> bytes:
    """Encode frames, uint8 (T, H, W, 3), as an endless GIF."""
    from PIL import Image

    first, *others = (Image.fromarray(frame) for frame in frames_THWC)
    buffer = io.BytesIO()
    first.save(buffer, "gif", save_all=True, append_images=others, duration=1000 // fps, loop=0)
    return buffer.getvalue()


def png(picture: npt.NDArray[np.uint8]) -> bytes:
    """Encode a picture, uint8 (H, W, 3), as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return buffer.getvalue()
