"""Time of encoding one clip by kind of operator, beside the most that a core reaches: where a CPU's time goes.

    python -m benchmarks.layers fsq_causal_488_262144 --side 128
    python -m benchmarks.layers vidtwin_structure_7_7_8_dynamics_7_8

Runs on one thread and counts its processor time, so a busy machine hardly changes the shares. FLOPs are those that are
computed, two for a multiplication; the published network may have more (`benchmarks.encode`). Each kind's rate is
compared with the best of large bare products and convolutions, measured in the same run.
"""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import sdpa_flop_count

from benchmarks.report import Row, report
from vidshard.models.tokenizer import get_preset
from vidshard.models.weights import load_tokenizer
from vidshard.pipeline.flow import ENCODER_ENVIRONMENT

ONE_THREAD = {**ENCODER_ENVIRONMENT, "OMP_NUM_THREADS": "1"}


@dataclass(kw_only=True, slots=True)
class Time:
    """Sums of one kind of operator."""

    seconds: float = 0.0
    flops: int = 0
    calls: int = 0


class Timer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Times the operators that run within it, as a context manager."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kinds: dict[str, Time] = defaultdict(Time)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and add its time to its kind."""
        start = time.thread_time()
        result = operator(*args, **(kwargs or {}))
        seconds = time.thread_time() - start
        kind, flops = kind_of(operator.overloadpacket.__name__, args, result)
        total = self.kinds[kind]
        total.seconds, total.flops, total.calls = total.seconds + seconds, total.flops + flops, total.calls + 1
        return result


def kind_of(name: str, args: tuple[Any, ...], result: Any) -> tuple[str, int]:
    """Name the kind of an operator, and count its FLOPs."""
    if name == "convolution":
        weight: Tensor = args[1]
        kernel = "x".join(map(str, weight.shape[2:]))
        narrow = ", below 32 channels" if min(weight.shape[:2]) < 32 else ""
        return f"convolution {kernel}{narrow}", 2 * result.numel() * weight[0].numel()
    if name in ("mm", "bmm"):
        return "matrix product", 2 * result.numel() * int(args[0].shape[-1])
    if name == "addmm":
        return "matrix product", 2 * result.numel() * int(args[1].shape[-1])
    if name == "_linear_pointwise":
        return "matrix product", 2 * result.numel() * int(args[1].shape[1])
    if "scaled_dot_product" in name:
        return "attention", int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))  # type: ignore[no-untyped-call]
    if "layer_norm" in name:
        return "norm", 0
    if name in ("silu", "silu_", "gelu", "relu"):
        return "activation", 0
    return "sums, copies, padding", 0


def rates(run: Callable[[], object], flops: float) -> float:
    """Measure FLOP/s of a function on this thread, best of five."""
    run()
    seconds = []
    for _ in range(5):
        start = time.thread_time()
        run()
        seconds.append(time.thread_time() - start)
    return flops / min(seconds)


def bare_rates() -> dict[str, float]:
    """Measure FLOP/s of large bare products (oneDNN and MKL) and convolutions, by name."""
    found = {}
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    packed = torch.ops.mkldnn._reorder_linear_weight(b)
    flops = 2 * 2048**3
    by_onednn = partial(torch.ops.mkldnn._linear_pointwise, a, packed, None, "none", [], "")
    found["matrix product 2048, oneDNN"] = rates(by_onednn, flops)
    found["matrix product 2048, MKL"] = rates(partial(F.linear, a, b), flops)
    for channels, side in ((128, 128), (256, 64), (512, 32)):
        x = torch.randn(2, channels, side, side).to(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3).to(memory_format=torch.channels_last)
        flops = 2 * x.numel() * 9 * channels
        found[f"convolution 3x3, {channels} channels"] = rates(partial(F.conv2d, x, weight, padding=1), flops)
    return found


def row_of(name: str, kind: Time, rate: float, share_of_peak: float, share_of_time: str) -> Row:
    """Make a row of the table; kinds without FLOPs have no rate."""
    return {
        "kind": name,
        "CPU ms": round(kind.seconds * 1000) if kind.calls else "-",
        "share of time": share_of_time,
        "GFLOP": round(kind.flops / 1e9, 1) if kind.flops else "-",
        "GFLOP/s": round(rate / 1e9) if rate else "-",
        "of the best bare": f"{share_of_peak:.0%}" if rate else "-",
        "calls": kind.calls or "-",
    }


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.argument("model")
@click.option("--side", type=int, help="Side of the square frames; by default the model's own.")
@click.option("--json", "json_path", metavar="FILE", help="Write the table there too.")
def main(model: str, side: int | None, json_path: str | None) -> None:
    """Measure, and print the table."""
    if any(os.environ.get(name) != value for name, value in ONE_THREAD.items()):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.layers", *sys.argv[1:]], os.environ | ONE_THREAD)
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    config = get_preset(model)
    num_frames, height, width = config.default_clip
    height, width = (side, side) if side else (height, width)
    tokenizer = load_tokenizer(config, None, seed=0)
    x_BCTHW = torch.rand(1, 3, num_frames, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    bare = bare_rates()
    peak = max(bare.values())
    rows = [row_of(f"bare {name}", Time(), rate, rate / peak, "-") for name, rate in bare.items()]
    tokenizer.encode(x_BCTHW)
    with Timer() as timer:
        tokenizer.encode(x_BCTHW)
    whole = Time(
        seconds=sum(kind.seconds for kind in timer.kinds.values()),
        flops=sum(kind.flops for kind in timer.kinds.values()),
        calls=sum(kind.calls for kind in timer.kinds.values()),
    )
    by_time = sorted(timer.kinds.items(), key=lambda item: -item[1].seconds)
    for name, kind in [*by_time, ("all", whole)]:
        rate = kind.flops / kind.seconds if kind.seconds else 0.0
        rows.append(row_of(name, kind, rate, rate / peak, f"{kind.seconds / whole.seconds:.1%}"))
    report(f"{model}, {num_frames}x{height}x{width}, encode, one thread", rows, json_path)


if __name__ == "__main__":
    main()
