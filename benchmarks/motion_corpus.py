"""Generator of small videos with motion, to train and measure a tokenizer where there is no video corpus.

Each video is a crop of training size out of a scene of full size, so that a model trained on crops sees the detail of
whole frames. A scene has a textured background and up to two shapes with textures of their own; everything pans, turns
and zooms at its own speed. Textures are photographs from a given folder, noise of natural spectrum, gradients and
patterns. Some videos are crops of given videos, and some are FFmpeg's test sources.

    python -m benchmarks.motion_corpus OUT --videos 4000 --crop 64 [--photos FOLDER] [--clips FOLDER]
"""

from __future__ import annotations

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal, cast

import av
import av.filter
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.random import Generator
from torch import Tensor

RATE = 8
"""Frames per second; the default rate of tokenization."""
FRAMES = 41
SCENE = (256, 704)
"""Shorter side of a photograph in pixels, from one that fills a frame of 256 x 256 to one seen through it in part."""
PATCH = 1.6
"""Size of a patch of a photograph relative to its crop; the margin is for the motion."""
SOURCES = (
    "testsrc2=size={n}x{n}:rate=8",
    "mandelbrot=size={n}x{n}:rate=8:start_scale=2:end_pts=200",
    "gradients=size={n}x{n}:rate=8:speed=0.05:seed={seed}:n=4",
    "life=size={n}x{n}:rate=8:mold=10:seed={seed}:life_color=#C83232:death_color=#3264C8:ratio=0.3",
    "smptehdbars=size={n}x{n}:rate=8",
)

