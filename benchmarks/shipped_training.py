"""Training of the weights that come with the package, on two CPU cores.

It goes on from weights of the network, or begins with the inner levels of one without Haar bands (`network_from`). It
ends at a time of day, however much of the cores it gets, and goes on from its last checkpoint when it is started again.
Two fifths of the clips are natural video: random crops at their own resolution, larger or smaller, most under a moving
camera. The others are an animated film and generated motion (`benchmarks.motion_corpus`).

    python -m benchmarks.shipped_training RUN --until 20:59 --init small.safetensors \
        --videos NATURAL --films FILMS --photos PHOTOS

``RUN/averaged.safetensors`` is the result. With ``--lpips`` the decoder alone is trained, with LPIPS beside L1: tokens
stay, and pictures get sharper at the cost of PSNR. The training differs from ``vidshard train finetune`` in the
optimizer, Muon (Jordan et al., 2024), in a cosine over time instead of steps, and in the clips, which are cut from
decoded videos in memory.
"""

# T frames of a clip, H height, W width

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.random import Generator
from torch import Tensor

from benchmarks import motion_corpus
from vidshard.models.tokenizer import frames_to_input
from vidshard.models.training import step as training_step
from vidshard.models.training.perceptual import Perceptual, load_perceptual
from vidshard.models.training.state import TrainState, begin_stage
from vidshard.models.vidtok.config import PRESETS, VidTokConfig
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import DEFAULT, load_weights, save_tokenizer
from vidshard.schemas.training import StageConfig

FRAMES, SIZE = 17, 64
KEEP_EVERY = 400
"""Number of steps between two checkpoints, each with a measurement of the held-out clips."""
HELD_OUT = ("walk", "bird")
"""Videos that are measured by and never trained on."""
HELD_OUT_TAIL = 0.15
"""Share at the end of the videos in ``LONG`` that is measured by as well."""
LONG = ("bottle-detection", "car-detection", "one-by-one-person-detection")
SHARES = {"generated": 0.40, "film": 0.20, "car-detection": 0.12, "one-by-one-person-detection": 0.08}
SHARES |= {"bottle-detection": 0.04, "other": 0.16}
"""Share of the clips from each source; ``other`` are all videos without a share of their own."""
GENERATED = 1500
"""Number of generated videos: half move as at 8 frames per second, half as at 25."""
CONSTANT_SHARE, LOWEST_SHARE = 0.25, 0.01
"""Share of the time at whose end the rate begins to fall, and the share of the rate that is left at the end."""
CUTS = 0.07
"""Share of the clips that change to another one at a random frame."""
SMALLEST_MATRIX = 2000
"""Values of the smallest kernel that Muon updates."""
LPIPS_FRAMES = 16
"""Frames of a step whose LPIPS is computed."""

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """A decoded video."""

    name: str
    frames: Frames
    """uint8 (N, H, W, 3)."""
    fps: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder for checkpoints, weights and log.jsonl")
    parser.add_argument("--until", required=True, metavar="HH:MM", help="time of day at which the rate has come down")
    parser.add_argument("--tokenizer", default=DEFAULT, metavar="NAME", help="preset to train")
    parser.add_argument("--init", type=Path, required=True, help="weights of it, or those whose inner levels to take")
    parser.add_argument(
        "--lpips", type=float, default=0.0, metavar="WEIGHT", help="train the decoder alone, with LPIPS of this weight"
    )
    parser.add_argument("--vgg-weights", metavar="FILE", help="VGG16 for LPIPS; torchvision's download if not given")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--videos", type=Path, required=True, help="folder of natural videos")
    parser.add_argument("--films", type=Path, required=True, help="folder of films")
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs for generated motion")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="clips of a step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.run.mkdir(parents=True, exist_ok=True)
    videos = {path.stem: decoded(path, "") for path in sorted(arguments.videos.glob("*.m*")) if path.suffix != ".md"}
    films = [decoded(path, "film") for path in sorted(arguments.films.iterdir())]
    corpus = motion_corpus.Corpus(
        crop=SIZE, photos=tuple(sorted(map(str, arguments.photos.iterdir()))), clips=(), seed=77
    )
    with ProcessPoolExecutor(arguments.threads) as pool:
        made = list(pool.map(partial(generated, corpus), range(GENERATED), chunksize=50))
    clips = Clips(videos, films, made)
    hour, minute = map(int, arguments.until.split(":"))
    end = datetime.datetime.now().replace(hour=hour, minute=minute, second=0).timestamp()
    settings: dict[str, Any] = {"frames": FRAMES, "size": (SIZE, SIZE), "fps": Fraction(8)}
    settings |= {"batch_size": arguments.batch_size, "learning_rate": arguments.learning_rate, "schedule": "constant"}
    settings |= {"max_grad_norm": 60_000, "ema_decay": 0.999, "gan_weight": 0, "learn_logvar": False}
    settings |= {"entropy_weight": 0, "commitment_weight": 0, "steps": 1 << 20}
    settings |= {"perceptual_weight": arguments.lpips, "trainable": "decoder" if arguments.lpips else "all"}
    perceptual = SomeFrames(load_perceptual(arguments.vgg_weights)) if arguments.lpips else None
    network = network_from(PRESETS[arguments.tokenizer], arguments.init)
    state = begin_stage(StageConfig.model_validate(settings), network, perceptual=perceptual)
    train(arguments.run, state, clips, end)


