"""Costs of what decoding does beside decoding: checks of packets, opening, new children, far entry points.

    python -m benchmarks.decoding_costs                        every section
    python -m benchmarks.decoding_costs --only checks,far      some of them
    python -m benchmarks.decoding_costs --quick --json costs.json

The videos are those of `benchmarks.decode`, made once and kept in the temporary folder, and numbered frames. Times are
processor time, each the least of the repeats, and repeats alternate between what is compared.

For "checks" packets are read, and not decoded, with all checks and with each check off. The difference is a check's
time for a packet. Shares are those of decoding the same packets at 3 and 8 frames per second to 256x256.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import click
from av.codec import Codec
from av.container import InputContainer
from av.video.stream import VideoStream

from benchmarks.decode import Video, decode_ours, make_task, make_video
from benchmarks.processes import tree_seconds
from benchmarks.report import Row, report
from tests.support.decoding import SPEC, decode, numbers, probe
from tests.support.videos import Recipe, write_video
from vidshard.pipeline import decode_stage
from vidshard.pipeline.video import decode as decoding
from vidshard.pipeline.video import decoding_pass
from vidshard.pipeline.video.container import open_video
from vidshard.pipeline.video.decode import decode_spans
from vidshard.pipeline.video.holes import hole_check
from vidshard.pipeline.video.input_file import opened, storage_failures_named
from vidshard.pipeline.video.lost_packets import loss_check
from vidshard.pipeline.video.packet_schedule import Step
from vidshard.pipeline.video.packets import SeekPoint, decode_packet, read_packets
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.pipeline.video.time_gaps import GapWatch
from vidshard.pipeline.video.timestamps import TickConverter
from vidshard.schemas.video import ClipSpec, Limits, VideoProbe, VideoRef

VIDEOS = [
    ("libx264", "mp4", 3), ("libx264", "mkv", 3), ("libx264", "flv", 0), ("libx264", "ts", 3), ("libx265", "mp4", 4),
    ("libsvtav1", "mp4", 0), ("libvpx-vp9", "webm", 0), ("libvpx", "webm", 0), ("ffv1", "mkv", 0), ("mjpeg", "avi", 0),
    ("mpeg4", "mp4", 2), ("mpeg4", "avi", 0), ("mpeg2video", "ts", 2), ("prores_ks", "mov", 0),
]  # fmt: skip
"""Encoder, suffix and B-frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """Size of the benchmark."""

    folder: Path
    """Keeps videos for later runs."""
    scratch: Path
    quick: bool
    repeats: int
    seconds: int
    """Length of a video."""

    def make(self, codec: str, suffix: str, b_frames: int, height: int = 480) -> Path:
        """A video of `benchmarks.decode`, of 30 frames per second; a small one where it has to be quick."""
        height = 144 if self.quick else height
        pixels = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}.get(codec, "yuv420p")
        like = Video(name="", codec=codec, height=height, fps=30, b_frames=b_frames, suffix=suffix, pixel_format=pixels)
        return make_video(self.folder, like, self.seconds)


def named(encoder: str) -> str:
    """The codec of an encoder."""
    return Codec(encoder, "w").canonical_name


def row(section: str, what: str, value: float, unit: str) -> Row:
    """Make one row of the table."""
    return {"section": section, "what": what, "value": round(value, 2), "unit": unit}


def timed(call: Callable[[], object]) -> float:
    """Processor seconds of a call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def least(calls: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The least seconds that each call measures."""
    found = [{name: call() for name, call in calls.items()} for _ in range(repeats)]
    return {name: min(each[name] for each in found) for name in calls}


# Checks.

_NO_GAPS = SimpleNamespace(is_needed=False)
_NO_RECORDING = SimpleNamespace(may_follow=False, explains_complaint=lambda _: False, at_end=lambda: None)


def _as_they_are(found: object, *_: object, **__: object) -> object:
    return found


CHECKS: dict[str, tuple[Callable[[VideoStream], bool], dict[str, object]]] = {
    "missing pictures": (lambda stream: bool(loss_check(stream)), {"loss_check": lambda _: None}),
    "holes": (lambda stream: bool(hole_check(stream)), {"hole_check": lambda _: None}),
    "gaps in time": (lambda stream: GapWatch(stream, TickConverter(), {}).is_needed, {"GapWatch": lambda *_: _NO_GAPS}),
    "counters": (lambda stream: stream.container.format.name == "mpegts", {"checked": _as_they_are}),
    "index": (
        lambda stream: stream.container.format.name == "avi",
        {"ChunkOrder": _as_they_are, "_in_order": _as_they_are},
    ),
    "joined recordings": (lambda _: True, {"RecordingEnd": lambda *_: _NO_RECORDING}),
}
"""Checks of packets: whether each applies to a stream, and what stands in for it in ``pipeline.video.packets``."""