Kind = Literal["scene", "clip", "source"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Sources of the videos."""

    crop: int
    photos: tuple[str, ...]
    clips: tuple[str, ...]
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the videos; those that are there already are left alone")
    parser.add_argument("--videos", type=int, default=4000, metavar="N")
    parser.add_argument("--crop", type=int, default=64, metavar="PIXELS", help="height and width")
    parser.add_argument("--photos", type=Path, help="folder of photographs whose licenses allow it")
    parser.add_argument("--clips", type=Path, help="folder of videos whose licenses allow it")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(
        crop=arguments.crop,
        photos=tuple(sorted(str(path) for path in arguments.photos.iterdir())) if arguments.photos else (),
        clips=tuple(sorted(str(path) for path in arguments.clips.iterdir())) if arguments.clips else (),
        seed=arguments.seed,
    )
    with ProcessPoolExecutor(initializer=partial(torch.set_num_threads, 1)) as pool:
        for done, _ in enumerate(pool.map(partial(_write, corpus, arguments.out), range(arguments.videos)), start=1):
            if done % 200 == 0 or done == arguments.videos:
                print(f"{done} of {arguments.videos} videos", flush=True)


def _write(corpus: Corpus, folder: Path, number: int) -> None:
    target = folder / f"{number:06d}.mp4"
    if target.exists():
        return
    unfinished = target.with_name(f".{target.name}")
    with av.open(str(unfinished), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width = stream.height = corpus.crop
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "12", "preset": "veryfast"}
        for frame in make_video(corpus, number):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    unfinished.replace(target)


def make_video(corpus: Corpus, number: int) -> np.ndarray:
    """Make the frames of one video, the same for the same number and seed: uint8 (41, crop, crop, 3)."""
    random = np.random.default_rng((corpus.seed, number))
    kinds: dict[Kind, float] = {"scene": 0.8, "clip": 0.15 if corpus.clips else 0.0, "source": 0.05}
    shares = np.array([*kinds.values()])
    kind = random.choice([*kinds], p=shares / shares.sum())
    if kind == "clip":
        return _crop_of_clip(corpus, random)
    if kind == "source":
        return _source(corpus, random)
    return _scene(corpus, random)


# Scenes


def _scene(corpus: Corpus, random: Generator) -> np.ndarray:
    size = corpus.crop
    seconds = torch.arange(FRAMES) / RATE
    still = random.random() < 0.3
    frames = _moving(_texture(corpus, random), _path(random, seconds, 0.0 if still else 60.0), size)
    for _ in range(random.choice([0, 1, 2], p=[0.45, 0.35, 0.2])):
        path = _path(random, seconds, 80.0)
        content = _moving(_texture(corpus, random), path, size)
        frames = torch.lerp(frames, content, _shape(random, path, size))
    contrast, brightness = random.uniform(0.6, 1.1), random.uniform(-0.1, 0.1)
    tint = torch.tensor(random.uniform(0.9, 1.1, 3), dtype=torch.float32)[:, None, None]
    fade = torch.tensor(1 + random.choice([0.0, 0.1]) * np.sin(seconds.numpy() * 2), dtype=torch.float32)
    frames = ((frames - 0.5) * contrast + 0.5 + brightness) * tint * fade[:, None, None, None]
    return _to_bytes(frames)


@dataclass(frozen=True, slots=True)
class Path2D:
    """Path of a crop over a texture: its center, angle and scale at each frame."""

    x: Tensor
    """Horizontal distance of the center from the texture's center, in pixels, like y."""
    y: Tensor
    turn: Tensor
    """Rotation in radians."""
    zoom: Tensor


def _path(random: Generator, seconds: Tensor, speed: float) -> Path2D:
    """Draw a path that drifts by up to ``speed`` pixels a second and sways, some paths also turning or zooming."""
    angle, pace = random.uniform(0, 2 * math.pi), speed * random.beta(1, 2)
    sway, beat = random.uniform(0, 0.15) * speed, random.uniform(0.3, 3)
    middle = seconds - seconds[-1] / 2
    turn = random.normal(0, 0.25) if random.random() < 0.3 and speed else 0.0
    zoom = random.normal(0, 0.15) if random.random() < 0.4 and speed else 0.0
    return Path2D(
        math.cos(angle) * pace * middle + sway * torch.sin(beat * seconds),
        math.sin(angle) * pace * middle + sway * torch.cos(beat * seconds),
        turn * middle,
        torch.exp(zoom * middle),
    )


def _moving(texture_CHW: Tensor, path: Path2D, size: int) -> Tensor:
    """Render a texture along a path, mirrored beyond its edges: (T, 3, size, size)."""
    return window(texture_CHW[None].expand(len(path.x), -1, -1, -1), path, size)


def window(frames_TCHW: Tensor, path: Path2D, size: int) -> Tensor:
    """Render frames through a window on a path, mirrored beyond their edges: (T, 3, size, size)."""
    height, width = frames_TCHW.shape[2:]
    line = torch.arange(size) - (size - 1) / 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    cos, sin = torch.cos(path.turn)[:, None, None], torch.sin(path.turn)[:, None, None]
    zoom = path.zoom[:, None, None]
    u = (cos * x - sin * y) * zoom + path.x[:, None, None]
    v = (sin * x + cos * y) * zoom + path.y[:, None, None]
    grid = torch.stack([u * 2 / width, v * 2 / height], dim=-1)
    return F.grid_sample(frames_TCHW, grid.float(), mode="bicubic", padding_mode="reflection", align_corners=False)


def _shape(random: Generator, path: Path2D, size: int) -> Tensor:
    """Render the coverage of each pixel by a moving shape: (T, 1, size, size) in [0, 1]."""
    line = torch.arange(size) - (size - 1) / 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    dx = x + path.x[:, None, None] - random.uniform(-0.4, 0.4) * size
    dy = y + path.y[:, None, None] - random.uniform(-0.4, 0.4) * size
    turn = path.turn[:, None, None] + random.uniform(0, math.pi)
    u, v = torch.cos(turn) * dx - torch.sin(turn) * dy, torch.sin(turn) * dx + torch.cos(turn) * dy
    wide, high = random.uniform(0.08, 0.5, 2) * size
    roundness = random.choice([2.0, 2.0, 6.0, 20.0])
    distance = ((u / wide).abs() ** roundness + (v / high).abs() ** roundness) ** (1 / roundness)
    edge = random.choice([0.5, 1.0, 4.0])
    cover: Tensor = ((1 - distance) * min(wide, high) / edge + 0.5).clamp(0, 1)
    return cover[:, None]


# Textures: float32 (3, H, W) in [0, 1]


def _texture(corpus: Corpus, random: Generator) -> Tensor:
    kind = random.choice(["photo", "noise", "flat", "pattern"], p=[0.7, 0.15, 0.1, 0.05])
    if kind == "photo" and corpus.photos:
        return _photo_patch(corpus, random)
    if kind in ("photo", "noise"):
        return _noise(corpus, random)
    side = int(corpus.crop * 2)
    line = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(line, line, indexing="ij")
    low, high = (torch.tensor(random.random(3), dtype=torch.float32)[:, None, None] for _ in range(2))
    angle = random.uniform(0, 2 * math.pi)
    along = math.cos(angle) * x + math.sin(angle) * y
    if kind == "flat":
        return torch.lerp(low, high, (0.5 + random.uniform(0, 0.5) * along).clamp(0, 1))
    periods = random.uniform(2, 20)
    wave = torch.sin(along * periods * math.pi)
    if random.random() < 0.5:
        wave = wave * torch.sin((math.cos(angle) * y - math.sin(angle) * x) * periods * math.pi)
    return torch.lerp(low, high, (wave * random.choice([0.7, 8.0]) / 2 + 0.5).clamp(0, 1))


def _photo_patch(corpus: Corpus, random: Generator) -> Tensor:
    photo = _photo(corpus.photos[random.integers(len(corpus.photos))])
    shorter = min(photo.shape[1:])
    scale = min(1.0, math.exp(random.uniform(math.log(SCENE[0]), math.log(SCENE[1]))) / shorter)
    side = min(shorter, math.ceil(corpus.crop * PATCH / scale))
    top, left = (int(random.integers(0, length - side + 1)) for length in photo.shape[1:])
    patch = photo[:, top : top + side, left : left + side]
    if random.random() < 0.5:
        patch = patch.flip(2)
    target = max(corpus.crop, round(side * scale))
    resized = F.interpolate(patch[None], (target, target), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].clamp(0, 1)


def _noise(corpus: Corpus, random: Generator) -> Tensor:
    """Make noise whose power falls with frequency as in photographs, in correlated colors."""
    side = corpus.crop * 2
    frequency = torch.fft.fftfreq(side)[:, None].square() + torch.fft.rfftfreq(side)[None].square()
    envelope = (frequency + 1 / side**2).pow(-random.uniform(0.9, 1.5) / 2)
    phases = torch.from_numpy(random.standard_normal((3, side, side)).astype(np.float32))
    planes = torch.fft.irfft2(torch.fft.rfft2(phases) * envelope, s=(side, side))
    planes = planes / planes.std(dim=(1, 2), keepdim=True)
    colored: Tensor = 0.5 + 0.18 * (planes[:1] + random.uniform(0, 0.6) * planes)
    return colored.clamp(0, 1)


@cache
def _photo(path: str) -> Tensor:
    """Read a photograph, at most 2 x SCENE on its shorter side: float32 (3, H, W) in [0, 1]."""
    with av.open(path) as container:
        frame = next(container.decode(video=0))
    image = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1).float() / 255
    scale = 2 * SCENE[1] / min(image.shape[1:])
    if scale >= 1:
        return image
    sides = [round(side * scale) for side in image.shape[1:]]
    return F.interpolate(image[None], sides, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)


