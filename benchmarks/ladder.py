"""Trains variants of one small FSQ tokenizer at equal cost on the same clips, and compares what they reconstruct.

Every variant has the latent grid, the levels and about the FLOPs of the baseline, which is ``fsq_causal_488_small``
with half of its channels. All see the same clips in the same order, each clip once. Optimizer (Muon), schedule and loss
are the same: L1 and the entropies of FSQ, as in the first stage of ``--preset small``.

* ``haar``: frames enter and leave as the four bands of a 2x2 Haar transform, and one halving and doubling is left out.
* ``shortcuts``: those of DC-AE (Chen et al., "Deep Compression Autoencoder", 2025) around each resampling in space.
  They have no weights and cost no FLOPs.
* ``decoder-heavy``: a narrower encoder, and the FLOPs that it saves in the decoder.

    python -m benchmarks.ladder --videos NATURAL [--steps 700] [--seeds 2] [--minutes 25] [--json FILE]

Two trainings run at a time, each on one thread. A row is printed when one ends, and the table at the end: means over
the seeds beside the lowest and highest seed. Differences within such a range mean nothing. PSNR is that of clips of
videos that no variant was trained on, with averaged weights, halfway and at the end.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.ladder_networks import CONFIG, VARIANTS, build, check, giga_flops
from benchmarks.motion_corpus import Corpus
from benchmarks.report import Row, report
from benchmarks.shipped_training import FRAMES, SIZE, Muon, Video, decoded, generated
from vidshard.jobs.training.presets import small
from vidshard.models.training.evaluation import evaluate_batch
from vidshard.models.training.state import TrainState, begin_stage
from vidshard.models.training.step import train_step
from vidshard.schemas.training import StageConfig

HELD_OUT_EVERY = 5
"""Number of natural videos, in the order of their names, of which one is held out."""
GENERATED_HELD_OUT = 1_000_000
"""Number of the first generated video that is held out. A generated video gives two clips."""

Frames = npt.NDArray[np.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--videos",
        type=Path,
        metavar="FOLDER",
        help="natural videos of 17 frames of 64x64 or more, for half of the clips",
    )
    parser.add_argument("--variants", default=",".join(VARIANTS), metavar="LIST", help="names, separated by commas")
    parser.add_argument("--steps", type=int, default=700, metavar="N")
    parser.add_argument("--batch-size", type=int, default=2, metavar="N", help="clips of a step")
    parser.add_argument("--seeds", type=int, default=2, metavar="N")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="to continue a ladder that was ended")
    parser.add_argument("--learning-rate", type=float, default=2e-3, metavar="RATE", help="of Muon")
    parser.add_argument("--held-out", type=int, default=40, metavar="N", help="clips of each kind to measure by")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="N", help="begin no training that would end later"
    )
    parser.add_argument("--quick", action="store_true", help="two steps, one seed and two clips to measure by")
    parser.add_argument("--json", metavar="FILE", help="also write the table here")
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    if args.quick:
        args.steps, args.seeds, args.held_out = 2, 1, 2
    stage = small(["videos"], "out").stages["stage1"]
    settings = {"frames": FRAMES, "steps": args.steps, "batch_size": args.batch_size, "precision": "float32"}
    settings |= {"learning_rate": args.learning_rate, "warmup_steps": min(50, args.steps // 2), "ema_decay": 0.99}
    settings |= {"final_rate_share": 0.02, "entropy_anneal_steps": args.steps // 7}
    stage = StageConfig.model_validate(stage.model_dump() | settings)
    names = args.variants.split(",")
    for name in names:
        check(VARIANTS[name])
    with tempfile.TemporaryDirectory() as folder:
        kinds = 1 + (args.videos is not None)
        write_clips(Path(folder), args.videos, -(-args.steps * args.batch_size // kinds), args.held_out)
        jobs = [
            partial(trained, name, stage.model_copy(update={"seed": seed}), Path(folder))
            for seed in range(args.first_seed, args.first_seed + args.seeds)
            for name in names
        ]
        rows = run_all(jobs, until, partial(print, flush=True))
    finished = [name for name in names if any(row["variant"] == name for row in rows)]
    if not finished:
        raise SystemExit("no training ended")
    report("ladder", [table_row(name, rows) for name in finished], args.json)


# Clips


def write_clips(folder: Path, videos: Path | None, count: int, held_out: int) -> None:
    """Write ``<kind>-train.npy`` and ``<kind>-held_out.npy`` of generated and natural clips.

    Args:
        videos: folder of natural videos, of which every fifth is held out; None for generated clips alone.
        count: number of clips of each kind to train on.
        held_out: number of clips of each kind to measure by.
    """
    corpus = Corpus(crop=SIZE, photos=(), clips=(), seed=0)
    for name, first, clips in (("train", 0, count), ("held_out", GENERATED_HELD_OUT, held_out)):
        made = [generated(corpus, first + number) for number in range(-(-clips // 2))]
        cuts = [video[at : at + FRAMES] for video in made for at in (0, len(video) - FRAMES)]
        np.save(folder / f"generated-{name}.npy", np.stack(cuts[:clips]))
    if videos is None:
        return
    paths = sorted(path for path in videos.iterdir() if path.suffix in (".mp4", ".mkv"))
    for name, clips in (("train", count), ("held_out", held_out)):
        taken = [path for n, path in enumerate(paths) if (n % HELD_OUT_EVERY == 3) == (name == "held_out")]
        share = -(-clips // len(taken))
        random = np.random.default_rng(len(taken))
        found = [crop(random, video) for video in (decoded(path, "") for path in taken) for _ in range(share)]
        np.save(folder / f"natural-{name}.npy", np.stack(found)[random.permutation(len(found))[:clips]])


def crop(random: np.random.Generator, video: Video) -> Frames:
    """Cut a clip at a random time and place at the video's own resolution, at its rate or a half or third of it."""
    step = min(int(random.integers(1, 4)), (len(video.frames) - 1) // (FRAMES - 1))
    room = (len(video.frames) - (FRAMES - 1) * step, *(side - SIZE + 1 for side in video.frames.shape[1:3]))
    at, top, left = random.integers(room).tolist()
    clip = video.frames[at : at + (FRAMES - 1) * step + 1 : step, top : top + SIZE, left : left + SIZE]
    return clip[:, :, ::-1] if random.random() < 0.5 else clip


# Training


def trained(name: str, stage: StageConfig, folder: Path) -> Row:
    """Train one variant in this process, and measure averaged weights on the held-out clips, halfway and at the end."""
    torch.set_num_threads(1)
    state = begin_stage(stage, build(VARIANTS[name], stage.seed))
    optimizer: Any = Muon(state.tokenizer.named_parameters())
    state.generator_optimizer = optimizer
    kinds = sorted(path.name.split("-")[0] for path in folder.glob("*-train.npy"))
    clips = [np.load(folder / f"{kind}-train.npy", mmap_mode="r") for kind in kinds]
    orders = [np.random.default_rng((stage.seed, n)).permutation(len(each)) for n, each in enumerate(clips)]
    seconds, halfway = 0.0, math.nan
    for step in range(stage.steps):
        if step == stage.steps // 2:
            halfway = measured(state, folder, kinds)["PSNR dB"]
        numbers = [divmod(step * stage.batch_size + n, len(kinds)) for n in range(stage.batch_size)]
        batch = [clips[kind][orders[kind][at % len(orders[kind])]] for at, kind in numbers]
        begun = time.process_time()
        train_step(state, torch.from_numpy(np.stack(batch)))
        seconds += time.process_time() - begun
    row: Row = {"variant": name, "seed": stage.seed, "halfway": round(halfway, 3)}
    row |= {what: round(figure, 3) for what, figure in measured(state, folder, kinds).items()}
    return row | {"core s / step": round(seconds / stage.steps, 3)}


def measured(state: TrainState, folder: Path, kinds: Sequence[str]) -> dict[str, float]:
    """PSNR of all held-out clips and of each kind, and the entropy of their tokens, with averaged weights."""
    found = {}
    with state.averaged():
        for kind in kinds:
            clips = torch.from_numpy(np.load(folder / f"{kind}-held_out.npy"))
            parts = [evaluate_batch(state, part) for part in torch.chunk(clips, -(-len(clips) // 4))]
            found[kind] = sum(parts[1:], start=parts[0])
    whole = sum([*found.values()][1:], start=found[kinds[0]]).metrics()
    by_kind = {kind: each.metrics()["psnr"] for kind, each in found.items()}
    return {"PSNR dB": whole["psnr"], **by_kind, "entropy bits": whole["codebook_entropy_bits"]}


def run_all(jobs: Sequence[Callable[[], Row]], until: float, report_row: Callable[[Row], None]) -> list[Row]:
    """Run trainings, two at a time, and begin none that would probably end after ``until`` (in `time.monotonic`)."""
    rows: list[Row] = []
    waiting, longest = list(jobs), 0.0
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        running: dict[Future[Row], float] = {}
        while waiting or running:
            while waiting and len(running) < 2:
                if time.monotonic() + longest > until:
                    waiting.clear()
                    break
                running[pool.submit(waiting.pop(0))] = time.monotonic()
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                longest = max(longest, time.monotonic() - running.pop(done))
                try:
                    rows.append(done.result())
                except BrokenProcessPool:
                    print("a training was killed: the rows are those of the trainings before it", flush=True)
                    return rows
                report_row(rows[-1])
    return rows


def table_row(name: str, rows: Sequence[Row]) -> Row:
    """Figures of one variant, means over its seeds."""

    def mean(column: str, of: Sequence[Row]) -> float:
        return float(np.mean([row[column] for row in of]))

    own = [row for row in rows if row["variant"] == name]
    seeds = {row["seed"] for row in own}
    baseline = [row for row in rows if row["variant"] == "baseline" and row["seed"] in seeds]
    encoder, decoder = giga_flops(VARIANTS[name], FRAMES, SIZE)
    weights = sum(weight.numel() for weight in build(VARIANTS[name], 0).parameters()) / 1e6
    row: Row = {"variant": name, "M weights": round(weights, 2), "GFLOP enc": round(encoder, 2)}
    row |= {"dec": round(decoder, 2), "bits": CONFIG.token_bits or 0.0, "seeds": len(own)}
    row |= {"halfway": round(mean("halfway", own), 2), "PSNR dB": round(mean("PSNR dB", own), 2)}
    row |= {"from": round(min(float(row["PSNR dB"]) for row in own), 2)}
    row |= {"to": round(max(float(row["PSNR dB"]) for row in own), 2)}
    same = len(baseline) == len(own)
    row |= {"to baseline": f"{mean('PSNR dB', own) - mean('PSNR dB', baseline):+.2f}" if same else "-"}
    row |= {kind: round(mean(kind, own), 2) for kind in ("generated", "natural") if kind in own[0]}
    return row | {name: round(mean(name, own), 3) for name in ("entropy bits", "core s / step")}


if __name__ == "__main__":
    main()
