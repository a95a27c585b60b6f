"""Opens a video file for FFmpeg safely, and picks its video stream.

FFmpeg gets a file object and a list of allowed container formats that hold their own pictures. Playlists and scripts
(HLS, DASH, concat, SDP) are never opened, and no protocol is allowed, so a file can reach nothing but its own bytes.

Only FFmpeg's own exceptions become a VideoError here; any other is a bug and propagates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from typing import Literal, cast

import av
from av.container import InputContainer
from av.container.core import Flags
from av.stream import Discard, Disposition
from av.video.stream import VideoStream

from vidshard.pipeline.video.decoders import opening_whitelist, refuse_decoder, whitelist
from vidshard.pipeline.video.ffmpeg_log import ErrorsLogged, of_lost_packets
from vidshard.pipeline.video.h264 import usability_of
from vidshard.pipeline.video.input_file import WatchedFile, position_kept, read_exactly
from vidshard.pipeline.video.mp4 import MP4_FIRST_BOXES
from vidshard.pipeline.video.stream_choice import choose_stream, has_decoder
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Limits

ThreadType = Literal["NONE", "SLICE", "FRAME", "AUTO"]

ALLOWED_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,apng,mxf,nut,ivf,rm,dv,gxf,wtv,"
    "yuv4mpegpipe,h264,hevc,vvc,av1,obu,m4v,mpegvideo,mjpeg,vc1,"
    "mp3,flac,wav,aac"
)
"""FFmpeg's names of containers that hold their own pictures, and of common audio containers.

Audio is opened so that it is refused as audio, with a helpful reason.
"""

_READ_BYTES = 1 << 16

_MAX_STREAMS = 200


@contextmanager
def ffmpeg_failures_as(reason: Reason, what: str) -> Iterator[None]:
    """Turn FFmpeg's errors into a VideoError "WHAT: ..."; running out of memory stays a MemoryError."""
    try:
        yield
    except av.error.MemoryError:
        raise
    except av.FFmpegError as error:
        raise VideoError(reason, f"{what}: {error.strerror}") from error