# Clips


def decoded(path: Path, name: str) -> Video:
    """Decode a whole video at its own size and rate."""
    with av.open(str(path)) as container:
        made = [(float(frame.time or 0), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    seconds = made[-1][0] - made[0][0]
    frames: Frames = np.stack([frame for _, frame in made]).astype(np.uint8, copy=False)
    return Video(name=name or path.stem, frames=frames, fps=(len(made) - 1) / seconds)


def generated(corpus: motion_corpus.Corpus, number: int) -> Frames:
    """Generate the frames of a video, uint8 (41, SIZE, SIZE, 3)."""
    motion_corpus.RATE = 8 if number % 2 else 25
    return motion_corpus.make_video(corpus, number)


class Clips:
    """Training clips, each from its number alone, and held-out clips."""

    def __init__(self, videos: Mapping[str, Video], films: Sequence[Video], made: Sequence[Frames]) -> None:
        self._own = {name: [video] for name, video in videos.items() if name in SHARES}
        self._own["film"] = list(films)
        self._own["other"] = [v for n, v in videos.items() if n not in SHARES and n not in HELD_OUT]
        self._made = made
        self._videos = videos

    def batch(self, number: int, size: int) -> Tensor:
        """Clips of a step: uint8 (size, T, H, W, 3)."""
        random = np.random.default_rng((0, number))
        return torch.stack([self._clip(random) for _ in range(size)])

    def held_out(self) -> Tensor:
        """25 clips of what is not trained on, in order of their sources: uint8 (25, T, H, W, 3)."""
        random = np.random.default_rng(123)
        clips = []
        for name in (*HELD_OUT, *LONG) * 5:
            video = self._videos[name]
            begin = int(len(video.frames) * (1 - HELD_OUT_TAIL)) if name in LONG else 0
            clips.append(cut(random, video, begin, len(video.frames), plain=True))
        return torch.stack(clips)

    def _clip(self, random: Generator) -> Tensor:
        clip = self._shot(random)
        if random.random() < CUTS:
            at = int(random.integers(1, FRAMES))
            clip = torch.cat([clip[:at], self._shot(random)[at:]])
        return clip

    def _shot(self, random: Generator) -> Tensor:
        source = random.choice([*SHARES], p=[*SHARES.values()])
        if source == "generated":
            frames = self._made[int(random.integers(len(self._made)))]
            at = int(random.integers(0, len(frames) - FRAMES + 1))
            clip = torch.from_numpy(frames[at : at + FRAMES])
            return clip.flip(2) if random.random() < 0.5 else clip
        videos = self._own[source]
        video = videos[int(random.integers(len(videos)))]
        share = 1 - HELD_OUT_TAIL if source in LONG else 1.0
        return cut(random, video, 0, int(len(video.frames) * share))


def cut(random: Generator, video: Video, begin: int, end: int, *, plain: bool = False) -> Tensor:
    """Cut a clip out of a video, at a random rate, place and scale.

    Args:
        begin: first frame that may be taken; ``end`` is behind the last one.
        plain: neither a moving camera nor other colors.

    Returns:
        uint8 (T, H, W, 3).
    """
    step = 1
    if video.fps > 20:
        step = int(random.choice([1, 2, 3, 4], p=[0.42, 0.13, 0.25, 0.20]))
    elif video.fps > 11:
        step = int(random.choice([1, 2], p=[0.7, 0.3]))
    step = min(step, (end - begin - 1) // (FRAMES - 1))
    first = int(random.integers(begin, end - (FRAMES - 1) * step))
    height, width = video.frames.shape[1:3]
    kind, shrunk = random.random(), 1.0
    if 0.4 <= kind < 0.85:
        shrunk = math.exp(random.uniform(0, math.log(min(2.8, min(height, width) / SIZE / 1.3))))
    elif kind >= 0.85:
        shrunk = 1 / math.exp(random.uniform(0, math.log(1.8)))
    moving = not plain and random.random() < 0.65
    margin = random.uniform(1.2, 3) if moving else 1.0
    side = min(round(SIZE * shrunk * margin), height, width)
    top, left = int(random.integers(0, height - side + 1)), int(random.integers(0, width - side + 1))
    taken = video.frames[first : first + (FRAMES - 1) * step + 1 : step, top : top + side, left : left + side]
    frames = torch.from_numpy(np.ascontiguousarray(taken)).permute(0, 3, 1, 2).float() / 255
    target = max(SIZE, round(side / shrunk))
    if target != side:
        frames = F.interpolate(frames, (target, target), mode="bicubic", antialias=True, align_corners=False)
    if moving and target > SIZE:
        frames = under_moving_camera(random, frames)
    elif target > SIZE:
        edge = (target - SIZE) // 2
        frames = frames[:, :, edge : edge + SIZE, edge : edge + SIZE]
    if random.random() < 0.5:
        frames = frames.flip(3)
    if not plain and random.random() < 0.25:
        tint = torch.tensor(random.uniform(0.9, 1.1, 3), dtype=torch.float32)[:, None, None]
        frames = ((frames - 0.5) * random.uniform(0.75, 1.15) + 0.5 + random.uniform(-0.08, 0.08)) * tint
    return (frames.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)


def under_moving_camera(random: Generator, frames_TCHW: Tensor) -> Tensor:
    """Cut a window that drifts, and perhaps sways, turns and zooms: float (T, 3, SIZE, SIZE)."""
    target = frames_TCHW.shape[-1]
    room, time_T = (target - SIZE) / 2, torch.linspace(-1, 1, FRAMES)
    angle, reach = random.uniform(0, 2 * math.pi), room * random.uniform(0.3, 1)
    x, y = math.cos(angle) * reach * time_T, math.sin(angle) * reach * time_T
    if random.random() < 0.5:
        beat = random.uniform(1, 8)
        x = x * 0.7 + room * 0.3 * torch.sin(beat * time_T + random.uniform(0, 6))
        y = y * 0.7 + room * 0.3 * torch.cos(beat * time_T)
    zoom = torch.exp(time_T * random.normal(0, 0.1)) if random.random() < 0.4 else torch.ones(FRAMES)
    turn = time_T * random.normal(0, 0.12) if random.random() < 0.3 else torch.zeros(FRAMES)
    path = motion_corpus.Path2D(x, y, turn, zoom)
    return motion_corpus.window(frames_TCHW, path, SIZE)


# Optimizer


class Muon:
    """Muon for kernels of convolutions, as matrices of (outputs, rest), and Adam for all other weights.

    A matrix moves along its orthogonalized momentum, scaled so that the mean square of an update is about Adam's: 0.2
    times the root of the longer side (Liu et al., "Muon is scalable for LLM training", 2025).
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        ends = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")
        self._kernels: list[Tensor] = []
        others: list[Tensor] = []
        for name, weight in parameters:
            is_kernel = weight.ndim >= 4 and weight.numel() > SMALLEST_MATRIX and not name.startswith(ends)
            (self._kernels if is_kernel else others).append(weight)
        self._momenta = [torch.zeros_like(kernel) for kernel in self._kernels]
        self._adam = torch.optim.Adam(others, betas=(0.9, 0.98))
        self.param_groups: list[dict[str, Any]] = [{"params": [*self._kernels, *others], "lr": 0.0}]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for weight in self.param_groups[0]["params"]:
            weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move all weights once, at the rate of the parameter group."""
        rate = self.param_groups[0]["lr"]
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        for kernel, momentum in zip(self._kernels, self._momenta, strict=True):
            assert kernel.grad is not None
            momentum.mul_(0.95).add_(kernel.grad)
            matrix = kernel.grad.add(momentum, alpha=0.95).flatten(1)
            update = orthogonalized(matrix).view_as(kernel)
            kernel.add_(update, alpha=-0.2 * rate * math.sqrt(max(matrix.shape)))

    def state_dict(self) -> dict[str, Any]:
        """Momenta of all weights."""
        return {"adam": self._adam.state_dict(), "momenta": self._momenta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self._adam.load_state_dict(state["adam"])
        for momentum, stored in zip(self._momenta, state["momenta"], strict=True):
            momentum.copy_(stored)


def orthogonalized(matrix: Tensor) -> Tensor:
    """Nearest matrix with orthonormal rows or columns, roughly: five Newton-Schulz steps in bfloat16."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = ((matrix.T if is_tall else matrix) / (matrix.norm() + 1e-12)).bfloat16()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.T if is_tall else x).float()


# Training


def network_from(config: VidTokConfig, init: Path) -> VidTok:
    """Make a network from weights: its own, or those of one without Haar bands, whose level 1 is its level 0.

    Of the latter it takes what has the same shape at that place. Its ends, and the unit that changes the width after
    the first one, have seeded weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = VidTok(config)
    other, weights = load_weights(init)
    assert isinstance(other, VidTokConfig), f"{other.name} is no VidTok"
    own = network.state_dict()
    for name, weight in own.items():
        side, part, *rest = name.split(".")
        if config.haar_bands > other.haar_bands and part in ("down", "down_temporal", "up", "up_temporal"):
            part += f".{int(rest.pop(0)) + 1}"
        source = weights.get(".".join([side, part, *rest]))
        if source is not None and source.shape == weight.shape:
            weight.copy_(source)
    network.load_state_dict(own)
    return network


class SomeFrames(Perceptual):
    """LPIPS of random frames, `LPIPS_FRAMES` of each batch: its mean is that of all frames, for a part of the work."""

    def __init__(self, whole: Perceptual) -> None:
        super().__init__(whole.network)

    def forward(self, real_FCHW: Tensor, fake_FCHW: Tensor, *, frames_at_once: int | None = None) -> Tensor:
        """LPIPS of some of the frames."""
        taken = torch.randperm(len(real_FCHW))[:LPIPS_FRAMES]
        return super().forward(real_FCHW[taken], fake_FCHW[taken], frames_at_once=frames_at_once)


def train(run: Path, state: TrainState, clips: Clips, end: float) -> None:
    """Train until a time, in seconds since 1970, and keep a checkpoint and averaged weights every few minutes."""
    network: Any = state.tokenizer
    trained = [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]
    optimizer: Any = Muon(trained)
    state.generator_optimizer = optimizer
    rate, batch_size = state.config.learning_rate, state.config.batch_size
    begun, checkpoint = time.time(), run / "checkpoint.pt"
    if checkpoint.exists():
        stored = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(stored["network"])
        optimizer.load_state_dict(stored["optimizer"])
        for name, average in state.averages.items():
            average.copy_(stored["averages"][name])
        state.step, state.average_l1, begun = stored["step"], stored["average_l1"], stored["begun"]
    held_out = clips.held_out()

    def kept(log: Callable[[str], object]) -> None:
        with state.averaged():
            figures = held_out_psnr(state, held_out)
            save_tokenizer(run / "averaged.safetensors", network)
        log(json.dumps({"step": state.step, "seconds": time.time() - begun, "psnr": figures}) + "\n")
        numbers = {"step": state.step, "average_l1": state.average_l1, "begun": begun}
        tensors = {"network": network.state_dict(), "averages": state.averages, "optimizer": optimizer.state_dict()}
        torch.save({**numbers, **tensors}, run / "unfinished.pt")
        (run / "unfinished.pt").replace(checkpoint)

    with (run / "log.jsonl").open("a", buffering=1) as file:
        while (progress := (time.time() - begun) / (end - begun)) < 1:
            if state.step % KEEP_EVERY == 0:
                kept(file.write)
            share = rate_share(progress) * min(1.0, (state.step + 1) / 100)
            training_step.learning_rate = _constant(rate * share)
            training_step.train_step(state, clips.batch(state.step, batch_size))
        kept(file.write)


def rate_share(progress: float) -> float:
    """Share of the learning rate at a share of the time: constant, then a cosine."""
    falling = max(0.0, progress - CONSTANT_SHARE) / (1 - CONSTANT_SHARE)
    return LOWEST_SHARE + (1 - LOWEST_SHARE) * 0.5 * (1 + math.cos(math.pi * falling))


def _constant(rate: float) -> Callable[..., float]:
    return lambda *_args, **_settings: rate


def held_out_psnr(state: TrainState, held_out: Tensor) -> dict[str, float]:
    """Mean PSNR in dB of the held-out clips, by source."""
    names = (*HELD_OUT, *LONG)
    found: list[float] = []
    with state.evaluating(), torch.inference_mode():
        for part in torch.chunk(held_out, len(held_out) // len(names)):
            real = frames_to_input(part)
            fake: Any = state.tokenizer
            video = fake.decode_payload(fake.encode(real).payload).clamp(-1, 1)
            found += (-10 * torch.log10(((video - real) / 2).square().mean((1, 3, 4)) + 1e-8)).mean(1).tolist()
    return {name: round(float(np.mean(found[at :: len(names)])), 2) for at, name in enumerate(names)}


if __name__ == "__main__":
    main()
