"""First measurements on a GPU: agreement, speed by operator, batch size and precision, transfers, memory and faults.

    python -m benchmarks.gpu [--json gpu.json] [--minutes 11] [--only SECTION,...] [--quick] [--dry]

One command for one GPU and at most eleven minutes. It needs torch, numpy, pyarrow, pydantic, safetensors and rich. Ray
and PyAV are not needed, except for the section ``job``. Sections run in this order: versions, agreement, fusion,
precisions, decoder, batches, operators, transfers, memory, faults, compile, job. One that has no time left, fails,
hangs or ends its process says so in the table, and the others go on. The JSON file is written after every row.

``--quick`` measures fewer precisions and batches. ``--dry`` runs the sections that need no GPU on this CPU, with the
smallest model: its figures mean nothing, but it shows that the script works.

Times are medians of CUDA events after a warm-up, with the settings that production has (``make_reproducible``). FLOPs
and bytes are counted by `vidshard.models.cost`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import report
from benchmarks.sections import Rows, Section, Supervisor, run_here
from vidshard.models.cost import Cost, decoding_cost, encoding_cost
from vidshard.models.tokenizer import frames_to_input, get_preset
from vidshard.models.vidtok import fused
from vidshard.models.vidtok.model import VidTok
from vidshard.models.vidtok.prepared import prepare_passes
from vidshard.models.weights import DEFAULT, load_tokenizer, shipped_weights
from vidshard.pipeline.compiled import compile_encoder
from vidshard.pipeline.devices import (
    end_process,
    examine_gpu,
    free_caches,
    is_gpu_fault,
    is_out_of_memory,
    make_reproducible,
)
from vidshard.pipeline.encode import encode_clips

IS_DRY = bool(os.environ.get("VIDSHARD_BENCH_DRY"))
"""Whether everything runs on this CPU, with small clips of the smallest model; set by ``--dry`` for child processes."""
IS_QUICK = IS_DRY or bool(os.environ.get("VIDSHARD_BENCH_QUICK"))
DEVICE = "cpu" if IS_DRY else "cuda"
LARGE = "tiny" if IS_DRY else "fsq_causal_488_32768"
SMALL = "tiny" if IS_DRY else DEFAULT
NUM_FRAMES, SIDE = (5, 32) if IS_DRY else (17, 256)
BATCH = 2 if IS_DRY else 8
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense float16 and bfloat16 peaks by the vendor's data sheets, by part of the GPU's name."""
PEAK_BYTES = {"H100": 3.35e12, "H200": 4.8e12, "GH200": 4.8e12, "A100": 2.0e12, "B200": 8.0e12}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sections and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.add_argument("--minutes", type=float, default=11.0, help="time after which no section begins")
    parser.add_argument("--only", default="", metavar="SECTIONS", help="comma-separated sections; all without it")
    parser.add_argument("--quick", action="store_true", help="fewer precisions and batches")
    parser.add_argument("--dry", action="store_true", help="try the script on this CPU; its figures mean nothing")
    parser.add_argument("--fault", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", metavar="SECTIONS", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.fault:
        provoke_fault()
    if options.child:
        with torch.inference_mode():
            run_here(SECTIONS, options.child.split(","), after_failure=free_caches)
        return
    names = options.only.split(",") if options.only else list(SECTIONS)
    unknown = sorted(set(names) - set(SECTIONS))
    if unknown:
        parser.error(f"there is no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if options.dry:
        os.environ["VIDSHARD_BENCH_DRY"] = "1"
        names = [name for name in names if not SECTIONS[name].needs_gpu]
    elif not torch.cuda.is_available():
        sys.exit(f"benchmarks.gpu needs a GPU, or --dry: {examine_gpu().problem('float32')}")
    if options.quick:
        os.environ["VIDSHARD_BENCH_QUICK"] = "1"
    command = [sys.executable, "-m", "benchmarks.gpu", "--child"]
    supervisor = Supervisor("gpu", command, options.minutes, options.json)
    report("gpu", supervisor.supervise({name: SECTIONS[name].seconds for name in names}), None)


def versions(bench: Rows) -> None:
    """Versions, and whether a run would take this GPU in every precision."""
    gpu = examine_gpu()
    bench.add("versions", "GPU", "-", "", str(gpu))
    for precision in DTYPES:
        problem = gpu.problem(precision)
        bench.add("versions", f"usable in {precision}", "no" if problem else "yes", "", problem or "")
    if not IS_DRY:
        free, total = torch.cuda.mem_get_info()
        bench.add("versions", "free memory", free / 2**30, "GiB", f"of {total / 2**30:.0f}")
    bench.add("versions", "Triton", "yes" if fused.HAS_TRITON else "NO: the fused kernels are not used", "")
    make_reproducible(DEVICE, torch.get_num_threads(), "float16")
    side = 64 if IS_DRY else 8192
    a = torch.randn(side, side, device=DEVICE, dtype=torch.float16)
    bench.add("versions", f"{side}^3 float16 product", 2 * side**3 / seconds_of(lambda: a @ a) / 1e12, "TFLOP/s")
    big = torch.empty(1 << (20 if IS_DRY else 31), dtype=torch.uint8, device=DEVICE)
    bench.add("versions", "copy on the device", 2 * big.numel() / seconds_of(big.clone) / 1e12, "TB/s")


def agreement(bench: Rows) -> None:
    """Tokens of the trained model of the package on this GPU beside those of float32 on the CPU."""
    clips = natural_clips(4, 64) if IS_DRY else natural_clips(20, 128)
    tokens: dict[str, np.ndarray] = {}
    for device, precision in [("cpu", "float32"), *((DEVICE, name) for name in DTYPES)]:
        model = trained(device, precision)
        encoded = [model.encode(to_input(model, clips[at : at + 4])).tokens for at in range(0, len(clips), 4)]
        tokens[f"{'reference' if not tokens else device} {precision}"] = (
            torch.cat([t for t in encoded if t is not None]).cpu().numpy()
        )
    expected = tokens.pop("reference float32")
    for name, found in tokens.items():
        equal = (found == expected).reshape(len(clips), -1).mean(axis=1)
        bench.add("agreement", f"{name}: equal tokens", 100 * equal.mean(), "%", f"worst clip {equal.min():.2%}")


def precisions(bench: Rows) -> None:
    """Speed of the large encoder and of the small one in every precision, eight clips a pass."""
    for name, precision in [(n, p) for p in ("float16", "bfloat16", "tf32", "float32") for n in (LARGE, SMALL)]:
        if not IS_QUICK or precision == "float16":
            clips_per_second(bench, "precisions", random_model(name, precision), precision, BATCH)


def decoder(bench: Rows) -> None:
    """Speed of the large decoder in float16 with each choice of kernels, and how far the pictures differ."""
    model = random_model(LARGE, "float16")
    shape = model.config.latent_shape(NUM_FRAMES, SIDE, SIDE)
    z_BCTHW = torch.rand(BATCH, model.config.latent_channels, *shape, device=DEVICE).to(model.dtype) * 2 - 1
    expected = None
    for what, kernels in KERNELS.items():
        count = partial(decoding_cost, model.config, NUM_FRAMES, SIDE, SIDE, torch.float16)
        cost = count(fuses_convolutions=kernels == "convolution")
        with chosen_kernels(model, kernels):
            x_BCTHW = model.decode(z_BCTHW)
            seconds = seconds_of(partial(model.decode, z_BCTHW)) / BATCH
        bench.add("decoder", what, 1 / seconds, "clips/s", rates(cost, seconds))
        if expected is not None:
            bench.add("decoder", "largest difference", float((x_BCTHW - expected).abs().max()), "of [-1, 1]")
        expected = x_BCTHW


def batches(bench: Rows) -> None:
    """Speed of the large encoder in float16 by batch size, and memory of a clip."""
    model = random_model(LARGE, "float16")
    for batch_size in (1, 2) if IS_DRY else (1, 16) if IS_QUICK else (1, 4, 16, 32):
        if not IS_DRY:
            torch.cuda.reset_peak_memory_stats()
        before = 0 if IS_DRY else torch.cuda.memory_allocated()
        clips_per_second(bench, "batches", model, "float16", batch_size)
        if not IS_DRY:
            peak = (torch.cuda.max_memory_allocated() - before) / batch_size
            bench.add("batches", f"B={batch_size}: peak memory of a clip", peak / 2**30, "GiB")


def operators(bench: Rows) -> None:
    """Time of each operator of the large encoder, with the bytes that it moves."""
    model = random_model(LARGE, "float16")
    x_BCTHW = to_input(model, noise(BATCH))
    cost = encoding_cost(model.config, NUM_FRAMES, SIDE, SIDE, torch.float16)
    model.encode(x_BCTHW)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not IS_DRY:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        model.encode(x_BCTHW)
        synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -device_time(event))
    for event in events[:14]:
        milliseconds = device_time(event) / 1000 / BATCH
        if milliseconds > 0.01:
            bench.add("operators", event.key[:70], milliseconds, "ms/clip", f"{event.count} calls a pass")
    for operator, moved in list(cost.bytes_by_operator.items())[:6]:
        bench.add("operators", f"{operator}: bytes by the count", moved / 1e9, "GB/clip")
    for channels in (128, 256, 512):
        for what, moved, seconds in norm_speeds(channels):
            speed = moved / seconds
            note = share_of(PEAK_BYTES, speed)
            bench.add("operators", f"{what} of {channels} channels", speed / 1e12, "TB/s", note)


def device_time(event: object) -> float:
    """Microseconds that an operator's own kernels took; on a CPU its own time."""
    name = "self_cpu_time_total" if IS_DRY else "self_device_time_total"
    return float(getattr(event, name))


def norm_speeds(channels: int) -> Iterator[tuple[str, int, float]]:
    """Bytes and seconds of norms over a large map: PyTorch's, and the fused kernels' with SiLU and with a sum."""
    rows = (1 << (16 if IS_DRY else 28)) // channels
    x = torch.randn(1, 1, rows, 1, channels, device=DEVICE, dtype=torch.float16)
    norm = torch.nn.LayerNorm(channels, device=DEVICE, dtype=torch.float16)
    size = 2 * x.numel()
    yield "layer norm", 2 * size, seconds_of(lambda: norm(x))
    if IS_DRY or not fused.HAS_TRITON:
        return
    settings = (norm.weight, norm.bias, 1e-6, True, 0, False)
    yield "fused norm and SiLU", 2 * size, seconds_of(lambda: fused.norm_silu(x, *settings))
    other = torch.zeros_like(x)
    yield "fused sum, norm and SiLU", 4 * size, seconds_of(lambda: fused.add_norm_silu(x, other, *settings))


KERNELS = {
    "with the kernels": "fused",
    "without": "none",
    "with norms in the convolutions": "convolution",
}
"""Choices of kernels, in words and as `chosen_kernels` takes them: ``--gpu-kernels``, or PyTorch's operators alone."""


def fusion(bench: Rows) -> None:
    """The kernels between and in convolutions: equal tokens, and speed with each choice and precision."""
    for name, precision in ((LARGE, "float16"), (LARGE, "bfloat16"), (SMALL, "float16")):
        model = random_model(name, precision)
        x_BCTHW = to_input(model, noise(BATCH))
        expected = None
        for what, kernels in KERNELS.items():
            with chosen_kernels(model, kernels):
                tokens = model.encode(x_BCTHW).tokens
                clips_per_second(bench, "fusion", model, precision, BATCH, what)
            assert tokens is not None
            if expected is None:
                expected = tokens
            else:
                equal = 100 * float((tokens == expected).float().mean())
                bench.add("fusion", f"{name} {precision} {what}: tokens equal to those of the kernels", equal, "%")


@contextmanager
def chosen_kernels(model: VidTok, kernels: str) -> Iterator[None]:
    """Compute with a choice of kernels: ``fused``, ``convolution``, or PyTorch's own operators for ``none``."""
    original = fused.is_used
    if kernels == "none":
        fused.is_used = lambda *_: False
    model.encoder.fuses_convolutions = model.decoder.fuses_convolutions = kernels == "convolution"
    try:
        yield
    finally:
        fused.is_used = original
        model.encoder.fuses_convolutions = model.decoder.fuses_convolutions = False


def compiled(bench: Rows) -> None:
    """The large encoder through ``torch.compile``: seconds to compile, speed, and equal tokens."""
    model = random_model(LARGE, "float16")
    x_BCTHW = to_input(model, noise(BATCH))
    expected = model.encode(x_BCTHW).tokens
    compile_encoder(model, backend="eager" if IS_DRY else "inductor")
    started = time.perf_counter()
    found = model.encode(x_BCTHW).tokens
    synchronize()
    bench.add("compile", "first pass", time.perf_counter() - started, "s")
    assert expected is not None
    assert found is not None
    bench.add("compile", "equal tokens", 100 * float((expected == found).float().mean()), "%")
    clips_per_second(bench, "compile", model, "float16", BATCH)


def transfers(bench: Rows) -> None:
    """The encoder as production calls it, with frames from memory and tokens to it, beside the bare passes."""
    for name in (LARGE, SMALL):
        model = random_model(name, "float16")
        payload = model.config.payload(NUM_FRAMES, SIDE, SIDE)
        clips = list(noise(8 * BATCH))
        encode_clips(model, clips[: 2 * BATCH], payload, batch_size=BATCH)
        synchronize()
        started = time.perf_counter()
        encode_clips(model, clips, payload, batch_size=BATCH)
        speed = len(clips) / (time.perf_counter() - started)
        x_BCTHW = to_input(model, noise(BATCH))
        bare = BATCH / seconds_of(partial(model.encode, x_BCTHW))
        bench.add("transfers", f"{name}: with transfers", speed, "clips/s", f"{speed / bare:.0%} of the passes alone")


def memory(bench: Rows) -> None:
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


def faults(bench: Rows) -> None:
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


def job(bench: Rows) -> None:
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
        subprocess.run(command, check=True, timeout=300, stdout=sys.stderr)
        summary = json.loads((Path(folder) / "tokens" / "summary.json").read_text())
    seconds = summary["seconds"]
    busy, wait = seconds["encoding, all workers"], seconds["encoders waiting for frames"]
    bench.add("job", "while tokenizing", summary["written"]["num_clips"] / seconds["tokenize"], "clips/s")
    bench.add("job", "encoders busy", 100 * busy / (busy + wait), "%")


SECTIONS = {
    "versions": Section(versions, 20),
    "agreement": Section(agreement, 45),
    "fusion": Section(fusion, 60),
    "precisions": Section(precisions, 45),
    "decoder": Section(decoder, 40),
    "batches": Section(batches, 25),
    "operators": Section(operators, 30),
    "transfers": Section(transfers, 20),
    "memory": Section(memory, 20, needs_gpu=True),
    "faults": Section(faults, 30, needs_gpu=True),
    "compile": Section(compiled, 120),
    "job": Section(job, 120, needs_gpu=True),
}
"""Sections in their order: the most important ones first."""


@lru_cache(maxsize=2)
def seeded(name: str) -> VidTok:
    """A model with seeded random weights in float32 on the CPU; making 158 million of them takes seconds."""
    model = load_tokenizer(get_preset(name), None, seed=0)
    assert isinstance(model, VidTok)
    return model


def random_model(name: str, precision: str) -> VidTok:
    """A model with seeded random weights on the GPU as production has it, and the flags of its precision."""
    make_reproducible(DEVICE, torch.get_num_threads(), precision)
    model = copy.deepcopy(seeded(name)).set_precision(DTYPES[precision]).to(DEVICE)
    prepare_passes(model)
    return model


def trained(device: str, precision: str) -> VidTok:
    """The trained model of the package."""
    make_reproducible(device, torch.get_num_threads(), precision)
    model = load_tokenizer(get_preset(DEFAULT), shipped_weights(), device=device, dtype=DTYPES[precision])
    assert isinstance(model, VidTok)
    return model


def clips_per_second(
    bench: Rows, section: str, model: VidTok, precision: str, batch_size: int, kernels: str = ""
) -> None:
    """Measure passes of one batch size, and add speed and utilization.

    Args:
        kernels: the kernels that the model has been given, in the words of `KERNELS`.
    """
    x_BCTHW = to_input(model, noise(batch_size))
    seconds = seconds_of(lambda: model.encode(x_BCTHW)) / batch_size
    fuses_convolutions = model.encoder.fuses_convolutions
    dtype = DTYPES[precision]
    cost = encoding_cost(model.config, NUM_FRAMES, SIDE, SIDE, dtype, fuses_convolutions=fuses_convolutions)
    what = f"{model.config.name} {precision} B={batch_size} {kernels}".rstrip()
    bench.add(section, what, 1 / seconds, "clips/s", rates(cost, seconds))


def rates(cost: Cost, seconds: float) -> str:
    """Rates of FLOPs and of counted bytes for a clip in so many seconds, in words."""
    note = f"{1000 * seconds:.2f} ms, {cost.flops / seconds / 1e12:.0f} TFLOP/s"
    note += f" ({share_of(PEAK_FLOPS, cost.flops / seconds)}), {cost.traffic_bytes / seconds / 1e12:.2f} TB/s counted"
    return note


def share_of(peaks: dict[str, float], value: float) -> str:
    """Share of this GPU's peak, in words."""
    name = "cpu" if IS_DRY else torch.cuda.get_device_name()
    peak = next((peak for part, peak in sorted(peaks.items(), key=lambda item: -len(item[0])) if part in name), None)
    return "peak unknown" if peak is None else f"{value / peak:.1%} of the peak"


def seconds_of(run: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of a call on the GPU, after two warm-up calls."""
    with torch.inference_mode():
        for _ in range(2):
            run()
        synchronize()
        return statistics.median(_timed(run, repeats))


def _timed(run: Callable[[], object], repeats: int) -> Iterator[float]:
    for _ in range(repeats):
        if IS_DRY:
            started = time.perf_counter()
            run()
            yield time.perf_counter() - started
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        yield begin.elapsed_time(end) / 1000


def synchronize() -> None:
    """Wait for the GPU."""
    if not IS_DRY:
        torch.cuda.synchronize()


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
    main()