@contextmanager
def _stream_of(path: Path) -> Iterator[tuple[Any, VideoStream]]:
    with opened(str(path)) as file, storage_failures_named(file, None) as watched, open_video(watched) as (_, stream):
        yield watched, stream


def _seconds_of_reading(path: Path, off: Mapping[str, object]) -> float:
    """Processor seconds of reading all packets, with some names of the module that does it replaced."""
    with ExitStack() as stack:
        for name, stub in off.items():
            stack.enter_context(patch(f"vidshard.pipeline.video.packets.{name}", stub))
        watched, stream = stack.enter_context(_stream_of(path))
        packets = read_packets(cast(InputContainer, stream.container), stream, SeekPoint(), watched, TickConverter())
        return timed(lambda: list(packets))


def checks(setup: Setup) -> Iterator[Row]:
    """Time of each check for a packet, and the share of all of them in decoding."""
    count = 30 * setup.seconds
    for codec, suffix, b_frames in VIDEOS[:1] if setup.quick else VIDEOS:
        path = setup.make(codec, suffix, b_frames)
        with _stream_of(path) as (_, stream):
            offs = {name: off for name, (applies, off) in CHECKS.items() if applies(stream)}
        offs["all"] = {name: stub for off in offs.values() for name, stub in off.items()}
        calls = {name: partial(_seconds_of_reading, path, off) for name, off in {"none": {}, **offs}.items()}
        taken = least(calls, 5 * setup.repeats)
        where = f"{named(codec)} in {suffix}"
        for name in offs:
            yield row("checks", f"{where}, {name}", 1e6 * (taken["none"] - taken[name]) / count, "µs a packet")
        for fps in (3, 8):
            task = make_task(path, fps, setup.seconds)
            [seconds] = least({"": partial(timed, partial(decode_ours, task))}, setup.repeats).values()
            share = 100 * (taken["none"] - taken["all"]) / seconds
            yield row("checks", f"{where}, share of decoding at {fps} fps", share, "%")


# Opening and children.


def opening(setup: Setup) -> Iterator[Row]:
    """Milliseconds of opening a file by its header alone, and as FFmpeg opens it by itself."""

    def open_once(path: Path) -> float:
        started = time.process_time()
        with _stream_of(path):
            return time.process_time() - started

    def open_plainly(path: Path) -> float:
        with patch("vidshard.pipeline.video.container._quick_options", lambda *_: None):
            return open_once(path)

    for codec, suffix, b_frames in VIDEOS[:1] if setup.quick else [VIDEOS[0], *VIDEOS[4:7]]:
        for height in (144,) if setup.quick else (480, 1080):
            path = setup.make(codec, suffix, b_frames, height)
            ways = {"by its header": partial(open_once, path), "by FFmpeg": partial(open_plainly, path)}
            for way, seconds in least(ways, 5 * setup.repeats).items():
                yield row("opening", f"{named(codec)}, {height} lines, {way}", 1000 * seconds, "ms")


def child(setup: Setup) -> Iterator[Row]:
    """Milliseconds of a new confined child, from videos that get one each and videos of which 16 share one."""
    spec = ClipSpec(fps=Fraction(8), num_frames=17, height=256, width=256)
    source, count = setup.make("libx264", "mp4", 3, 360), 16 if setup.quick else 48
    copies = [Path(shutil.copy(source, setup.scratch / f"copy{number}.mp4")) for number in range(2)]  # taken in turn
    taken: dict[int, float] = {}
    for videos_per_decoder in (16, 1) if setup.quick else (16, 1, 16, 1):
        limits = Limits(videos_per_decoder=videos_per_decoder)
        decoder = decode_stage.SpanDecoder(spec=spec, max_clips=100, clips_per_pass=100, limits=limits)
        decode_stage.probe(VideoRef(uri=str(source), num_bytes=-1), limits)  # starts what forks
        before = tree_seconds(os.getpid())
        for number in range(count):
            header = decode_stage.probe(VideoRef(uri=str(copies[number % 2]), num_bytes=-1), limits)
            assert isinstance(header, VideoProbe)
            [result] = decoder.decode_together(plan_spans(header, spec, 100), [spec], None)
            assert result.clips
        seconds = (tree_seconds(os.getpid()) - before) / count
        taken[videos_per_decoder] = min(seconds, taken.get(videos_per_decoder, math.inf))
    for videos_per_decoder, seconds in taken.items():
        yield row("child", f"a video with --videos-per-decoder {videos_per_decoder}", 1000 * seconds, "ms")
    yield row("child", "a new child", 1000 * (taken[1] - taken[16]) * 16 / 15, "ms")


