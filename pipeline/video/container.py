"""A video file as FFmpeg is allowed to see it, and what its header says.

FFmpeg is given a file object and a list of containers that hold their own pictures. Playlists and scripts (HLS,
DASH, concat, SDP) are never opened, and no protocol is allowed, so a file can reach nothing but its own bytes.

Only FFmpeg's and the storage's own exceptions become a VideoError; any other is a bug and propagates.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from typing import BinaryIO, Literal, cast

import av
from av.container import InputContainer
from av.container.core import Flags
from av.stream import Discard, Disposition
from av.video.stream import VideoStream

from vidshard.pipeline.storage import RemoteVideo, StorageError, public_uri, storage_errors
from vidshard.pipeline.video.h264 import usability_of
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Limits

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

_READ_BYTES = 1 << 16

_MAX_STREAMS = 200


@dataclass(slots=True)
class WatchedFile:
    """A file as FFmpeg reads it, which remembers the storage's errors: FFmpeg takes some for the end of the file."""

    file: BinaryIO
    error: BaseException | None = None
    num_bytes: int = 0
    limits: Limits = field(default_factory=Limits)

    def read(self, num_bytes: int = -1) -> bytes:
        """At most this many bytes."""
        try:
            return self.file.read(num_bytes)
        except storage_errors() as error:
            self.error = self.error or error
            raise

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """The new position; negative, as FFmpeg wants it, where a damaged file points to no position at all."""
        try:
            return self.file.seek(offset, whence)
        except _seeking_errors() as error:
            if self._is_outside(offset, whence):
                return -errno.EINVAL
            if not isinstance(error, ValueError):
                self.error = self.error or error
            raise

    def _is_outside(self, offset: int, whence: int) -> bool:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.file.tell(), os.SEEK_END: self.num_bytes}[whence]
        return not 0 <= base + offset <= self.num_bytes

    def tell(self) -> int:
        """The position."""
        return self.file.tell()

    def samples(self, offsets: Sequence[int], num_bytes: int) -> list[bytes]:
        """So many bytes from each offset, fewer only at the end of the file. The position is lost."""
        if isinstance(self.file, RemoteVideo):
            try:
                return self.file.samples(offsets, num_bytes)
            except storage_errors() as error:
                self.error = self.error or error
                raise
        parts = []
        for offset in offsets:
            self.seek(offset)
            parts.append(read_exactly(self, num_bytes))
        return parts


@contextmanager
def opened(source: str | BinaryIO) -> Iterator[BinaryIO]:
    if not isinstance(source, str):
        yield source
        return
    try:
        file = open(source, "rb")  # noqa: SIM115  closed below; only the opening is watched here
    except OSError as error:
        raise VideoError(Reason.UNREADABLE, one_line(error)) from error
    with file:
        yield file


@contextmanager
def storage_failures_named(file: BinaryIO, limits: Limits | None = None) -> Iterator[WatchedFile]:
    """Whatever goes wrong while the storage fails is the storage's fault, not the video's."""
    watched = WatchedFile(file, limits=limits or Limits())
    try:
        watched.num_bytes = watched.seek(0, os.SEEK_END)
        yield watched
    except _reading_errors() as error:
        if watched.error is None:
            raise
        raise VideoError(Reason.UNREADABLE, one_line(watched.error)) from error
    if watched.error is not None:
        raise VideoError(Reason.UNREADABLE, one_line(watched.error)) from watched.error


def opening_errors() -> tuple[type[BaseException], ...]:
    return (StorageError, *storage_errors())


def _seeking_errors() -> tuple[type[BaseException], ...]:
    return (ValueError, *storage_errors())  # files in memory refuse negative positions with a ValueError


def _reading_errors() -> tuple[type[BaseException], ...]:
    return (VideoError, *storage_errors())


@contextmanager
def ffmpeg_failures_as(reason: Reason, what: str) -> Iterator[None]:
    try:
        yield
    except av.error.MemoryError:
        raise
    except av.FFmpegError as error:
        raise VideoError(reason, f"{what}: {error.strerror}") from error


