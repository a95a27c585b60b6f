"""Speeds of this machine for `vidshard plan --machine FILE`, from two models of different size.

    python -m benchmarks.machine mine.json [--precision float32]

The small model is bound by memory and the large one by arithmetic, so their times give both speeds of
`jobs.tokenization.machines.Machine`: of this GPU, or of one core. Takes about two minutes on two cores.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import click
import numpy as np
import torch

from benchmarks.report import describe_machine
from vidshard.models.cost import Cost, encoding_cost
from vidshard.models.tokenizer import frames_to_input, get_preset
from vidshard.models.weights import load_tokenizer
from vidshard.pipeline.devices import make_reproducible
from vidshard.pipeline.tokenizer_source import PRECISIONS

MODELS = (("fsq_causal_488_small", 256), ("fsq_causal_488_32768", 128))


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.argument("target", metavar="FILE.json")
@click.option("--precision", default="float32", show_default=True, type=click.Choice(list(PRECISIONS)))
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1))
def main(target: str, precision: str, repeats: int) -> None:
    """Measure and write the file."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make_reproducible(device, torch.get_num_threads(), precision)
    measured = [measure(name, side, device, precision, repeats) for name, side in MODELS]
    flops_per_second, bytes_per_second = speeds(measured, PRECISIONS[precision].itemsize)
    record = {
        "name": Path(target).stem,
        "is_gpu": device == "cuda",
        "flops_per_second": {precision: flops_per_second},
        "bytes_per_second": bytes_per_second,
        "is_measured": True,
        "source": f"measured on {describe_machine()}",
    }
    Path(target).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def measure(name: str, side: int, device: str, precision: str, repeats: int) -> tuple[Cost, float]:
    """Cost of a clip, and its seconds on a GPU or a core."""
    config = get_preset(name)
    model = load_tokenizer(config, None, seed=0, device=device, dtype=PRECISIONS[precision])
    batch = 8 if device == "cuda" else 1
    frames = np.random.default_rng(0).integers(0, 256, (batch, 17, side, side, 3), np.uint8)
    x_BCTHW = frames_to_input(torch.from_numpy(frames).to(device), model.dtype)
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            started = time.perf_counter()
            model.encode(x_BCTHW)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - started) / batch)
    units = 1 if device == "cuda" else torch.get_num_threads()
    found = statistics.median(seconds[1:]) * units
    print(f"{name} at {side}: {found:.4g} s for a clip", flush=True)
    return encoding_cost(config, 17, side, side), found


def speeds(measured: list[tuple[Cost, float]], bytes_per_value: int) -> tuple[float, float]:
    """Solve for both speeds; where that gives a negative one, all time is that of arithmetic."""
    matrix = np.array([[cost.flops, cost.traffic_bytes * bytes_per_value / 2] for cost, _ in measured], np.float64)
    per_flop, per_byte = np.linalg.solve(matrix, np.array([seconds for _, seconds in measured]))
    if per_flop <= 0 or per_byte <= 0:
        cost, seconds = measured[-1]
        return cost.flops / seconds, 1e15
    return float(1 / per_flop), float(1 / per_byte)


if __name__ == "__main__":
    main()
