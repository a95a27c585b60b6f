"""Outcomes of decoding damaged videos, and whole ones that might be suspected.

    python -m benchmarks.decoding_faults                              every kind
    python -m benchmarks.decoding_faults --only holes,archives        some of them
    python -m benchmarks.decoding_faults --quick --json faults.json

Videos are made here, damaged by a seed, decoded, and compared with the whole video, frame by frame. Outcomes:

* "refused": the span is rejected.
* "reported": the clips are kept, and the span is reported as doubtful (``possible_loss``).
* "unchanged": all frames are those of the whole video.
* "absent": frames are absent and the one before them stays on screen; all others are those of the whole video.
* "wrong": another frame than in the whole video is shown, and nothing says so.

Archives are decoded in the sandbox; their outcomes are ``clips``, or the reason.
"""

from __future__ import annotations

import io
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import av
import click

from benchmarks.report import Row, report
from tests.support.archives import ENCODERS, sequence, write_archive
from tests.support.combinations import RATE, combinations, write_combination
from tests.support.fuzz import LIMITS, TIMEOUT_SECONDS, decode_all, mutate
from tests.support.law import breaches
from tests.support.lost_packets import (
    NUMBERED,
    UNNUMBERED,
    Outcome,
    outcome_of,
    with_hole,
    with_times,
    without_packets,
    wrong_times,
)
from tests.support.pictures import CODECS, PLAIN, places, write_pictures
from tests.support.transport_streams import recording
from tests.support.videos import Recipe, write_video
from vidshard.pipeline.video.sandbox import DecodeSandbox
from vidshard.schemas.rejections import Reason, VideoError