@contextmanager
def open_video(watched: WatchedFile, thread_type: ThreadType = "NONE") -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its largest stream of moving pictures; the other streams are not read."""
    watched.seek(0)
    head = watched.read(4096)
    if not head:
        raise VideoError(Reason.EMPTY_FILE, "the file has no bytes")
    with _container(watched, head) as container:
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
        refuse_large(watched.limits, context.width, context.height)
        context.options = {**context.options, "max_pixels": str(allocated_pixels(watched.limits))}
        yield container, video


def _container(watched: WatchedFile, head: bytes) -> InputContainer:
    """The file opened, without decoding a picture where the header alone tells what decoding would."""
    quickly = _how_to_open_quickly(head)
    if quickly is not None:
        with suppress(av.FFmpegError):
            container = _av_open(watched, {"skip_frame": "all"}, quickly)
            if all(_is_told(stream) for stream in container.streams.video):
                return container
            container.close()
    try:
        return _av_open(watched, {}, {})
    except av.FFmpegError as error:  # out of memory too: here it is an index that claims absurd sizes
        raise _refusal(watched, head, error) from error


def _av_open(watched: WatchedFile, options: dict[str, str], container_options: dict[str, str]) -> InputContainer:
    watched.seek(0)
    return av.open(
        watched,
        "r",
        # max_pixels: for the decoders that look for the streams' parameters
        options={"max_pixels": str(allocated_pixels(watched.limits)), **options},
        container_options={
            "format_whitelist": ALLOWED_FORMATS,
            "protocol_whitelist": "none",
            "enable_drefs": "0",
            "max_streams": str(_MAX_STREAMS),
            **container_options,
        },
        metadata_errors="replace",
        buffer_size=_READ_BYTES,
    )


# Those that learn from the header all that they would from a picture, or, without one, its picture's format at most.
_QUICK_DECODERS = "h264,hevc,av1,libdav1d,mpeg4"
_QUICK_CODECS = frozenset({*_QUICK_DECODERS.split(","), "vp8", "vp9"})


def _how_to_open_quickly(head: bytes) -> dict[str, str] | None:
    """Options with which FFmpeg looks at no picture; None for containers whose headers say too little.

    Otherwise FFmpeg decodes up to seven pictures of h264, and one of vp9, to learn their format and how far they are
    reordered: 6 to 32 ms for each span.
    """
    if head[4:8] == b"ftyp":
        return {"codec_whitelist": _QUICK_DECODERS, "probesize": "32"}  # one packet
    # without times for decoding, those of reordered codecs depend on what was looked at
    if head.startswith(b"\x1a\x45\xdf\xa3") and b"V_VP" in head and b"V_MPEG" not in head:
        return {"codec_whitelist": _QUICK_DECODERS}
    return None


def _is_told(stream: VideoStream) -> bool:
    """Whether the header says all that decoding a few pictures would: size, rate, reordering and pixel shape."""
    if not _has_decoder(stream):
        return True
    context = stream.codec_context
    if codec_name(stream) not in _QUICK_CODECS or not (context.width and context.height and stream.average_rate):
        return False
    if codec_name(stream) != "h264":
        return True
    said = usability_of(bytes(context.extradata or b""))
    return said is not None and said.states_reordering and (said.square or bool(stream.sample_aspect_ratio))


def allocated_pixels(limits: Limits) -> int:
    """What FFmpeg may allocate for a picture: it counts rows filled up to 64 pixels; the exact limit is ours."""
    return min(limits.max_pixels + 64 * 16384, 2**31 - 1)


def refuse_large(limits: Limits, width: int, height: int) -> None:
    """Refuse pictures of more pixels than the limits allow."""
    if width * height > limits.max_pixels:
        raise VideoError(
            Reason.OVER_LIMIT, f"pictures of {width}x{height}, more than the {limits.max_pixels:,} of --max-pixels"
        )


def refuse_long(limits: Limits, *, seconds: Fraction | float = 0, num_frames: float = 0) -> None:
    """Refuse a video that is longer, or has more frames, than the limits allow."""
    if seconds > limits.max_seconds:
        raise VideoError(
            Reason.OVER_LIMIT, f"{float(seconds):.6g} s, more than the {limits.max_seconds:g} of --max-seconds"
        )
    if num_frames > limits.max_frames:
        raise VideoError(
            Reason.OVER_LIMIT, f"{num_frames:.7g} frames, more than the {limits.max_frames:,} of --max-frames"
        )


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

_OTHERS = (
    (b"\x1f\x8b", "compressed with gzip: decompress it, as images are read only out of a plain .tar or a .zip"),
    (b"BZh", "compressed with bzip2: decompress it, as images are read only out of a plain .tar or a .zip"),
    (b"\xfd7zXZ\0", "compressed with xz: decompress it, as images are read only out of a plain .tar or a .zip"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: decompress it, as images are read only out of a plain .tar or a .zip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: images are read out of a plain .tar or a .zip"),
    (b"Rar!\x1a\x07", "a RAR archive: images are read out of a plain .tar or a .zip"),
)


def _refusal(watched: WatchedFile, head: bytes, error: av.FFmpegError) -> VideoError:
    """Why FFmpeg would not open it, as far as its first bytes tell."""
    words = error.strerror
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for mark, name in _SCRIPTS:
        if text.startswith(mark) or (mark.startswith(b"<") and text.startswith(b"<?xml") and mark in text):
            return VideoError(Reason.NOT_A_VIDEO, f"{name}: it names other files, and those are never opened")
    for mark, name in _OTHERS:
        if head.startswith(mark):
            return VideoError(Reason.NOT_A_VIDEO, name)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        advice = "put single images into a .tar or .zip, convert an animated one to .png (APNG), .gif or .mp4"
        return VideoError(Reason.NOT_A_VIDEO, f"a WebP picture: {advice}")
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
        header = read_exactly(watched, 16)
        num_bytes = int.from_bytes(header[:4], "big")
        if num_bytes == 1 and len(header) == 16:
            num_bytes = int.from_bytes(header[8:16], "big")
        if header[4:8] == b"moov":
            return offset + num_bytes <= watched.num_bytes
        if num_bytes < 8:  # 0 is "to the end of the file"
            return False
        offset += num_bytes
    return False


# What the header says.


def codec_name(stream: VideoStream) -> str:
    return stream.codec_context.codec.canonical_name


def time_base_of(stream: VideoStream) -> Fraction:
    return stream.time_base or Fraction(1, 1_000_000)


_RATES_AGREE = Fraction(1, 5000)
"""24 and 23.976 differ by five times as much; FLV's average over a few seconds is off by a fifth of it."""

