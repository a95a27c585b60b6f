"""Frames of a video in presentation order, from a time on: seeking, decoding, and the refusal of damage."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

from vidshard.pipeline.video.container import ThreadType, open_video
from vidshard.pipeline.video.decoding_pass import DecodingPass
from vidshard.pipeline.video.frame_order import DecodingTimesError, MissingFrameError, TimedFrame
from vidshard.pipeline.video.image_archive import ImageArchive, image_archive
from vidshard.pipeline.video.input_file import WatchedFile
from vidshard.pipeline.video.packet_schedule import FOREVER, Needed
from vidshard.pipeline.video.packets import NoKeyframeError, SeekPoint
from vidshard.pipeline.video.timestamps import Clock
from vidshard.schemas.rejections import Reason, VideoError

# Seconds before the wanted time to try in turn, when the container's index led past it; the start of the file is last.
_SEEK_BACK_SECONDS = (0, 2, 10, 60)


def frames_covering(
    watched: WatchedFile,
    needed_pts: int | None,
    clock: Clock,
    thread_type: ThreadType,
    needed: Needed | None = None,
    *,
    with_edits: bool = True,
) -> Generator[TimedFrame, None, None]:
    """Frames in presentation order, the first one not after ``needed_pts``.

    Args:
        watched: the file.
        needed_pts: None for the start of the video.
        clock: the ticks of all times here.
        thread_type: how the decoder uses threads.
        needed: as in :func:`decode_from`.
        with_edits: False for times of an mp4's media, without its edit list.
    """
    if needed_pts is not None:
        for seconds in _SEEK_BACK_SECONDS:
            start = SeekPoint(seek_pts=needed_pts - int(seconds / clock.time_base), with_edits=with_edits)
            with closing(decode_from(watched, start, thread_type, clock=clock, needed=needed)) as frames:
                try:
                    first = next(frames, None)
                except VideoError:  # not a place to start decoding: the start of the file decides
                    continue
                if first is not None and first.pts <= needed_pts:
                    yield first
                    yield from frames
                    return
    yield from decode_from(watched, SeekPoint(with_edits=with_edits), thread_type, clock=clock, needed=needed)


def frames_after(
    watched: WatchedFile,
    pts: int,
    clock: Clock,
    thread_type: ThreadType,
    needed: Needed,
    *,
    with_edits: bool = True,
) -> Generator[TimedFrame, None, None]:
    """The first keyframe after a tick, then the wanted frames; none where no keyframe follows.

    Args:
        watched: the file.
        pts: where damage was met.
        clock: the ticks of all times here.
        thread_type: how the decoder uses threads.
        needed: as in :func:`decode_from`.
        with_edits: False for times of an mp4's media, without its edit list.
    """
    key_pts: int | None = None

    def needed_or_first(start_pts: int, end_pts: int) -> bool:
        nonlocal key_pts
        key_pts = start_pts if key_pts is None else key_pts
        return start_pts == key_pts or needed(start_pts, end_pts)

    start = SeekPoint(seek_pts=pts + 1, forward=True, with_edits=with_edits)
    yield from decode_from(watched, start, thread_type, clock=clock, needed=needed_or_first)


def decode_from(
    watched: WatchedFile,
    start: SeekPoint,
    thread_type: ThreadType = "NONE",
    *,
    clock: Clock | None = None,
    keep_going: bool = False,
    needed: Needed | None = None,
) -> Generator[TimedFrame, None, None]:
    """Frames from a seek point to the end of the video.

    Args:
        watched: the file.
        start: where to start.
        thread_type: how the decoder uses threads.
        clock: the ticks of all times here; None for the container's own.
        keep_going: skip what fails to decode, and fail only when nothing is left.
        needed: decode the frames for which it holds, with the same pixels and times as all; others may come too. The
            last of them ends the iteration. None decodes all.

    Raises:
        VideoError: the stream is damaged, truncated or over a limit, or has no frames.
    """
    archive = image_archive(watched)
    if archive is not None:
        yield from _images_from(archive, start, keep_going, needed)
        return
    last_pts: int | None = None
    try:
        for frame in _decode_needed(watched, start, thread_type, clock, keep_going, needed):
            last_pts = frame.pts
            yield frame
        return
    except NoKeyframeError:
        if start.seek_pts is not None:
            return
        from_start, by_place = SeekPoint(await_keyframe=False, with_edits=start.with_edits), False
    except DecodingTimesError:
        if start.forward:  # the place of a frame is known only by counting from the start
            return
        from_start, by_place = SeekPoint(with_edits=start.with_edits), True
    for frame in _decode_once(watched, from_start, thread_type, clock, keep_going, None, by_place=by_place):
        if last_pts is None or frame.pts > last_pts:
            yield frame


def _images_from(
    archive: ImageArchive, start: SeekPoint, keep_going: bool, needed: Needed | None
) -> Generator[TimedFrame, None, None]:
    """Images of an archive: the one sought, those that are needed, and the last one, which marks the end."""
    last = len(archive) - 1
    first = 0
    if start.seek_pts is not None:
        first = max(0, start.seek_pts if start.forward else min(start.seek_pts, last))
    awaited = start.seek_pts is not None  # the one sought; forward, the first that is whole
    failure: VideoError | None = None
    for pts in range(first, len(archive)):
        if needed is not None and not awaited:
            if not needed(pts, FOREVER):
                return
            if pts < last and not needed(pts, pts + 1):
                continue
        try:
            frame = archive.frame(pts)
        except VideoError as error:
            if not keep_going and not (awaited and start.forward):
                raise
            failure = error
            continue
        yield TimedFrame(frame=frame, pts=pts, end_pts=pts + 1, stream=archive)
        awaited = keep_going = False
    if keep_going and failure is not None:
        raise VideoError(Reason.NO_FRAMES, f"not one image of the archive could be decoded: {failure.detail}")


def _decode_needed(
    watched: WatchedFile,
    start: SeekPoint,
    thread_type: ThreadType,
    clock: Clock | None,
    keep_going: bool,
    needed: Needed | None,
) -> Generator[TimedFrame, None, None]:
    """Frames as from ``_decode_once``; everything is decoded where leaving out packets went wrong."""
    last_pts: int | None = None
    if needed is not None:
        try:
            for frame in _decode_once(watched, start, thread_type, clock, keep_going, needed):
                last_pts = frame.pts
                yield frame
            return
        except MissingFrameError:
            pass
    for frame in _decode_once(watched, start, thread_type, clock, keep_going, None):
        if last_pts is None or frame.pts > last_pts:
            yield frame


def _decode_once(
    watched: WatchedFile,
    start: SeekPoint,
    thread_type: ThreadType,
    clock: Clock | None,
    keep_going: bool,
    needed: Needed | None,
    *,
    by_place: bool = False,
) -> Generator[TimedFrame, None, None]:
    """Frames of one pass over the packets; none where decoding cannot start at the seek point.

    Args:
        watched: the file.
        start: as in :func:`decode_from`.
        thread_type: as there.
        clock: as there.
        keep_going: as there.
        needed: as there; packets that it can do without are left out.
        by_place: frames have the times of their places, as the container's are those of decoding.

    Raises:
        DecodingTimesError: the container's times are those of decoding.
        MissingFrameError: decoding failed, perhaps for the packets that were left out.
    """
    with open_video(watched, thread_type, with_edits=start.with_edits) as (container, stream):
        opened = DecodingPass.begin(
            watched, container, stream, start, clock=clock, keep_going=keep_going, needed=needed, by_place=by_place
        )
        if opened is not None:
            yield from opened.frames()
