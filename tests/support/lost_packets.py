"""Takes packets and bytes out of videos, and compares what is decoded with the whole video, time by time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from tests.support.decoding import SPEC, probe
from tests.support.law import EVERY_DECODER
from vidshard.pipeline.video.decode import decode_spans
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.rejections import VideoError

Shown = dict[float, npt.NDArray[np.uint8]]
"""Picture by its presentation time in seconds, rounded to milliseconds."""

NUMBERED = {
    "mpeg4": ("avi", "mp4", "matroska", "nut", "m4v", "3gp"),
    "mpeg2video": ("avi", "mp4", "matroska", "asf", "mpegts", "mpeg2video", "mxf"),
    "mpeg1video": ("avi", "mp4", "asf"),
    "libx264": ("mp4", "matroska", "flv"),
    "libx265": ("mp4", "matroska", "flv"),
}
"""Codecs whose pictures tell which one they follow, and containers they go into."""

UNNUMBERED = {
    "libvpx": ("matroska", "webm", "ivf", "avi", "nut"),
    "libvpx-vp9": ("mp4", "webm", "ivf", "avi"),
    "h263": ("avi", "mov", "3gp"),
    "msmpeg4v2": ("avi", "asf"),
    "wmv2": ("avi", "asf"),
    "svq1": ("mov",),
    "ffv1": ("avi", "matroska"),
}
"""Codecs that number nothing: only a gap in time tells."""

_SPEC = replace(SPEC, fps=Fraction(25), num_frames=3, height=48, width=72)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Outcome of decoding a video."""

    shown: Shown
    told: VideoError | None
    """The refusal, or the doubt; None where nothing was said."""


def outcome_of(path: Path) -> Outcome:
    """Decode a video of 25 frames per second whole."""
    shown: Shown = {}
    doubt: VideoError | None = None
    try:
        for span in plan_spans(probe(path, EVERY_DECODER), _SPEC, 100_000):
            [result] = decode_spans([span], _SPEC, str(path), max_clips=100_000, limits=EVERY_DECODER)
            if result.error is not None:
                return Outcome(shown=shown, told=result.error)
            doubt = doubt or result.doubt
            for clip in result.clips:
                times = clip.frame_pts_seconds[: clip.num_valid_frames]
                shown |= {round(time, 3): frame for time, frame in zip(times, clip.frames, strict=False)}
    except VideoError as error:
        return Outcome(shown=shown, told=error)
    return Outcome(shown=shown, told=doubt)


def wrong_times(shown: Shown, original: Shown) -> list[float]:
    """Times at which another picture is shown than in the whole video."""
    return [time for time, frame in shown.items() if time not in original or not np.array_equal(frame, original[time])]


def without_packets(target: Path, source: Path, container_format: str, lost: Sequence[int], *, close: bool) -> Path:
    """A remux without some packets.

    Args:
        target: where it goes.
        source: the whole video.
        container_format: FFmpeg's name of the container.
        lost: numbers of the packets that are left out.
        close: whether the times after a lost packet move up, as in containers that count pictures.
    """
    with av.open(str(source)) as reader, av.open(str(target), "w", format=container_format) as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        number, moved = 0, 0
        for packet in reader.demux(video=0):
            if not packet.size:
                continue
            assert packet.time_base is not None
            if number in lost:
                moved += round(Fraction(1, 25) / packet.time_base) if close else 0
            else:
                if moved:
                    packet.pts = None if packet.pts is None else packet.pts - moved
                    packet.dts = None if packet.dts is None else packet.dts - moved
                packet.stream = stream
                writer.mux(packet)
            number += 1
    return target


def with_times(target: Path, source: Path, container_format: str, steps: Sequence[int]) -> Path:
    """A remux of a video of 25 frames per second whose pictures stay for other numbers of frames.

    Args:
        target: where it goes.
        source: the whole video.
        container_format: FFmpeg's name of the container.
        steps: how many frames long each picture stays, again and again.
    """
    with av.open(str(source)) as reader, av.open(str(target), "w", format=container_format) as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        packets = [packet for packet in reader.demux(video=0) if packet.size]
        assert packets[0].time_base is not None
        frame_ticks = round(Fraction(1, 25) / packets[0].time_base)
        at, moved = 0, {}
        for pts in sorted(packet.pts for packet in packets if packet.pts is not None):
            moved[pts] = at
            at += steps[len(moved) % len(steps)] * frame_ticks
        clock = sorted(moved.values())
        for number, packet in enumerate(packets):
            assert packet.pts is not None
            packet.pts, packet.dts = moved[packet.pts] + 3 * max(steps) * frame_ticks, clock[number]
            packet.stream = stream
            writer.mux(packet)
    return target


def with_hole(target: Path, source: Path, offset: int, num_bytes: int) -> Path:
    """A copy in which some bytes are zero, as where a block of a disk or a part of a download is missing."""
    data = bytearray(source.read_bytes())
    data[offset : offset + num_bytes] = bytes(len(data[offset : offset + num_bytes]))
    target.write_bytes(data)
    return target
