"""Frames of a video in presentation order, from a time on: seeking, decoding, and the refusal of damage."""

from __future__ import annotations

import heapq
import re
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain

import av
import av.logging
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vidshard.pipeline.video.container import (
    ThreadType,
    WatchedFile,
    codec_name,
    ffmpeg_failures_as,
    may_change_aspect,
    open_video,
    pixel_aspect,
    refuse_large,
    refuse_long,
)
from vidshard.pipeline.video.h264 import PictureNumbers
from vidshard.pipeline.video.image_archive import ImageArchive, image_archive
from vidshard.pipeline.video.packet_schedule import FOREVER, Needed, Schedule, Step
from vidshard.pipeline.video.timestamps import Clock, TickConverter, stream_seconds, time_base_of, usual_ticks
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Limits

# How far before the wanted time to try, in seconds, when the container's index led past it; then the start.
_SEEK_BACK_SECONDS = (0, 2, 10, 60)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedFrame:
    """A decoded frame, and the ticks from which to which (exclusive) it is on screen if no other one follows."""

    frame: VideoFrame
    pts: int
    end_pts: int
    """The next one's time, where only wanted frames are decoded."""
    stream: VideoStream | ImageArchive
    pixel_aspect: Fraction | None = None
    """Shape of a pixel; None for squares. The stream cannot tell later: the last frame outlives its container."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeekPoint:
    """Where decoding begins."""

    seek_pts: int | None = None
    """At the keyframe before this tick; None for the start of the file."""
    forward: bool = False
    """At the first keyframe not before that tick."""
    await_keyframe: bool = True
    """False feeds the decoder from the first packet on, for streams that mark no keyframes."""


_LACKS_A_PICTURE = "one that it may refer to is not there"
"""Stands at a packet that does."""


class _NoKeyframeError(Exception):
    """Not one packet was marked as a keyframe."""


class _MissingFrameError(Exception):
    """A wanted frame did not come out of its packet, or something failed after packets were left out."""


def frames_covering(
    watched: WatchedFile,
    needed_pts: int | None,
    clock: Clock,
    thread_type: ThreadType,
    needed: Needed | None = None,
) -> Generator[TimedFrame, None, None]:
    """Frames in presentation order, the first one not after ``needed_pts``; from the first of all for None.

    With ``needed``, others than those that are wanted may be missing.
    """
    if needed_pts is not None:
        for seconds in _SEEK_BACK_SECONDS:
            start = SeekPoint(seek_pts=needed_pts - int(seconds / clock.time_base))
            with closing(decode_from(watched, start, thread_type, clock=clock, needed=needed)) as frames:
                try:
                    first = next(frames, None)
                except VideoError:  # landed where decoding cannot begin: the start has the last word
                    continue
                if first is not None and first.pts <= needed_pts:
                    yield first
                    yield from frames
                    return
    yield from decode_from(watched, SeekPoint(), thread_type, clock=clock, needed=needed)


def frames_after(
    watched: WatchedFile, pts: int, clock: Clock, thread_type: ThreadType, needed: Needed
) -> Generator[TimedFrame, None, None]:
    """The first keyframe after a tick, and from it on the frames that are wanted; none where there is no such one.

    Args:
        watched: the file.
        pts: where damage was met.
        clock: that of all times here.
        thread_type: how the decoder uses threads.
        needed: as in :func:`decode_from`.
    """
    key_pts: int | None = None

    def needed_too(begin: int, end: int) -> bool:
        nonlocal key_pts
        key_pts = begin if key_pts is None else key_pts
        return begin == key_pts or needed(begin, end)

    start = SeekPoint(seek_pts=pts + 1, forward=True)
    yield from decode_from(watched, start, thread_type, clock=clock, needed=needed_too)


def decode_from(
    watched: WatchedFile,
    start: SeekPoint,
    thread_type: ThreadType = "NONE",
    *,
    clock: Clock | None = None,
    keep_going: bool = False,
    needed: Needed | None = None,
) -> Generator[TimedFrame, None, None]:
    """Frames from a starting point to the end, where a truncated stream is refused.

    Args:
        watched: the file.
        start: where to begin.
        thread_type: how the decoder uses threads.
        clock: that of all times here; None for the container's own, as it is.
        keep_going: skip what fails to decode, and fail only when nothing is left.
        needed: decode the frames for which it holds, with the same pixels and times; others where that is no extra
            work. It ends with the last of them. None decodes all.
    """
    archive = image_archive(watched)
    if archive is not None:
        yield from _images_from(archive, start, keep_going, needed)
        return
    try:
        yield from _decode_needed(watched, start, thread_type, clock, keep_going, needed)
    except _NoKeyframeError:
        if start.seek_pts is None:
            yield from _decode_once(watched, SeekPoint(await_keyframe=False), thread_type, clock, keep_going, None)


def _images_from(
    archive: ImageArchive, start: SeekPoint, keep_going: bool, needed: Needed | None
) -> Generator[TimedFrame, None, None]:
    """Images of an archive: the one sought, those that are needed, and the last one, after which is the end."""
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
    """As ``_decode_once``; where leaving packets out went wrong, decoding everything has the last word."""
    last_pts: int | None = None
    if needed is not None:
        try:
            for shown in _decode_once(watched, start, thread_type, clock, keep_going, needed):
                last_pts = shown.pts
                yield shown
            return
        except _MissingFrameError:
            pass
    for shown in _decode_once(watched, start, thread_type, clock, keep_going, None):
        if last_pts is None or shown.pts > last_pts:
            yield shown


def _decode_once(
    watched: WatchedFile,
    start: SeekPoint,
    thread_type: ThreadType,
    clock: Clock | None,
    keep_going: bool,
    needed: Needed | None,
) -> Generator[TimedFrame, None, None]:
    with open_video(watched, thread_type) as (container, stream):
        read = clock.converter(stream) if clock is not None else TickConverter()
        if start.seek_pts is not None:
            with ffmpeg_failures_as(Reason.DECODE_ERROR, "seeking failed"):
                container.seek(read.to_container(start.seek_pts), backward=not start.forward, stream=stream)
        time_base = time_base_of(stream)
        frame_ticks = usual_ticks(stream)
        aspect, aspect_may_change = pixel_aspect(stream), may_change_aspect(stream)
        packets = _packets(container, stream, start, watched.limits, read)
        first_pts: int | None = None  # of the keyframe that a seek led to
        if start.seek_pts is not None:
            first = next(packets)
            if first is None and start.forward:
                return  # no keyframe comes any more
            if first is not None:
                first_pts = first.pts
                if first_pts is None and stream.codec_context.reorder_depth == 0:
                    first_pts = first.dts
                if first_pts is None:
                    return  # no telling where this is: only counting from the start says
            packets = chain([first], packets)
        last_pts: int | None = None  # these two by the container's ticks
        end_pts = 0
        failure = "no packets"
        awaited = _Awaited()
        schedule = Schedule(packets, stream, _by_clock(needed, read), first_pts) if needed is not None else None
        with _in_doubt(watched, schedule):
            for step in schedule or _every(packets):
                try:
                    frames = _decode_step(watched, stream, step)
                except VideoError as error:
                    if not keep_going:
                        raise
                    failure = error.detail
                    continue
                if step is not None:
                    awaited.sent(step)
                for frame in frames:
                    pts = frame.pts if frame.pts is not None else frame.dts
                    if pts is None:
                        pts = end_pts
                    if first_pts is not None and pts < first_pts:
                        continue  # leans on pictures before the keyframe, which were not decoded
                    if frame.is_corrupt and not keep_going:
                        detail = f"{_at(pts, time_base)}: the decoder had to conceal a damaged picture"
                        raise VideoError(Reason.DECODE_ERROR, detail)
                    if last_pts is not None and pts < last_pts:
                        before = f"{float(last_pts * time_base):.2f} s"
                        detail = f"{_at(pts, time_base)}: presentation times run backwards, after {before}"
                        raise VideoError(Reason.DECODE_ERROR, detail)
                    end_pts = awaited.came(pts) or pts + (frame.duration or frame_ticks)
                    aspect = pixel_aspect(stream) if aspect_may_change else aspect
                    last_pts = pts
                    yield TimedFrame(
                        frame=frame, pts=read(pts), end_pts=read(end_pts), stream=stream, pixel_aspect=aspect
                    )
            awaited.came(FOREVER)
            if schedule is not None and schedule.stopped:
                return
            if last_pts is not None:
                _refuse_truncated(stream, end_pts * time_base)
            elif start.seek_pts is None:
                raise VideoError(
                    Reason.NO_FRAMES, f"no frame of its {codec_name(stream)} stream could be decoded: {failure}"
                )


def _by_clock(needed: Needed, read: TickConverter) -> Needed:
    """The same question in the container's ticks."""
    if read.parts == 1:
        return needed
    return lambda pts, until_pts: needed(read(pts), until_pts if until_pts == FOREVER else read(until_pts))


