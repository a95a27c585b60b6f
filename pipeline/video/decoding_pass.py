"""One pass over the packets of a video: which are sent to the decoder, and the frames that come back, in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Self

from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vidshard.pipeline.video.clock_order import clock_runs_back
from vidshard.pipeline.video.color_tags import ColorTags
from vidshard.pipeline.video.container import codec_name, ffmpeg_failures_as, may_reorder
from vidshard.pipeline.video.cropping import crop_of
from vidshard.pipeline.video.entry_points import EntryPoints
from vidshard.pipeline.video.frame_order import (
    MOST_REORDERED,
    FrameOrder,
    HeldFrames,
    MissingFrameError,
    PacketPlaces,
    TimedFrame,
)
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


@dataclass(kw_only=True, slots=True)
class DecodingPass:
    """A stream that is decoded once, from a seek point to its end."""

    watched: WatchedFile
    stream: VideoStream
    convert: TickConverter
    steps: Iterator[Step | None]
    """Steps of the decoder, in order; None drains it."""
    schedule: Schedule | None
    """Decides which packets are left out; None for none of them."""
    order: FrameOrder
    held: HeldFrames
    """Frames that are held back until it is certain that no earlier one follows."""
    tags: ColorTags
    places: PacketPlaces | None
    """Gives frames the times of their places; None where the container's times are those of presentation."""
    end: StreamEnd
    from_start: bool
    keep_going: bool
    """Skip what fails to decode, and fail only when nothing is left."""
    failure: str = "no packets"
    """The last failure that was skipped."""
    last: TimedFrame | None = None

    @classmethod
    def begin(
        cls,
        watched: WatchedFile,
        container: InputContainer,
        stream: VideoStream,
        start: SeekPoint,
        *,
        clock: Clock | None,
        keep_going: bool,
        needed: Needed | None,
        by_place: bool,
    ) -> Self | None:
        """Seek, and look at the first packets to decide what can be left out; None where decoding cannot start there.

        Args:
            watched: the file.
            container: the file as FFmpeg has it open.
            stream: the stream to decode.
            start: where to start.
            clock: the ticks of all times; None for the container's own.
            keep_going: skip what fails to decode.
            needed: the frames that are wanted; None for all.
            by_place: frames have the times of their places.
        """
        convert = clock.converter(stream) if clock is not None else TickConverter()
        end = StreamEnd()
        found = _packets_from(container, stream, start, watched, convert, end)
        if found is None:
            return None
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
        return cls(
            watched=watched,
            stream=stream,
            convert=convert,
            steps=chain(_every(lead), schedule or _every(packets)),
            schedule=schedule,
            order=FrameOrder(
                stream, convert, first_pts, crop, conceal=keep_going, is_certain=is_certain, places=places
            ),
            held=HeldFrames(MOST_REORDERED + 2 if by_place or not is_certain else 0),
            tags=ColorTags(stream),
            places=places,
            end=end,
            from_start=start.seek_pts is None,
            keep_going=keep_going and not by_place,
        )

    def frames(self) -> Iterator[TimedFrame]:
        """Decode the stream; frames come in the order in which they are shown.

        Raises:
            DecodingTimesError: the container's times are those of decoding.
            MissingFrameError: decoding failed after packets were left out, which may be the cause.
            VideoError: the stream is damaged, truncated or over a limit, or has no frames.
        """
        with _failures_retried(self.watched, self.schedule):
            for step in self.steps:
                for frame in self._decoded(step):
                    timed = self.order.timed(frame)
                    if timed is not None:
                        self.last = timed
                        yield from self.held.put(timed)
            if self.places is not None:
                self.places.end()
            yield from self.held.give()
            self.order.awaited.came(FOREVER)
            if self.schedule is None or not self.schedule.stopped:
                self.watched.next_recording = self.end.next_recording
                yield from self._prolonged_last()

    def _decoded(self, step: Step | None) -> list[VideoFrame]:
        """The frames that the decoder gives for a step; none for one that fails and may."""
        try:
            if step is not None:
                if self.places is not None:
                    self.places.sent(step.packet)
                if self.tags.is_needed and step.packet.is_keyframe:
                    self.tags.restore_before(bytes(step.packet))
            frames = _decode_step(self.watched, self.stream, step)
        except VideoError as error:
            if not self.keep_going:
                raise
            self.failure = error.detail
            return []
        if step is not None:
            self.order.awaited.sent(step)
        return frames

    def _prolonged_last(self) -> Iterator[TimedFrame]:
        """The last frame again where it stays on screen for longer; refuses a stream that ends too early."""
        order, schedule, end = self.order, self.schedule, self.end
        if order.last_pts is None:
            if self.from_start:
                codec = codec_name(self.stream)
                raise VideoError(Reason.NO_FRAMES, f"no frame of its {codec} stream could be decoded: {self.failure}")
            return
        until = held_until(self.watched, self.stream, end, order.last_pts)
        if self.last is not None and until is not None and until > order.end_pts:
            order.end_pts = until
            yield replace(self.last, end_pts=self.convert(until))
        reached = order.end_pts
        if schedule is not None and schedule.left_out and end.last is not None and end.last.pts is not None:
            reached = max(reached, end.last.pts + (end.last.duration or 0))  # it is there, and was not decoded
        refuse_truncated(self.stream, reached * time_base_of(self.stream))


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
        counting from the start tells where it is, or it may be of another recording.
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
    if clock_runs_back(watched, stream, first):
        return None
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
