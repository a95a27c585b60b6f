"""Frames of a video in presentation order, from a time on: seeking, decoding, and the refusal of damage."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain

import av
import av.logging
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipeline.container import (
    ThreadType,
    WatchedFile,
    codec_name,
    ffmpeg_failures_as,
    open_video,
    stream_seconds,
    time_base_of,
    usual_ticks,
)
from pipeline.packets import SKIPPABLE_CODECS, Action, CannotSkipError, Needed, Step, steps
from schemas.video import Reason, VideoError

# How far before the wanted time to try, in seconds, when the container's index led past it; then the start.
_SEEK_BACK_SECONDS = (0, 2, 10, 60)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A decoded frame, and the ticks from which to which (exclusive) it is on screen if no other one follows."""

    frame: VideoFrame | None
    """None where frames that nobody needs were left out."""
    pts: int
    end_pts: int
    stream: VideoStream


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Where decoding begins."""

    seek_pts: int | None = None
    """At the keyframe before this tick; None for the start of the file."""
    forward: bool = False
    """At the first keyframe not before that tick; an entry without a frame says first where it is."""
    await_keyframe: bool = True
    """False feeds the decoder from the first packet on, for streams that mark no keyframes."""


class _NoKeyframeError(Exception):
    """Not one packet was marked as a keyframe."""


def frames_covering(
    watched: WatchedFile,
    needed_pts: int | None,
    time_base: Fraction,
    thread_type: ThreadType = "NONE",
    needed: Needed | None = None,
) -> Generator[Shown, None, None]:
    """Frames in presentation order, the first one not after ``needed_pts``; from the first of all for None.

    Args:
        watched: the file.
        needed_pts: the first tick at which a frame is needed.
        time_base: seconds per tick.
        thread_type: how the decoder uses threads.
        needed: which frames are; others may be left out. Where several in a row are, an entry without a frame says
            from when on. It can happen that frames are given again from an earlier time on. None for all frames.
    """
    if needed_pts is not None:
        for seconds in _SEEK_BACK_SECONDS:
            start = Start(seek_pts=needed_pts - int(seconds / time_base))
            with closing(decode_from(watched, start, thread_type, needed)) as frames:
                try:
                    first = next(frames, None)
                except VideoError:  # landed where decoding cannot begin: the start has the last word
                    continue
                if first is not None and first.pts <= needed_pts:
                    yield first
                    yield from frames
                    return
    yield from decode_from(watched, Start(), thread_type, needed)


def frames_after(
    watched: WatchedFile, pts: int, thread_type: ThreadType = "NONE", needed: Needed | None = None
) -> Generator[Shown, None, None]:
    """Frames from the first keyframe after a tick on, which an entry without a frame names; none where there is none.

    Args:
        watched: the file.
        pts: where damage was met.
        thread_type: how the decoder uses threads.
        needed: as in :func:`frames_covering`.
    """
    yield from decode_from(watched, Start(seek_pts=pts + 1, forward=True), thread_type, needed)


def decode_from(
    watched: WatchedFile,
    start: Start,
    thread_type: ThreadType = "NONE",
    needed: Needed | None = None,
    *,
    keep_going: bool = False,
) -> Generator[Shown, None, None]:
    """Frames from a starting point to the end, where a truncated stream is refused.

    Args:
        watched: the file.
        start: where to begin.
        thread_type: how the decoder uses threads.
        needed: as in :func:`frames_covering`.
        keep_going: skip what fails to decode, and fail only when nothing is left.
    """
    try:
        yield from _decode_once(watched, start, thread_type, needed, keep_going)
    except CannotSkipError:
        yield from decode_from(watched, start, thread_type, keep_going=keep_going)
    except _NoKeyframeError:
        if start.seek_pts is None:
            yield from _decode_once(watched, Start(await_keyframe=False), thread_type, None, keep_going)


def _decode_once(
    watched: WatchedFile, start: Start, thread_type: ThreadType, needed: Needed | None, keep_going: bool
) -> Generator[Shown, None, None]:
    with open_video(watched, thread_type) as (container, stream):
        if start.seek_pts is not None:
            with ffmpeg_failures_as(Reason.DECODE_ERROR, "seeking failed"):
                container.seek(start.seek_pts, backward=not start.forward, stream=stream)
        time_base = time_base_of(stream)
        frame_ticks = usual_ticks(stream)
        first_pts: int | None = None  # of the keyframe that a seek led to
        expected_pts: int | None = None  # of the keyframe with which decoding went on after packets were left out
        previous: Shown | None = None
        failure = "no packets"
        end = _End()
        packets = end.watch(_packets(container, stream, start), frame_ticks)
        plan: Iterator[Step]
        if needed is None or not start.await_keyframe or codec_name(stream) not in SKIPPABLE_CODECS:
            plan = (Step(Action.DECODE, packet, packet.pts or 0) for packet in packets)
        else:
            plan = steps(packets, needed, codec=codec_name(stream), frame_ticks=frame_ticks)
        for step in chain(plan, [Step(Action.DECODE, None, 0)]):
            packet = step.packet
            if packet is not None and first_pts is None and start.seek_pts is not None:
                first_pts = packet.pts
                if first_pts is None and stream.codec_context.reorder_depth == 0:
                    first_pts = packet.dts
                if first_pts is None:
                    return  # no telling where this is: only counting from the start says
                if start.forward:
                    yield Shown(frame=None, pts=first_pts, end_pts=first_pts + frame_ticks, stream=stream)
            if step.action is Action.RESTART:
                expected_pts = step.pts
            try:
                frames = _take_step(watched, stream, step)
            except VideoError as error:
                if not keep_going:
                    raise
                failure = error.detail
                continue
            for frame in frames:
                pts: int | None = frame.pts if frame.pts is not None else frame.dts
                if pts is None:
                    pts = previous.end_pts if previous is not None else 0
                if first_pts is not None and pts < first_pts:
                    continue  # leans on pictures before the keyframe, which were not decoded
                if expected_pts is not None and (pts != expected_pts or not frame.key_frame):
                    raise CannotSkipError
                expected_pts = None
                if frame.is_corrupt and not keep_going:
                    words = "the decoder had to conceal a damaged picture"
                    raise VideoError(Reason.DECODE_ERROR, f"at {float(pts * time_base):.2f} s: {words}")
                if previous is not None and pts < previous.pts:
                    words = f"presentation times run backwards, after {float(previous.pts * time_base):.2f} s"
                    raise VideoError(Reason.DECODE_ERROR, f"at {float(pts * time_base):.2f} s: {words}")
                previous = Shown(frame=frame, pts=pts, end_pts=pts + (frame.duration or frame_ticks), stream=stream)
                yield previous
            if step.action is Action.SKIP:
                stream.codec_context.flush_buffers()
                at_pts = step.pts if previous is None else max(step.pts, previous.pts)
                previous = Shown(frame=None, pts=at_pts, end_pts=at_pts + frame_ticks, stream=stream)
                yield previous
        if previous is not None and previous.frame is None and end.packet is not None:
            _refuse_damaged(watched, end.packet, "at the end")
            previous = replace(previous, end_pts=max(previous.end_pts, end.pts))
            yield previous
        if previous is not None:
            _refuse_truncated(stream, previous.end_pts * time_base)
        elif start.seek_pts is None:
            raise VideoError(
                Reason.NO_FRAMES, f"no frame of its {codec_name(stream)} stream could be decoded: {failure}"
            )


@dataclass(slots=True)
class _End:
    """Where the packets read so far end."""

    packet: Packet[VideoStream] | None = None
    """The last one."""
    pts: int = 0
    """When the frame that is shown last leaves the screen."""

    def watch(self, packets: Iterator[Packet[VideoStream]], frame_ticks: int) -> Iterator[Packet[VideoStream]]:
        for packet in packets:
            self.packet = packet
            if packet.pts is not None:
                self.pts = max(self.pts, packet.pts + (packet.duration or frame_ticks))
            yield packet


def _packets(container: InputContainer, stream: VideoStream, start: Start) -> Iterator[Packet[VideoStream]]:
    """Packets from the first keyframe on that is no earlier than wanted."""
    waiting = start.await_keyframe
    earliest = start.seek_pts if start.forward else None
    num_packets = 0
    packets = container.demux(stream)
    while True:
        try:
            with _demuxer_heard(container, num_packets):
                packet = next(packets, None)
        except av.FFmpegError as error:  # out of memory too: here it is a packet that claims an absurd size
            raise VideoError(Reason.DECODE_ERROR, f"after {num_packets} packets: {error.strerror}") from error
        if packet is None:
            break
        if packet.size == 0:  # a frame that repeats the last one, or the end; to the decoder both mean the end
            continue
        num_packets += 1
        if waiting and packet.is_keyframe:
            waiting = earliest is not None and (packet.pts is None or packet.pts < earliest)
        if not waiting:
            yield packet
    if waiting and num_packets:
        raise _NoKeyframeError


@contextmanager
def _demuxer_heard(container: InputContainer, num_packets: int) -> Iterator[None]:
    """Take what FFmpeg's demuxer only writes into its log, that it lost its place, for the damage it is.

    It goes on at the next place it understands, and the pictures in between are missing without a mark: those after
    them would be wrong. Costs a microsecond.
    """
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # else a message is held back until another one comes, of another file
    try:
        with av.logging.Capture() as messages:
            yield
    finally:
        av.logging.set_level(None)
    for _, name, text in messages:
        if name == container.format.name:
            cut_off = "prematurely" in text or "partial file" in text
            reason = Reason.TRUNCATED if cut_off else Reason.DECODE_ERROR
            raise VideoError(reason, f"after {num_packets} packets: {' '.join(text.split())}")


def _take_step(watched: WatchedFile, stream: VideoStream, step: Step) -> list[VideoFrame]:
    """The frames that come out of the decoder."""
    unwanted = step.action is Action.DECODE_IF_REFERENCED
    stream.codec_context.skip_frame = "NONREF" if unwanted else "DEFAULT"
    return _decode_packet(watched, stream, step.packet)


def _decode_packet(watched: WatchedFile, stream: VideoStream, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
    if packet is None:
        with ffmpeg_failures_as(Reason.DECODE_ERROR, "at the end"):
            return stream.codec_context.decode(None)
    if packet.is_corrupt:
        _refuse_damaged(watched, packet, _whereabouts(packet, stream))
    try:
        return stream.codec_context.decode(packet)
    except av.error.MemoryError:
        raise
    except av.FFmpegError as error:
        raise VideoError(Reason.DECODE_ERROR, f"{_whereabouts(packet, stream)}: {error.strerror}") from error


def _whereabouts(packet: Packet[VideoStream], stream: VideoStream) -> str:
    pts = packet.pts if packet.pts is not None else packet.dts
    return f"at {float(pts * time_base_of(stream)):.2f} s" if pts is not None else f"at byte {packet.pos}"


def _refuse_damaged(watched: WatchedFile, packet: Packet[VideoStream], at: str) -> None:
    if packet.is_corrupt:
        if packet.pos is not None and packet.pos + packet.size >= watched.num_bytes:
            raise VideoError(Reason.TRUNCATED, f"{at}: the file ends in the middle of a packet")
        raise VideoError(Reason.DECODE_ERROR, f"{at}: the container marks the packet as damaged")


def seconds_from_packets(watched: WatchedFile, first_pts: int) -> Fraction:
    """From the first frame to the end, by reading every packet but decoding none."""
    with open_video(watched) as (container, stream):
        frame_ticks = usual_ticks(stream)
        num_packets, end_pts = 0, first_pts
        for packet in _packets(container, stream, Start(await_keyframe=False)):
            num_packets += 1
            if packet.pts is not None:
                end_pts = max(end_pts, packet.pts + (packet.duration or frame_ticks))
        return max(end_pts - first_pts, num_packets * frame_ticks if end_pts == first_pts else 0) * time_base_of(stream)


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
