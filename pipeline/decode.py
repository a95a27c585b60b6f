"""From a file to clips: probe the header, then decode one span at a time.

Plain functions over PyAV; nothing knows of Ray. Which frame belongs to which grid time is decided in
``sampling``, the picture's shape in ``geometry``; only sampled frames are converted to RGB and resized.

What is promised, whatever the container:

- Time. A frame's time is its presentation time. Where the container gives none (some frames of AVI and MPEG
  program streams), the time of the packet that brought the frame out of the decoder; where there is none either
  (raw streams), the end of the frame before. Two frames with the same time: the later one stays on screen. Times
  that run backwards have no honest order and are refused.
- Spans. A span decoded alone has the same pixels and times as one pass over the whole video: decoding begins at
  a keyframe at or before the span's first grid time, further back when the container's index led too far, and
  at the start where only counting tells the time (raw streams, AVI with B-frames).
- Damage. All or nothing: a decode error, a packet or frame marked corrupt, or a picture that the decoder had to
  conceal refuses the whole span. A keyframe is awaited at the start, so a recording that was cut out of a
  broadcast is not damaged by that.
- Safety. FFmpeg is given a file object and a list of containers that hold their own pictures. Playlists and
  scripts (HLS, DASH, concat, SDP) are never opened, and no protocol is allowed, so a file can reach nothing but
  its own bytes.

Only FFmpeg's and the storage's own exceptions become a VideoError; any other is a bug and propagates. Running
out of memory while decoding is a MemoryError, to which ``sandbox`` gives its reason.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import BinaryIO, Literal, cast

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.container.core import Flags
from av.packet import Packet
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Discard, Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from pipeline.geometry import Orientation, display_size, place, plan_geometry
from pipeline.sampling import Grid
from pipeline.storage import StorageError, public_uri, storage_errors
from schemas.video import Clip, ClipSpec, Geometry, Reason, Span, VideoError, VideoProbe, VideoRef, VideoSource

ThreadType = Literal["NONE", "SLICE", "FRAME", "AUTO"]

ALLOWED_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,apng,mxf,nut,ivf,rm,dv,gxf,wtv,"
    "yuv4mpegpipe,h264,hevc,vvc,av1,obu,m4v,mpegvideo,mjpeg,vc1,"
    "mp3,flac,wav,aac"
)
"""FFmpeg's names of containers that hold their own pictures, and the common ones that hold only sound, so that
those are refused for what they are."""

# Formats without timestamps or length of their own: FFmpeg guesses a duration from the bit rate, often wildly.
_RAW_FORMATS = frozenset({"h264", "hevc", "vvc", "av1", "obu", "m4v", "mpegvideo", "mjpeg", "vc1"})

# Bilinear with the triangle widened on downscaling, which is what "antialiased bilinear" means elsewhere. Against a
# floating-point conversion and resize, three real clips to 256 and 128 lines: 43 to 58 dB with full chroma and
# accurate rounding, 28 to 44 dB without, for up to 0.4 ms more a frame (one size of odd width: 37 dB both ways).
# Bit-exact costs nothing measurable and makes the pixels independent of the CPU's vector instructions.
_SCALE_FLAGS = (
    Interpolation.BILINEAR
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)

_READ_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 16

# How far before the wanted time to try, in seconds, when the container's index led past it; then the start.
_SEEK_BACK_SECONDS = (0, 2, 10, 60)


def probe_video(ref: VideoRef, open_input: Callable[[str], BinaryIO]) -> VideoProbe:
    """What the header says of a video, and the time of its first frame.

    Reads the header, some 300 KiB for the content's fingerprint and the first frame; the whole file only where no
    duration is stated anywhere.

    Args:
        ref: the file.
        open_input: gives a seekable binary file for ``ref.uri``; it is closed here.

    Raises:
        VideoError: UNREADABLE, EMPTY_FILE, NOT_A_VIDEO, NO_VIDEO_STREAM, NO_FRAMES, UNSUPPORTED, TRUNCATED (an mp4
            without its index) or DECODE_ERROR (a container whose header is damaged).
    """
    try:
        file = open_input(ref.uri)
    except _opening_errors() as error:
        raise VideoError(Reason.UNREADABLE, _one_line(error)) from error
    with file, _storage_failures_named(file) as watched:
        video_id = fingerprint(watched)
        with closing(_decode_from(watched, _Start(), keep_going=True)) as frames:
            first = next(frames)  # or it raises NO_FRAMES
            stream = first.stream
            orientation = _orientation(first.frame)
            width, height = display_size(first.frame.width, first.frame.height, stream.sample_aspect_ratio, orientation)
            source = VideoSource(
                width=width,
                height=height,
                codec=_codec(stream),
                fps=float(stream.average_rate or 0),
                rotation_degrees=orientation.rotation_degrees,
            )
            time_base = _time_base(stream)
            duration_seconds = _seconds_from_header(stream, first.pts * time_base)
        if duration_seconds is None:
            duration_seconds = _seconds_from_packets(watched, first.pts)
        return VideoProbe(
            video_id=video_id,
            uri=ref.uri,
            num_bytes=watched.num_bytes,
            time_base=time_base,
            grid_start_pts=first.pts,
            duration_seconds_from_header=float(duration_seconds),
            source=source,
        )


def fingerprint(file: BinaryIO | WatchedFile) -> str:
    """24 hex digits of a file's content: its size and five 64 KiB samples, or all of a small one.

    The same for copies anywhere, whatever their name. Two files of equal size that differ only between the samples
    share it; video files made by a program differ in their index and timestamps, which lie at the ends.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    digest = hashlib.blake2b(num_bytes.to_bytes(8, "little"), digest_size=12)
    last = num_bytes - _CHUNK_BYTES
    offsets = (0, last // 4, last // 2, last * 3 // 4, last) if num_bytes > 5 * _CHUNK_BYTES else (0,)
    for offset in offsets:
        file.seek(offset)
        digest.update(_read_exactly(file, _CHUNK_BYTES if len(offsets) > 1 else num_bytes))
    file.seek(0)
    return digest.hexdigest()


def decode_span(
    span: Span, spec: ClipSpec, source: str | BinaryIO, *, max_clips: int, thread_type: ThreadType = "NONE"
) -> list[Clip]:
    """Decode one span of a video.

    Args:
        span: which clips; from ``plan_spans``.
        spec: the grid and the geometry; the same that the span was planned with.
        source: a local path, or a seekable binary file that stays open.
        max_clips: the open-ended last span may hold this many clips, not more: the limit on memory, as
            ``max_clips * spec.clip_bytes`` bytes of frames are held at once.
        thread_type: how the decoder uses threads; one thread unless asked, as many tasks run side by side.

    Returns:
        The span's clips in order. Fewer than planned, or none, where the video ended before the header said so; a
        span after the first may be empty.

    Raises:
        VideoError: DECODE_ERROR, TRUNCATED, LONGER_THAN_HEADER, TOO_SHORT, NO_FRAMES, UNSUPPORTED, UNREADABLE, and
            whatever ``probe_video`` refuses, should the file have changed since.
    """
    grid = Grid.of(span, spec)
    clips = _ClipsInTheMaking(span=span, spec=spec, grid=grid, max_clips=max_clips)
    with _opened(source) as file, _storage_failures_named(file) as watched:
        needed_pts = grid.pts_at(clips.position - spec.lead_frames) if clips.position else None
        with closing(_frames_covering(watched, needed_pts, span.time_base, thread_type)) as frames:
            shown: _Shown | None = None
            for following in frames:
                if shown is not None:
                    clips.show(shown, until=grid.first_index_at(following.pts) + spec.lead_frames)
                if clips.full:
                    return clips.finished()
                shown = following
        assert shown is not None, "a video without frames is refused where it is decoded"
        clips.show(shown, until=grid.first_index_at(shown.end_pts) + spec.lead_frames)
        return clips.finished()


# The video as FFmpeg opens it.


@dataclass(slots=True)
class WatchedFile:
    """A file as FFmpeg reads it, which remembers the storage's errors: FFmpeg takes some for the end of the file."""

    file: BinaryIO
    error: BaseException | None = None
    num_bytes: int = 0

    def read(self, num_bytes: int = -1) -> bytes:
        """At most this many bytes."""
        try:
            return self.file.read(num_bytes)
        except storage_errors() as error:
            self.error = self.error or error
            raise

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """The new position."""
        try:
            return self.file.seek(offset, whence)
        except storage_errors() as error:
            self.error = self.error or error
            raise

    def tell(self) -> int:
        """The position."""
        return self.file.tell()


@contextmanager
def _opened(source: str | BinaryIO) -> Iterator[BinaryIO]:
    if not isinstance(source, str):
        yield source
        return
    try:
        file = open(source, "rb")  # noqa: SIM115  closed below; only the opening is watched here
    except OSError as error:
        raise VideoError(Reason.UNREADABLE, _one_line(error)) from error
    with file:
        yield file


@contextmanager
def _storage_failures_named(file: BinaryIO) -> Iterator[WatchedFile]:
    """Whatever goes wrong while the storage fails is the storage's fault, not the video's."""
    watched = WatchedFile(file)
    try:
        watched.num_bytes = watched.seek(0, os.SEEK_END)
        yield watched
    except _reading_errors() as error:
        if watched.error is None:
            raise
        raise VideoError(Reason.UNREADABLE, _one_line(watched.error)) from error
    if watched.error is not None:
        raise VideoError(Reason.UNREADABLE, _one_line(watched.error)) from watched.error


def _opening_errors() -> tuple[type[BaseException], ...]:
    return (StorageError, *storage_errors())


def _reading_errors() -> tuple[type[BaseException], ...]:
    return (VideoError, *storage_errors())


@contextmanager
def _ffmpeg_failures_as(reason: Reason, what: str) -> Iterator[None]:
    try:
        yield
    except av.error.MemoryError:
        raise
    except av.FFmpegError as error:
        raise VideoError(reason, f"{what}: {error.strerror}") from error


@contextmanager
def _open_video(watched: WatchedFile, thread_type: ThreadType = "NONE") -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its largest stream of moving pictures; the other streams are not read."""
    watched.seek(0)
    head = watched.read(1024)
    if not head:
        raise VideoError(Reason.EMPTY_FILE, "the file has no bytes")
    watched.seek(0)
    try:
        container = av.open(
            watched,
            "r",
            container_options={"format_whitelist": ALLOWED_FORMATS, "protocol_whitelist": "none"},
            metadata_errors="replace",
            buffer_size=_READ_BYTES,
        )
    except av.FFmpegError as error:  # out of memory too: here it is an index that claims absurd sizes
        raise _refusal(watched, head, error) from error
    with container:
        # PyAV asks FFmpeg to invent missing times, and in AVI with B-frames it invents wrong ones
        container.flags &= ~cast(int, Flags.gen_pts.value)
        videos = [
            stream
            for stream in container.streams.video
            if not stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails)
        ]
        if not videos:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
            cover = " (a cover picture)" if container.streams.video else ""
            raise VideoError(Reason.NO_VIDEO_STREAM, f"{container.format.name} with streams: {kinds}{cover}")
        decodable = [stream for stream in videos if _has_decoder(stream)]
        if not decodable:
            raise VideoError(Reason.UNSUPPORTED, f"no decoder for its video stream in {container.format.name}")
        video = max(decodable, key=lambda s: (s.width * s.height, bool(s.disposition & Disposition.default), -s.index))
        for stream in container.streams:
            if stream.index != video.index:
                stream.discard = Discard.all
        context = video.codec_context
        if {"avi", "mpeg"} & set(container.format.name.split(",")):
            thread_type = "NONE"  # frame threads would shift the times that stand in for missing ones
        context.thread_type = thread_type
        context.thread_count = 1 if thread_type == "NONE" else 0
        yield container, video


def _has_decoder(stream: VideoStream) -> bool:
    # PyAV's stubs promise a codec context; a stream without a decoder has None
    return getattr(stream, "codec_context", None) is not None


_SCRIPTS = (
    (b"#EXTM3U", "an HLS playlist"),
    (b"ffconcat", "an ffconcat script"),
    (b"<MPD", "a DASH manifest"),
    (b"<SmoothStreamingMedia", "a Smooth Streaming manifest"),
    (b"v=0", "a session description (SDP)"),
    (b"[playlist]", "a playlist"),
    (b"<asx", "a playlist"),
)


def _refusal(watched: WatchedFile, head: bytes, error: av.FFmpegError) -> VideoError:
    """Why FFmpeg would not open it, as far as its first bytes tell."""
    words = error.strerror
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for mark, name in _SCRIPTS:
        if text.startswith(mark) or (mark.startswith(b"<") and text.startswith(b"<?xml") and mark in text):
            return VideoError(Reason.NOT_A_VIDEO, f"{name}: it names other files, and those are never opened")
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        if _has_mp4_index(watched):
            return VideoError(Reason.DECODE_ERROR, f"the mp4 index (moov) is damaged: {words}")
        return VideoError(Reason.TRUNCATED, f"an mp4 without its index (moov): {words}")
    if isinstance(error, av.error.EOFError):
        return VideoError(Reason.TRUNCATED, "the file ends inside its header, or right after it")
    if head.startswith(b"\x1a\x45\xdf\xa3") or (head.startswith(b"RIFF") and head[8:12] == b"AVI "):
        return VideoError(Reason.DECODE_ERROR, f"the container's header is damaged: {words}")
    return VideoError(Reason.NOT_A_VIDEO, f"not in a container format that is allowed here: {words}")


def _has_mp4_index(watched: WatchedFile) -> bool:
    """Whether the top-level boxes include a whole moov."""
    offset = 0
    while offset + 8 <= watched.num_bytes:
        watched.seek(offset)
        header = _read_exactly(watched, 16)
        num_bytes = int.from_bytes(header[:4], "big")
        if num_bytes == 1 and len(header) == 16:
            num_bytes = int.from_bytes(header[8:16], "big")
        if header[4:8] == b"moov":
            return offset + num_bytes <= watched.num_bytes
        if num_bytes < 8:  # 0 is "to the end of the file"
            return False
        offset += num_bytes
    return False


# Frames in presentation order.


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shown:
    """A decoded frame, and the ticks from which to which (exclusive) it is on screen if no other one follows."""

    frame: VideoFrame
    pts: int
    end_pts: int
    stream: VideoStream


@dataclass(frozen=True, kw_only=True, slots=True)
class _Start:
    """Where decoding begins."""

    seek_pts: int | None = None
    """At the keyframe before this tick; None for the start of the file."""
    await_keyframe: bool = True
    """False feeds the decoder from the first packet on, for streams that mark no keyframes."""


class _NoKeyframeError(Exception):
    """Not one packet was marked as a keyframe."""


def _frames_covering(
    watched: WatchedFile, needed_pts: int | None, time_base: Fraction, thread_type: ThreadType
) -> Generator[_Shown, None, None]:
    """Frames in presentation order, the first one not after ``needed_pts``; from the first of all for None."""
    if needed_pts is not None:
        for seconds in _SEEK_BACK_SECONDS:
            start = _Start(seek_pts=needed_pts - int(seconds / time_base))
            with closing(_decode_from(watched, start, thread_type)) as frames:
                try:
                    first = next(frames, None)
                except VideoError:  # landed where decoding cannot begin: the start has the last word
                    continue
                if first is not None and first.pts <= needed_pts:
                    yield first
                    yield from frames
                    return
    yield from _decode_from(watched, _Start(), thread_type)


def _decode_from(
    watched: WatchedFile, start: _Start, thread_type: ThreadType = "NONE", *, keep_going: bool = False
) -> Generator[_Shown, None, None]:
    """Frames from a starting point to the end, where a truncated stream is refused.

    Args:
        watched: the file.
        start: where to begin.
        thread_type: how the decoder uses threads.
        keep_going: skip what fails to decode, and fail only when nothing is left.
    """
    try:
        yield from _decode_once(watched, start, thread_type, keep_going)
    except _NoKeyframeError:
        if start.seek_pts is None:
            yield from _decode_once(watched, _Start(await_keyframe=False), thread_type, keep_going)


def _decode_once(
    watched: WatchedFile, start: _Start, thread_type: ThreadType, keep_going: bool
) -> Generator[_Shown, None, None]:
    with _open_video(watched, thread_type) as (container, stream):
        if start.seek_pts is not None:
            with _ffmpeg_failures_as(Reason.DECODE_ERROR, "seeking failed"):
                container.seek(start.seek_pts, stream=stream)
        time_base = _time_base(stream)
        usual_ticks = _usual_ticks(stream)
        first_pts: int | None = None  # of the keyframe that a seek led to
        previous: _Shown | None = None
        failure = "no packets"
        for packet in _packets(container, stream, start.await_keyframe):
            if packet is not None and first_pts is None and start.seek_pts is not None:
                first_pts = packet.pts
                if first_pts is None and stream.codec_context.reorder_depth == 0:
                    first_pts = packet.dts
                if first_pts is None:
                    return  # no telling where this is: only counting from the start says
            try:
                frames = _decode_packet(watched, stream, packet)
            except VideoError as error:
                if not keep_going:
                    raise
                failure = error.detail
                continue
            for frame in frames:
                pts = frame.pts if frame.pts is not None else frame.dts
                if pts is None:
                    pts = previous.end_pts if previous is not None else 0
                if first_pts is not None and pts < first_pts:
                    continue  # leans on pictures before the keyframe, which were not decoded
                at = f"at {float(pts * time_base):.2f} s"
                if frame.is_corrupt and not keep_going:
                    raise VideoError(Reason.DECODE_ERROR, f"{at}: the decoder had to conceal a damaged picture")
                if previous is not None and pts < previous.pts:
                    before = f"{float(previous.pts * time_base):.2f} s"
                    raise VideoError(Reason.DECODE_ERROR, f"{at}: presentation times run backwards, after {before}")
                previous = _Shown(frame=frame, pts=pts, end_pts=pts + (frame.duration or usual_ticks), stream=stream)
                yield previous
        if previous is not None:
            _refuse_truncated(stream, previous.end_pts * time_base)
        elif start.seek_pts is None:
            raise VideoError(Reason.NO_FRAMES, f"no frame of its {_codec(stream)} stream could be decoded: {failure}")


def _packets(
    container: InputContainer, stream: VideoStream, await_keyframe: bool
) -> Iterator[Packet[VideoStream] | None]:
    """Packets from the first keyframe on, then None to drain the decoder."""
    waiting = await_keyframe
    num_packets = 0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError as error:  # out of memory too: here it is a packet that claims an absurd size
            raise VideoError(Reason.DECODE_ERROR, f"after {num_packets} packets: {error.strerror}") from error
        if packet is None:
            break
        if packet.size == 0:  # a frame that repeats the last one, or the end; to the decoder both mean the end
            continue
        num_packets += 1
        waiting = waiting and not packet.is_keyframe
        if not waiting:
            yield packet
    if waiting and num_packets:
        raise _NoKeyframeError
    yield None


def _decode_packet(watched: WatchedFile, stream: VideoStream, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
    if packet is None:
        with _ffmpeg_failures_as(Reason.DECODE_ERROR, "at the end"):
            return stream.codec_context.decode(None)
    pts = packet.pts if packet.pts is not None else packet.dts
    at = f"at {float(pts * _time_base(stream)):.2f} s" if pts is not None else f"at byte {packet.pos}"
    if packet.is_corrupt:
        if packet.pos is not None and packet.pos + packet.size >= watched.num_bytes:
            raise VideoError(Reason.TRUNCATED, f"{at}: the file ends in the middle of a packet")
        raise VideoError(Reason.DECODE_ERROR, f"{at}: the container marks the packet as damaged")
    with _ffmpeg_failures_as(Reason.DECODE_ERROR, at):
        return stream.codec_context.decode(packet)


# What the header says.


def _codec(stream: VideoStream) -> str:
    return stream.codec_context.codec.canonical_name


def _time_base(stream: VideoStream) -> Fraction:
    return stream.time_base or Fraction(1, 1_000_000)


def _usual_ticks(stream: VideoStream) -> int:
    """How long a frame stays that does not say so itself: by the average rate, at least one tick."""
    rate = stream.average_rate or stream.guessed_rate
    return max(1, round(1 / (rate * _time_base(stream)))) if rate else 1


def _orientation(frame: VideoFrame) -> Orientation:
    side_data = cast(SideDataContainer, frame.side_data)  # the stubs call it a dictionary of strings
    matrix = next((data for data in side_data if data.type is SideDataType.DISPLAYMATRIX), None)
    return Orientation.from_display_matrix(bytes(matrix)) if matrix is not None else Orientation()


def _stream_seconds(stream: VideoStream) -> Fraction | None:
    """Length that the header gives to the video stream itself, not to the container or guessed from a bit rate."""
    formats = stream.container.format.name.split(",")
    if stream.duration and ("mov" in formats or "avi" in formats):
        return stream.duration * _time_base(stream)
    if "matroska" in formats:
        for key, value in stream.metadata.items():
            if key.upper().startswith("DURATION") and (match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", value)):
                hours, minutes, seconds = match.groups()
                return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
    return None


def _seconds_from_header(stream: VideoStream, first_seconds: Fraction) -> Fraction | None:
    """From the first frame to the end, as claimed; None where nothing usable is."""
    container = stream.container
    assert isinstance(container, InputContainer)
    formats = set(container.format.name.split(","))
    if formats & _RAW_FORMATS:
        return None
    seconds = _stream_seconds(stream)
    if seconds is None and container.duration:
        seconds = Fraction(container.duration, av.time_base)
    if seconds is not None and "matroska" in formats:
        seconds -= max(first_seconds, Fraction(0))  # there, counted from zero rather than from the first frame
    return seconds if seconds is not None and seconds > 0 else None


def _seconds_from_packets(watched: WatchedFile, first_pts: int) -> Fraction:
    """From the first frame to the end, by reading every packet but decoding none."""
    with _open_video(watched) as (container, stream):
        usual_ticks = _usual_ticks(stream)
        num_packets, end_pts = 0, first_pts
        for packet in _packets(container, stream, await_keyframe=False):
            if packet is not None:
                num_packets += 1
                if packet.pts is not None:
                    end_pts = max(end_pts, packet.pts + (packet.duration or usual_ticks))
        return max(end_pts - first_pts, num_packets * usual_ticks if end_pts == first_pts else 0) * _time_base(stream)


def _refuse_truncated(stream: VideoStream, end_seconds: Fraction) -> None:
    """Refuse a stream whose frames end well before its header says they do.

    Only what the header says of the video stream itself counts: a container may be longer for its sound. Where
    the clock starts differs between writers, so the reading that misses less is taken. Honest writers are exact to
    a frame or two; a second, or a hundredth of the length, leaves room for the others.
    """
    claimed = _stream_seconds(stream)
    if claimed is None:
        return
    start = (stream.start_time or 0) * _time_base(stream)
    reached = max(end_seconds, end_seconds - start)
    if claimed - reached > max(Fraction(1), claimed / 100):
        raise VideoError(
            Reason.TRUNCATED,
            f"the header promises {float(claimed):.2f} s of video, the frames end at {float(reached):.2f} s",
        )


# Clips out of frames.


@dataclass(kw_only=True, slots=True)
class _ClipsInTheMaking:
    """The clips of one span, filled grid time by grid time."""

    span: Span
    spec: ClipSpec
    grid: Grid
    max_clips: int
    first_clip: int = field(init=False)
    """Index of the first clip that is made; those before the span's own are its halo."""
    position: int = field(init=False)
    """The next frame to fill, counted from the first one of clip 0."""
    frames: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    """Per clip, uint8 (T, H, W, 3)."""
    pts: list[list[int]] = field(default_factory=list)
    """Per clip, the ticks of the frames so far."""
    geometries: list[Geometry] = field(default_factory=list)
    """Per clip, that of its first frame."""
    reformatter: VideoReformatter = field(default_factory=VideoReformatter)

    def __post_init__(self) -> None:
        self.first_clip = self.span.first_clip - self.spec.halo_of(self.span.first_clip)
        self.position = self.first_clip * self.spec.num_frames

    @property
    def full(self) -> bool:
        """Whether every grid time of the span has its frame; never true of an open-ended one."""
        return self.span.end_clip is not None and self.position >= self.span.end_clip * self.spec.num_frames

    def show(self, shown: _Shown, *, until: int) -> None:
        """Fill the frames before ``until`` with this one, as far as the span goes."""
        if self.span.end_clip is not None:
            until = min(until, self.span.end_clip * self.spec.num_frames)
        if until <= self.position:
            return
        rgb, geometry = _render(shown, self.spec, self.reformatter)
        for index in range(self.position, until):
            slot = index % self.spec.num_frames
            if slot == 0:
                self._begin_clip(geometry)
            place(rgb, geometry, self.frames[-1][slot])
            self.pts[-1].append(shown.pts)
        self.position = until

    def _begin_clip(self, geometry: Geometry) -> None:
        if self.span.end_clip is None and len(self.frames) >= self.max_clips + self.spec.halo_clips:
            claimed = self.span.duration_seconds_from_header
            raise VideoError(
                Reason.LONGER_THAN_HEADER,
                f"more than {self.max_clips} clips after clip {self.span.first_clip}; the header says {claimed:.2f} s",
            )
        self.frames.append(np.empty((self.spec.num_frames, self.spec.height, self.spec.width, 3), np.uint8))
        self.pts.append([])
        self.geometries.append(geometry)

    def finished(self) -> list[Clip]:
        """The clips, the tail policy applied.

        Raises:
            VideoError: TOO_SHORT: under ``drop``, a video without one whole clip.
        """
        num_frames = self.spec.num_frames
        if self.spec.tail == "drop" and self.pts and len(self.pts[-1]) < num_frames:
            if len(self.pts) == 1 and self.first_clip == 0:
                num_times, needed = (n - self.spec.lead_frames for n in (len(self.pts[0]), num_frames))
                raise VideoError(Reason.TOO_SHORT, f"{num_times} of the {needed} frames of one clip")
            del self.frames[-1], self.pts[-1], self.geometries[-1]
        clips = []
        for number, (frames, pts, geometry) in enumerate(zip(self.frames, self.pts, self.geometries, strict=True)):
            clip_index = self.first_clip + number
            lead = 0 if clip_index else self.spec.lead_frames
            num_valid = len(pts)
            frames[num_valid:] = frames[num_valid - 1]
            ticks = pts + pts[-1:] * (num_frames - num_valid)
            clips.append(
                Clip(
                    video_id=self.span.video_id,
                    clip_index=clip_index,
                    frames=frames,
                    start_seconds=float(self.grid.seconds_at(self.spec.first_frame(clip_index) + lead)),
                    frame_pts_seconds=np.array(
                        [float(tick * self.span.time_base) for tick in ticks[lead:]], np.float64
                    ),
                    num_valid_frames=num_valid - lead,
                    lead_frames=lead,
                    geometry=geometry,
                )
            )
        return clips


def _render(shown: _Shown, spec: ClipSpec, reformatter: VideoReformatter) -> tuple[npt.NDArray[np.uint8], Geometry]:
    """A frame as displayed, scaled but not yet cut: uint8 (scaled_height, scaled_width, 3).

    Colour conversion and scaling are one pass. A frame that needs no scaling has exactly the pixels of PyAV's
    ``to_ndarray(format="rgb24")``.
    """
    frame = shown.frame
    orientation = _orientation(frame)
    try:
        width, height = display_size(frame.width, frame.height, shown.stream.sample_aspect_ratio, orientation)
        geometry = plan_geometry(width, height, spec)
    except ValueError as error:
        raise VideoError(Reason.UNSUPPORTED, str(error)) from error
    width, height = orientation.size(geometry.scaled_width, geometry.scaled_height)
    unscaled = (width, height) == (frame.width, frame.height)
    with _ffmpeg_failures_as(Reason.UNSUPPORTED, f"cannot convert {frame.width}x{frame.height} {frame.format.name}"):
        rgb = reformatter.reformat(
            frame, width, height, "rgb24", interpolation=None if unscaled else _SCALE_FLAGS, threads=1
        )
    return orientation.apply(np.asarray(rgb.to_ndarray(), np.uint8)), geometry


# Words for people.


def _read_exactly(file: BinaryIO | WatchedFile, num_bytes: int) -> bytes:
    """So many bytes, fewer only at the end of the file."""
    parts = []
    while num_bytes > 0 and (part := file.read(num_bytes)):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def _one_line(error: BaseException) -> str:
    """What the storage says, without user names, passwords or signatures of its addresses."""
    words = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+", lambda match: public_uri(match[0]), words, flags=re.IGNORECASE)
