"""Damaged copies of small videos through the real decoding: each gives clips or a reason from the closed list.

``python -m tests.support.fuzz --mutations 2000 --seed 0`` prints what became of them, by container.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from tests.support.videos import Recipe, write_video
from vidshard.pipeline.storage import open_video
from vidshard.pipeline.video.decode import decode_span
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.pipeline.video.sandbox import DecodeSandbox
from vidshard.schemas.rejections import VideoError
from vidshard.schemas.video import ClipSpec, Limits, VideoRef

SPEC = ClipSpec(fps=Fraction(4), num_frames=5, height=32, width=32)
LIMITS = Limits(max_pixels=1 << 22, max_seconds=3600, max_frames=100_000, memory_bytes=1 << 30)
TIMEOUT_SECONDS = 10.0

SOURCES = {
    **dict.fromkeys(("mp4", "mov", "mkv", "ts", "flv", "3gp", "h264"), Recipe(b_frames=2)),
    **dict.fromkeys(("avi", "m4v", "nut"), Recipe(codec="mpeg4")),
    **dict.fromkeys(("mpg", "mxf"), Recipe(codec="mpeg2video")),
    **dict.fromkeys(("hevc",), Recipe(codec="libx265")),
    **dict.fromkeys(("webm",), Recipe(codec="libvpx-vp9")),
    "ivf": Recipe(codec="libvpx"),
    "obu": Recipe(codec="libsvtav1"),
    "gif": Recipe(codec="gif", pixel_format="rgb8"),
    "apng": Recipe(codec="apng", pixel_format="rgb24"),
    "ogv": Recipe(codec="libtheora"),
    "wmv": Recipe(codec="wmv2"),
    "y4m": Recipe(codec="rawvideo"),
    "mjpeg": Recipe(codec="mjpeg", pixel_format="yuvj420p"),
}
"""By suffix."""


@dataclass(kw_only=True, slots=True)
class Outcome:
    """Outcomes of decoding the mutations."""

    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By container, and ``clips`` or the reason."""
    slowest: tuple[float, str] = (0.0, "")
    resident_mib: list[int] = field(default_factory=list)
    """Memory of the decoding process after each mutation; 0 where it had ended."""
    unwritable: list[str] = field(default_factory=list)
    """Suffixes that this build of FFmpeg does not write."""


def mutate(data: bytes, others: Sequence[bytes], rng: random.Random) -> tuple[bytes, str]:
    """A damaged copy, and what was done to it. Half of the damage is done to the first 4 KiB, where headers are."""
    out = bytearray(data)
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        end = min(4096, len(out)) if rng.random() < 0.5 else len(out)
        if end < 16:
            break
        at = rng.randrange(end - 8)
        count = min(rng.choice((1, 4, 16, 200, 3000)), len(out) - at)
        kind = rng.choice(("flip", "noise", "truncate", "splice", "repeat", "delete", "field", "zero", "swap"))
        done.append(f"{kind}@{at}+{count}")
        if kind == "flip":
            for _ in range(rng.choice((1, 8, 64))):
                out[rng.randrange(end)] ^= 1 << rng.randrange(8)
        elif kind == "noise":
            out[at : at + count] = rng.randbytes(count)
        elif kind == "truncate":
            del out[max(at, 1) :]
        elif kind == "splice":
            other = rng.choice(others)
            start = rng.randrange(len(other))
            out[at : at + count] = other[start : start + count]
        elif kind == "repeat":
            out[at:at] = bytes(out[at : at + count]) * rng.choice((1, 3, 20))
        elif kind == "delete":
            del out[at : at + count]
        elif kind == "field":
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), 2 ** (8 * width - 1) - 1))
            out[at : at + width] = value.to_bytes(width, rng.choice(("big", "little")))
        elif kind == "zero":
            out[at : at + count] = bytes(count)
        else:
            other_at = rng.randrange(end - 8)
            out[at : at + 8], out[other_at : other_at + 8] = out[other_at : other_at + 8], out[at : at + 8]
    return bytes(out), " ".join(done)


def decode_all(uri: str) -> int:
    """Number of clips; runs in the child."""
    probe = probe_video(VideoRef(uri=uri, num_bytes=-1), open_video, LIMITS)
    spans = plan_spans(probe, SPEC, 4)
    return sum(len(decode_span(span, SPEC, uri, max_clips=200, limits=LIMITS)) for span in spans[:20])


def fuzz(num_mutations: int, seed: int, folder: Path, suffixes: Sequence[str] = tuple(SOURCES)) -> Outcome:
    """Decode that many damaged files.

    Raises:
        Exception: whatever is no VideoError, with a note that says by which mutation; its file stays in ``folder``.
    """
    outcome = Outcome()
    sources: dict[str, bytes] = {}
    for suffix in suffixes:
        try:
            sources[suffix] = write_video(folder / f"source.{suffix}", SOURCES[suffix]).read_bytes()
        except (OSError, ValueError):  # av.FFmpegError is one of them or the other
            outcome.unwritable.append(suffix)
    whole = list(sources.values())
    with DecodeSandbox(memory_limit_bytes=LIMITS.memory_bytes) as sandbox:
        for number in range(num_mutations):
            suffix = list(sources)[number % len(sources)]
            rng = random.Random(f"{seed}/{number}")
            data, done = mutate(sources[suffix], whole, rng)
            path = folder / f"mutation.{suffix}"
            path.write_bytes(data)
            started = time.monotonic()
            name = f"number {number}, {suffix}: {done}"
            try:
                sandbox.run(decode_all, str(path), timeout_seconds=TIMEOUT_SECONDS)
                what = "clips"
            except VideoError as error:
                what = str(error.reason)
            except Exception as error:
                error.add_note(name)
                raise
            outcome.slowest = max(outcome.slowest, (time.monotonic() - started, f"{name}: {what}"))
            outcome.reasons[suffix, what] += 1
            pid = sandbox.pid
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) if pid else 0
            outcome.resident_mib.append(pages * 4096 >> 20)
    return outcome


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = fuzz(args.mutations, args.seed, Path(folder))
    for suffix in SOURCES:
        counts = {what: count for (name, what), count in sorted(outcome.reasons.items()) if name == suffix}
        print(f"{suffix:6}", *(f"{what} {count}" for what, count in counts.items()))
    totals: Counter[str] = Counter()
    for (_, what), count in outcome.reasons.items():
        totals[what] += count
    print("all   ", *(f"{what} {count}" for what, count in totals.most_common()))
    print("not written by this build:", *outcome.unwritable)
    print(f"slowest: {outcome.slowest[0]:.2f} s, {outcome.slowest[1]}")
    step = max(1, len(outcome.resident_mib) // 10)
    print("MiB of the decoding process over the run:", *outcome.resident_mib[::step], outcome.resident_mib[-1])


if __name__ == "__main__":
    from tests.support.fuzz import main as run  # by its importable name, as the decoding process finds functions

    run()
