"""The end of a video: when its last picture leaves the screen, and whether that is where its header says."""

from __future__ import annotations

from fractions import Fraction

from av.video.stream import VideoStream

from vidshard.pipeline.video.avi import empty_chunks_after
from vidshard.pipeline.video.container import codec_name, open_video, refuse_long
from vidshard.pipeline.video.image_archive import image_archive
from vidshard.pipeline.video.input_file import WatchedFile
from vidshard.pipeline.video.packets import SeekPoint, StreamEnd, read_packets
from vidshard.pipeline.video.timestamps import stream_seconds, time_base_of, usual_ticks
from vidshard.schemas.rejections import Reason, VideoError

_SILENT = frozenset({"h264", "hevc", "vvc", "av1"})
"""Codecs in which a packet without a picture is no repeat of the one before: it is damaged, or holds only headers."""


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
        for packet in read_packets(container, stream, SeekPoint(await_keyframe=False), watched, end=end):
            if packet is not None:
                num_packets += 1
                if packet.pts is not None:
                    end_pts = max(end_pts, packet.pts + (packet.duration or frame_ticks))
                ticks = end_pts - first_pts or num_packets * frame_ticks
                if ticks > longest:  # checked within the loop, as there may be no end
                    refuse_long(watched.limits, seconds=ticks * time_base)
        held = held_until(watched, stream, end, None)
        return (max(ticks, held - first_pts) if held is not None else ticks) * time_base


def held_until(watched: WatchedFile, stream: VideoStream, end: StreamEnd, last_pts: int | None) -> int | None:
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


def refuse_truncated(stream: VideoStream, end_seconds: Fraction) -> None:
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
