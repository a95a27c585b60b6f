"""First measurements on a GPU: agreement, speed by operator, batch size and precision, transfers, memory and faults.

    python -m benchmarks.gpu [--json gpu.json] [--minutes 11] [--only SECTION,...]

One command for one GPU and at most eleven minutes. It needs torch, numpy, pyarrow, pydantic, safetensors and rich. Ray
and PyAV are not needed, except for the section ``job``. Sections run in this order: versions, agreement, precisions,
batches, operators, fusion, compile, transfers, memory, faults, job. One that has no time left, or cannot run, says so
in the table. The JSON file is written after every section, so that an interrupted run leaves what it measured.

Times are medians of CUDA events after a warm-up, with the settings that production has (``make_reproducible``). FLOPs
and bytes are counted by `vidshard.models.cost`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import Row, report
from vidshard.models.cost import Cost, encoding_cost
from vidshard.models.tokenizer import frames_to_input, get_preset
from vidshard.models.vidtok import fused
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import SHIPPED, load_tokenizer, shipped_weights
from vidshard.pipeline.devices import end_process, examine_gpu, is_gpu_fault, is_out_of_memory, make_reproducible
from vidshard.pipeline.encode import encode_clips

LARGE = "fsq_causal_488_32768"
NUM_FRAMES, SIDE = 17, 256
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense float16 and bfloat16 peaks by the vendor's data sheets, by part of the GPU's name."""
PEAK_BYTES = {"H100": 3.35e12, "H200": 4.8e12, "GH200": 4.8e12, "A100": 2.0e12, "B200": 8.0e12}


class Bench:
    """Rows measured so far, and the time that is left."""

    def __init__(self, minutes: float, json_path: str | None) -> None:
        self.rows: list[Row] = []
        self._json_path = json_path
        self._end = time.monotonic() + 60 * minutes

    @property
    def seconds_left(self) -> float:
        """Seconds until the time is over."""
        return self._end - time.monotonic()

    def add(self, section: str, what: str, value: float | str, unit: str, note: str = "") -> None:
        """Add one row, print it, and write the file."""
        shown = value if isinstance(value, str) else float(f"{value:.4g}")
        self.rows.append({"section": section, "what": what, "value": shown, "unit": unit, "note": note})
        print(f"{section}: {what}: {shown} {unit} {note}".rstrip(), flush=True)
        if self._json_path:
            Path(self._json_path).write_text(json.dumps({"benchmark": "gpu", "rows": self.rows}, indent=2) + "\n")