# Crops of given videos, and FFmpeg's own sources


@cache
def _clip(path: str) -> Tensor:
    """Read a video at 8 frames per second, at most 256 pixels on its shorter side: float32 (T, 3, H, W) in [0, 1]."""
    taken: list[Tensor] = []
    with av.open(path) as container:
        for frame in container.decode(video=0):
            if frame.time is None or frame.time * RATE < len(taken):
                continue
            image = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)[None].float() / 255
            scale = min(1.0, 384 / min(image.shape[2:]))
            sides = [round(side * scale) for side in image.shape[2:]]
            taken.append(F.interpolate(image, sides, mode="bicubic", antialias=True, align_corners=False))
    return torch.cat(taken).clamp(0, 1)


def _crop_of_clip(corpus: Corpus, random: Generator) -> np.ndarray:
    clip = _clip(corpus.clips[random.integers(len(corpus.clips))])
    scale = random.uniform(256, 384) / min(clip.shape[2:])
    start = int(random.integers(0, max(1, len(clip) - FRAMES + 1)))
    side = min(round(corpus.crop / scale), *clip.shape[2:])
    top, left = (int(random.integers(0, length - side + 1)) for length in clip.shape[2:])
    part = clip[start : start + FRAMES, :, top : top + side, left : left + side]
    resized = F.interpolate(part, (corpus.crop, corpus.crop), mode="bicubic", antialias=True, align_corners=False)
    return _to_bytes(resized.flip(3) if random.random() < 0.5 else resized)


def _source(corpus: Corpus, random: Generator) -> np.ndarray:
    text = SOURCES[random.integers(len(SOURCES))].format(n=max(corpus.crop, 64), seed=int(random.integers(1 << 30)))
    name, _, settings = text.partition("=")
    graph = av.filter.Graph()
    source, sink = graph.add(name, settings), graph.add("buffersink")
    source.link_to(sink)
    graph.configure()
    frames = [cast(av.VideoFrame, graph.pull()).to_ndarray(format="rgb24") for _ in range(FRAMES)]
    return np.stack(frames)[:, : corpus.crop, : corpus.crop]


def _to_bytes(frames_TCHW: Tensor) -> np.ndarray:
    return (frames_TCHW.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


if __name__ == "__main__":
    main()