_FEWEST_TICKS = 8
_FINEST = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """The ticks in which a video's times are counted: the container's, or finer ones.

    A container rounds times to its ticks, Matroska to milliseconds. Where the stream states its rate, its frames lie a
    whole number of intervals after the first one; a time that is one tick at most from such a place is that place
    rounded (half a tick, and half a tick for the first frame's own), and counts as the place itself. Ticks are divided
    so that each place falls on one. Times elsewhere stay as they are, and so does their order.
    """

    time_base: Fraction
    """Seconds for each tick."""
    start_pts: int
    """That of the first frame."""

    @classmethod
    def of(cls, stream: VideoStream, first_pts: int) -> Clock:
        """That of a video whose first frame has this time by the container's clock."""
        time_base = time_base_of(stream)
        interval = _interval(stream, time_base)
        if interval is None or interval < _FEWEST_TICKS or interval.denominator > _FINEST:
            return cls(time_base=time_base, start_pts=first_pts)
        parts = interval.denominator if abs(first_pts) * interval.denominator < 1 << 62 else 1
        return cls(time_base=time_base / parts, start_pts=first_pts * parts)

    def reading(self, stream: VideoStream) -> TickConverter:
        """How to read a container's times.

        Raises:
            VideoError: DECODE_ERROR: it is not the file whose clock this is.
        """
        parts = time_base_of(stream) / self.time_base
        if parts.denominator != 1:
            raise VideoError(Reason.DECODE_ERROR, "its clock is not the one that it had when it was probed")
        interval = _interval(stream, self.time_base)
        whole = interval.numerator if parts > 1 and interval is not None and interval.denominator == 1 else 0
        return TickConverter(parts=parts.numerator, interval=whole, start_pts=self.start_pts)