def main() -> None:
    """Run the sections and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.add_argument("--minutes", type=float, default=11.0, help="time after which no section begins")
    parser.add_argument("--only", default="", metavar="SECTIONS", help="comma-separated sections; all without it")
    parser.add_argument("--fault", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fault:
        provoke_fault()
    if not torch.cuda.is_available():
        sys.exit(f"benchmarks.gpu needs a GPU: {examine_gpu().problem('float32')}")
    bench = Bench(arguments.minutes, arguments.json)
    only = [name for name in arguments.only.split(",") if name]
    for name, (section, seconds) in SECTIONS.items():
        if only and name not in only:
            continue
        if bench.seconds_left < seconds:
            bench.add(name, "skipped", "-", "", f"takes some {seconds} s, {bench.seconds_left:.0f} s are left")
            continue
        try:
            section(bench)
        except Exception as error:  # noqa: BLE001  one section must not take the others with it
            bench.add(name, "failed", "-", "", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            torch.cuda.empty_cache()
    report("gpu", bench.rows, None)


def versions(bench: Bench) -> None:
    """Versions, and whether a run would take this GPU in every precision."""
    gpu = examine_gpu()
    bench.add("versions", str(gpu), "-", "")
    for precision in DTYPES:
        bench.add("versions", f"usable in {precision}", gpu.problem(precision) or "yes", "")
    free, total = torch.cuda.mem_get_info()
    bench.add("versions", "free memory", free / 2**30, "GiB", f"of {total / 2**30:.0f}")
    make_reproducible("cuda", torch.get_num_threads(), "float16")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    bench.add("versions", "8192^3 float16 product", 2 * 8192**3 / seconds_of(lambda: a @ a) / 1e12, "TFLOP/s")
    big = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    bench.add("versions", "copy on the device", 2 * big.numel() / seconds_of(big.clone) / 1e12, "TB/s")


def agreement(bench: Bench) -> None:
    """Tokens of the trained model of the package on this GPU beside those of float32 on the CPU."""
    clips = natural_clips(20, 128)
    tokens: dict[str, np.ndarray] = {}
    for device, precision in [("cpu", "float32"), *(("cuda", name) for name in DTYPES)]:
        model = trained(device, precision)
        encoded = [model.encode(to_input(model, clips[at : at + 4])).tokens for at in range(0, len(clips), 4)]
        tokens[f"{device} {precision}"] = torch.cat([t for t in encoded if t is not None]).cpu().numpy()
    expected = tokens.pop("cpu float32")
    for name, found in tokens.items():
        equal = (found == expected).reshape(len(clips), -1).mean(axis=1)
        bench.add("agreement", f"{name}: equal tokens", 100 * equal.mean(), "%", f"worst clip {equal.min():.2%}")


def precisions(bench: Bench) -> None:
    """Speed of the large encoder and of the small one in every precision, eight clips a pass."""
    for name in (LARGE, SHIPPED):
        for precision in DTYPES:
            model = random_model(name, precision)
            clips_per_second(bench, "precisions", model, precision, 8)
            del model


def batches(bench: Bench) -> None:
    """Speed of the large encoder in float16 by batch size, and memory of a clip."""
    model = random_model(LARGE, "float16")
    for batch_size in (1, 4, 16, 32):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        clips_per_second(bench, "batches", model, "float16", batch_size)
        peak = (torch.cuda.max_memory_allocated() - before) / batch_size
        bench.add("batches", f"B={batch_size}: peak memory of a clip", peak / 2**30, "GiB")


def operators(bench: Bench) -> None:
    """Time of each operator of the large encoder, with the bytes that it moves."""
    model = random_model(LARGE, "float16")
    x_BCTHW = to_input(model, noise(8))
    cost = encoding_cost(model.config, NUM_FRAMES, SIDE, SIDE, torch.float16)
    model.encode(x_BCTHW)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        model.encode(x_BCTHW)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in events[:14]:
        milliseconds = event.self_device_time_total / 1000 / 8
        if milliseconds > 0.01:
            bench.add("operators", event.key[:70], milliseconds, "ms/clip", f"{event.count} calls a pass")
    for operator, moved in list(cost.bytes_by_operator.items())[:6]:
        bench.add("operators", f"{operator}: bytes by the count", moved / 1e9, "GB/clip")
    widths = {channels: norm_speed(channels) for channels in (128, 256, 512)}
    for channels, speed in widths.items():
        bench.add("operators", f"layer norm of {channels} channels", speed / 1e12, "TB/s", share_of(PEAK_BYTES, speed))


def norm_speed(channels: int) -> float:
    """Bytes per second of PyTorch's layer norm over the channels of a large map."""
    x = torch.randn((1 << 28) // channels, channels, device="cuda", dtype=torch.float16)
    norm = torch.nn.LayerNorm(channels, device="cuda", dtype=torch.float16)
    return 2 * x.numel() * 2 / seconds_of(lambda: norm(x))


def fusion(bench: Bench) -> None:
    """The kernel of norm, SiLU and padding: equal tokens, and speed with and without it."""
    for name in (LARGE, SHIPPED):
        model = random_model(name, "float16")
        x_BCTHW = to_input(model, noise(8))
        with_kernel = model.encode(x_BCTHW).tokens
        original = fused.is_used
        fused.is_used = lambda *_: False
        try:
            without = model.encode(x_BCTHW).tokens
            seconds = seconds_of(partial(model.encode, x_BCTHW)) / 8
        finally:
            fused.is_used = original
        assert with_kernel is not None
        assert without is not None
        equal = 100 * float((with_kernel == without).float().mean())
        bench.add("fusion", f"{name}: equal tokens", equal, "%")
        bench.add("fusion", f"{name}: without the kernel", 1 / seconds, "clips/s")


def compiled(bench: Bench) -> None:
    """The large encoder through ``torch.compile``: seconds to compile, speed, and equal tokens."""
    model = random_model(LARGE, "float16")
    x_BCTHW = to_input(model, noise(8))
    expected = model.encode(x_BCTHW).tokens
    model.encoder_output = torch.compile(model.encoder_output, dynamic=False)  # type: ignore[method-assign]
    started = time.perf_counter()
    found = model.encode(x_BCTHW).tokens
    torch.cuda.synchronize()
    bench.add("compile", "first pass", time.perf_counter() - started, "s")
    assert expected is not None
    assert found is not None
    bench.add("compile", "equal tokens", 100 * float((expected == found).float().mean()), "%")
    clips_per_second(bench, "compile", model, "float16", 8)


def transfers(bench: Bench) -> None:
    """The encoder as production calls it, with frames from memory and tokens to it, beside the bare passes."""
    for name in (LARGE, SHIPPED):
        model = random_model(name, "float16")
        payload = model.config.payload(NUM_FRAMES, SIDE, SIDE)
        clips = list(noise(8 * 8))
        encode_clips(model, clips[:16], payload, batch_size=8)
        torch.cuda.synchronize()
        started = time.perf_counter()
        encode_clips(model, clips, payload, batch_size=8)
        speed = len(clips) / (time.perf_counter() - started)
        x_BCTHW = to_input(model, noise(8))
        bare = 8 / seconds_of(partial(model.encode, x_BCTHW))
        bench.add("transfers", f"{name}: with transfers", speed, "clips/s", f"{speed / bare:.0%} of the passes alone")


def memory(bench: Bench) -> None:
    """A batch that does not fit: the exception must be recognized, and half of it fit in the end."""
    model = random_model(LARGE, "float16")
    total = torch.cuda.get_device_properties().total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 8 * 2**30) / total)
    batch_size = 32
    try:
        while batch_size:
            try:
                model.encode(to_input(model, noise(batch_size)))
                break
            except RuntimeError as error:
                known = is_out_of_memory(error, num_clips=batch_size)
                text = " ".join(str(error).split())[:120]
                bench.add("memory", f"B={batch_size} in 8 GiB", "recognized" if known else "NOT RECOGNIZED", "", text)
                batch_size //= 2
            torch.cuda.empty_cache()
        bench.add("memory", "largest batch in 8 GiB", batch_size, "clips")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def faults(bench: Bench) -> None:
    """A fault of the GPU in another process: the exception must be recognized."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--fault"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.strip().splitlines()
    bench.add("faults", "an index out of range in a kernel", said[-1] if said else "NOT RECOGNIZED", "")


def provoke_fault() -> None:
    """Let a kernel fail, and say whether its exception is recognized as a fault."""
    try:
        torch.zeros(4, device="cuda")[torch.tensor([1 << 20], device="cuda")].sum().item()
    except RuntimeError as error:
        known = "recognized" if is_gpu_fault(error) else "NOT RECOGNIZED"
        print(f"{known}: {type(error).__name__}: {' '.join(str(error).split())[:100]}", flush=True)
    else:
        print("NOT RECOGNIZED: nothing was raised", flush=True)
    end_process(0)


def job(bench: Bench) -> None:
    """The whole command on generated videos, if Ray and PyAV are there."""
    try:
        import av  # noqa: F401
        import ray  # noqa: F401
    except ImportError as error:
        bench.add("job", "skipped", "-", "", f"needs {error.name}")
        return
    from fractions import Fraction

    from benchmarks.pipeline import make_corpus
    from vidshard.schemas.video import ClipSpec

    with tempfile.TemporaryDirectory() as folder:
        spec = ClipSpec(fps=Fraction(8), num_frames=NUM_FRAMES, height=SIDE, width=SIDE)
        videos = make_corpus(Path(folder) / "videos", 320, spec)
        command = [sys.executable, "-m", "vidshard.jobs.cli", "tokenize", str(videos[0].parent)]
        command += ["--out", f"{folder}/tokens", "--tokenizer", LARGE, "--random-weights", "0"]
        subprocess.run(command, check=True, timeout=max(60.0, bench.seconds_left), stdout=sys.stderr)
        summary = json.loads((Path(folder) / "tokens" / "summary.json").read_text())
    seconds = summary["seconds"]
    busy, wait = seconds["encoding, all workers"], seconds["encoders waiting for frames"]
    bench.add("job", "while tokenizing", summary["written"]["num_clips"] / seconds["tokenize"], "clips/s")
    bench.add("job", "encoders busy", 100 * busy / (busy + wait), "%")


SECTIONS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "versions": (versions, 20),
    "agreement": (agreement, 60),
    "precisions": (precisions, 60),
    "batches": (batches, 30),
    "operators": (operators, 30),
    "fusion": (fusion, 30),
    "compile": (compiled, 150),
    "transfers": (transfers, 20),
    "memory": (memory, 20),
    "faults": (faults, 30),
    "job": (job, 120),
}
"""Sections, and the seconds that each may take."""


def random_model(name: str, precision: str) -> VidTok:
    """A model with seeded random weights on the GPU, and the flags of its precision."""
    make_reproducible("cuda", torch.get_num_threads(), precision)
    model = load_tokenizer(get_preset(name), None, seed=0, device="cuda", dtype=DTYPES[precision])
    assert isinstance(model, VidTok)
    return model


def trained(device: str, precision: str) -> VidTok:
    """The trained model of the package."""
    make_reproducible(device, torch.get_num_threads(), precision)
    model = load_tokenizer(get_preset(SHIPPED), shipped_weights(), device=device, dtype=DTYPES[precision])
    assert isinstance(model, VidTok)
    return model


def clips_per_second(bench: Bench, section: str, model: VidTok, precision: str, batch_size: int) -> None:
    """Measure passes of one batch size, and add speed and utilization."""
    x_BCTHW = to_input(model, noise(batch_size))
    seconds = seconds_of(lambda: model.encode(x_BCTHW)) / batch_size
    cost: Cost = encoding_cost(model.config, NUM_FRAMES, SIDE, SIDE, DTYPES[precision])
    note = f"{1000 * seconds:.2f} ms, {cost.flops / seconds / 1e12:.0f} TFLOP/s"
    note += f" ({share_of(PEAK_FLOPS, cost.flops / seconds)}), {cost.traffic_bytes / seconds / 1e12:.2f} TB/s counted"
    bench.add(section, f"{model.config.name} {precision} B={batch_size}", 1 / seconds, "clips/s", note)


def share_of(peaks: dict[str, float], value: float) -> str:
    """Share of this GPU's peak, in words."""
    name = torch.cuda.get_device_name()
    peak = next((peak for part, peak in sorted(peaks.items(), key=lambda item: -len(item[0])) if part in name), None)
    return "peak unknown" if peak is None else f"{value / peak:.1%} of the peak"


