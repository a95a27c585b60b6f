"""Packets of a video stream: read from the container in decoding order, and sent to the decoder."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import av
from av.container import InputContainer
from av.packet import Packet, PacketSideData
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vidshard.pipeline.video.avi import ChunkOrder
from vidshard.pipeline.video.container import num_packets_before_damage, refuse_large, refuse_long
from vidshard.pipeline.video.entry_points import STATE_HANDED_OUT_ONCE, EntryPoints
from vidshard.pipeline.video.ffmpeg_log import ErrorsLogged, damage_said, refuse_lost_position
from vidshard.pipeline.video.holes import hole_check
from vidshard.pipeline.video.input_file import WatchedFile
from vidshard.pipeline.video.joined import RecordingEnd
from vidshard.pipeline.video.lost_packets import loss_check
from vidshard.pipeline.video.time_gaps import GapWatch
from vidshard.pipeline.video.timestamps import TickConverter, is_clockless, time_base_of, usual_ticks
from vidshard.pipeline.video.transport_stream import Damage, Whole, checked
from vidshard.schemas.rejections import Reason, VideoError


@dataclass(frozen=True, kw_only=True, slots=True)
class SeekPoint:
    """The place in a video at which decoding starts."""

    seek_pts: int | None = None
    """Decoding starts at the keyframe before this tick; None for the start of the file."""
    forward: bool = False
    """Start at the first keyframe not before that tick instead."""
    await_keyframe: bool = True
    """False feeds the decoder from the first packet on, for streams that mark no keyframes."""
    with_edits: bool = True
    """False for times of an mp4's media, without its edit list."""


_MAX_BYTES_KEPT = 64 << 20
"""Packets kept while a later entry point is looked for; beyond it, decoding starts at the one found."""


class NoKeyframeError(Exception):
    """Not one packet was marked as a keyframe."""


@dataclass(slots=True)
class StreamEnd:
    """The end of a stream as its packets tell it: an empty one, for one, repeats the picture before it."""

    until_pts: int | None = None
    """Tick of the container; None while there was no empty packet."""
    last: Packet[VideoStream] | None = None
    """The packet with the latest time so far, of those with content that no edit list hides."""
    next_recording: int | None = None
    """Offset of another recording that is joined to this one, and not read."""


def read_packets(
    container: InputContainer,
    stream: VideoStream,
    start: SeekPoint,
    watched: WatchedFile,
    convert: TickConverter | None = None,
    end: StreamEnd | None = None,
) -> Iterator[Packet[VideoStream] | None]:
    """Packets from the first keyframe at or after the container's position, then None to drain the decoder.

    After a seek only a keyframe counts at which decoding may start, by :class:`EntryPoints`.

    Args:
        container: at the position that a seek led to.
        stream: its video stream.
        start: whether to wait for a keyframe, and the earliest one for a forward seek.
        watched: the file; the number of packets is limited by ``max_frames``.
        convert: ticks of the container to those of ``start``; None where they are the same.
        end: is filled while packets are read.

    Raises:
        VideoError: DECODE_ERROR or TRUNCATED: the container is damaged; OVER_LIMIT.
        NoKeyframeError: there were packets, but no keyframe.
    """
    waiting = start.await_keyframe
    missing, has_hole = loss_check(stream), hole_check(stream)
    end = end or StreamEnd()
    found = _nonempty_packets(container, stream, watched, end)
    if container.format.name == "mpegts":
        found = checked(found, watched, stream)
    elif container.format.name == "avi":
        found = _in_order(found, ChunkOrder(watched, stream), is_start=start.seek_pts is None)
    if watched.opening and start.seek_pts is None:
        found = _damaged_after(found, num_packets_before_damage(watched, stream.index), watched.opening[0][2], end)
    packets = _Lookahead(found)
    if start.seek_pts is not None:
        waiting = False
        entries = EntryPoints(stream)
        find_entry = _read_to_entry if entries.must_read_all else _skip_to_entry
        if not find_entry(packets, start, entries, convert or TickConverter()):
            yield None
            return
    gaps = GapWatch(stream, convert or TickConverter(), watched.gaps) if start.with_edits else None
    num_packets = 0
    for packet in packets:
        num_packets += 1
        waiting = waiting and not packet.is_keyframe
        # a damaged packet among those before the first keyframe may have been one
        if not waiting or isinstance(packet.opaque, Damage):
            if gaps is not None and gaps.is_needed:
                gaps.note(packet, packets.show)
            words = missing(packet, packets.show) if missing is not None else None
            if words is None and has_hole is not None and has_hole(bytes(packet)):
                words = "a hole of zeros within the picture"
            if words is not None and not isinstance(packet.opaque, Damage):
                packet.opaque = Damage(words)
            yield packet
    if waiting and num_packets:
        raise NoKeyframeError
    yield None


