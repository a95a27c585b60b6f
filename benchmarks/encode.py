"""Speed and memory of our encoder and decoder beside others, with the same weights, clips and precision.

    python -m benchmarks.encode                                   both VidTok models at 128 and 256
    python -m benchmarks.encode --sizes 128 --repeats 3 --json encode.json
    python -m benchmarks.encode --models vidtwin_structure_7_7_8_dynamics_7_8

VidTok is compared with diffusers, VidTwin with plain PyTorch implementations (`benchmarks.plain_vidtwin`).

* Milliseconds are medians over the repeats, which alternate between the implementations.
* CPU milliseconds are those of all threads. On a shared machine they are steadier than the time on the clock; with
  several threads they include waiting, so compare them with ``OMP_NUM_THREADS=1``. "times as fast" is the ratio of
  milliseconds, "by CPU time" that of CPU milliseconds.
* Ours runs with the settings of glibc's allocator that the job gives its encoders. The others run in processes of their
  own with glibc's defaults, as in a plain script: large blocks go back to the system, and their pages fault at the next
  operator. ``--allocator job`` gives all of them the job's settings, and ``--allocator shell`` those of the shell.
* Memory is the peak above what the process held before the call, so it includes no weights. A pass of its own tells it.
  Timed passes have the memory that the process kept from the one before, as in a job.
* FLOPs are those of the published network, two for each multiplication of a convolution or matrix product, counted by
  torch on the model of diffusers, or on the plain one. Their share is relative to the best of large products and
  convolutions in the same run. An implementation that saves multiplications can show more than 100 %.

VidTwin takes one size only. One plain implementation has the structure of the released code. The other calls
`torch.nn.MultiheadAttention` with ``need_weights=False``, which takes PyTorch's fused attention.

Diffusers computes causal models by the rules of v1.1 only. Ours is therefore measured twice: as the named model, and by
those rules, where both must agree. Needs diffusers (``pip install -e '.[dev]'``).
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import click
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contender import Build, Contender, Elsewhere, Measured, Passes, measured
from benchmarks.diffusers_vidtok import diffusers_decode, diffusers_encode, diffusers_model
from benchmarks.plain_vidtwin import PlainVidTwin, Structure, plain_vidtwin
from benchmarks.report import Row, report
from vidshard.models.tokenizer import get_preset
from vidshard.models.vidtok.config import VidTokConfig
from vidshard.models.vidtok.convolutions import matrix_product
from vidshard.models.vidtok.model import VidTok
from vidshard.models.vidtwin.config import VidTwinConfig
from vidshard.models.weights import load_tokenizer, seeded_weights
from vidshard.pipeline.devices import make_reproducible
from vidshard.pipeline.flow import ENCODER_ENVIRONMENT

NUM_FRAMES = 17


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Choice of what is measured, and where."""

    device: str
    repeats: int
    directions: tuple[str, ...]
    skipped: frozenset[str]
    """Names of implementations to leave out."""
    ours_only: bool
    elsewhere: bool
    """The others run in processes of their own."""
    peaks: Mapping[torch.dtype, float]
    """FLOP/s of large products and convolutions, by `peak_flops`."""

    def contenders(self, ours: Mapping[str, Passes], others: Mapping[str, Build]) -> dict[str, list[Contender]]:
        """Make the contenders by direction.

        Args:
            ours: implementations by name, which run in this process.
            others: functions that make the other implementations, by name.
        """
        ours = {name: passes for name, passes in ours.items() if name not in self.skipped}
        others = {} if self.ours_only else {name: make for name, make in others.items() if name not in self.skipped}
        remote = {name: Elsewhere(build) for name, build in others.items()} if self.elsewhere else {}
        here = {**ours, **({} if self.elsewhere else {name: build() for name, build in others.items()})}
        return {
            direction: [
                *(_contender(name, partial(measured, passes[direction], self.device)) for name, passes in here.items()),
                *(_contender(name, partial(process.measure, direction)) for name, process in remote.items()),
            ]
            for direction in self.directions
        }


