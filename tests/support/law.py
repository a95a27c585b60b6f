"""The law of decoding: spans cut anywhere equal one pass, and one pass equals plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from tests.support.decoding import SPEC, probe
from vidshard.pipeline.video.decode import decode_spans
from vidshard.pipeline.video.frame_order import TimedFrame
from vidshard.pipeline.video.render import Renderer
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Clip, ClipSpec, Limits

Pixels = npt.NDArray[np.uint8]

EVERY_DECODER = Limits(decoders=("all",))


def plain_pictures(path: Path, spec: ClipSpec) -> tuple[list[Pixels], list[Fraction | None]]:
    """Every frame that a plain PyAV loop decodes, in its order, and its time.

    Returns:
        The frames drawn as for a clip, uint8 (H, W, 3) each, and their seconds; nothing where the loop fails.
    """
    pictures: list[Pixels] = []
    times: list[Fraction | None] = []
    renderer = Renderer(spec)
    with suppress(av.FFmpegError), av.open(str(path)) as container:
        stream = max(container.streams.video, key=lambda each: each.frames)
        for frame in container.decode(stream):
            shown = TimedFrame(frame=frame, pts=0, end_pts=0, stream=stream, pixel_aspect=stream.sample_aspect_ratio)
            pictures.append(np.empty((spec.height, spec.width, 3), np.uint8))
            renderer.cut(shown, pictures[-1])
            times.append(None if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base)
        return pictures, times
    return [], []


def _on_grid(pictures: list[Pixels], times: list[Fraction | None], fps: Fraction, count: int) -> list[Pixels]:
    """For each grid time the last picture not after it; the pictures themselves where one has no time."""
    known = [time for time in times if time is not None]
    if len(known) < len(times) or not known:
        return pictures
    shown = []
    for number in range(count):
        at = known[0] + number / fps + Fraction(1, 1000)  # times may be rounded to milliseconds
        shown.append(pictures[max(n for n, time in enumerate(known) if time <= at)])
    return shown


def clips_of(path: Path, spec: ClipSpec, clips_per_span: int) -> tuple[list[Clip], VideoError | None]:
    """Clips of all spans, each decoded by itself, and the first error."""
    clips: list[Clip] = []
    try:
        for span in plan_spans(probe(path, EVERY_DECODER), spec, clips_per_span):
            [result] = decode_spans([span], spec, str(path), max_clips=100_000, limits=EVERY_DECODER)
            if result.error is not None:
                return clips, result.error
            clips += result.clips
    except VideoError as error:
        return clips, error
    return clips, None


def breaches(
    path: Path, fps: Fraction, *, spans_of: Sequence[int] = (1, 2), compare_plain: bool = True
) -> tuple[list[str], Reason | None]:
    """Breaches of the law by a video, a line each; and the reason where it is refused.

    Args:
        path: the video.
        fps: its own rate, at which each of its frames is shown once.
        spans_of: numbers of clips in a span that are tried.
        compare_plain: False for videos whose frames do not lie on that rate.
    """
    spec = replace(SPEC, fps=fps, num_frames=3, height=48, width=72)
    one_pass, error = clips_of(path, spec, 1_000_000)
    found = []
    for clips_per_span in spans_of:
        spans, other_error = clips_of(path, spec, clips_per_span)
        if (error is None) != (other_error is None):
            found.append(f"one pass: {error}; spans of {clips_per_span}: {other_error}")
        elif error is None and not _same(one_pass, spans):
            found.append(f"spans of {clips_per_span} differ from one pass")
    if compare_plain:
        plain, times = plain_pictures(path, spec)
        shown = [frame for clip in one_pass for frame in clip.frames[: clip.num_valid_frames]]
        if error is not None:
            found += [f"refused ({error}), but plain decoding gives {len(plain)} frames"] * (len(plain) > 1)
        elif not _equal(plain, shown) and not _equal(_on_grid(plain, times, fps, len(shown)), shown):
            wrong = [n for n, (a, b) in enumerate(zip(plain, shown, strict=False)) if not np.array_equal(a, b)]
            found.append(f"{len(shown)} frames for {len(plain)} of plain decoding, of which {wrong} differ")
    return found, None if error is None else error.reason


def _equal(some: list[Pixels], others: list[Pixels]) -> bool:
    return len(some) == len(others) and all(map(np.array_equal, some, others))


def _same(some: list[Clip], others: list[Clip]) -> bool:
    return len(some) == len(others) and all(
        np.array_equal(a.frames, b.frames) and np.array_equal(a.frame_pts_seconds, b.frame_pts_seconds)
        for a, b in zip(some, others, strict=True)
    )
