"""Frames of a video in presentation order, from a time on: seeking, decoding, and the refusal of damage."""

from __future__ import annotations

import heapq
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain

from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vidshard.pipeline.video.avi import empty_chunks_after
from vidshard.pipeline.video.container import (
    ThreadType,
    codec_name,
    ffmpeg_failures_as,
    may_change_aspect,
    open_video,
    pixel_aspect,
    refuse_long,
)
from vidshard.pipeline.video.cropping import Crop, crop_of
from vidshard.pipeline.video.entry_points import EntryPoints
from vidshard.pipeline.video.image_archive import ImageArchive, image_archive
from vidshard.pipeline.video.input_file import WatchedFile
from vidshard.pipeline.video.packet_schedule import FOREVER, Needed, Schedule, Step
from vidshard.pipeline.video.packets import (
    NoKeyframeError,
    SeekPoint,
    StreamEnd,
    at_seconds,
    decode_packet,
    drain,
    read_packets,
)
from vidshard.pipeline.video.timestamps import Clock, TickConverter, stream_seconds, time_base_of, usual_ticks
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Limits

# Seconds before the wanted time to try in turn, when the container's index led past it; the start of the file is last.
_SEEK_BACK_SECONDS = (0, 2, 10, 60)


_SILENT = frozenset({"h264", "hevc", "vvc", "av1"})
"""Codecs in which a packet without a picture is no repeat of the one before: it is damaged, or holds only headers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedFrame:
    """A decoded frame and its display interval [pts, end_pts) in ticks."""

    frame: VideoFrame
    pts: int
    end_pts: int
    """The next frame's time where that is known, else by the frame's own duration; a frame that follows may start
    earlier."""
    stream: VideoStream | ImageArchive
    pixel_aspect: Fraction | None = None
    """Pixel aspect ratio; None for squares. Kept here, as the last frame outlives its container."""
    crop: Crop | None = None
    """The part that the container shows; None for all."""

    @property
    def shown_size(self) -> tuple[int, int]:
        """Stored (width, height) of the part that is shown, before orientation and pixel shape."""
        width, height = self.frame.width, self.frame.height
        return (width, height) if self.crop is None else self.crop.size(width, height)


class _MissingFrameError(Exception):
    """A wanted frame did not come out of its packet, or something failed after packets were left out."""


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
    try:
        yield from _decode_needed(watched, start, thread_type, clock, keep_going, needed)
    except NoKeyframeError:
        if start.seek_pts is None:
            from_start = SeekPoint(await_keyframe=False, with_edits=start.with_edits)
            yield from _decode_once(watched, from_start, thread_type, clock, keep_going, None)


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
        except _MissingFrameError:
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
) -> Generator[TimedFrame, None, None]:
    """Frames of one pass over the packets; with ``needed``, packets that it can do without are left out."""
    with open_video(watched, thread_type, with_edits=start.with_edits) as (container, stream):
        convert = clock.converter(stream) if clock is not None else TickConverter()
        end = StreamEnd()
        found = _packets_from(container, stream, start, watched.limits, convert, end)
        if found is None:
            return
        packets, first_pts = found
        schedule = Schedule(packets, stream, _in_clock(needed, convert), first_pts) if needed is not None else None
        order = _FrameOrder(stream, convert, first_pts, crop_of(watched, stream), conceal=keep_going)
        failure = "no packets"
        last: TimedFrame | None = None
        with _failures_retried(watched, schedule):
            for step in schedule or _every(packets):
                try:
                    frames = _decode_step(watched, stream, step)
                except VideoError as error:
                    if not keep_going:
                        raise
                    failure = error.detail
                    continue
                if step is not None:
                    order.awaited.sent(step)
                for frame in frames:
                    timed = order.timed(frame)
                    if timed is not None:
                        last = timed
                        yield timed
            order.awaited.came(FOREVER)
            if schedule is not None and schedule.stopped:
                return
            if order.last_pts is not None:
                held_until = _held_until(watched, stream, end, order.last_pts)
                if last is not None and held_until is not None and held_until > order.end_pts:
                    order.end_pts = held_until
                    yield replace(last, end_pts=convert(held_until))
                _refuse_truncated(stream, order.end_pts * time_base_of(stream))
            elif start.seek_pts is None:
                raise VideoError(
                    Reason.NO_FRAMES, f"no frame of its {codec_name(stream)} stream could be decoded: {failure}"
                )


def _packets_from(
    container: InputContainer,
    stream: VideoStream,
    start: SeekPoint,
    limits: Limits,
    convert: TickConverter,
    end: StreamEnd,
) -> tuple[Iterator[Packet[VideoStream] | None], int | None] | None:
    """Packets from a seek point on, and the time of the keyframe it led to, in the container's ticks.

    Returns:
        The time is None without a seek, or where decoding can start nowhere but at the start of the file. None
        instead of both where decoding cannot start there: no keyframe follows, or it has no time, so that only
        counting from the start tells where it is.
    """
    entries = None if start.seek_pts is None else EntryPoints(stream)
    if entries is not None and entries.only_start:
        if start.forward:
            return None
        start = SeekPoint()
    packets = read_packets(container, stream, start, limits, convert, end)
    if start.seek_pts is None:
        return packets, None
    if entries is not None and not entries.must_read_all:
        with ffmpeg_failures_as(Reason.DECODE_ERROR, "seeking failed"):
            container.seek(convert.to_container(start.seek_pts), backward=not start.forward, stream=stream)
    first = next(packets)
    if first is None:
        return None if start.forward else (iter([None]), None)
    first_pts = first.pts
    if first_pts is None and stream.codec_context.reorder_depth == 0:
        first_pts = first.dts
    return None if first_pts is None else (chain([first], packets), first_pts)


def _in_clock(needed: Needed, convert: TickConverter) -> Needed:
    """The same question asked in the container's ticks."""
    if convert.parts == 1:
        return needed
    return lambda pts, until_pts: needed(convert(pts), until_pts if until_pts == FOREVER else convert(until_pts))


