"""Trains the tiny FSQ tokenizer with both affinities of the entropy loss, and compares what they reconstruct and use.

Both affinities see the same batches of generated video (`benchmarks.twin_split`), at several entropy weights and seeds.
Clips of other videos are measured with averaged weights: PSNR and the use of the codebook, as means over the seeds.

    python -m benchmarks.entropy_affinity [--steps 400] [--seeds 2] [--weights 0.1,10,100] [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch

from benchmarks.report import Row, report
from benchmarks.twin_split import HELD_OUT_SEED, SIZE, Frames, moving_shapes
from vidshard.jobs.training.presets import tiny
from vidshard.models.tokenizer import PRESETS
from vidshard.models.training.evaluation import evaluate_batch
from vidshard.models.training.generator import start_tokenizer
from vidshard.models.training.state import begin_stage
from vidshard.models.training.step import train_step
from vidshard.schemas.training import StageConfig

VIDEOS, HELD_OUT = 100, 16
"""Numbers of videos to train on and to measure by."""
FRAMES = 32
"""Frames of a video."""

Affinity = Literal["dot", "distance"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, metavar="N")
    parser.add_argument("--seeds", type=int, default=2, metavar="N")
    parser.add_argument("--weights", default="0.1,10,100", metavar="LIST", help="entropy weights, separated by commas")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    videos = [moving_shapes(seed, FRAMES) for seed in range(VIDEOS)]
    held_out = [moving_shapes(HELD_OUT_SEED + seed, FRAMES) for seed in range(HELD_OUT)]
    rows = [
        row_of(affinity, weight, videos, held_out, steps=args.steps, seeds=range(args.seeds))
        for weight in map(float, args.weights.split(","))
        for affinity in get_args(Affinity)
    ]
    report("entropy_affinity", rows, args.json)


def row_of(
    affinity: Affinity,
    weight: float,
    videos: Sequence[Frames],
    held_out: Sequence[Frames],
    *,
    steps: int,
    seeds: Sequence[int],
) -> Row:
    """Figures of one affinity at one entropy weight, means over the seeds."""
    preset = tiny(["videos"], "out").stages["stage1"]
    stage = preset.model_copy(
        update={"entropy_affinity": affinity, "entropy_weight": weight, "steps": steps, "gan_weight": 0.0}
    )
    figures = [trained(stage.model_copy(update={"seed": seed}), videos, held_out) for seed in seeds]
    means = {name: float(np.mean([figure[name] for figure in figures])) for name in figures[0]}
    return {
        "entropy weight": weight,
        "affinity": affinity,
        "PSNR dB": round(means["psnr"], 2),
        "from": round(min(figure["psnr"] for figure in figures), 2),
        "to": round(max(figure["psnr"] for figure in figures), 2),
        "codebook used, of what the tokens could": round(means["codebook_share_of_ceiling"], 3),
        "bits": round(means["codebook_entropy_bits"], 2),
    }


def trained(stage: StageConfig, videos: Sequence[Frames], held_out: Sequence[Frames]) -> dict[str, float]:
    """Train a network in this process, and measure it on the first clips of held-out videos."""
    random = np.random.default_rng(stage.seed)
    state = begin_stage(stage, start_tokenizer(PRESETS["tiny"], stage.seed))
    for _ in range(stage.steps):
        batch = [cut(videos[int(random.integers(len(videos)))], stage, random) for _ in range(stage.batch_size)]
        train_step(state, torch.from_numpy(np.stack(batch)))
    with state.averaged():
        return evaluate_batch(
            state, torch.from_numpy(np.stack([cut(video, stage, None) for video in held_out]))
        ).metrics()


def cut(video: Frames, stage: StageConfig, random: np.random.Generator | None) -> Frames:
    """A clip of a video, at a random time and place, or at the first time in the middle."""
    height, width = stage.size
    room = (len(video) - stage.frames, SIZE - height, SIZE - width)
    at, top, left = (0, room[1] // 2, room[2] // 2) if random is None else random.integers(np.add(room, 1)).tolist()
    return video[at : at + stage.frames, top : top + height, left : left + width]


if __name__ == "__main__":
    main()