@contextmanager
def _in_doubt(watched: WatchedFile, schedule: Schedule | None) -> Iterator[None]:
    """A failure after packets were left out may come of that."""
    try:
        yield
    except VideoError as error:
        of_the_pictures = error.reason in (Reason.DECODE_ERROR, Reason.NO_FRAMES) and watched.error is None
        if schedule is not None and schedule.left_out and of_the_pictures:
            raise _MissingFrameError from error
        raise


@dataclass(slots=True)
class _Awaited:
    """The wanted frames that have not come out of the decoder yet."""

    expected: list[tuple[int, int | None]] = field(default_factory=list)
    """A heap of their times, and of those of the frames after them."""

    def sent(self, step: Step) -> None:
        if step.expected_pts is not None:
            heapq.heappush(self.expected, (step.expected_pts, step.next_pts))

    def came(self, pts: int) -> int | None:
        """A frame came out: when the next one follows, where that is known.

        Raises:
            _MissingFrameError: one that was wanted before it did not.
        """
        if not self.expected or pts < self.expected[0][0]:
            return None
        expected_pts, next_pts = heapq.heappop(self.expected)
        if expected_pts != pts:
            raise _MissingFrameError
        return next_pts


def _every(packets: Iterator[Packet[VideoStream] | None]) -> Iterator[Step | None]:
    return (None if packet is None else Step(packet=packet) for packet in packets)