@contextmanager
def _failures_retried(watched: WatchedFile, schedule: Schedule | None) -> Iterator[None]:
    """Raise _MissingFrameError for a failure after packets were left out, as that may be its cause."""
    try:
        yield
    except VideoError as error:
        of_the_pictures = error.reason in (Reason.DECODE_ERROR, Reason.NO_FRAMES) and watched.error is None
        if schedule is not None and schedule.left_out and of_the_pictures:
            raise _MissingFrameError from error
        raise


def _every(packets: Iterator[Packet[VideoStream] | None]) -> Iterator[Step | None]:
    return (None if packet is None else Step(packet=packet) for packet in packets)


def _decode_step(watched: WatchedFile, stream: VideoStream, step: Step | None) -> list[VideoFrame]:
    """The frames the decoder gives for a step; None drains it."""
    context = stream.codec_context
    frames: list[VideoFrame] = []
    if step is None or step.restart:
        frames = drain(watched, stream)
    if step is None:
        return frames
    if step.restart:
        context.flush_buffers()
    context.skip_frame = "NONREF" if step.skip else "DEFAULT"
    return frames + decode_packet(watched, stream, step.packet)


@dataclass(slots=True)
class _AwaitedFrames:
    """The wanted frames that have not come out of the decoder yet."""

    expected: list[tuple[int, int | None]] = field(default_factory=list)
    """A heap of their times, and of the times of the frames after them."""

    def sent(self, step: Step) -> None:
        if step.expected_pts is not None:
            heapq.heappush(self.expected, (step.expected_pts, step.next_pts))

    def came(self, pts: int) -> int | None:
        """Take note of a frame that came out.

        Returns:
            The time of the next frame, where that is known.

        Raises:
            _MissingFrameError: a frame that was wanted before it did not come.
        """
        if not self.expected or pts < self.expected[0][0]:
            return None
        expected_pts, next_pts = heapq.heappop(self.expected)
        if expected_pts != pts:
            raise _MissingFrameError
        return next_pts


class _FrameOrder:
    """Gives decoded frames their display intervals, and refuses those that are damaged or out of order."""

    __slots__ = (
        "_aspect",
        "_aspect_may_change",
        "_conceal",
        "_convert",
        "_crop",
        "_first_pts",
        "_frame_ticks",
        "_stream",
        "_time_base",
        "awaited",
        "end_pts",
        "last_pts",
    )

    def __init__(
        self,
        stream: VideoStream,
        convert: TickConverter,
        first_pts: int | None,
        crop: Crop | None = None,
        *,
        conceal: bool,
    ) -> None:
        """Expect the frames of a stream.

        Args:
            stream: the frames' stream.
            convert: the container's ticks to those of the clock.
            first_pts: frames before it are left out; in the container's ticks, as all times here.
            crop: the part of the pictures that is shown; None for all.
            conceal: take frames in which the decoder concealed damage.
        """
        self.awaited = _AwaitedFrames()
        self.last_pts: int | None = None
        self.end_pts = 0
        self._stream, self._convert, self._first_pts, self._conceal = stream, convert, first_pts, conceal
        self._time_base, self._frame_ticks = time_base_of(stream), usual_ticks(stream)
        self._aspect, self._aspect_may_change = pixel_aspect(stream), may_change_aspect(stream)
        self._crop = crop
        if crop is not None and crop.pixel_aspect is not None:
            self._aspect = crop.pixel_aspect

    def timed(self, frame: VideoFrame) -> TimedFrame | None:
        """The frame with its times; None for one before the keyframe that a seek led to.

        Raises:
            VideoError: DECODE_ERROR: it is damaged, or its time runs backwards.
            _MissingFrameError: a frame that was wanted before it did not come.
        """
        pts = frame.pts if frame.pts is not None else frame.dts
        if pts is None:
            pts = self.end_pts
        if self._first_pts is not None and pts < self._first_pts:
            return None  # it references pictures before the keyframe, which were not decoded
        if frame.is_corrupt and not self._conceal:
            detail = f"{at_seconds(pts, self._time_base)}: the decoder had to conceal a damaged picture"
            raise VideoError(Reason.DECODE_ERROR, detail)
        if self.last_pts is not None and pts < self.last_pts:
            before = f"{float(self.last_pts * self._time_base):.2f} s"
            detail = f"{at_seconds(pts, self._time_base)}: presentation times run backwards, after {before}"
            raise VideoError(Reason.DECODE_ERROR, detail)
        self.end_pts = self.awaited.came(pts) or pts + (frame.duration or self._frame_ticks)
        self.last_pts = pts
        if self._aspect_may_change:
            self._aspect = pixel_aspect(self._stream)
        return TimedFrame(
            frame=frame,
            pts=self._convert(pts),
            end_pts=self._convert(self.end_pts),
            stream=self._stream,
            pixel_aspect=self._aspect,
            crop=self._crop,
        )


