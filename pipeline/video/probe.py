"""Probing: reads a video's header and its first frame, and digests its content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from fractions import Fraction
from typing import BinaryIO

from av.video.stream import VideoStream

from vidshard.pipeline.video.container import codec_name, refuse_long
from vidshard.pipeline.video.content_id import archive_id, content_id
from vidshard.pipeline.video.encryption import encryption_of
from vidshard.pipeline.video.geometry import display_size
from vidshard.pipeline.video.image_archive import ImageArchive
from vidshard.pipeline.video.input_file import open_file, storage_failures_named
from vidshard.pipeline.video.joined import refuse_other_fragments
from vidshard.pipeline.video.packets import times_ahead
from vidshard.pipeline.video.presentation import first_frame
from vidshard.pipeline.video.render import orientation_of
from vidshard.pipeline.video.stream_end import seconds_from_packets
from vidshard.pipeline.video.timestamps import Clock, frame_rate, seconds_from_header, time_base_of
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Limits, VideoProbe, VideoRef, VideoSource


def probe_video(ref: VideoRef, open_input: Callable[[str], BinaryIO], limits: Limits | None = None) -> VideoProbe:
    """Read a video's header and the time of its first frame.

    Reads the header, the first frame, and for the content's id 320 KiB or a small file whole; all of a large file only
    where no duration is stated anywhere.

    Args:
        ref: the file.
        open_input: opens ``ref.uri`` as a seekable binary file, which is closed here.
        limits: what the video may cost; None for the defaults.

    Raises:
        VideoError: OVER_LIMIT, UNREADABLE, EMPTY_FILE, NOT_A_VIDEO, NO_VIDEO_STREAM, NO_FRAMES, UNSUPPORTED, ENCRYPTED,
            TRUNCATED (an mp4 without its index) or DECODE_ERROR (a damaged header, or joined fragments).
    """
    with open_file(ref.uri, open_input) as file, storage_failures_named(file, limits) as watched:
        video_id = content_id(watched)
        encryption = encryption_of(watched)
        if encryption and all(encryption):
            raise _encrypted(encryption)
        refuse_other_fragments(watched)
        with closing(first_frame(watched)) as frames:
            try:
                first, shown_seconds = next(frames)
            except VideoError as error:
                if any(encryption):
                    raise _encrypted(encryption) from error
                raise
            stream = first.stream
            orientation = orientation_of(first.frame)
            width, height = display_size(*first.shown_size, first.pixel_aspect, orientation)
            duration_seconds: Fraction | None
            if isinstance(stream, ImageArchive):
                codec, fps, clock = stream.codec, stream.rate, Clock(time_base=1 / stream.rate, start_pts=first.pts)
                duration_seconds = (len(stream) - first.pts) / stream.rate
                video_id = archive_id(video_id, fps)
            else:
                _refuse_encrypted(stream, encryption)
                codec, fps, clock = codec_name(stream), frame_rate(stream), Clock.of(stream, first.pts)
                if clock.time_base != time_base_of(stream):
                    clock = Clock.of(stream, first.pts, times_ahead(stream))
                duration_seconds = shown_seconds or seconds_from_header(stream, first.pts * time_base_of(stream))
                refuse_long(watched.limits, seconds=duration_seconds or 0, num_frames=stream.frames)
            source = VideoSource(
                width=width,
                height=height,
                codec=codec,
                fps=float(fps),
                rotation_degrees=orientation.rotation_degrees,
            )
        if duration_seconds is None:
            duration_seconds = seconds_from_packets(watched, first.pts)
            refuse_long(watched.limits, seconds=duration_seconds)
        return VideoProbe(
            video_id=video_id,
            uri=ref.uri,
            num_bytes=watched.num_bytes,
            time_base=clock.time_base,
            grid_start_pts=clock.start_pts,
            duration_seconds_from_header=float(duration_seconds),
            source=source,
        )


def _encrypted(encryption: Sequence[str | None]) -> VideoError:
    return VideoError(Reason.ENCRYPTED, f"its pictures are encrypted: {next(filter(None, encryption))}")


def _refuse_encrypted(stream: VideoStream, encryption: Sequence[str | None]) -> None:
    """Refuse a stream that is encrypted, beside others that are not.

    Raises:
        VideoError: ENCRYPTED.
    """
    number = [video.index for video in stream.container.streams.video].index(stream.index)
    if number < len(encryption) and encryption[number]:
        raise _encrypted(encryption)
