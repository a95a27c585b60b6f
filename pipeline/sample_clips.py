"""Clips of one video as an iterator: the frames of a tokenize run without Ray, torch or an output folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal

from vidshard.pipeline import storage
from vidshard.pipeline.row_errors import row_error
from vidshard.pipeline.video.decode import stream_clips
from vidshard.pipeline.video.input_file import open_file
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.rejections import VideoError
from vidshard.schemas.video import (
    Clip,
    ClipPlacement,
    ClipSpec,
    Limits,
    Part,
    ResizePolicy,
    TailPolicy,
    VideoRef,
    parse_rate,
)

_ALL_CLIPS = 1 << 62
"""Clips per span that make a video a single span."""


def sample_clips(
    uri: str | os.PathLike[str],
    *,
    fps: str | int | float | Fraction = 8,
    frames: int = 17,
    size: int | tuple[int, int] = 256,
    start: float = 0.0,
    end: float | None = None,
    stride_seconds: float | Fraction | None = None,
    clips_per_video: int | None = None,
    clip_placement: ClipPlacement = "even",
    clip_seed: int = 0,
    min_seconds: float | Fraction = 0,
    tail: TailPolicy = "pad",
    resize: ResizePolicy = "crop",
    damaged: Literal["reject", "keep"] = "reject",
    limits: Limits | None = None,
) -> Iterator[Clip]:
    """Decode a video, or an archive of images, into clips on a fixed time grid.

    The arguments have the names and the meaning of the settings of ``vidshard tokenize``, and the clips have the
    frames a run with these settings tokenizes. Decoding happens in this process, as the iterator advances; memory
    holds the clips that overlap in time, however long the video. A run decodes in a sandbox instead: use one for files
    that may be hostile.

    Args:
        uri: a local path, or a URL that fsspec understands.
        fps: sampling rate in frames per second, such as 8, 7.5 or "30000/1001".
        frames: frames per clip.
        size: side of a square, or (height, width), in pixels.
        start: seconds after the video's first frame at which sampling starts.
        end: seconds after the video's first frame at which it ends; None for the end of the video.
        stride_seconds: seconds from the start of one clip to the next; None for clips without gap or overlap.
        clips_per_video: at most this many clips; None for all.
        clip_placement: positions of those: spread evenly, or random.
        clip_seed: seed of random positions.
        min_seconds: clips with less video than this are left out.
        tail: ``pad`` repeats the last frame of an incomplete last clip, ``drop`` leaves that clip out.
        resize: ``crop``, ``stretch`` or ``pad`` to the clip's aspect ratio.
        damaged: ``reject`` raises at the first damage, after the clips before it; ``keep`` leaves out damaged clips.
        limits: what the video may cost; None for the defaults.

    Returns:
        An iterator of :class:`~vidshard.schemas.video.Clip`, in order. Nothing is opened before its first step.

    Raises:
        ValueError: an argument out of range; raised by the call itself.
        VideoError: while iterating: the video cannot be read or decoded, or holds no clip at all.
        OutageError: while iterating: its storage does not answer, though it was asked again for a while.
    """
    height, width = (size, size) if isinstance(size, int) else size
    spec = ClipSpec(
        fps=parse_rate(fps),
        num_frames=frames,
        height=height,
        width=width,
        tail=tail,
        resize=resize,
        stride_seconds=None if stride_seconds is None else Fraction(str(stride_seconds)),
        min_seconds=Fraction(str(min_seconds)),
        clips_per_video=clips_per_video,
        placement=clip_placement,
        placement_seed=clip_seed,
    )
    path = storage.absolute(os.fspath(uri))
    return _clips(path, spec, Part.of(start, end), damaged == "keep", limits or Limits())


def _clips(path: str, spec: ClipSpec, part: Part, keep_undamaged: bool, limits: Limits) -> Iterator[Clip]:
    try:
        probe = probe_video(VideoRef(uri=path, num_bytes=-1), storage.open_video, limits)
        with open_file(path, storage.open_video) as file:
            [span] = plan_spans(probe, spec, _ALL_CLIPS, part)
            yield from stream_clips(span, spec, file, keep_undamaged=keep_undamaged, limits=limits)
    except VideoError:
        raise
    except Exception as error:
        raise row_error(error, path) from error
