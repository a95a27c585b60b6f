"""Times of all frames of a video, by its packets: which number a frame has, counted from the first one.

No picture is decoded, but every packet is read. A video is refused whose packets are not known to be one frame each, as
counting them would then give other numbers than a player that counts frames.
"""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from vidshard.pipeline.video.container import codec_name, open_video
from vidshard.pipeline.video.image_archive import image_archive
from vidshard.pipeline.video.input_file import WatchedFile, storage_failures_named
from vidshard.pipeline.video.packet_info import inspector_of
from vidshard.pipeline.video.packets import SeekPoint, read_packets
from vidshard.pipeline.video.presentation import has_several_cuts
from vidshard.pipeline.video.timestamps import Clock, is_clockless
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Limits

_ONE_FRAME_EACH = frozenset({"h264", "hevc", "av1", "mpeg4", "mpeg2video", "mjpeg", "vp8", "vp9", "prores", "dnxhd"})
"""Codecs whose packets tell whether they are one frame each, by ``packet_info``."""


def frame_seconds(file: BinaryIO, clock: Clock, limits: Limits) -> npt.NDArray[np.float64]:
    """Times of all frames: float64 (N,), increasing, in seconds after the first frame.

    Args:
        file: the video; it stays open.
        clock: of the video as it was probed.
        limits: what it may cost.

    Raises:
        VideoError: UNSUPPORTED: its packets are not known to be one frame each. Otherwise as for decoding.
    """
    with storage_failures_named(file, limits) as watched:
        ticks = np.array(_ticks(watched, clock), np.float64)
    ticks.sort()
    if not len(ticks) or ticks[0] != clock.start_pts:
        raise _uncounted("its first frame cannot be decoded")
    if (np.diff(ticks) <= 0).any():
        raise _uncounted("two of its frames have the same time")
    return (ticks - clock.start_pts) * float(clock.time_base)


def _ticks(watched: WatchedFile, clock: Clock) -> list[int]:
    """Times of all frames in ticks of the clock, in the order of the file."""
    archive = image_archive(watched)
    if archive is not None:
        return list(range(clock.start_pts, len(archive)))
    if has_several_cuts(watched):
        raise _uncounted("its edit list has several cuts")
    with open_video(watched) as (container, stream):
        codec = codec_name(stream)
        if codec not in _ONE_FRAME_EACH:
            raise _uncounted(f"the packets of {codec} are not known to be one frame each")
        convert, inspect = clock.converter(stream), inspector_of(stream)
        ticks: list[int] = []
        clockless = is_clockless(stream)
        for packet in read_packets(container, stream, SeekPoint(await_keyframe=False), watched):
            if packet is None or packet.is_discard:
                continue
            if inspect(bytes(packet)) is None:
                raise _uncounted("a packet of it is not one whole frame, as in interlaced video")
            if clockless:
                ticks.append(clock.start_pts + len(ticks))
            elif packet.pts is None:
                raise _uncounted("a packet of it has no time")
            else:
                ticks.append(convert(packet.pts))
    return ticks


def _uncounted(why: str) -> VideoError:
    return VideoError(
        Reason.UNSUPPORTED, f"its frames cannot be counted for the rule frames: {why}; give samples times"
    )
