"""Frames of a video in presentation order, from a time on: seeking, decoding, and the refusal of damage."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain

from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vidshard.pipeline.video.color_tags import ColorTags
from vidshard.pipeline.video.container import ThreadType, codec_name, ffmpeg_failures_as, may_reorder, open_video
from vidshard.pipeline.video.cropping import crop_of
from vidshard.pipeline.video.entry_points import EntryPoints
from vidshard.pipeline.video.frame_order import (
    MOST_REORDERED,
    DecodingTimesError,
    FrameOrder,
    HeldFrames,
    MissingFrameError,
    PacketPlaces,
    TimedFrame,
)
from vidshard.pipeline.video.image_archive import ImageArchive, image_archive
from vidshard.pipeline.video.input_file import WatchedFile
from vidshard.pipeline.video.packet_schedule import FOREVER, Needed, Schedule, Step
from vidshard.pipeline.video.packets import (
    NoKeyframeError,
    SeekPoint,
    StreamEnd,
    decode_packet,
    drain,
    read_packets,
)
from vidshard.pipeline.video.stream_end import held_until, refuse_truncated
from vidshard.pipeline.video.timestamps import Clock, TickConverter, time_base_of
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
    """Frames of one pass over the packets; with ``needed``, packets that it can do without are left out.

    Args:
        watched: the file.
        start: as in :func:`decode_from`.
        thread_type: as there.
        clock: as there.
        keep_going: as there.
        needed: as there.
        by_place: frames have the times of their places, as the container's are those of decoding.

    Raises:
        DecodingTimesError: the container's times are those of decoding.
    """
    with open_video(watched, thread_type, with_edits=start.with_edits) as (container, stream):
        convert = clock.converter(stream) if clock is not None else TickConverter()
        end = StreamEnd()
        found = _packets_from(container, stream, start, watched, convert, end)
        if found is None:
            return
        packets, first_pts = found
        is_certain = by_place
        if not by_place:
            packets, is_certain = _with_certainty(packets, stream)
        places = PacketPlaces() if by_place else None
        schedule = None
        lead: Iterator[Packet[VideoStream] | None] = iter(())
        if needed is not None and is_certain:
            if start.seek_pts is None and clock is not None:
                lead, packets = _before(clock.start_pts, packets, convert)
            schedule = Schedule(packets, stream, _in_clock(needed, convert), first_pts)
        crop = crop_of(watched, stream)
        tags = ColorTags(stream)
        order = FrameOrder(stream, convert, first_pts, crop, conceal=keep_going, is_certain=is_certain, places=places)
        held = HeldFrames(MOST_REORDERED + 2 if by_place or not is_certain else 0)
        failure = "no packets"
        last: TimedFrame | None = None
        with _failures_retried(watched, schedule):
            for step in chain(_every(lead), schedule or _every(packets)):
                try:
                    if places is not None and step is not None:
                        places.sent(step.packet)
                    if step is not None and tags.is_needed and step.packet.is_keyframe:
                        tags.restore_before(bytes(step.packet))
                    frames = _decode_step(watched, stream, step)
                except VideoError as error:
                    if not keep_going or by_place:
                        raise
                    failure = error.detail
                    continue
                if step is not None:
                    order.awaited.sent(step)
                for frame in frames:
                    timed = order.timed(frame)
                    if timed is not None:
                        last = timed
                        yield from held.put(timed)
            if places is not None:
                places.end()
            yield from held.give()
            order.awaited.came(FOREVER)
            if schedule is not None and schedule.stopped:
                return
            if order.last_pts is not None:
                until = held_until(watched, stream, end, order.last_pts)
                if last is not None and until is not None and until > order.end_pts:
                    order.end_pts = until
                    yield replace(last, end_pts=convert(until))
                reached = order.end_pts
                if schedule is not None and schedule.left_out and end.last is not None and end.last.pts is not None:
                    reached = max(reached, end.last.pts + (end.last.duration or 0))  # it is there, and was not decoded
                refuse_truncated(stream, reached * time_base_of(stream))
            elif start.seek_pts is None:
                raise VideoError(
                    Reason.NO_FRAMES, f"no frame of its {codec_name(stream)} stream could be decoded: {failure}"
                )


def _packets_from(
    container: InputContainer,
    stream: VideoStream,
    start: SeekPoint,
    watched: WatchedFile,
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
    packets = read_packets(container, stream, start, watched, convert, end)
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


def _before(
    pts: int, packets: Iterator[Packet[VideoStream] | None], convert: TickConverter
) -> tuple[Iterator[Packet[VideoStream] | None], Iterator[Packet[VideoStream] | None]]:
    """Split off the packets before the first one that is presented at a tick or later.

    There are none where the first frame could be decoded: all of these are decoded, so that their damage is noticed.
    """
    rest: list[Packet[VideoStream] | None] = []

    def first() -> Iterator[Packet[VideoStream] | None]:
        for packet in packets:
            if packet is None or packet.pts is None or convert(packet.pts) >= pts:
                rest.append(packet)
                return
            yield packet

    def others() -> Iterator[Packet[VideoStream] | None]:
        yield from rest
        yield from packets

    return first(), others()


_PACKETS_ASKED = 64
"""Packets that are looked at for one that is presented before an earlier one."""


def _with_certainty(
    packets: Iterator[Packet[VideoStream] | None], stream: VideoStream
) -> tuple[Iterator[Packet[VideoStream] | None], bool]:
    """Look ahead whether the times of packets are certainly those of presentation.

    They are if the decoder does not reorder, or if the container does: then a packet has an earlier time than one
    before it. Packets without a time cannot be asked.

    Returns:
        The packets, and whether their times are certain.
    """
    if not may_reorder(stream):
        return packets, True
    ahead: list[Packet[VideoStream] | None] = []
    latest: int | None = None
    is_certain = False
    failure: Exception | None = None
    while len(ahead) < _PACKETS_ASKED and not is_certain:
        try:
            packet = next(packets, None)
        except (VideoError, NoKeyframeError) as error:  # raised when its turn comes
            failure = error
            break
        ahead.append(packet)
        if packet is None:
            break
        is_certain = packet.pts is None or (latest is not None and packet.pts < latest)
        latest = packet.pts
    return _then(ahead, packets, failure), is_certain


def _then(
    ahead: list[Packet[VideoStream] | None], packets: Iterator[Packet[VideoStream] | None], failure: Exception | None
) -> Iterator[Packet[VideoStream] | None]:
    yield from ahead
    if failure is not None:
        raise failure
    yield from packets


def _in_clock(needed: Needed, convert: TickConverter) -> Needed:
    """The same question asked in the container's ticks."""
    if convert.parts == 1:
        return needed
    return lambda pts, until_pts: needed(convert(pts), until_pts if until_pts == FOREVER else convert(until_pts))


@contextmanager
def _failures_retried(watched: WatchedFile, schedule: Schedule | None) -> Iterator[None]:
    """Raise MissingFrameError for a failure after packets were left out, as that may be its cause."""
    try:
        yield
    except VideoError as error:
        of_the_pictures = error.reason in (Reason.DECODE_ERROR, Reason.NO_FRAMES) and watched.error is None
        if schedule is not None and schedule.left_out and of_the_pictures:
            raise MissingFrameError from error
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