def _contender(name: str, measure: Callable[..., Measured]) -> Contender:
    return Contender(name=name, run=partial(measure, anew=False), run_anew=partial(measure, anew=True))


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--models", default="kl_causal_488_4chn,fsq_causal_488_262144", show_default=True, metavar="NAMES")
@click.option("--sizes", default="128,256", show_default=True, metavar="SIDES", help="Sides of the square frames.")
@click.option("--directions", default="encode,decode", show_default=True, metavar="NAMES")
@click.option("--repeats", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--depth", type=click.IntRange(min=1), help="Blocks of VidTwin's transformers, to measure a part.")
@click.option(
    "--allocator",
    type=click.Choice(["each", "job", "shell"]),
    default="each",
    show_default=True,
    help="Settings of the allocator: of the job for ours and of the shell for the others, or the same for all.",
)
@click.option("--skip", multiple=True, metavar="NAME", help="Leave this implementation out. Can be given again.")
@click.option("--ours-only", is_flag=True, help="Leave the other implementations out.")
@click.option("--json", "json_path", metavar="FILE", help="Write the table there too.")
def main(
    models: str,
    sizes: str,
    directions: str,
    repeats: int,
    depth: int | None,
    allocator: str,
    skip: tuple[str, ...],
    ours_only: bool,
    json_path: str | None,
) -> None:
    """Measure, and print the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keeps_memory = device == "cpu" and allocator != "shell"
    if keeps_memory and any(os.environ.get(name) != value for name, value in ENCODER_ENVIRONMENT.items()):
        # the allocator reads its settings when the process starts; the job's encoders start with these
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.encode", *sys.argv[1:]], os.environ | ENCODER_ENVIRONMENT
        )
    torch.set_grad_enabled(False)
    make_reproducible(device, torch.get_num_threads())  # as encoders do: on a GPU float32 is then no TF32
    peaks = {dtype: peak_flops(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, flops in peaks.items():
        print(f"a product or convolution in {dtype} reaches {flops / 1e9:.0f} GFLOP/s", flush=True)
    comparison = Comparison(
        device=device,
        repeats=repeats,
        directions=tuple(directions.split(",")),
        skipped=frozenset(skip),
        ours_only=ours_only,
        elsewhere=device == "cpu" and allocator == "each",
        peaks=peaks,
    )
    rows: list[Row] = []
    for name in models.split(","):
        config = get_preset(name)
        if isinstance(config, VidTwinConfig):
            config = config.model_copy(update={"depth": depth or config.depth})
            rows += compare_vidtwin(config, comparison)
            continue
        assert isinstance(config, VidTokConfig)
        for side in map(int, sizes.split(",")):
            rows += compare(config, side, comparison)
    report("encode and decode", rows, json_path)


def compare(config: VidTokConfig, side: int, comparison: Comparison) -> list[Row]:
    """Measure the rows of one model at one size."""
    device = comparison.device
    v1_1 = config.model_copy(update={"variant": "causal-v1.1"})
    ours = load_tokenizer(config, None, seed=0, device=device)
    same_rules = VidTok(v1_1).to(device).eval().requires_grad_(False)
    same_rules.load_state_dict(ours.state_dict(), assign=True)
    half = load_tokenizer(config, None, seed=0, device=device, dtype=torch.bfloat16)
    random = torch.Generator().manual_seed(0)
    x_BCTHW = (torch.rand(1, 3, NUM_FRAMES, side, side, generator=random) * 2 - 1).to(device)
    z_BCTHW = ours.head.quantize(
        torch.randn(1, ours.head.encoder_channels, *config.latent_shape(NUM_FRAMES, side, side)[-3:], generator=random)
    ).latents.to(device)
    implementations: dict[str, Passes] = {
        "vidshard": {"encode": lambda: ours.encode(x_BCTHW).latents, "decode": lambda: ours.decode(z_BCTHW)},
        "vidshard, v1.1 rules": {
            "encode": lambda: same_rules.encode(x_BCTHW).latents,
            "decode": lambda: same_rules.decode(z_BCTHW),
        },
        "vidshard, bfloat16": {"encode": lambda: half.encode(x_BCTHW).latents, "decode": lambda: half.decode(z_BCTHW)},
    }
    others = {"diffusers": partial(diffusers_passes, config, v1_1, x_BCTHW, z_BCTHW)}
    # what each must agree with: its own rules in float32, and theirs where those are v1.1's
    reference = defaultdict(lambda: "vidshard", {"vidshard, v1.1 rules": "diffusers", "diffusers": "diffusers"})
    flops = published_flops(v1_1, side)
    clip = f"{NUM_FRAMES}x{side}x{side}"
    rows: list[Row] = []
    for direction, contenders in comparison.contenders(implementations, others).items():
        run_in_turns(f"{config.name} {clip} {direction}", contenders, comparison.repeats)
        tokens = config.codebook_size is not None and direction == "encode"
        given: Row = {"model": config.name, "clip": clip, "direction": direction}
        rows += rows_of(given, contenders, "diffusers", reference, flops[direction], comparison.peaks, tokens=tokens)
    return rows


def diffusers_passes(config: VidTokConfig, rules: VidTokConfig, x_BCTHW: Tensor, z_BCTHW: Tensor) -> Passes:
    """Make the model of diffusers with our weights, on the device of its inputs."""
    model = diffusers_model(rules, seeded_weights(config, 0)).to(x_BCTHW.device)
    return {"encode": lambda: diffusers_encode(model, x_BCTHW)[0], "decode": lambda: diffusers_decode(model, z_BCTHW)}


def compare_vidtwin(config: VidTwinConfig, comparison: Comparison) -> list[Row]:
    """Measure the rows of a VidTwin model at its size."""
    device = comparison.device
    ours = load_tokenizer(config, None, seed=0, device=device)
    half = load_tokenizer(config, None, seed=0, device=device, dtype=torch.bfloat16)
    random = torch.Generator().manual_seed(0)
    clip = config.default_clip
    x_BCTHW = (torch.rand(1, 3, *clip, generator=random) * 2 - 1).to(device)
    latents = {
        name: torch.randn(1, *shape, generator=random).to(device) for name, shape in config.latent_shapes.items()
    }

    implementations: dict[str, Passes] = {
        "vidshard": {
            "encode": lambda: _joined(m.mean for m in ours.moments(x_BCTHW).values()),
            "decode": lambda: ours.decode(latents),
        },
        "vidshard, bfloat16": {
            "encode": lambda: _joined(m.mean for m in half.moments(x_BCTHW).values()),
            "decode": lambda: half.decode(latents),
        },
    }
    structures: dict[str, Structure] = {RELEASED: "released", PARTS: "parts"}
    others = {
        name: partial(plain_passes, config, structure, x_BCTHW, latents) for name, structure in structures.items()
    }
    flops = plain_flops(config)
    reference: dict[str, str] = defaultdict(lambda: "vidshard")
    rows: list[Row] = []
    for direction, contenders in comparison.contenders(implementations, others).items():
        run_in_turns(f"{config.name} {direction}", contenders, comparison.repeats)
        given: Row = {"model": config.name, "clip": "x".join(map(str, clip)), "direction": direction}
        rows += rows_of(given, contenders, RELEASED, reference, flops[direction], comparison.peaks, tokens=False)
    return rows


def plain_passes(config: VidTwinConfig, structure: Structure, x_BCTHW: Tensor, latents: Mapping[str, Tensor]) -> Passes:
    """Make a plain implementation of VidTwin with our weights, on the device of its inputs."""
    weights = load_tokenizer(config, None, seed=0, device=str(x_BCTHW.device)).state_dict()
    model = plain_vidtwin(config, weights, structure)
    model.return_weights(False)
    return {
        "encode": lambda: _joined(mean for mean, _ in model.encode(x_BCTHW).values()),
        "decode": lambda: model.decode(latents),
    }


def _joined(means: Iterable[Tensor]) -> Tensor:
    return torch.cat([mean.flatten(1) for mean in means], dim=1)


PARTS = "nn.MultiheadAttention"
"""Name of the plain implementation of VidTwin with PyTorch's own attention."""
RELEASED = "structure of the release"
"""Name of the plain implementation of VidTwin in the released order of work."""


def plain_flops(config: VidTwinConfig) -> dict[str, float]:
    """Count FLOPs of encoding and of decoding a clip with the plain implementation of VidTwin."""
    with torch.device("meta"):
        model = PlainVidTwin(config)
        x_BCTHW = torch.empty(1, 3, *config.default_clip)
        latents = {name: torch.empty(1, *shape) for name, shape in config.latent_shapes.items()}
    flops = {}
    for direction in ("encode", "decode"):
        with FlopCounterMode(display=False) as counter:
            _ = model.encode(x_BCTHW) if direction == "encode" else model.decode(latents)
        flops[direction] = float(counter.get_total_flops())
    return flops


def run_in_turns(title: str, contenders: list[Contender], repeats: int) -> None:
    """Measure all implementations of a direction, alternating between them."""
    for contender in contenders:
        contender.prepare()
    for _ in range(repeats):
        for contender in contenders:
            contender.take_turn()
            print(
                f"{title} {contender.name}: {contender.milliseconds[-1] / 1000:.2f} s, "
                f"{contender.peak_bytes / 2**20:.0f} MiB",
                flush=True,
            )


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Measure the most FLOP/s that large products and convolutions reach, each the best of five.

    A product of two 4096 x 4096 matrices by each library that there is, and 3x3 convolutions of 256 channels.
    """
    a_BTHWC, b = torch.randn(1, 8, 8, 64, 4096).to(device, dtype), torch.randn(4096, 4096).to(device, dtype)
    maps = torch.randn(8, 256, 64, 64).to(device, dtype, memory_format=torch.channels_last)
    kernel = torch.randn(256, 256, 3, 3).to(device, dtype, memory_format=torch.channels_last)
    product, convolution = 2 * 4096**3, 2 * maps.numel() * 256 * 9
    runs = [
        (product, lambda: matrix_product(a_BTHWC, b, None)),
        (product, lambda: F.linear(a_BTHWC, b)),
        (convolution, lambda: F.conv2d(maps, kernel, padding=1)),
    ]
    return max(flops / _least_seconds(run, device) for flops, run in runs)


def _least_seconds(run: Callable[[], object], device: str) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def published_flops(config: VidTokConfig, side: int) -> dict[str, float]:
    """Count FLOPs of encoding and of decoding a clip with the diffusers model."""
    model = diffusers_model(config, None)
    padded = -(-NUM_FRAMES // config.time_stride) * config.time_stride
    latent_grid = config.latent_shape(NUM_FRAMES, side, side)[-3:]
    inputs = {
        "encode": (model.encoder, torch.empty(1, 3, padded, side, side, device="meta")),
        "decode": (model.decoder, torch.empty(1, config.latent_channels, *latent_grid, device="meta")),
    }
    flops = {}
    for direction, (network, value) in inputs.items():
        with FlopCounterMode(display=False) as counter:
            network(value)
        flops[direction] = float(counter.get_total_flops())
    return flops


def equal_positions(one: Contender, other: Contender) -> float:
    """Compute the share of positions whose latents are equal in all channels; for codes, the share of equal tokens."""
    assert one.output is not None
    assert other.output is not None
    return float((one.output.cpu() == other.output.cpu()).all(dim=1).float().mean())


def rows_of(
    given: Row,
    contenders: list[Contender],
    baseline: str,
    reference: Mapping[str, str],
    flops: float,
    peaks: Mapping[torch.dtype, float],
    *,
    tokens: bool,
) -> list[Row]:
    """Make a row for each implementation, with ratios to the baseline where it took part.

    Args:
        given: first columns of each row.
        baseline: name of the implementation that ratios refer to.
        reference: name of the implementation that each one's result is compared with.
        tokens: whether results are codes, so that equal ones are counted.
    """
    by_name = {contender.name: contender for contender in contenders}
    theirs = by_name.get(baseline)
    medians = {c.name: statistics.median(c.milliseconds) for c in contenders}
    cpu_medians = {c.name: statistics.median(c.cpu_milliseconds) for c in contenders}
    rows: list[Row] = []
    for contender in contenders:
        dtype = torch.bfloat16 if "bfloat16" in contender.name else torch.float32
        other = by_name.get(reference[contender.name], contender)
        assert contender.output is not None
        assert other.output is not None
        rows.append(
            {
                **given,
                "implementation": contender.name,
                "ms": round(medians[contender.name]),
                "times as fast": round(medians[baseline] / medians[contender.name], 2) if theirs else "-",
                "CPU ms": round(cpu_medians[contender.name]),
                "by CPU time": round(cpu_medians[baseline] / cpu_medians[contender.name], 2) if theirs else "-",
                "peak MiB": round(contender.peak_bytes / 2**20),
                "of its memory": round(contender.peak_bytes / theirs.peak_bytes, 2) if theirs else "-",
                "TFLOP": round(flops / 1e12, 2),
                "FLOP utilization": f"{flops / medians[contender.name] * 1000 / peaks[dtype]:.0%}",
                "agrees with": reference[contender.name] if other is not contender else "-",
                "max difference": float(f"{(contender.output.cpu() - other.output.cpu()).abs().max():.1e}"),
                "equal tokens": f"{equal_positions(contender, other):.2%}" if tokens else "-",
            }
        )
    return rows


if __name__ == "__main__":
    main()