@contextmanager
def open_video(
    watched: WatchedFile, thread_type: ThreadType = "NONE", *, with_edits: bool = True
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the container and the video stream that ``choose_stream`` prefers; the other streams are not read.

    Args:
        watched: the file.
        thread_type: how the decoder uses threads.
        with_edits: False leaves an mp4's edit list out: packets have the times of its media.

    Raises:
        VideoError: EMPTY_FILE, NOT_A_VIDEO, NO_VIDEO_STREAM, UNSUPPORTED, OVER_LIMIT, TRUNCATED or DECODE_ERROR.
    """
    watched.seek(0)
    head = watched.read(4096)
    if not head:
        raise VideoError(Reason.EMPTY_FILE, "the file has no bytes")
    with ExitStack() as stack:
        container = stack.enter_context(_container(watched, head, with_edits))
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
        video, was_read = choose_stream(container, videos, watched.limits)
        if not has_decoder(video):
            raise VideoError(Reason.UNSUPPORTED, f"no decoder for its video stream in {container.format.name}")
        refuse_decoder(video, watched.limits)
        if any(key.lower() == "alpha_mode" and value == "1" for key, value in video.metadata.items()):
            raise VideoError(
                Reason.UNSUPPORTED, "its alpha lies beside the picture, which alone shows colors of invisible pixels"
            )
        if codec_name(video) == "wmv2" and not video.codec_context.extradata:
            raise VideoError(
                Reason.DECODE_ERROR, f"{container.format.name} lost the header without which wmv2 shows noise"
            )
        if was_read:
            index = video.index
            container.close()
            container = stack.enter_context(_container(watched, head, with_edits))
            container.flags &= ~cast(int, Flags.gen_pts.value)
            video = cast(VideoStream, container.streams[index])
        for stream in container.streams:
            if stream.index != video.index:
                stream.discard = Discard.all
        context = video.codec_context
        if {"avi", "mpeg"} & set(container.format.name.split(",")):
            thread_type = "NONE"  # frame threads would shift the times that stand in for missing ones
        context.thread_type = thread_type
        context.thread_count = 1 if thread_type == "NONE" else 0
        refuse_large(watched.limits, context.width, context.height)
        pixels = str(allocated_pixels(watched.limits))
        strict = {"err_detect": "bitstream"} if codec_name(video) in _LENIENT_DECODERS else {}
        context.options = {**context.options, "max_pixels": pixels, **whitelist(watched.limits), **strict}
        yield container, video


def _container(watched: WatchedFile, head: bytes, with_edits: bool) -> InputContainer:
    """Open the file; where the header alone is enough, without decoding a picture first."""
    quickly = _quick_options(head, watched.limits)
    edits = {**opening_whitelist(watched.limits), **({} if with_edits else {"ignore_editlist": "1"})}
    if quickly is not None:
        with suppress(av.FFmpegError):
            container = _av_open(watched, {"skip_frame": "all"}, edits | quickly)
            if all(_header_is_enough(stream) for stream in container.streams.video):
                return container
            container.close()
    try:
        return _av_open(watched, {}, edits)
    except av.FFmpegError as error:  # out of memory too: here it is an index that claims absurd sizes
        raise _refusal(watched, head, error) from error


def _av_open(watched: WatchedFile, options: dict[str, str], container_options: dict[str, str]) -> InputContainer:
    watched.seek(0)
    with ErrorsLogged() as messages:
        container = av.open(
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
    watched.opening = of_lost_packets(container.format.name, messages)
    return container


def num_packets_before_damage(watched: WatchedFile, stream_index: int) -> int:
    """Number of packets of a stream before the first place that the demuxer passes over; 0 if that is not found.

    The file is opened once more, so that FFmpeg reads no packets ahead; its position and what it said before stay.
    """
    opening, num_packets = watched.opening, 0
    with position_kept(watched), suppress(av.FFmpegError):
        options = {**opening_whitelist(watched.limits), "probesize": "32", "analyzeduration": "0"}
        with _av_open(watched, {"skip_frame": "all"}, options) as container:
            is_known = stream_index < len(container.streams)  # FLV names some streams by their packets alone
            packets = container.demux(container.streams[stream_index]) if is_known else iter(())
            while is_known and not watched.opening:
                with ErrorsLogged() as messages:
                    packet = next(packets, None)
                if packet is None or any(name == container.format.name for _, name, _ in messages):
                    break
                num_packets += bool(packet.size)
    watched.opening = opening
    return num_packets


_LENIENT_DECODERS = frozenset({"msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2"})
"""Decoders that go on with coefficients outside of a block, which are damage, unless they are asked not to."""

# Decoders that learn from the header all that they would learn from a picture, apart from the pixel format.
_QUICK_DECODERS = frozenset({"h264", "hevc", "av1", "libdav1d", "mpeg4"})
_QUICK_CODECS = _QUICK_DECODERS | {"vp8", "vp9"}


def _quick_options(head: bytes, limits: Limits) -> dict[str, str] | None:
    """Options with which FFmpeg decodes no picture on opening; None for containers whose headers say too little.

    Without them FFmpeg decodes up to seven pictures of h264, and one of vp9, to learn their format and reorder depth:
    5 to 55 ms for each span.
    """
    if head[4:8] == b"ftyp":
        return {**opening_whitelist(limits, _QUICK_DECODERS), "probesize": "32"}  # one packet
    # Matroska has no decoding times: those FFmpeg makes for reordered codecs depend on the pictures it looked at
    if head.startswith(b"\x1a\x45\xdf\xa3") and b"V_VP" in head and b"V_MPEG" not in head:
        return opening_whitelist(limits, _QUICK_DECODERS)
    return None


def _header_is_enough(stream: VideoStream) -> bool:
    """Whether the header states what decoding a few pictures would: size, rate, reorder depth and pixel shape."""
    if not has_decoder(stream):
        return True
    context = stream.codec_context
    if codec_name(stream) not in _QUICK_CODECS or not (context.width and context.height and stream.average_rate):
        return False
    if codec_name(stream) != "h264":
        return True
    usability = usability_of(bytes(context.extradata or b""))
    if usability is None or usability.num_reordered is None:
        return False
    return usability.square or bool(stream.sample_aspect_ratio)


def may_reorder(stream: VideoStream) -> bool:
    """Whether pictures may be presented in another order than they are decoded in, as far as the header tells."""
    if stream.codec_context.reorder_depth:
        return True
    if codec_name(stream) != "h264":
        return False
    usability = usability_of(bytes(stream.codec_context.extradata or b""))  # the decoder may not have read it yet
    return usability is not None and bool(usability.num_reordered)


def allocated_pixels(limits: Limits) -> int:
    """FFmpeg's limit of pixels in a picture: looser than ours, as it counts rows padded to 64 pixels."""
    return min(limits.max_pixels + 64 * 16384, 2**31 - 1)


def refuse_large(limits: Limits, width: int, height: int) -> None:
    """Refuse pictures of more pixels than the limits allow.

    Raises:
        VideoError: OVER_LIMIT.
    """
    if width * height > limits.max_pixels:
        raise VideoError(
            Reason.OVER_LIMIT, f"pictures of {width}x{height}, more than the {limits.max_pixels:,} of --max-pixels"
        )


def refuse_long(limits: Limits, *, seconds: Fraction | float = 0, num_frames: float = 0) -> None:
    """Refuse a video that is longer, or has more frames, than the limits allow.

    Raises:
        VideoError: OVER_LIMIT.
    """
    if seconds > limits.max_seconds:
        raise VideoError(
            Reason.OVER_LIMIT, f"{float(seconds):.6g} s, more than the {limits.max_seconds:g} of --max-seconds"
        )
    if num_frames > limits.max_frames:
        raise VideoError(
            Reason.OVER_LIMIT, f"{num_frames:.7g} frames, more than the {limits.max_frames:,} of --max-frames"
        )


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
    """The error for a file that FFmpeg did not open, by its first bytes."""
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
    if head[4:8] in MP4_FIRST_BOXES:
        if _has_mp4_index(watched):
            return VideoError(Reason.DECODE_ERROR, f"the mp4 index (moov) is damaged: {words}")
        return VideoError(Reason.TRUNCATED, f"an mp4 without its index (moov): {words}")
    if isinstance(error, av.error.EOFError):
        return VideoError(Reason.TRUNCATED, "the file ends inside its header, or right after it")
    if head.startswith(b"\x1a\x45\xdf\xa3") or (head.startswith(b"RIFF") and head[8:12] == b"AVI "):
        return VideoError(Reason.DECODE_ERROR, f"the container's header is damaged: {words}")
    return VideoError(Reason.NOT_A_VIDEO, f"not in a container format that is allowed here: {words}")


def _has_mp4_index(watched: WatchedFile) -> bool:
    """Whether the top-level boxes of an mp4 include a complete moov."""
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


# The opened stream.


def codec_name(stream: VideoStream) -> str:
    """FFmpeg's name of the stream's codec."""
    return stream.codec_context.codec.canonical_name


# Containers in which only the pictures themselves state a pixel shape, which may change within the stream.
_WITHOUT_ASPECT = frozenset({"mpegts", "mpeg", "mpegvideo", "h264", "hevc", "vvc", "m4v"})


def may_change_aspect(stream: VideoStream) -> bool:
    """Whether the pixel aspect ratio may change within the stream."""
    return bool(_WITHOUT_ASPECT & set(stream.container.format.name.split(",")))


def pixel_aspect(stream: VideoStream) -> Fraction | None:
    """Pixel aspect ratio: the container's, as in players, otherwise the one the decoder met last.

    The decoder may be ahead of the frame on screen by as many frames as it holds back to reorder them.
    """
    if may_change_aspect(stream):
        return stream.codec_context.sample_aspect_ratio or stream.sample_aspect_ratio
    return stream.sample_aspect_ratio
