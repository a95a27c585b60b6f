"""Placement of a run: its device and precision, decided from the settings and from what PyTorch sees on the machines.

A GPU that Ray or this machine has is used, or the run is refused before it plans. Encoders never fall back to a CPU.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from vidshard.jobs.runtime.executor import ClusterExecutor, Executor, LocalExecutor
from vidshard.jobs.runtime.progress import warn
from vidshard.jobs.runtime.run_record import RunRecord
from vidshard.models.cost import MOST_VALUES, encoding_cost
from vidshard.models.tokenizer import TokenizerConfig
from vidshard.models.weights import count_parameters
from vidshard.pipeline.devices import DEFAULT_PRECISION, GpuReport, examine_gpu
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.schemas.errors import EXIT_AGAIN, UserError
from vidshard.schemas.fields import WorkerCount, without_effect
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.video import ClipSpec

Device = Literal["cuda", "cpu"]


class NoGpuError(UserError):
    """No GPU node joined the cluster in the time that the run waits for one; one may come later."""

    exit_code = EXIT_AGAIN


def with_gpus(
    executor: LocalExecutor | ClusterExecutor, run: TokenizeRun, console: Console
) -> LocalExecutor | ClusterExecutor:
    """The executor of a run once its cluster has a GPU, if the run waits for one (``--wait-for-gpus``).

    Raises:
        NoGpuError: none came in that time.
        UserError: no node can come, or none is wanted.
    """
    seconds = float(run.wait_for_gpus)
    if not seconds or executor.num_gpus:
        return executor
    if isinstance(executor, LocalExecutor) or not executor.can_grow:
        raise UserError(
            f"--wait-for-gpus {seconds:g} waits for nodes that join a cluster, and this run has {executor}: name the "
            "cluster with --ray-address, or leave --wait-for-gpus out"
        )
    if run.device == "cpu":
        raise UserError(f"--wait-for-gpus {seconds:g} and --device cpu exclude each other: leave one of them out")
    console.print(f"{executor}: waiting for a GPU node, for {seconds:g} s at most", highlight=False)
    found = executor.awaiting_gpus(seconds)
    if found is None:
        raise NoGpuError(
            f"--wait-for-gpus {seconds:g}: no GPU node joined {executor} in that time. `ray status` tells what its "
            "autoscaler waits for; give more time, or --device cpu"
        )
    return found


def place(resolved: ResolvedRun, record: RunRecord, executor: Executor, console: Console) -> ResolvedRun:
    """Decide device and precision of a run, and say so.

    Args:
        record: record of the output, whose precision a run takes that names none.

    Raises:
        UserError: a GPU was promised that PyTorch cannot use, one clip is too large for a GPU, or there are more
            encoders than fit the GPUs.
    """
    setting = resolved.run.device
    reports = [] if setting == "cpu" else executor.examine_gpus()
    device, why = _device_of(setting, reports, executor)
    precision, why_precision = _precision_of(resolved, record, device)
    for report in reports:
        problem = report.problem(precision)
        if problem is not None:
            raise UserError(f"the GPU of {report.node} cannot be used, though {executor} has it: {problem}")
    placed = resolved.placed(device=device, precision=precision)
    if device == "cuda":
        gpu_workers(placed.run.encode_workers, placed.run.gpus_per_worker, executor)  # both refuse what cannot work
        most_clips(placed)
    lacking = what_lacks(placed, executor)
    console.print(f"device {device}: {why}", highlight=False, markup=False)
    console.print(f"precision {precision}: {why_precision}", highlight=False, markup=False)
    _warn(placed, setting, console)
    modes = executor.modes | ({"gpu"} if device == "cuda" else set())
    for text in (*without_effect(resolved.run, modes), *lacking):
        warn(console, text)
    return placed


def _device_of(setting: str, reports: list[GpuReport], executor: Executor) -> tuple[Device, str]:
    if setting == "cpu":
        ignored = f"; {executor.num_gpus:g} GPUs are left alone" if executor.num_gpus else ""
        return "cpu", f"as --device says{ignored}"
    if executor.num_gpus > 0:
        if not reports:
            raise UserError(
                f"{executor} has GPUs, but none was free to be examined: wait for the other jobs, or give --device cpu"
            )
        named = {str(report): report for report in reports}
        return "cuda", "; ".join(named)
    if setting == "cuda":
        problem = examine_gpu().problem("float32") or (
            "Ray knows of none: start its nodes with --num-gpus, or give --wait-for-gpus TIME if they come later"
        )
        raise UserError(f"--device cuda, and {executor}: {problem}")
    return "cpu", "no GPU was found"


def _precision_of(resolved: ResolvedRun, record: RunRecord, device: Device) -> tuple[str, str]:
    if resolved.run.precision != "auto":
        said = "as --precision says"
        if resolved.run.precision == "tf32" and device == "cpu":
            said += "; a CPU computes it in float32, and only GPUs round"
        return resolved.run.precision, said
    stored = record.identity.get("precision")
    if stored not in (None, "auto"):
        return str(stored), "that of the output"
    if resolved.config.default_precision is not None:
        return resolved.config.default_precision, "the default of the tokenizer"
    return DEFAULT_PRECISION[device], f"the default on a {'GPU' if device == 'cuda' else 'CPU'}"


def _warn(placed: ResolvedRun, setting: str, console: Console) -> None:
    """Warn of what a placement costs: float32 on a GPU, or a GPU that is left idle."""
    if placed.run.device == "cuda" and placed.run.precision == "float32":
        warn(
            console,
            "float32 on a GPU is five to ten times slower than float16 by its roofline (docs/performance.md); "
            "--precision float16 and another --out: 0.7 % of the tokens differ",
        )
    if placed.run.device == "cpu" and setting == "auto" and has_nvidia_gpu():
        problem = examine_gpu().problem("float32")
        if problem is not None:
            warn(console, f"this machine's GPU is not used: {problem}")


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver of this machine lists a GPU, whatever PyTorch sees."""
    gpus = Path("/proc/driver/nvidia/gpus")
    return gpus.is_dir() and any(gpus.iterdir())


