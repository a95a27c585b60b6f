"""Decodes spans of a video into clips, in as few passes over the file as it takes.

Plain functions over PyAV; nothing knows of Ray. ``container`` opens files safely, ``frames`` decodes frames and their
times, ``presentation`` applies edit lists, ``render`` and ``geometry`` turn a frame into a picture, ``sampling`` says
which frame belongs to which grid time, and ``clip_builder`` collects frames into clips.

A span decoded alone has the same pixels and times as in one pass over the whole video. Damage refuses the whole span
unless undamaged clips are kept. Running out of memory while decoding is a MemoryError, which ``sandbox`` turns into a
reason.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import closing, suppress
from typing import BinaryIO

from vidshard.pipeline.video.clip_builder import ClipBuilder
from vidshard.pipeline.video.container import ThreadType, refuse_large, refuse_long
from vidshard.pipeline.video.continuation import FAR_SECONDS, Continuation, FarEntryError
from vidshard.pipeline.video.frame_order import TimedFrame
from vidshard.pipeline.video.input_file import Gap, WatchedFile, opened, storage_failures_named
from vidshard.pipeline.video.joined import refuse_rest
from vidshard.pipeline.video.packet_schedule import FOREVER
from vidshard.pipeline.video.presentation import frames_after, frames_covering
from vidshard.pipeline.video.timestamps import Clock
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Clip, ClipSpec, Limits, Span, SpanClips

SEEK_GAP_SECONDS = 10
"""Stretches of video longer than this that no clip needs are skipped by seeking, which costs some milliseconds."""

_DAMAGE = frozenset({Reason.DECODE_ERROR, Reason.TRUNCATED})


def decode_span(
    span: Span,
    spec: ClipSpec,
    source: str | BinaryIO,
    *,
    max_clips: int,
    thread_type: ThreadType = "NONE",
    limits: Limits | None = None,
) -> list[Clip]:
    """Decode one span of a video; see :func:`decode_spans`.

    Raises:
        VideoError: the span was refused.
    """
    [result] = decode_spans([span], spec, source, max_clips=max_clips, thread_type=thread_type, limits=limits)
    if result.error is not None:
        raise result.error
    return result.clips


def decode_spans(
    spans: Sequence[Span],
    spec: ClipSpec | Sequence[ClipSpec],
    source: str | BinaryIO,
    *,
    max_clips: int,
    keep_undamaged: bool = False,
    thread_type: ThreadType = "NONE",
    limits: Limits | None = None,
    continuing: bool = False,
) -> list[SpanClips]:
    """Decode spans of one video, in one pass where they lie close together.

    Each has the same clips as decoded by itself: where one fails, those that are not finished are decoded alone.

    Args:
        spans: which clips; from ``plan_spans``, all of one video.
        spec: the grid and the geometry; the same that the spans were planned with. A sequence has one for each span.
        source: a local path, or a seekable binary file, which stays open.
        max_clips: clips that an open-ended last span may hold. It bounds memory: ``max_clips * spec.clip_bytes``
            bytes of frames are held at once.
        keep_undamaged: for a damaged span, give the clips before, between and after the damage, each as if there
            were none, and an error that says what is missing. Otherwise damage refuses the whole span.
        thread_type: how the decoder uses threads; one thread by default, as many tasks run side by side.
        limits: what the video may cost; None for the defaults.
        continuing: keep the decoder of a file that can only be decoded from far before, for a later call.

    Returns:
        For each span its clips in order, or why it was refused. There are fewer clips than planned, or none, where
        the video ends before the header says so; a span after the first of its part may be empty. Reasons are
        OVER_LIMIT, DECODE_ERROR, TRUNCATED, LONGER_THAN_HEADER, TOO_SHORT, NO_FRAMES, UNSUPPORTED, UNREADABLE, and
        those of ``probe_video``, should the file have changed since.

    Raises:
        VideoError: UNREADABLE: the file cannot be opened.
    """
    limits = limits or Limits()
    span = spans[0]
    clock = Clock(time_base=span.time_base, start_pts=span.grid_start_pts)
    specs = (spec,) * len(spans) if isinstance(spec, ClipSpec) else tuple(spec)
    key = (span.video_id, clock, frozenset(specs), thread_type, limits)

    def fresh() -> list[ClipBuilder]:
        return [ClipBuilder(span, own, max_clips) for span, own in zip(spans, specs, strict=True)]

    def apart(builders: list[ClipBuilder], *, refuse_far: bool) -> list[ClipBuilder]:
        if len(builders) > 1:
            with suppress(VideoError):  # it is not known which span it belongs to: each is decoded alone below
                _fill(file, builders, thread_type, limits, refuse_far=refuse_far)
        for number, builder in enumerate(builders):
            if not builder.is_done:
                builders[number] = builder = ClipBuilder(builder.span, specs[number], max_clips)
                try:
                    _fill(file, [builder], thread_type, limits, keep_undamaged=keep_undamaged, refuse_far=refuse_far)
                except VideoError as error:
                    builder.refuse(error)
        return builders

    with opened(source) as file:
        if continuing:
            _forget_others(key)
            if _fill_from_kept(file, builders := fresh(), thread_type):
                return [builder.result() for builder in builders]
        try:
            builders = apart(fresh(), refuse_far=continuing)
        except FarEntryError:
            _keep(Continuation.start(key, file, limits, _next_stretch(fresh())[0], clock, thread_type))
            if not _fill_from_kept(file, builders := fresh(), thread_type):
                builders = apart(fresh(), refuse_far=False)
    return [builder.result() for builder in builders]


_kept: Continuation | None = None
"""Decoder of the last file of this process that could only be decoded from far before."""


def _keep(continuation: Continuation | None) -> None:
    global _kept
    if _kept is not None and _kept is not continuation:
        _kept.close()
    _kept = continuation


def _forget_others(key: Hashable) -> None:
    if _kept is not None and _kept.key != key:
        _keep(None)


def _fill_from_kept(file: BinaryIO, builders: Sequence[ClipBuilder], thread_type: ThreadType) -> bool:
    """Give frames to the builders from the decoder that was kept; whether all are done.

    It is forgotten where it has passed what they need, or fails: then they are decoded from their own entry points.
    """
    kept = _kept
    if kept is None:
        return False
    waiting = list(builders)
    for builder in builders:
        builder.note_gaps(kept.watched.gaps.values())
    kept.bind(file)
    try:
        while waiting and kept.reaches(_next_stretch(waiting)[0]):
            for _ in _decode_stretch(kept.watched, waiting, thread_type, kept=kept):
                pass
            waiting = [builder for builder in waiting if not builder.is_done]
    except (VideoError, OSError):
        _keep(None)
        return False
    except BaseException:
        _keep(None)
        raise
    kept.bind(None)
    if waiting or kept.watched.error is not None:
        _keep(None)
        return False
    return True


def stream_clips(
    span: Span,
    spec: ClipSpec,
    source: str | BinaryIO,
    *,
    keep_undamaged: bool = False,
    thread_type: ThreadType = "NONE",
    limits: Limits | None = None,
) -> Iterator[Clip]:
    """Decode one span and give each clip as soon as it is complete.

    The clips are those of :func:`decode_spans`. Memory holds the clips that overlap in time, however long the span.

    Args:
        span: which clips.
        spec: the grid and the geometry.
        source: a local path, or a seekable binary file, which stays open.
        keep_undamaged: leave out the damaged clips and go on; otherwise damage ends the iteration with an error.
        thread_type: how the decoder uses threads.
        limits: what the video may cost; None for the defaults.

    Raises:
        VideoError: the reasons of ``decode_spans``, apart from LONGER_THAN_HEADER; the clips before it are complete.
    """
    builder = ClipBuilder(span, spec, max_clips=FOREVER)
    with opened(source) as file:
        while not builder.is_done:
            try:
                with storage_failures_named(file, limits) as watched:
                    for _ in _decode_stretch(watched, [builder], thread_type):
                        yield from builder.take_complete()
            except VideoError as error:
                if not keep_undamaged or error.reason not in _DAMAGE:
                    raise
                builder.note_damage(error)
    result = builder.result()
    yield from result.clips
    if result.error is not None and not keep_undamaged:
        raise result.error


def _fill(
    file: BinaryIO,
    builders: Sequence[ClipBuilder],
    thread_type: ThreadType,
    limits: Limits | None,
    *,
    keep_undamaged: bool = False,
    refuse_far: bool = False,
) -> None:
    """Give frames to the builders until all are done, in as few passes as it takes.

    Args:
        file: the video.
        builders: of spans of one video.
        thread_type: how the decoder uses threads.
        limits: what the video may cost.
        keep_undamaged: a single builder goes on after damage.
        refuse_far: as in ``_decode_stretch``.

    Raises:
        VideoError: the video is damaged or over a limit.
        FarEntryError: an entry point is far away.
    """
    waiting = list(builders)
    gaps: dict[int, Gap] = {}
    for builder in builders:
        builder.note_gaps(gaps.values())
    while waiting:
        try:
            with storage_failures_named(file, limits) as watched:
                watched.gaps = gaps
                for _ in _decode_stretch(watched, waiting, thread_type, refuse_far=refuse_far):
                    pass
        except VideoError as error:
            if not keep_undamaged or error.reason not in _DAMAGE:
                raise
            for builder in waiting:
                builder.note_damage(error)
        waiting = [builder for builder in waiting if not builder.is_done]


def _decode_stretch(
    watched: WatchedFile,
    waiting: Sequence[ClipBuilder],
    thread_type: ThreadType,
    *,
    kept: Continuation | None = None,
    refuse_far: bool = False,
) -> Iterator[None]:
    """Give the builders the frames of the next stretch of video they need, up to a gap or the end.

    Yields after each frame, so that the caller can take complete clips out of a builder.

    Args:
        watched: the file.
        waiting: builders of spans that need frames.
        thread_type: how the decoder uses threads.
        kept: gives the frames; None to decode them from an entry point.
        refuse_far: whether the entry point must not be far away.

    Raises:
        FarEntryError: it is.
    """
    span = waiting[0].span
    start, end = _next_stretch(waiting)
    limit_pts = span.grid_start_pts + int(watched.limits.max_seconds / span.time_base)

    def needed(pts: int, until_pts: int) -> bool:
        if end is not None and pts >= end:
            return False
        for builder in waiting:  # noqa: SIM110  a loop is faster, and this runs several times for each packet
            if builder.times.needs(pts, until_pts):
                return True
        return False

    clock = Clock(time_base=span.time_base, start_pts=span.grid_start_pts)
    damaged_pts = waiting[0].damage.last_pts
    if kept is not None:
        source = kept.frames(waiting, end)
    elif damaged_pts is None:
        first_pts = start if start > span.grid_start_pts else None
        source = frames_covering(watched, first_pts, clock, thread_type, needed)
    else:
        source = frames_after(watched, damaged_pts, clock, thread_type, needed)
    with closing(source) as frames:
        shown: TimedFrame | None = None
        for following in frames:
            if refuse_far and shown is None and (start - following.pts) * span.time_base > FAR_SECONDS:
                raise FarEntryError
            if following.pts > limit_pts:
                refuse_long(watched.limits, seconds=(following.pts - span.grid_start_pts) * span.time_base)
            refuse_large(watched.limits, following.frame.width, following.frame.height)
            for builder in waiting:
                builder.note_frame(following.pts)
                if shown is not None:
                    builder.add(shown, until_pts=following.pts)
            waiting = [builder for builder in waiting if not builder.is_done]
            if not waiting or (end is not None and following.pts >= end):
                return
            shown = following
            yield
    if shown is not None:  # else no keyframe comes after the damage
        for builder in waiting:
            builder.add(shown, until_pts=shown.end_pts)
        if end is not None and shown.end_pts >= end:
            return
        if watched.next_recording is not None:
            refuse_rest(watched, watched.next_recording)
    for builder in waiting:
        builder.end(builder.seen_pts if shown is None else shown.end_pts)


def _next_stretch(builders: Sequence[ClipBuilder]) -> tuple[int, int | None]:
    """Ticks from the first frame needed to the next long gap (exclusive); None for the end of the video."""
    gap = int(SEEK_GAP_SECONDS / builders[0].span.time_base)
    stretches = sorted((builder.next_stretch(SEEK_GAP_SECONDS) for builder in builders), key=lambda each: each[0])
    start, end = stretches[0]
    for next_start, next_end in stretches[1:]:
        if end is None or next_start > end + gap:
            break
        end = None if next_end is None else max(end, next_end)
    return start, end
