"""Machines that a forecast can be made for: a small table of speeds, each with where it comes from.

The time of a pass is ``flops / flops_per_second + traffic / bytes_per_second``, with both counts from `models.cost`.
Two models of different size fix both speeds (`python -m benchmarks.machine`), so the formula holds for models and frame
sizes in between. Decoding is a rate for each codec, in core-seconds for a megapixel of source video.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidshard.models.cost import Cost
from vidshard.schemas.errors import UserError

DECODING = {"h264": 0.0022, "hevc": 0.0020, "vp9": 0.0049, "av1": 0.0018, "mpeg4": 0.0006}
"""Core-seconds of decoding a megapixel of source video, sampled at 8 frames per second (docs/performance.md)."""
DECODING_OTHERS = 0.0022
OPENING_SECONDS = 0.05
"""Core-seconds of opening a video or a span."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Speeds of a machine's encoder, which is one GPU, or one core of a CPU."""

    name: str
    is_gpu: bool
    flops_per_second: Mapping[str, float]
    """By precision."""
    bytes_per_second: float
    is_measured: bool
    """False for a roofline."""
    source: str
    """Source of the speeds, in words."""

    def seconds(self, cost: Cost, precision: str, bytes_per_value: int) -> float:
        """Seconds of a GPU, or of a core, for one clip.

        Args:
            cost: cost of a clip, counted at two bytes a value.
            bytes_per_value: of the precision.
        """
        traffic = cost.traffic_bytes * bytes_per_value / 2
        return cost.flops / self.flops_per_second[precision] + traffic / self.bytes_per_second


_ROOFLINE = "a roofline, not measured"
MACHINES = {
    machine.name: machine
    for machine in (
        Machine(
            name="h200",
            is_gpu=True,
            # convolutions at 650 TFLOP/s, and maps at the rate that makes eager passes 21.8 ms (docs/performance.md)
            flops_per_second={"float16": 650e12, "bfloat16": 650e12, "tf32": 250e12, "float32": 52e12},
            bytes_per_second=3.26e12,
            is_measured=False,
            source=_ROOFLINE,
        ),
        Machine(
            name="h100",
            is_gpu=True,
            flops_per_second={"float16": 600e12, "bfloat16": 600e12, "tf32": 230e12, "float32": 50e12},
            bytes_per_second=2.3e12,
            is_measured=False,
            source=_ROOFLINE,
        ),
        Machine(
            name="a100",
            is_gpu=True,
            flops_per_second={"float16": 220e12, "bfloat16": 220e12, "tf32": 100e12, "float32": 17e12},
            bytes_per_second=1.3e12,
            is_measured=False,
            source=_ROOFLINE,
        ),
    )
}
"""Machines by name."""


def find_machine(name: str) -> Machine:
    """Look up a machine, or read one that `benchmarks.machine` wrote.

    Args:
        name: a key of `MACHINES`, or the path of a JSON file.

    Raises:
        UserError: there is no such machine, or the file is none.
    """
    if name in MACHINES:
        return MACHINES[name]
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"--machine {name}: known are here, {', '.join(MACHINES)}, and files that `python -m benchmarks.machine` "
            "writes"
        )
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        return Machine(**record)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--machine {name} is no machine of `python -m benchmarks.machine`: {error}") from error


def decoding_seconds(codec: str, width: int, height: int, fps: float, seconds: float) -> float:
    """Core-seconds of decoding a stretch of video, its opening included."""
    rate = DECODING.get(codec, DECODING_OTHERS)
    return OPENING_SECONDS + rate * width * height * max(fps, 1.0) / 1e6 * seconds