def _in_order(
    packets: Iterator[Packet[VideoStream]], order: ChunkOrder, *, is_start: bool
) -> Iterator[Packet[VideoStream]]:
    """Mark each packet of an AVI before which chunks of its index are missing."""
    for packet in packets:
        if order.lacks_chunk_before(packet, is_start=is_start):
            packet.opaque = Damage("chunks that the index lists are missing before it")
        is_start = False
        yield packet


def _damaged_after(
    packets: Iterator[Packet[VideoStream]], num_before: int, words: str, end: StreamEnd
) -> Iterator[Packet[VideoStream]]:
    """Mark the packet behind so many others, as the demuxer passed over what lay before it; raise where none is."""
    words = " ".join(words.split())
    for packet in packets:
        if num_before == 0:
            packet.opaque = Damage(words)
        num_before -= 1
        yield packet
    if num_before >= 0 and end.next_recording is None:
        raise VideoError(Reason.DECODE_ERROR, f"at the end: {words}")


_PACKETS_TIMED = 48
_BYTES_TIMED = 2 << 20


def times_ahead(stream: VideoStream) -> list[int]:
    """Times of the next packets of an opened stream, 48 at most or 2 MiB, in the container's ticks. Uses them up."""
    container = stream.container
    assert isinstance(container, InputContainer)
    times: list[int] = []
    num_bytes = 0
    with suppress(av.FFmpegError):  # damage is met again by whoever decodes
        for packet in container.demux(stream):
            if packet.pts is not None and packet.size:
                times.append(packet.pts)
            num_bytes += packet.size
            if len(times) >= _PACKETS_TIMED or num_bytes >= _BYTES_TIMED:
                break
    return times


def _nonempty_packets(
    container: InputContainer, stream: VideoStream, watched: WatchedFile, end: StreamEnd
) -> Iterator[Packet[VideoStream]]:
    """Every packet of at least one byte up to the next recording; without times where those are invented."""
    clockless, frame_ticks = is_clockless(stream), usual_ticks(stream)
    # ASF states times of decoding alone; FFmpeg makes durations by a rate that may be wrong, and some other times
    only_decoding_times = stream.container.format.name == "asf" and stream.codec_context.reorder_depth > 0
    num_packets = 0
    last_time: int | None = None
    last_dts: int | None = None
    limits, recording = watched.limits, RecordingEnd(watched, container)
    packets = container.demux(stream)
    while True:
        packet, error = None, None
        try:
            with ErrorsLogged() as messages:
                packet = next(packets, None)
        except av.FFmpegError as failure:  # out of memory too: here it is a packet that claims an absurd size
            error = failure
        is_over = recording.may_follow and packet is not None and recording.is_before(packet)
        if is_over or ((error or messages) and recording.explains_complaint(packet)):
            packet = None
        elif error is not None:
            raise VideoError(Reason.DECODE_ERROR, f"after {num_packets} packets: {error.strerror}") from error
        elif messages:
            refuse_lost_position(container.format.name, messages, num_packets)
        if packet is None:
            end.next_recording = recording.at_end()
            return
        if packet.size == 0:  # a frame that repeats the last one, or the end; to the decoder both mean the end
            pts = packet.pts if packet.pts is not None else packet.dts
            if pts is not None:
                end.until_pts = max(end.until_pts or 0, pts + (packet.duration or frame_ticks))
            continue
        time = packet.pts if packet.pts is not None else packet.dts
        if time is not None and (last_time is None or time >= last_time) and not packet.is_discard:
            last_time, end.last = time, packet
        num_packets += 1
        if num_packets > limits.max_frames:
            refuse_long(limits, num_frames=num_packets)
        if clockless:
            packet.pts = packet.dts = None
            packet.duration = 0
        elif only_decoding_times and packet.dts is not None:
            packet.pts = None
            packet.duration = packet.dts - last_dts if last_dts is not None and last_dts < packet.dts else 0
            last_dts = packet.dts
        yield packet


class _Lookahead:
    """Iterator over packets that can show the next ones; an error comes when its packet's turn has come."""

    def __init__(self, packets: Iterator[Packet[VideoStream]]) -> None:
        self._packets = packets
        self._shown: deque[Packet[VideoStream]] = deque()
        self._error: VideoError | None = None

    def __iter__(self) -> Iterator[Packet[VideoStream]]:
        return self

    def __next__(self) -> Packet[VideoStream]:
        if self._shown:
            return self._shown.popleft()
        if self._error is not None:
            raise self._error
        return next(self._packets)

    def show(self, index: int = 0) -> Packet[VideoStream] | None:
        """The packet after ``index`` others; None at the end or before an error."""
        while len(self._shown) <= index and self._error is None:
            try:
                packet = next(self._packets, None)
            except VideoError as error:
                self._error, packet = error, None
            if packet is None:
                return None
            self._shown.append(packet)
        return self._shown[index] if index < len(self._shown) else None

    def drop(self, count: int) -> None:
        """Forget the next packets, which were shown."""
        for _ in range(count):
            self._shown.popleft()