@dataclass(frozen=True, kw_only=True, slots=True)
class TickConverter:
    """From the container's ticks to those of a clock."""

    parts: int = 1
    """Ticks of the clock in one of the container's."""
    interval: int = 0
    """From one frame to the next; 0 takes all times as they are."""
    start_pts: int = 0

    def __call__(self, ticks: int) -> int:
        """The time by the clock; never a later one for an earlier one."""
        if not self.interval:
            return ticks * self.parts
        offset = ticks * self.parts - self.start_pts
        place = (2 * offset + self.interval) // (2 * self.interval) * self.interval
        return self.start_pts + (place if abs(offset - place) <= self.parts else offset)

    def back(self, pts: int) -> int:
        """The last of the container's ticks that may read so."""
        return pts if self.parts == 1 else pts // self.parts + 1


def _interval(stream: VideoStream, time_base: Fraction) -> Fraction | None:
    """Ticks from one frame to the next where the stream says so; None where it does not, or contradicts itself."""
    lowest = stream.base_rate
    average = stream.average_rate or lowest
    if not average or not lowest:
        return None
    if "mov" in stream.container.format.name.split(","):  # its average is that of the index, over all frames
        rate = _usual_rate(average, _RATES_AGREE)
    elif abs(average - lowest) > lowest * _RATES_AGREE:
        rate = None
    else:  # Matroska's nanoseconds come back as 19001/317 for 60000/1001, a millisecond in six hours
        rate = _usual_rate(lowest, Fraction(1, 1_000_000)) or lowest
    return 1 / (rate * time_base) if rate else None


def _usual_rate(rate: Fraction, tolerance: Fraction) -> Fraction | None:
    """The whole number that it is about, or that by 1.001; None where there is none."""
    for usual in (Fraction(round(rate)), Fraction(round(rate * 1001 / 1000) * 1000, 1001)):
        if abs(usual - rate) <= rate * tolerance:
            return usual
    return None


# Containers in which only the pictures themselves state a pixel shape, which may change on the way.
_WITHOUT_ASPECT = frozenset({"mpegts", "mpeg", "mpegvideo", "h264", "hevc", "vvc", "m4v"})


def may_change_aspect(stream: VideoStream) -> bool:
    """Whether the shape of a pixel may be another one later."""
    return bool(_WITHOUT_ASPECT & set(stream.container.format.name.split(",")))


def pixel_aspect(stream: VideoStream) -> Fraction | None:
    """Shape of a pixel: what the container says, as in players, otherwise what the decoder found last.

    The decoder may be a few frames ahead of the one shown, by as many as it holds back to reorder them.
    """
    if may_change_aspect(stream):
        return stream.codec_context.sample_aspect_ratio or stream.sample_aspect_ratio
    return stream.sample_aspect_ratio


def usual_ticks(stream: VideoStream) -> int:
    """How long a frame stays that does not say so itself: by the average rate, at least one tick."""
    rate = stream.average_rate or stream.guessed_rate
    return max(1, round(1 / (rate * time_base_of(stream)))) if rate else 1


def stream_seconds(stream: VideoStream) -> Fraction | None:
    """Length that the header gives to the video stream itself, not to the container or guessed from a bit rate."""
    formats = stream.container.format.name.split(",")
    if stream.duration and ("mov" in formats or "avi" in formats):
        return stream.duration * time_base_of(stream)
    if "matroska" in formats:
        for key, value in stream.metadata.items():
            if key.upper().startswith("DURATION") and (match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", value)):
                hours, minutes, seconds = match.groups()
                return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
    return None


def seconds_from_header(stream: VideoStream, first_seconds: Fraction) -> Fraction | None:
    """From the first frame to the end, as claimed; None where nothing usable is."""
    container = stream.container
    assert isinstance(container, InputContainer)
    formats = set(container.format.name.split(","))
    if formats & _RAW_FORMATS:
        return None
    seconds = stream_seconds(stream)
    if seconds is None and container.duration:
        seconds = Fraction(container.duration, av.time_base)
    if seconds is not None and "matroska" in formats:
        seconds -= max(first_seconds, Fraction(0))  # there, counted from zero rather than from the first frame
    return seconds if seconds is not None and seconds > 0 else None


# Words for people.


def read_exactly(file: BinaryIO | WatchedFile, num_bytes: int) -> bytes:
    """So many bytes, fewer only at the end of the file."""
    parts = []
    while num_bytes > 0 and (part := file.read(num_bytes)):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def one_line(error: BaseException) -> str:
    """What the storage says, without user names, passwords or signatures of its addresses."""
    words = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+", lambda match: public_uri(match[0]), words, flags=re.IGNORECASE)
