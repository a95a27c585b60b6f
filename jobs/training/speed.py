"""Speed of a training: throughput, time spent waiting, and MFU (the share of the devices' peak that is used)."""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from vidshard.models.training.state import TrainState
from vidshard.schemas.training import StageConfig


class Speed:
    """Throughput of a stage: clips and steps per second, share of time spent waiting for data, and MFU."""

    def __init__(
        self, flops_per_clip: float, peak_flops: float, workers: int, before: Mapping[str, float] | None = None
    ) -> None:
        """Start counting.

        Args:
            flops_per_clip: floating-point operations of a step per clip; 0.0 if unknown.
            peak_flops: peak FLOP/s of one worker; 0.0 if unknown.
            workers: number of workers.
            before: `record` of the checkpoint that the stage resumes from; empty or None for none.
        """
        self._flops, self._peak = flops_per_clip, peak_flops * workers
        self._began = time.perf_counter()
        self._now = _Count(began=self._began)
        self._whole: _Count | None = None
        self._before = {"seconds": 0.0, "counted_seconds": 0.0, "steps": 0, "clips": 0, "waited": 0.0, **(before or {})}

    @property
    def seconds(self) -> float:
        """Seconds of training that led to the present step, over all starts of the stage."""
        return self._before["seconds"] + time.perf_counter() - self._began

    def record(self) -> dict[str, float]:
        """Counts for a checkpoint, so that `seconds` and `overall` of a resumed stage are those of all its starts."""
        whole = self._counted()
        return {
            "seconds": self.seconds,
            "counted_seconds": time.perf_counter() - whole.began,
            "steps": whole.steps,
            "clips": whole.clips,
            "waited": whole.waited,
        }

    def _counted(self) -> _Count:
        """Steps that `overall` counts, those of earlier starts included."""
        own, before = self._whole or _Count(began=time.perf_counter()), self._before
        return _Count(
            began=own.began - before["counted_seconds"],
            steps=own.steps + int(before["steps"]),
            clips=own.clips + int(before["clips"]),
            waited=own.waited + before["waited"],
        )

    def step(self, clips: int, wait_seconds: float) -> None:
        """Count a step: clips of the batch over all workers, and seconds that this worker waited for its part."""
        for count in (self._now, self._whole):
            if count is not None:
                count.steps += 1
                count.clips += clips
                count.waited += wait_seconds

    def recent(self) -> dict[str, float]:
        """Throughput since the last call; ``mfu``, the share of the devices' peak, only where it is known."""
        figures = self._figures(self._now)
        self._now = _Count(began=time.perf_counter())
        if self._whole is None:
            self._whole = _Count(began=time.perf_counter())
        return figures

    def overall(self) -> dict[str, float]:
        """Throughput since the first call of `recent`, and of earlier starts since theirs; empty before.

        Until then pipelines fill and kernels are chosen.
        """
        whole = self._counted()
        return self._figures(whole) if whole.steps else {}

    def _figures(self, count: _Count) -> dict[str, float]:
        seconds = max(time.perf_counter() - count.began, 1e-9)
        figures = {
            "clips_per_second": count.clips / seconds,
            "steps_per_second": count.steps / seconds,
            "waiting": count.waited / seconds,
        }
        if self._flops and self._peak:
            figures["mfu"] = figures["clips_per_second"] * self._flops / self._peak
        return figures


@dataclass(kw_only=True)
class _Count:
    began: float
    steps: int = 0
    clips: int = 0
    waited: float = 0.0


def flops_per_clip(state: TrainState, stage: StageConfig) -> float:
    """Floating-point operations of the tokenizer per clip of a step: one forward pass, and two for the backward pass.

    Parts of the network that are not trained count once. The usual count for MFU leaves out the networks of the losses
    and what activation checkpointing computes again. 0.0 where counting would take long (a large model on a CPU).
    """
    if state.device.type == "cpu" and sum(p.numel() for p in state.tokenizer.parameters()) > 20_000_000:
        return 0.0
    x_BCTHW = torch.zeros(1, 3, stage.frames, *stage.size, device=state.device)
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        state.generator(x_BCTHW)
    counts = {name: sum(by_operator.values()) for name, by_operator in whole.get_flop_counts().items()}
    frozen = tuple(
        f"tokenizer.{name}"
        for name, part in state.tokenizer.named_children()
        if not any(parameter.requires_grad for parameter in part.parameters())
    )
    forward_only = sum(count for name, count in counts.items() if frozen and name.endswith(frozen))
    return float(3 * whole.get_total_flops() - 2 * forward_only)


_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12, "B200": 2250e12}
"""Peak dense bfloat16 throughput in FLOP/s, as the vendors state it (V100: float16)."""


def peak_flops(device: torch.device, precision: str) -> float:
    """Peak throughput of a device in FLOP/s, measured by matrix products on a CPU; 0.0 for an unknown GPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((peak for known, peak in _PEAKS.items() if known in name), 0.0)
        return peak if precision == "bfloat16" else peak / 2
    best = math.inf
    # some CPUs have units for bfloat16, others are slower with it; the faster type counts
    for dtype in (torch.float32, torch.bfloat16)[: 2 if precision == "bfloat16" else 1]:
        a = torch.ones(512, 512, dtype=dtype)
        for _ in range(8):
            began = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - began)
    return 2 * 512**3 / best