def seconds_of(run: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of a call on the GPU, after two warm-up calls."""
    with torch.inference_mode():
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        return statistics.median(_timed(run, repeats))


def _timed(run: Callable[[], object], repeats: int) -> Iterator[float]:
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        yield begin.elapsed_time(end) / 1000


def to_input(model: VidTok, clips: np.ndarray) -> Tensor:
    """Input of a model: (B, 3, T, H, W) on its device."""
    return frames_to_input(torch.from_numpy(clips).to(model.device), model.dtype)


def noise(count: int) -> np.ndarray:
    """Clips of noise, whose values do not matter: uint8 (count, T, H, W, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, NUM_FRAMES, SIDE, SIDE, 3), np.uint8)


def natural_clips(count: int, side: int) -> np.ndarray:
    """Moving smooth pictures with noise of a camera, seeded: uint8 (count, T, side, side, 3)."""
    random = np.random.default_rng(1)
    clips = []
    for _ in range(count):
        spectrum = np.fft.fft2(random.standard_normal((2 * side, 2 * side, 3)), axes=(0, 1))
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(2 * side), np.fft.fftfreq(2 * side))) + 1 / side
        picture = np.fft.ifft2(spectrum / frequency[..., None] ** 1.5, axes=(0, 1)).real
        picture = 128 + 60 * picture / picture.std()
        step = random.integers(-3, 4, 2)
        frames = [np.roll(picture, t * step, axis=(0, 1))[:side, :side] for t in range(NUM_FRAMES)]
        clips.append(np.stack(frames) + random.normal(0, 2, (NUM_FRAMES, side, side, 3)))
    return np.clip(np.stack(clips), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
