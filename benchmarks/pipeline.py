"""Overhead of the pipeline: clips per second of the whole job, of its encoder alone and of its decoder alone.

    python -m benchmarks.pipeline [--tokenizer NAME] [--size N] [--clips N] [--json PATH]

All three run on the same generated corpus: 640x360 h264 at 30 frames per second, sampled at 8 to clips of 17 frames.
The decoder alone runs in one process per core. The encoder alone runs as in the job, with the same threads and
environment, on frames in memory. The job can at best be as fast as the slower of the two. Without a GPU both share the
cores, so the job falls further behind the closer their speeds are.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path

from benchmarks.report import Row, report
from vidshard.jobs.tokenization.demo import Sample, write_sample
from vidshard.pipeline.flow import ENCODER_ENVIRONMENT
from vidshard.pipeline.plan import clips_per_span
from vidshard.pipeline.storage import open_binary
from vidshard.pipeline.video.decode import decode_span
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.video import ClipSpec, Span, VideoRef

CLIPS_PER_VIDEO = 8


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="fsq_causal_488_32768", help="with seeded random weights")
    parser.add_argument("--size", type=int, default=128, help="height and width of the clips")
    parser.add_argument("--clips", type=int, default=64, help="clips in the corpus")
    parser.add_argument("--encoder-clips", type=int, default=12, help="clips that the encoder alone is timed on")
    parser.add_argument("--json", metavar="PATH", help="also write the figures here")
    parser.add_argument("--encoder-alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    spec = ClipSpec(fps=Fraction(8), num_frames=17, height=arguments.size, width=arguments.size)
    if arguments.encoder_alone:
        print(json.dumps(time_encoder(arguments.tokenizer, spec, arguments.encoder_clips)))
        return
    with tempfile.TemporaryDirectory(prefix="vidshard-bench-") as folder:
        videos = make_corpus(Path(folder) / "videos", arguments.clips, spec)
        decoder = time_decoder(videos, spec)
        encoder = time_encoder_apart(arguments)
        whole, tokenizing, num_clips = time_job(videos[0].parent, Path(folder) / "tokens", arguments)
    slower = min(decoder, encoder)
    rows: list[Row] = [
        row(f"decoder alone, {os.cpu_count()} processes", decoder, slower),
        row("encoder alone", encoder, slower),
        row(f"the job while tokenizing {num_clips} clips", num_clips / tokenizing, slower),
        row("the job with start, probing and end", num_clips / whole, slower),
    ]
    report(f"pipeline, {arguments.tokenizer} at 17x{arguments.size}x{arguments.size}", rows, arguments.json)


def row(name: str, clips_per_second: float, slower: float) -> Row:
    """Make one row of the table."""
    return {
        "what": name,
        "clips_per_s": round(clips_per_second, 3),
        "of the slower": f"{clips_per_second / slower:.0%}",
    }


def make_corpus(folder: Path, num_clips: int, spec: ClipSpec) -> list[Path]:
    """Make videos that hold this many clips together."""
    folder.mkdir()
    seconds = float(CLIPS_PER_VIDEO * spec.clip_seconds)
    videos = []
    for number in range(-(-num_clips // CLIPS_PER_VIDEO)):
        name = f"{number:04d}.mp4"
        sample = Sample(name=name, codec="libx264", width=640, height=360, rate=Fraction(30), seconds=seconds)
        write_sample(folder / name, sample, seed=number)
        videos.append(folder / name)
    return videos


def time_decoder(videos: list[Path], spec: ClipSpec) -> float:
    """Measure clips per second of the decoder, one process per core, over the whole corpus."""
    spans = []
    for video in videos:
        probe = probe_video(VideoRef(uri=str(video), num_bytes=-1), open_binary)
        spans += [(span, spec) for span in plan_spans(probe, spec, clips_per_span(spec, None))]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_decode, spans[:2] * 2))  # processes started, modules imported
        started = time.perf_counter()
        num_clips = sum(pool.map(_decode, spans))
        return num_clips / (time.perf_counter() - started)


def _decode(work: tuple[Span, ClipSpec]) -> int:
    span, spec = work
    return len(decode_span(span, spec, span.uri, max_clips=1000))


def time_encoder_apart(arguments: argparse.Namespace) -> float:
    """Measure clips per second of the encoder in a process with the environment that the job gives it."""
    command = [sys.executable, "-m", "benchmarks.pipeline", "--encoder-alone", "--tokenizer", arguments.tokenizer]
    command += ["--size", str(arguments.size), "--encoder-clips", str(arguments.encoder_clips)]
    environment = os.environ | ENCODER_ENVIRONMENT
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1]))


def time_encoder(name: str, spec: ClipSpec, num_clips: int) -> float:
    """Measure clips per second of the encoder on frames in memory, after one warm-up pass."""
    import numpy as np
    import torch

    from vidshard.models.vidtok.config import PRESETS
    from vidshard.models.weights import load_tokenizer
    from vidshard.pipeline.devices import make_reproducible
    from vidshard.pipeline.encode import encode_clips

    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size = 8 if device == "cuda" else 1
    make_reproducible(device, os.cpu_count() or 1)
    config = PRESETS[name]
    tokenizer = load_tokenizer(config, None, seed=0, device=device)
    payload = config.payload(spec.num_frames, spec.height, spec.width)
    rng = np.random.default_rng(0)
    shape = (spec.num_frames, spec.height, spec.width, 3)
    clips = [rng.integers(0, 256, shape, np.uint8) for _ in range(-(-num_clips // batch_size) * batch_size)]
    encode_clips(tokenizer, clips[:batch_size], payload, batch_size=batch_size)
    started = time.perf_counter()
    encode_clips(tokenizer, clips, payload, batch_size=batch_size)
    return len(clips) / (time.perf_counter() - started)


def time_job(videos: Path, out: Path, arguments: argparse.Namespace) -> tuple[float, float, int]:
    """Measure seconds of the whole command, seconds of its tokenizing phase, and clips."""
    command = [
        sys.executable,
        "-m",
        "vidshard.jobs.cli",
        "tokenize",
        str(videos),
        "--out",
        str(out),
        "--random-weights",
        "0",
    ]
    command += ["--tokenizer", arguments.tokenizer, "--size", str(arguments.size)]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr)
    whole = time.perf_counter() - started
    summary = json.loads((out / "summary.json").read_text())
    return whole, summary["seconds"]["tokenize"], summary["written"]["num_clips"]


if __name__ == "__main__":
    main()