def _skip_to_entry(packets: _Lookahead, start: SeekPoint, entries: EntryPoints, convert: TickConverter) -> bool:
    """Drop the packets before the first entry point; forward, before the first one not before the time sought.

    Returns:
        Whether to go on; False where only entry points after the time sought can follow.
    """
    assert start.seek_pts is not None
    while (packet := packets.show()) is not None:
        if entries.is_entry(packet, partial(packets.show, 1)):
            if not start.forward or (packet.pts is not None and convert(packet.pts) >= start.seek_pts):
                return True
        elif not start.forward and packet.dts is not None and convert(packet.dts) > start.seek_pts:
            return False
        packets.drop(1)
    return True


def _read_to_entry(packets: _Lookahead, start: SeekPoint, entries: EntryPoints, convert: TickConverter) -> bool:
    """Drop the packets before the last entry point not after the time sought; forward, as ``_skip_to_entry``.

    The packets come from the start of the file. The last side data of those left out goes with the first one kept.

    Returns:
        Whether to go on.
    """
    assert start.seek_pts is not None
    carried: dict[object, PacketSideData] = {}
    state: list[PacketSideData] | None = None
    at = num_bytes = 0
    while (packet := packets.show(at)) is not None and num_bytes < _MAX_BYTES_KEPT:
        for kind in STATE_HANDED_OUT_ONCE:
            if packet.has_sidedata(kind):
                carried[kind] = packet.get_sidedata(kind)
        pts = packet.pts if packet.pts is not None else packet.dts
        if pts is not None and entries.is_entry(packet, partial(packets.show, at + 1)):
            time = convert(pts)
            if time >= start.seek_pts if start.forward else time <= start.seek_pts:
                packets.drop(at)
                at, num_bytes, state = 0, 0, list(carried.values())
            if time >= start.seek_pts:
                break
        if state is None:
            packets.drop(1)
            continue
        if packet.dts is not None and convert(packet.dts) > start.seek_pts:
            break
        at, num_bytes = at + 1, num_bytes + packet.size
    first = packets.show()
    if first is not None:
        for data in state or ():
            first.set_sidedata(data)
    return state is not None or first is None


def decode_packet(watched: WatchedFile, stream: VideoStream, packet: Packet[VideoStream]) -> list[VideoFrame]:
    """The frames that the decoder gives for a packet.

    Raises:
        VideoError: DECODE_ERROR or TRUNCATED: the packet, or a picture it refers to, is damaged or missing; OVER_LIMIT.
    """
    mark = packet.opaque
    if isinstance(mark, Damage):
        raise VideoError(Reason.DECODE_ERROR, f"{_time_of(packet, stream)}: {mark.words}")
    if packet.is_corrupt and not isinstance(mark, Whole):
        at = _time_of(packet, stream)
        if packet.pos is not None and packet.pos + packet.size >= watched.num_bytes:
            raise VideoError(Reason.TRUNCATED, f"{at}: the file ends in the middle of a packet")
        raise VideoError(Reason.DECODE_ERROR, f"{at}: the container marks the packet as damaged")
    return _decode(watched, stream, packet, must_be_clean=isinstance(mark, Whole) and mark.must_decode_clean)


def drain(watched: WatchedFile, stream: VideoStream) -> list[VideoFrame]:
    """The frames that the decoder still holds back.

    Raises:
        VideoError: as :func:`decode_packet`.
    """
    return _decode(watched, stream, None)


def _decode(
    watched: WatchedFile, stream: VideoStream, packet: Packet[VideoStream] | None, *, must_be_clean: bool = False
) -> list[VideoFrame]:
    try:
        with ErrorsLogged() as messages:
            frames = stream.codec_context.decode(packet)
    except av.FFmpegError as error:
        for _, _, text in messages:  # each codec has another error for it, "out of memory" among them
            if size := re.search(r"size (\d+)x(\d+) exceeds", text):
                refuse_large(watched.limits, int(size[1]), int(size[2]))
        if isinstance(error, av.error.MemoryError):
            raise
        at = "at the end" if packet is None else _time_of(packet, stream)
        raise VideoError(Reason.DECODE_ERROR, f"{at}: {error.strerror}") from error
    if (said := damage_said(messages)) is not None:
        at = "at the end" if packet is None else _time_of(packet, stream)
        raise VideoError(Reason.DECODE_ERROR, f"{at}: {said}")
    if must_be_clean and messages and packet is not None:
        detail = f"{_time_of(packet, stream)}: where two recordings are joined, the decoder says: {messages[0][2]}"
        raise VideoError(Reason.DECODE_ERROR, " ".join(detail.split()))
    return frames


def _time_of(packet: Packet[VideoStream], stream: VideoStream) -> str:
    pts = packet.pts if packet.pts is not None else packet.dts
    return at_seconds(pts, time_base_of(stream)) if pts is not None else f"at byte {packet.pos}"


def at_seconds(pts: int, time_base: Fraction) -> str:
    """The time of a tick, for messages: "at 1.25 s"."""
    return f"at {float(pts * time_base):.2f} s"
