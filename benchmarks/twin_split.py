"""Trains the tiny VidTwin on generated video and measures how it splits clips into structure and dynamics.

The videos show textured backgrounds that pan slowly, with small textured shapes that move fast. A tokenizer is trained
on them with ``vidshard train one_stage --preset vidtwin_tiny``, and measured on videos of other seeds: reconstruction
from everything, from structure alone, from dynamics alone, and from the structure of one clip with the dynamics of
another. Its output folder also gets a picture of a few clips.

    python -m benchmarks.twin_split OUT [--videos 200] [--steps 1000] [--json FILE]
"""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.report import report
from vidshard.jobs.training.recorder import picture_strip, png
from vidshard.models.metrics import psnr
from vidshard.models.tokenizer import frames_to_input, output_to_frames
from vidshard.models.vidtwin.model import VidTwin
from vidshard.models.weights import load_tokenizer, load_weights

SIZE = 64
RATE = 8
"""Frames per second."""
SECONDS = 4
HELD_OUT_SEED = 1_000_000
"""First seed of the videos that are measured."""
BLOCK = 8
"""Side in pixels of the blocks whose means are the low-frequency picture."""

WAYS = ("everything", "structure alone", "dynamics alone")
"""Ways to reconstruct a clip."""

Frames = npt.NDArray[np.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for videos, run and picture")
    parser.add_argument("--videos", type=int, default=200, metavar="N")
    parser.add_argument("--steps", type=int, default=1000, metavar="N")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    weights = train(args.out, write_corpus(args.out / "videos", args.videos), ["--steps", str(args.steps)])
    figures = measure(weights, args.out / "split.png")
    report("twin_split", [{"what": name, "figure": round(value, 3)} for name, value in figures.items()], args.json)


def train(out: Path, videos: Path, flags: Sequence[str]) -> Path:
    """Train with the real command; returns the trained weights."""
    run = out / "run"
    command = [sys.executable, "-m", "vidshard.jobs.main", "train", "one_stage", "--preset", "vidtwin_tiny"]
    subprocess.run([*command, "--videos", str(videos), "--out", str(run), *flags], check=True)
    return run / "one_stage" / "tokenizer.safetensors"


# The videos


def moving_shapes(seed: int, num_frames: int) -> Frames:
    """Textured background that pans slowly, and two small textured shapes that move fast: uint8 (T, H, W, 3)."""
    random = np.random.default_rng(seed)
    background = _texture(random, SIZE + 32)
    pan = random.uniform(-6, 6, 2)  # pixels per second
    shapes = [_Shape(random) for _ in range(2)]
    frames = np.empty((num_frames, SIZE, SIZE, 3))
    for number in range(num_frames):
        seconds = number / RATE
        # a triangle wave, so that the pan stays inside the texture
        y, x = (16 - np.abs((offset * seconds + 16) % 64 - 32) for offset in pan)
        frames[number] = _cut(background, 16 + y / 2, 16 + x / 2)
        for shape in shapes:
            shape.draw(frames[number], seconds)
    return np.asarray((frames * 255).clip(0, 255), np.uint8)


class _Shape:
    """A disc or a square with a texture, on a fast orbit."""

    def __init__(self, random: np.random.Generator) -> None:
        self.radius = random.uniform(5, 9)
        self.is_disc = random.random() < 0.5
        self.texture = _texture(random, SIZE)
        self.center = random.uniform(20, 44, 2)
        self.reach = random.uniform(8, 18, 2)
        self.turns = random.uniform(0.5, 1.2, 2) * random.choice([-1, 1], 2)  # per second
        self.phase = random.uniform(0, 2 * np.pi, 2)

    def draw(self, frame: npt.NDArray[np.float64], seconds: float) -> None:
        place = self.center + self.reach * np.sin(2 * np.pi * self.turns * seconds + self.phase)
        y, x = np.mgrid[:SIZE, :SIZE] - place[:, None, None]
        distance = np.hypot(y, x) if self.is_disc else np.maximum(np.abs(y), np.abs(x))
        cover = np.clip(self.radius - distance + 0.5, 0, 1)[..., None]
        frame[:] = (1 - cover) * frame + cover * self.texture


def _texture(random: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
    """Colored noise of a natural spectrum, in [0, 1]: (size, size, 3)."""
    fy, fx = np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij")
    falloff = 1 / np.maximum(np.hypot(fy, fx), 1.5 / size) ** 2
    waves = np.stack([np.fft.irfft2(np.fft.rfft2(random.standard_normal((size, size))) * falloff) for _ in range(3)], 2)
    waves /= waves.std(axis=(0, 1))
    return np.clip(0.5 + 0.22 * waves, 0, 1)


def _cut(texture: npt.NDArray[np.float64], y: float, x: float) -> npt.NDArray[np.float64]:
    """Part of a texture at a place between pixels."""
    row, column = int(y), int(x)
    down, right = y - row, x - column
    part = texture[row : row + SIZE + 1, column : column + SIZE + 1]
    rows = (1 - down) * part[:-1] + down * part[1:]
    cut: npt.NDArray[np.float64] = (1 - right) * rows[:, :-1] + right * rows[:, 1:]
    return cut


def write_corpus(folder: Path, count: int) -> Path:
    """Write videos of seeds 0, 1, 2 ..., those that are there already are left alone; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        path = folder / f"{seed:05d}.mp4"
        if not path.exists():
            _write(path, moving_shapes(seed, SECONDS * RATE))
    return folder


def _write(path: Path, frames: Frames) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv444p"
        stream.options = {"preset": "veryfast", "crf": "12"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


# Measuring


def measure(weights: Path, picture: Path | None = None, pairs: int = 32) -> dict[str, float]:
    """Measure trained weights on pairs of clips that no training has seen.

    Returns:
        Figures by what they say; distances are root mean squares, of values in [0, 1].
    """
    config = load_weights(weights)[0]
    network = load_tokenizer(config, weights)
    assert isinstance(network, VidTwin)
    clips = np.stack([moving_shapes(HELD_OUT_SEED + n, network.config.num_frames) for n in range(2 * pairs)])
    x_BCTHW = frames_to_input(torch.from_numpy(clips))
    with torch.no_grad():
        latents = network.encode(x_BCTHW).payload
        partner = {name: value.roll(pairs, dims=0) for name, value in latents.items()}
        whole = network.decode_payload(latents)
        structure, dynamics = (network.decode_payload(latents, parts=[part]) for part in ("structure", "dynamics"))
        crossed = network.decode_payload(partner | {"structure": latents["structure"]})
    if picture is not None:
        shown = [0, 1, 2, pairs]
        rows = (clips, *(output_to_frames(video).numpy() for video in (whole, structure, dynamics, crossed)))
        picture.write_bytes(png(picture_strip(*(videos[shown] for videos in rows))))
    other = x_BCTHW.roll(pairs, dims=0)
    to_own, to_other = _distance(_low(crossed), _low(x_BCTHW)), _distance(_low(crossed), _low(other))
    motion_of_own, motion_of_other = (_alike(_motion(crossed), _motion(clip)) for clip in (x_BCTHW, other))
    made = zip(WAYS, (whole, structure, dynamics), strict=True)
    return {f"PSNR, {way}": _psnr(x_BCTHW, video) for way, video in made} | {
        "crossed: low-frequency distance to the clip of the structure": float(to_own.mean()),
        "crossed: low-frequency distance to the clip of the dynamics": float(to_other.mean()),
        "crossed: share of clips nearer to that of the structure": float((to_own < to_other).float().mean()),
        "crossed: correlation of motion with the clip of the structure": float(motion_of_own.mean()),
        "crossed: correlation of motion with the clip of the dynamics": float(motion_of_other.mean()),
    }


def _psnr(x_BCTHW: Tensor, made_BCTHW: Tensor) -> float:
    frames = (video.movedim(2, 1).flatten(0, 1) for video in (x_BCTHW, made_BCTHW.clamp(-1, 1)))
    return float(psnr(*frames).mean())


def _low(x_BCTHW: Tensor) -> Tensor:
    """Means of the blocks of each frame."""
    return F.avg_pool3d(x_BCTHW.clamp(-1, 1), (1, BLOCK, BLOCK))


def _motion(x_BCTHW: Tensor) -> Tensor:
    """Difference of each frame from the clip's mean frame."""
    return x_BCTHW - x_BCTHW.mean(dim=2, keepdim=True)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Distance of the clips of two batches: (B,)."""
    return ((a - b) / 2).square().flatten(1).mean(1).sqrt()


def _alike(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the clips of two batches: (B,)."""
    return F.cosine_similarity(a.flatten(1), b.flatten(1))


if __name__ == "__main__":
    main()