def seconds_from_packets(watched: WatchedFile, first_pts: int) -> Fraction:
    """Seconds from the first frame to the end, by reading every packet but decoding none.

    Args:
        watched: the file.
        first_pts: time of the first frame, in the container's ticks.

    Raises:
        VideoError: the container is damaged, or the video over a limit.
    """
    archive = image_archive(watched)
    if archive is not None:
        return (len(archive) - first_pts) / archive.rate
    with open_video(watched) as (container, stream):
        frame_ticks, time_base = usual_ticks(stream), time_base_of(stream)
        longest = watched.limits.max_seconds / time_base
        num_packets, ticks, end_pts = 0, 0, first_pts
        end = StreamEnd()
        for packet in read_packets(container, stream, SeekPoint(await_keyframe=False), watched.limits, end=end):
            if packet is not None:
                num_packets += 1
                if packet.pts is not None:
                    end_pts = max(end_pts, packet.pts + (packet.duration or frame_ticks))
                ticks = end_pts - first_pts or num_packets * frame_ticks
                if ticks > longest:  # checked within the loop, as there may be no end
                    refuse_long(watched.limits, seconds=ticks * time_base)
        held_until = _held_until(watched, stream, end, None)
        return (max(ticks, held_until - first_pts) if held_until is not None else ticks) * time_base


def _held_until(watched: WatchedFile, stream: VideoStream, end: StreamEnd, last_pts: int | None) -> int | None:
    """The tick until which packets without a picture hold the last picture; None where there are none at the end.

    Args:
        watched: the file, read to its end.
        stream: the video stream.
        end: the end of its packets.
        last_pts: time of the last frame, in the container's ticks; None where nothing was decoded.
    """
    until, last = end.until_pts, end.last
    if last is None:
        return until
    ticks = last.duration or usual_ticks(stream)
    if last_pts is not None and last.pts is not None and last.pts > last_pts and codec_name(stream) not in _SILENT:
        until = max(until or 0, last.pts + ticks)
    entries, formats = stream.index_entries, stream.container.format.name.split(",")
    if "mov" in formats and last.pts is not None and last.dts is not None and len(entries):
        final = entries[-1]
        if not final.size and not final.is_discard and final.timestamp > last.dts:  # the demuxer passes over them
            until = max(until or 0, final.timestamp + last.pts - last.dts + ticks)
    if "avi" in formats and last.pos is not None and last.dts is not None:
        count = empty_chunks_after(watched, stream.index, last.pos + last.size)
        until = max(until or 0, last.dts + (1 + count) * ticks) if count else until
    return until


def _refuse_truncated(stream: VideoStream, end_seconds: Fraction) -> None:
    """Refuse a stream whose frames end well before its header says they do.

    Only the length that the header states for the video stream counts: a container may be longer for its sound.
    Writers differ in where its clock starts, so the reading that misses less is taken. Honest writers are exact to a
    frame or two; a second, or a hundredth of the length, leaves room for the others.
    """
    claimed = stream_seconds(stream)
    if claimed is None:
        return
    start = (stream.start_time or 0) * time_base_of(stream)
    reached = max(end_seconds, end_seconds - start)
    if claimed - reached > max(Fraction(1), claimed / 100):
        raise VideoError(
            Reason.TRUNCATED,
            f"the header promises {float(claimed):.2f} s of video, the frames end at {float(reached):.2f} s",
        )
