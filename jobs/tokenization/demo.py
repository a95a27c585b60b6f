"""Demo: tokenizes a sample corpus in about a minute and writes a few reconstructions.

The corpus is generated here, so the demo needs no download: moving pictures in several codecs, sizes and frame
rates, and one broken file.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from rich.console import Console
from rich.text import Text

from vidshard.jobs.shards.decode import DecodeRun, decode_output
from vidshard.jobs.tokenization.job import tokenize
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.shard_reader import find_clips, output_shards
from vidshard.schemas.runs import TokenizeRun

NUM_RECONSTRUCTIONS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Description of one video of the sample corpus."""

    name: str
    codec: str
    width: int
    height: int
    rate: Fraction
    seconds: float
    pixel_format: str = "yuv420p"


SAMPLES = (
    Sample(name="drift.mp4", codec="libx264", width=480, height=270, rate=Fraction(30), seconds=6.0),
    Sample(name="tall.mp4", codec="libx264", width=240, height=426, rate=Fraction(30000, 1001), seconds=5.0),
    Sample(name="film.mkv", codec="libx265", width=416, height=234, rate=Fraction(24), seconds=5.0),
    Sample(name="web.webm", codec="libvpx-vp9", width=320, height=240, rate=Fraction(25), seconds=4.0),
    Sample(name="old.avi", codec="mpeg4", width=352, height=288, rate=Fraction(15), seconds=5.0),
    Sample(
        name="slow.mov", codec="mjpeg", width=256, height=256, rate=Fraction(5), seconds=4.0, pixel_format="yuvj420p"
    ),
)


def run_demo(videos: Sequence[str], out: str, console: Console) -> int:
    """Tokenize a sample corpus, or the user's videos, and write some reconstructions; returns the exit code.

    Args:
        videos: files or folders; empty for the sample corpus.
        out: folder for videos, tokens and reconstructions.

    Raises:
        VidshardError: the videos cannot be tokenized, or their tokens cannot be decoded.
    """
    folder = Path(out)
    if videos:
        folder /= Path(videos[0]).stem or "own"  # apart from the result of the sample corpus
    else:
        console.print(f"making a sample corpus in {folder / 'videos'}", highlight=False)
        make_corpus(folder / "videos")
        videos = [str(folder / "videos")]
    tokens = str(folder / "tokens")
    summary = tokenize(TokenizeRun(inputs=list(videos), out=tokens, size=(256, 256), resize="crop"), console)
    if summary.exit_code:
        return summary.exit_code
    if not shard_paths(str(Path(tokens).absolute())):
        return 0  # the summary says why
    shown = folder / "reconstructions"
    console.print("\nreconstructions (source left, tokens right)", style="bold")
    decode_output(DecodeRun(out=tokens, clip_ids=_some_clips(tokens), folder=str(shown), side_by_side=True), console)
    console.print(Text(f"\nnext: vidshard inspect {shlex.quote(tokens)}; open the files in {shown}/", style="bold"))
    return 0


def _some_clips(tokens: str) -> list[str]:
    """Ids of the first clip of each of the first ``NUM_RECONSTRUCTIONS`` videos."""
    first: dict[str, str] = {}
    for _, clip_id in sorted(find_clips(output_shards(tokens), ""), key=lambda found: found[1]):
        first.setdefault(clip_id.split("-")[0], clip_id)
    return list(first.values())[:NUM_RECONSTRUCTIONS]


def make_corpus(folder: Path) -> None:
    """Write the sample videos and a broken one; existing sample videos are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(SAMPLES):
        target = folder / sample.name
        if not target.exists():
            write_sample(target, sample, seed=number)
    whole = (folder / SAMPLES[0].name).read_bytes()
    (folder / "broken.mp4").write_bytes(whole[: len(whole) // 2])


def write_sample(target: Path, sample: Sample, seed: int) -> None:
    """Encode one sample video, atomically."""
    unfinished = target.with_name(f"unfinished-{target.name}")
    with av.open(str(unfinished), "w") as container:
        stream = container.add_stream(sample.codec, rate=sample.rate)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = sample.width, sample.height, sample.pixel_format
        stream.options = {
            "x265-params": "log-level=none",
            "preset": "ultrafast",
            "cpu-used": "8",
            "deadline": "realtime",
        }
        for index in range(round(sample.seconds * sample.rate)):
            picture = _picture(sample, float(index / sample.rate), seed)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    unfinished.replace(target)


def _picture(sample: Sample, seconds: float, seed: int) -> np.ndarray:
    """Draw one frame, uint8 (H, W, 3): a panning gradient with texture, and three orbiting discs."""
    y, x = np.mgrid[: sample.height, : sample.width].astype(np.float32) / sample.height
    phase = seconds * 0.6 + seed
    picture = np.stack(
        [0.5 + 0.4 * np.sin(2 * np.pi * (x * f + y * g - phase * 0.2) + h) for f, g, h in _WAVES], axis=-1
    )
    picture += 0.08 * np.sin(40 * (x + 0.1 * phase))[..., None] * np.sin(40 * y)[..., None]
    for disc in range(3):
        angle = phase * (1.0 + 0.4 * disc) + 2.1 * disc
        cx, cy = 0.5 * sample.width / sample.height + 0.3 * np.cos(angle), 0.5 + 0.3 * np.sin(angle)
        inside = (x - cx) ** 2 + (y - cy) ** 2 < (0.07 + 0.04 * disc) ** 2
        picture[inside] = [0.9, 0.3 * disc, 0.9 - 0.4 * disc]
    return (picture.clip(0, 1) * 255).astype(np.uint8)


_WAVES = ((0.7, 0.2, 0.0), (0.3, 0.8, 2.1), (0.5, 0.5, 4.2))