def gpu_workers(wanted: WorkerCount | None, share: float, executor: Executor) -> WorkerCount:
    """Number of encoders on GPUs: by default as many as fit, and more as nodes join.

    Raises:
        UserError: more are wanted from the start than fit: those would wait for ever.
    """
    fitting = sum(node.num_encoders(share) for node in executor.gpu_nodes)
    if fitting == 0:
        raise UserError(
            f"--gpus-per-worker {share:g}: no node of {executor} has so much of a GPU; give a smaller share"
        )
    if wanted is not None and wanted.least > fitting:
        raise UserError(
            f"--encode-workers {wanted}: {fitting} fit the GPUs of {executor} at --gpus-per-worker {share:g}; the "
            f"others would never start. For a cluster that grows give {fitting}..{wanted.most or ''}"
        )
    return wanted or WorkerCount(fitting, None if executor.can_grow else fitting)


_ENCODER_BYTES = 400 << 20
"""Memory of an encoder's process without weights and frames: Python, PyTorch, Ray's worker (measured: 390 MiB)."""


def what_lacks(placed: ResolvedRun, executor: Executor) -> list[str]:
    """Warnings of what the workers of a placed run lack on the machines that are there.

    Raises:
        UserError: they lack it, and none can join.
    """
    run, found = placed.run, []
    if "workers" not in executor.modes:
        return []
    if run.encode_workers is not None and run.device == "cpu":
        least = run.encode_workers.least
        fitting = max(1, executor.num_cpus)
        each = _ENCODER_BYTES + 4 * count_parameters(placed.config)
        memory = math.inf if executor.memory_bytes is None else executor.memory_bytes
        if memory // each < min(least, fitting):
            found.append(
                f"--encode-workers {run.encode_workers}: {least} encoders of {each / 2**30:.1f} GiB each do not fit "
                f"the {memory / 2**30:.1f} GiB of {executor}; give {max(1, int(memory // each))} at most"
            )
        elif least > fitting:
            found.append(
                f"--encode-workers {run.encode_workers}: {executor} has room for {fitting} encoders, one for each CPU; "
                f"give {fitting}" + (f", or {fitting}..{run.encode_workers.most or ''}" if executor.can_grow else "")
            )
    if executor.can_grow:
        return [f"{text}. Until nodes join, the run goes on with fewer" for text in found]
    if found:
        raise UserError("; ".join(found))
    if run.decode_workers is not None and run.decode_workers > executor.num_cpus:
        return [f"--decode-workers {run.decode_workers}: {executor} decodes at most {executor.num_cpus} videos at once"]
    return []


def most_clips(resolved: ResolvedRun) -> dict[tuple[int, int], int]:
    """Largest batch of each frame size (height, width) on a GPU, so that no map has more than 2^31 - 1 values.

    Raises:
        UserError: a map of a single clip has more.
    """
    return {(spec.height, spec.width): _most_clips(resolved, spec) for spec in resolved.clip_specs}


def _most_clips(resolved: ResolvedRun, spec: ClipSpec) -> int:
    height, width = spec.height, spec.width
    if resolved.tiling is not None:
        height, width = min(height, resolved.tiling.height), min(width, resolved.tiling.width)
    num_frames = resolved.config.valid_frames(max(resolved.encoded_frames, spec.num_frames))
    largest = encoding_cost(resolved.config, num_frames, height, width).largest_map
    if largest > MOST_VALUES:
        raise UserError(
            f"one clip of {spec.num_frames}x{spec.bucket} has a map of {largest:,} values in {resolved.config.name}, "
            f"and a GPU's kernels take {MOST_VALUES:,}: give a smaller --size or --frames, or a --tile-size"
        )
    return MOST_VALUES // largest


MATRIX_BOUND = 20
"""FLOPs per byte of memory traffic from which bfloat16 is faster on a CPU whose products are. Measured on an AMD EPYC
(Zen 4): 0.98 times as fast as float32 at 14 (``tiny``), 1.6 times at 30 (``fsq_causal_488_small``)."""
LEAST_SPEEDUP = 1.3
"""Speed of products in bfloat16, in that of float32, from which they pay for the casts between them."""


def bfloat16_pays(run: TokenizeRun, config: TokenizerConfig) -> bool:
    """Whether a placed run in float32 on CPUs would be faster in bfloat16, by this machine's CPU and the network."""
    if run.device != "cpu" or run.precision != "float32":
        return False
    cost = encoding_cost(config, *config.default_clip)
    return cost.flops >= MATRIX_BOUND * cost.traffic_bytes and bfloat16_speedup() >= LEAST_SPEEDUP


def bfloat16_speedup(side: int = 512, repeats: int = 4) -> float:
    """Speed of a product of matrices in bfloat16 on this machine's CPU, in that of float32; takes some 10 ms.

    The CPU's flags do not tell: an Intel Xeon that has AVX512-BF16 reaches 0.53.

    Args:
        side: rows and columns of the matrices.
        repeats: products of each dtype, of which the fastest counts.
    """
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for dtype in (*seconds,) * repeats:
        matrix = torch.ones(side, side, dtype=dtype)
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.float32] / seconds[torch.bfloat16]
