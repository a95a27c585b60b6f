"""Checks of what a decoding process answers: that it is an answer to the question, with numbers that can be.

``pipeline.video.answers`` has checked the types. A hostile video that took over FFmpeg chooses the values: they must
not name another file, another video or more clips than were asked for, nor bring numbers that stop a later stage.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Clip, ClipSpec, Limits, Span, SpanClips, VideoProbe, VideoRef

_CODEC = re.compile(r"[A-Za-z0-9_.-]{0,64}")
_MOST = 2**63


def checked_probe(found: object, ref: VideoRef, limits: Limits) -> VideoProbe:
    """The header of the file that was asked about.

    Args:
        found: what the process answered.
        ref: the file; its address replaces the one in the answer.
        limits: the run's, for the length of a video.

    Raises:
        VideoError: DECODER_CRASHED: it is no such header.
    """
    if not isinstance(found, VideoProbe):
        raise _other()
    source, base = found.source, found.time_base
    if not (
        0 <= found.num_bytes < _MOST
        and 0 < base.numerator < _MOST
        and base.denominator < _MOST
        and abs(found.grid_start_pts) < _MOST
        and 0 <= found.duration_seconds_from_header <= limits.max_seconds
        and 1 <= source.width < 2**31
        and 1 <= source.height < 2**31
        and 0 <= source.fps < 2**31
        and source.rotation_degrees in (0, 90, 180, 270)
        and _CODEC.fullmatch(source.codec)
    ):
        raise _other()
    return replace(found, uri=ref.uri)


def checked_clips(results: object, spans: Sequence[Span], specs: Sequence[ClipSpec], max_clips: int) -> list[SpanClips]:
    """The clips of the spans that were asked for.

    Args:
        results: what the process answered.
        spans: of one video.
        specs: clip settings of each span.
        max_clips: largest number of clips of an open-ended last span, its halo not counted.

    Raises:
        VideoError: DECODER_CRASHED: they are not.
    """
    if not isinstance(results, list) or len(results) != len(spans):
        raise _other()
    for result, span, spec in zip(results, spans, specs, strict=True):
        if not isinstance(result, SpanClips) or not 0 <= result.num_errors < 2**31:
            raise _other()
        if result.doubt is not None and (result.doubt.reason is not Reason.POSSIBLE_LOSS or not result.clips):
            raise _other()
        first = span.first_clip - spec.halo_of(span.first_clip)
        end = span.first_clip + max_clips + spec.halo_clips if span.end_clip is None else span.end_clip
        indices = [clip.clip_index for clip in result.clips]
        if indices != sorted(set(indices)) or any(not first <= index < end for index in indices):
            raise _other()
        if not all(_is_of(clip, span, spec) for clip in result.clips):
            raise _other()
    return results


def _is_of(clip: Clip, span: Span, spec: ClipSpec) -> bool:
    geometry, times = clip.geometry, clip.frame_pts_seconds
    places = (geometry.scaled_width, geometry.scaled_height, geometry.left, geometry.top)
    return bool(
        clip.video_id == span.video_id
        and clip.frames.shape == (spec.num_frames, spec.height, spec.width, 3)
        and clip.lead_frames in (0, spec.lead_frames)
        and geometry.policy == spec.resize
        and all(abs(place) < 2**31 for place in places)
        and math.isfinite(clip.start_seconds)
        and times.dtype == np.float64
        and np.isfinite(times).all()
        and (np.diff(times) >= 0).all()
    )


def _other() -> VideoError:
    return VideoError(Reason.DECODER_CRASHED, "the decoding process answered something else than it was asked")