T = TypeVar("T")
Found = Iterator[tuple[str, str]]
"""Codec or kind of each video, and the outcome of decoding it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """Size and seed of the benchmark."""

    folder: Path
    quick: bool
    seed: int

    def some(self, members: Sequence[T]) -> Sequence[T]:
        """All members; the first one where it has to be quick."""
        return members[:1] if self.quick else members

    def random(self, *words: object) -> random.Random:
        """A generator of random numbers that depends on the seed and on these words."""
        return random.Random(f"{self.seed}/{words}")


def told(found: Outcome, original: Outcome) -> str:
    """The outcome in a word."""
    if found.told is not None:
        return "reported" if found.told.reason is Reason.POSSIBLE_LOSS else "refused"
    if wrong_times(found.shown, original.shown):
        return "wrong"
    return "unchanged" if len(found.shown) == len(original.shown) else "absent"


HOLE_BYTES = 64


def holes(setup: Setup) -> Found:
    """64 zero bytes in the middle of each of four pictures."""
    for codec, containers in setup.some([*CODECS.items(), ("wmv2", ("asf",)), ("qtrle", ("mov",))]):
        for container in setup.some(containers):
            whole = write_pictures(setup.folder / "whole", codec, container)
            original = outcome_of(whole)
            for offset, size in places(whole)[1:5]:
                if size >= 4 * HOLE_BYTES:
                    found = outcome_of(with_hole(setup.folder / "hole", whole, offset + size // 2, HOLE_BYTES))
                    yield codec, told(found, original)


def lost_packets(setup: Setup) -> Found:
    """Each packet of a group of six pictures, left out with its time; not in streams that count pictures."""
    for codec, containers in setup.some([*NUMBERED.items(), *UNNUMBERED.items()]):
        for container in setup.some([each for each in containers if each not in ("m4v", "mpeg2video")]):
            whole = write_combination(codec, container, setup.folder)
            if whole is None:
                continue
            original = outcome_of(whole)
            for lost in setup.some(range(8, 14)):
                path = without_packets(setup.folder / "lacking", whole, container, [lost], close=False)
                yield codec, told(outcome_of(path), original)


TS_PACKET = 188


def transport_streams(setup: Setup) -> Found:
    """1 to 60 packets of a transport stream, of one or three recordings, taken out behind the first picture."""
    for codec, b_frames in setup.some(
        [("libx264", 0), ("libx264", 2), ("libx265", 2), ("mpeg2video", 2), ("mpeg4", 0)]
    ):
        for parts in setup.some([1, 3]):
            path = setup.folder / "whole.ts"
            made = (recording(path, codec, 30 + 30 * part, b_frames=b_frames) for part in range(parts))
            data = b"".join([part.read_bytes() for part in made])
            path.write_bytes(data)
            original = outcome_of(path)
            assert original.told is None, (codec, parts, original.told)
            rng = setup.random("ts", codec, b_frames, parts)
            for _ in range(3 if setup.quick else 150):
                count = len(data) // TS_PACKET
                lost = rng.choice([each for each in (1, 1, 2, 5, 13, 40, 60) if each < count - 20])
                first = rng.randrange(12, count - lost)
                path.write_bytes(data[: first * TS_PACKET] + data[(first + lost) * TS_PACKET :])
                yield f"{codec}, {parts} recordings", told(outcome_of(path), original)


def whole(setup: Setup) -> Found:
    """Whole videos of plain and textured pictures at three bit rates, and of constant and of varying rate."""
    for codec, containers in setup.some(list(CODECS.items())):
        for container in setup.some(containers):
            for picture in setup.some(list(PLAIN.values())):
                for bit_rate in setup.some([None, 20_000, 20_000_000]):
                    with suppress(av.FFmpegError):
                        path = write_pictures(setup.folder / "whole", codec, container, picture, bit_rate)
                        yield f"{codec}, pictures", suspected(path)
    for codec, containers in setup.some(list(MOVED.items())):
        for b_frames in setup.some([0, 2]):
            source = write_video(
                setup.folder / "source.nut", Recipe(codec=codec, num_frames=60, gop=20, b_frames=b_frames)
            )
            for container in setup.some(containers):
                for number in setup.some(range(20)):
                    rng = setup.random("whole", codec, b_frames, container, number)
                    steps = [rng.choice((1, 1, 1, 2, 3, 7)) for _ in range(60)] if number % 2 else [1]
                    path = with_times(setup.folder / "moved", source, container, steps)
                    yield f"{codec}, {'varying' if number % 2 else 'constant'} rate", suspected(path)


MOVED = {
    **dict.fromkeys(("libx264", "libx265", "mpeg2video"), ("mp4", "matroska", "mpegts", "nut")),
    "mpeg4": ("mp4", "matroska", "nut"),
    **dict.fromkeys(("libvpx", "libvpx-vp9"), ("matroska", "nut")),
}
"""Codecs and containers of whole videos with other times."""


def suspected(path: Path) -> str:
    """Whether a whole video is refused or reported."""
    said = outcome_of(path).told
    return "not suspected" if said is None else f"suspected ({said.reason})"


def archives(setup: Setup) -> Found:
    """Archives of eight images with damaged bytes; half of the tars have their checksums corrected."""
    sources = {
        (suffix, kind): write_archive(setup.folder / f"whole.{kind}", sequence(8, suffix)).read_bytes()
        for suffix in setup.some(list(ENCODERS))
        for kind in ("tar", "zip")
    }
    others, slowest = list(sources.values()), 0.0
    with DecodeSandbox(memory_limit_bytes=LIMITS.memory_bytes) as sandbox:
        for (suffix, kind), data in sources.items():
            for number in range(3 if setup.quick else 400):
                damaged, _ = mutate(data, others, setup.random("archives", suffix, kind, number))
                path = setup.folder / "damaged"
                path.write_bytes(_with_checksums(damaged) if kind == "tar" and number % 2 else damaged)
                started = time.monotonic()
                try:
                    sandbox.run(decode_all, str(path), timeout_seconds=TIMEOUT_SECONDS)
                    yield kind, "clips"
                except VideoError as error:
                    yield kind, str(error.reason)
                slowest = max(slowest, time.monotonic() - started)
    print(f"slowest archive: {slowest:.2f} s")


def _with_checksums(data: bytes) -> bytes:
    """A tar whose headers have the checksums of what they hold now."""
    out = io.BytesIO(data)
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            total = sum(data[at : at + 148]) + 8 * 32 + sum(data[at + 156 : at + 512])
            out.seek(at + 148)
            out.write(b"%06o\0 " % total)
    return out.getvalue()


def law(setup: Setup) -> Found:
    """Every combination of encoder and container: spans against one pass, and that against plain decoding."""
    for codec, container in combinations():
        path = write_combination(codec, container, setup.folder)
        if path is not None:
            lines, reason = breaches(path, RATE)
            path.unlink()
            outcome = "holds" if not lines else "breach"
            if reason is not None:
                outcome = (
                    f"refused as by PyAV ({reason})" if not lines else f"refused, not by PyAV ({codec}, {container})"
                )
            yield "", outcome
            if setup.quick:
                return


KINDS: dict[str, Callable[[Setup], Found]] = {
    each.__name__: each for each in (holes, lost_packets, transport_streams, whole, archives, law)
}


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--quick", is_flag=True, help="A few videos of each kind.")
@click.option("--only", default=",".join(KINDS), metavar="KINDS", help="Kinds of damage, comma-separated.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_path", metavar="FILE", help="Write the table there too.")
def main(quick: bool, only: str, seed: int, json_path: str | None) -> None:
    """Print the table."""
    rows: list[Row] = []
    for kind in only.split(","):
        counts: dict[str, Counter[str]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for what, outcome in KINDS[kind](Setup(folder=Path(folder), quick=quick, seed=seed)):
                counts.setdefault(what, Counter())[outcome] += 1
        if len(counts) > 1:
            counts["all"] = sum(counts.values(), Counter())
        for what, outcomes in counts.items():
            words = ", ".join(f"{outcome} {count}" for outcome, count in outcomes.most_common())
            rows.append({"kind": kind, "of": what, "tried": outcomes.total(), "outcomes": words})
    report("faults of videos", rows, json_path)


if __name__ == "__main__":
    main()