def _packets(
    container: InputContainer, stream: VideoStream, start: SeekPoint, limits: Limits, read: TickConverter | None = None
) -> Iterator[Packet[VideoStream] | None]:
    """Packets from the first keyframe on that is no earlier than wanted, then None to drain the decoder."""
    waiting = start.await_keyframe
    earliest = start.seek_pts if start.forward else None
    num_packets = 0
    context = stream.codec_context
    numbers = PictureNumbers(bytes(context.extradata or b"")) if context.codec.canonical_name == "h264" else None
    packets = container.demux(stream)
    while True:
        try:
            with _ErrorsLogged() as messages:
                packet = next(packets, None)
        except av.FFmpegError as error:  # out of memory too: here it is a packet that claims an absurd size
            raise VideoError(Reason.DECODE_ERROR, f"after {num_packets} packets: {error.strerror}") from error
        if messages:
            _refuse_lost_place(container, messages, num_packets)
        if packet is None:
            break
        if packet.size == 0:  # a frame that repeats the last one, or the end; to the decoder both mean the end
            continue
        num_packets += 1
        if num_packets > limits.max_frames:
            refuse_long(limits, num_frames=num_packets)
        if waiting and packet.is_keyframe:
            waiting = earliest is not None and (packet.pts is None or (read or int)(packet.pts) < earliest)
        if not waiting:
            if numbers is not None and numbers.is_one_missing(bytes(packet), packet.is_keyframe):
                packet.opaque = _LACKS_A_PICTURE
            yield packet
    if waiting and num_packets:
        raise _NoKeyframeError
    yield None


def _refuse_lost_place(container: InputContainer, messages: list[tuple[int, str, str]], num_packets: int) -> None:
    """Take what FFmpeg's demuxer only writes into its log, that it lost its place, for the damage it is.

    It goes on at the next place it understands, and the pictures in between are missing without a mark: those after
    them would be wrong.
    """
    for _, name, text in messages:
        if name == container.format.name:
            cut_off = "prematurely" in text or "partial file" in text
            reason = Reason.TRUNCATED if cut_off else Reason.DECODE_ERROR
            raise VideoError(reason, f"after {num_packets} packets: {' '.join(text.split())}")