# Packets that are decoded.


def far(setup: Setup) -> Iterator[Row]:
    """Spans of a file with one keyframe, decoded one by one with and without the decoder that is kept."""
    count, rate = (120, Fraction(2)) if setup.quick else (3000, Fraction(10))
    options = (("x264-params", "keyint=10000:min-keyint=9999:scenecut=0"),)
    recipe = Recipe(num_frames=count, rate=rate, gop=10000, options=options)
    path = write_video(setup.scratch / "far.mp4", recipe)
    spec = ClipSpec(fps=Fraction(2), num_frames=5, height=32, width=32)
    spans = plan_spans(probe(path), spec, 5)
    for continuing in (False, True):
        with patch.object(decoding_pass, "decode_packet", wraps=decode_packet) as decoded:
            started = time.process_time()
            for span in spans:
                decode_spans([span], spec, str(path), max_clips=1000, continuing=continuing)
            seconds = time.process_time() - started
        decoding._keep(None)
        where = f"{len(spans)} spans of {count} packets, decoder {'kept' if continuing else 'not kept'}"
        yield row("far", f"{where}: packets decoded", decoded.call_count, "")
        yield row("far", f"{where}: time", seconds, "s")


def skipped(setup: Setup) -> Iterator[Row]:
    """Packets that decoding at 3 of 30 frames per second does not send, and frames that come out of the decoder."""
    original = decoding_pass._decode_step
    for codec, suffix, b_frames in VIDEOS[:1] if setup.quick else VIDEOS:
        task = make_task(setup.make(codec, suffix, b_frames), 3, setup.seconds)
        counts: Counter[str] = Counter()

        def counting(watched: Any, stream: VideoStream, step: Step | None, counts: Counter[str] = counts) -> Any:
            frames = original(watched, stream, step)
            counts.update(sent=step is not None, decoded=len(frames))
            return frames

        with patch.object(decoding_pass, "_decode_step", counting):
            decode_ours(task)
        where, of = f"{named(codec)} in {suffix}", 30 * setup.seconds
        yield row("skipped", f"{where}, not sent of {of}", of - counts["sent"], "packets")
        yield row("skipped", f"{where}, decoded of {of}", counts["decoded"], "frames")


def own_rate(setup: Setup) -> Iterator[Row]:
    """Frames that a video gives at its own rate, with corrected and with uncorrected times."""
    count = 60 if setup.quick else 600
    cases = [(suffix, "libx264", rate) for suffix in ("mp4", "mkv", "flv", "ts") for rate in (24000, 30000, 60000)]
    cases += [("webm", "libvpx", 30000), ("asf", "mpeg4", 30000)]
    for suffix, codec, thousands in [cases[4]] if setup.quick else cases:
        rate = Fraction(thousands, 1001)
        recipe = Recipe(codec=codec, num_frames=count, rate=rate, width=64, height=48)
        path = write_video(setup.scratch / f"own.{suffix}", recipe)
        spec = ClipSpec(fps=rate, num_frames=17, height=SPEC.height, width=SPEC.width)
        corrected = len(set(numbers(decode(path, spec))))
        with patch("vidshard.pipeline.video.timestamps._interval", lambda *_: None):
            uncorrected = len(set(numbers(decode(path, spec))))
        where = f"{float(rate):.2f} in {suffix}, of {count}"
        yield row("own_rate", f"{where}, corrected times", corrected, "frames")
        yield row("own_rate", f"{where}, uncorrected times", uncorrected, "frames")


SECTIONS = {each.__name__: each for each in (checks, opening, child, far, skipped, own_rate)}


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--quick", is_flag=True, help="One small video and one repeat in each section.")
@click.option("--only", default=",".join(SECTIONS), metavar="SECTIONS", help="Sections, comma-separated.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--json", "json_path", metavar="FILE", help="Write the table there too.")
def main(quick: bool, only: str, repeats: int, json_path: str | None) -> None:
    """Print the table."""
    folder = Path(tempfile.gettempdir()) / "vidshard-bench-decode"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        repeats, seconds = (1, 1) if quick else (repeats, 4)
        setup = Setup(folder=folder, scratch=Path(scratch), quick=quick, repeats=repeats, seconds=seconds)
        rows = [each for section in only.split(",") for each in SECTIONS[section](setup)]
    report("costs of decoding", rows, json_path)


if __name__ == "__main__":
    main()