class _ErrorsLogged:
    """What FFmpeg writes into its log meanwhile: level, part of FFmpeg, words. Costs a microsecond."""

    __slots__ = ("_capture",)

    def __enter__(self) -> list[tuple[int, str, str]]:
        av.logging.set_level(av.logging.ERROR)
        av.logging.set_skip_repeated(False)  # else a message is held back until another one comes, of another file
        self._capture = av.logging.Capture()
        return self._capture.__enter__()

    def __exit__(self, *error: object) -> None:
        self._capture.__exit__(None, None, None)
        av.logging.set_level(None)


def _decode_step(watched: WatchedFile, stream: VideoStream, step: Step | None) -> list[VideoFrame]:
    context = stream.codec_context
    frames: list[VideoFrame] = []
    if step is None or step.restart:
        frames = _decode(watched, stream, None)
    if step is None:
        return frames
    if step.restart:
        context.flush_buffers()
    context.skip_frame = "NONREF" if step.skip else "DEFAULT"
    return frames + _decode_packet(watched, stream, step.packet)


def _decode_packet(watched: WatchedFile, stream: VideoStream, packet: Packet[VideoStream]) -> list[VideoFrame]:
    if packet.is_corrupt:
        at = _place_of(packet, stream)
        if packet.pos is not None and packet.pos + packet.size >= watched.num_bytes:
            raise VideoError(Reason.TRUNCATED, f"{at}: the file ends in the middle of a packet")
        raise VideoError(Reason.DECODE_ERROR, f"{at}: the container marks the packet as damaged")
    if packet.opaque is _LACKS_A_PICTURE:
        raise _missing_reference(_place_of(packet, stream))
    return _decode(watched, stream, packet)


def _missing_reference(place: str) -> VideoError:
    return VideoError(Reason.DECODE_ERROR, f"{place}: a picture that this one refers to is missing")


def _decode(watched: WatchedFile, stream: VideoStream, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
    """The frames that come of a packet, or of draining the decoder."""
    try:
        with _ErrorsLogged() as messages:
            frames = stream.codec_context.decode(packet)
    except av.FFmpegError as error:
        for _, _, text in messages:  # each codec has another error for it, "out of memory" among them
            if size := re.search(r"size (\d+)x(\d+) exceeds", text):
                refuse_large(watched.limits, int(size[1]), int(size[2]))
        if isinstance(error, av.error.MemoryError):
            raise
        at = "at the end" if packet is None else _place_of(packet, stream)
        raise VideoError(Reason.DECODE_ERROR, f"{at}: {error.strerror}") from error
    if any("Could not find ref" in text for _, _, text in messages):  # hevc then gives no picture, and no error
        raise _missing_reference("at the end" if packet is None else _place_of(packet, stream))
    return frames


def _place_of(packet: Packet[VideoStream], stream: VideoStream) -> str:
    pts = packet.pts if packet.pts is not None else packet.dts
    return _at(pts, time_base_of(stream)) if pts is not None else f"at byte {packet.pos}"


def _at(pts: int, time_base: Fraction) -> str:
    return f"at {float(pts * time_base):.2f} s"


def seconds_from_packets(watched: WatchedFile, first_pts: int) -> Fraction:
    """From the first frame to the end, by reading every packet but decoding none."""
    archive = image_archive(watched)
    if archive is not None:
        return (len(archive) - first_pts) / archive.rate
    with open_video(watched) as (container, stream):
        frame_ticks, time_base = usual_ticks(stream), time_base_of(stream)
        longest = watched.limits.max_seconds / time_base
        num_packets, ticks, end_pts = 0, 0, first_pts
        for packet in _packets(container, stream, SeekPoint(await_keyframe=False), watched.limits):
            if packet is not None:
                num_packets += 1
                if packet.pts is not None:
                    end_pts = max(end_pts, packet.pts + (packet.duration or frame_ticks))
                ticks = end_pts - first_pts or num_packets * frame_ticks
                if ticks > longest:  # now, as there may be no end
                    refuse_long(watched.limits, seconds=ticks * time_base)
        return ticks * time_base


def _refuse_truncated(stream: VideoStream, end_seconds: Fraction) -> None:
    """Refuse a stream whose frames end well before its header says they do.

    Only what the header says of the video stream itself counts: a container may be longer for its sound. Where
    the clock starts differs between writers, so the reading that misses less is taken. Honest writers are exact to
    a frame or two; a second, or a hundredth of the length, leaves room for the others.
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
