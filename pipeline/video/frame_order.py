"""Display intervals of decoded frames, and the refusal of frames that are damaged or out of order.

A decoder gives frames in the order of presentation. Some writers leave out the composition times of streams with
B-frames, so that a packet's time is that of decoding it. Then frames come out in another order than their times, and
each is shown at the time of the packet that has its place in that order (``PacketPlaces``).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vidshard.pipeline.video.container import may_change_aspect, pixel_aspect
from vidshard.pipeline.video.cropping import Crop
from vidshard.pipeline.video.image_archive import ImageArchive
from vidshard.pipeline.video.packet_schedule import Step
from vidshard.pipeline.video.packets import at_seconds
from vidshard.pipeline.video.timestamps import TickConverter, time_base_of, usual_ticks
from vidshard.schemas.rejections import Reason, VideoError


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedFrame:
    """A decoded frame and its display interval [pts, end_pts) in ticks."""

    frame: VideoFrame
    pts: int
    end_pts: int
    """The next frame's time where that is known, else by the frame's own duration; a frame that follows may start
    earlier."""
    stream: VideoStream | ImageArchive
    pixel_aspect: Fraction | None = None
    """Pixel aspect ratio; None for squares. Kept here, as the last frame outlives its container."""
    crop: Crop | None = None
    """The part that the container shows; None for all."""

    @property
    def shown_size(self) -> tuple[int, int]:
        """Stored (width, height) of the part that is shown, before orientation and pixel shape."""
        width, height = self.frame.width, self.frame.height
        return (width, height) if self.crop is None else self.crop.size(width, height)


class MissingFrameError(Exception):
    """A wanted frame did not come out of its packet, or something failed after packets were left out."""


class DecodingTimesError(Exception):
    """The container's times turned out to be those of decoding: frames come out in another order."""


@dataclass(slots=True)
class AwaitedFrames:
    """The wanted frames that have not come out of the decoder yet."""

    expected: list[tuple[int, int | None]] = field(default_factory=list)
    """A heap of their times, and of the times of the frames after them."""

    def sent(self, step: Step) -> None:
        if step.expected_pts is not None:
            heapq.heappush(self.expected, (step.expected_pts, step.next_pts))

    def came(self, pts: int) -> int | None:
        """Take note of a frame that came out.

        Returns:
            The time of the next frame, where that is known.

        Raises:
            MissingFrameError: a frame that was wanted before it did not come.
        """
        if not self.expected or pts < self.expected[0][0]:
            return None
        expected_pts, next_pts = heapq.heappop(self.expected)
        if expected_pts != pts:
            raise MissingFrameError
        return next_pts


MOST_REORDERED = 17
"""A frame that comes out after so many later packets were sent would be out of every codec's reordering."""


@dataclass(slots=True)
class PacketPlaces:
    """Packets by their times, and frames by their order: which packet has the place of which frame.

    Every packet has to give one frame, and packet times have to rise. Then the n-th frame has the n-th time.
    """

    inside: dict[int, int] = field(default_factory=dict)
    """Number of each packet that is in the decoder, by its time, in the order in which they were sent."""
    free: deque[int] = field(default_factory=deque)
    """Times that no frame has been given, in order."""
    num_sent: int = 0
    last_pts: int | None = None

    def sent(self, packet: Packet[VideoStream]) -> None:
        """Take note of a packet that the decoder gets.

        Raises:
            VideoError: DECODE_ERROR: it has no time, or one that does not rise; or an earlier one gave no frame.
        """
        pts = packet.pts
        if pts is None or packet.is_discard or (self.last_pts is not None and pts <= self.last_pts):
            raise _times_unknown("times that do not rise from packet to packet")
        self.last_pts = pts
        self.inside[pts] = self.num_sent
        self.free.append(pts)
        self.num_sent += 1
        if self.num_sent - next(iter(self.inside.values())) > MOST_REORDERED + 1:
            raise _times_unknown("a packet without a picture")

    def place(self, pts: int | None) -> int:
        """The time of the next frame.

        Args:
            pts: the time of the packet that it is of.

        Raises:
            VideoError: DECODE_ERROR: it is of no packet that is in the decoder.
        """
        if pts is None or self.inside.pop(pts, None) is None:
            raise _times_unknown("a packet with several pictures")
        return self.free.popleft()

    def end(self) -> None:
        """Take note that the decoder is empty.

        Raises:
            VideoError: DECODE_ERROR: a packet gave no frame.
        """
        if self.inside:
            raise _times_unknown("a packet without a picture")


def _times_unknown(cause: str) -> VideoError:
    return VideoError(
        Reason.DECODE_ERROR,
        "its container states times of decoding and none of presentation, and they do not tell when each picture is "
        f"shown, because of {cause}",
    )


@dataclass(slots=True)
class HeldFrames:
    """The last frames that came out, held back while a later one may show that their times are wrong."""

    size: int
    """Number of frames that are held back; 0 for none."""
    frames: deque[TimedFrame] = field(default_factory=deque)

    def put(self, frame: TimedFrame) -> Iterator[TimedFrame]:
        """Add a frame, and give those that need not be held any longer."""
        self.frames.append(frame)
        while len(self.frames) > self.size:
            yield self.frames.popleft()

    def give(self) -> Iterator[TimedFrame]:
        """Give all frames."""
        while self.frames:
            yield self.frames.popleft()


class FrameOrder:
    """Gives decoded frames their display intervals, and refuses those that are damaged or out of order."""

    __slots__ = (
        "_aspect",
        "_aspect_may_change",
        "_conceal",
        "_convert",
        "_crop",
        "_first_pts",
        "_frame_ticks",
        "_is_certain",
        "_places",
        "_stream",
        "_time_base",
        "awaited",
        "end_pts",
        "last_pts",
    )

    def __init__(
        self,
        stream: VideoStream,
        convert: TickConverter,
        first_pts: int | None,
        crop: Crop | None = None,
        *,
        conceal: bool,
        is_certain: bool = True,
        places: PacketPlaces | None = None,
    ) -> None:
        """Expect the frames of a stream.

        Args:
            stream: the frames' stream.
            convert: the container's ticks to those of the clock.
            first_pts: frames before it are left out; in the container's ticks, as all times here.
            crop: the part of the pictures that is shown; None for all.
            conceal: take frames in which the decoder concealed damage.
            is_certain: whether times are known to be those of presentation.
            places: gives each frame the time of its place; None where frames have their packet's time.
        """
        self.awaited = AwaitedFrames()
        self.last_pts: int | None = None
        self.end_pts = 0
        self._stream, self._convert, self._first_pts, self._conceal = stream, convert, first_pts, conceal
        self._time_base, self._frame_ticks = time_base_of(stream), usual_ticks(stream)
        self._aspect, self._aspect_may_change = pixel_aspect(stream), may_change_aspect(stream)
        self._is_certain, self._places = is_certain, places
        self._crop = crop
        if crop is not None and crop.pixel_aspect is not None:
            self._aspect = crop.pixel_aspect

    def timed(self, frame: VideoFrame) -> TimedFrame | None:
        """The frame with its times; None for one before the keyframe that a seek led to.

        Raises:
            VideoError: DECODE_ERROR: it is damaged, or its time runs backwards.
            MissingFrameError: a frame that was wanted before it did not come.
            DecodingTimesError: its time runs backwards, and times were not certain.
        """
        pts = frame.pts if frame.pts is not None else frame.dts
        if self._places is not None:
            pts = self._places.place(frame.pts)
        if pts is None:
            pts = self.end_pts
        if self._first_pts is not None and pts < self._first_pts:
            return None  # it references pictures before the keyframe, which were not decoded
        if frame.is_corrupt and not self._conceal:
            detail = f"{at_seconds(pts, self._time_base)}: the decoder had to conceal a damaged picture"
            raise VideoError(Reason.DECODE_ERROR, detail)
        if self.last_pts is not None and pts < self.last_pts:
            if not self._is_certain:
                raise DecodingTimesError
            before = f"{float(self.last_pts * self._time_base):.2f} s"
            detail = f"{at_seconds(pts, self._time_base)}: presentation times run backwards, after {before}"
            raise VideoError(Reason.DECODE_ERROR, detail)
        self.end_pts = self.awaited.came(pts) or pts + (frame.duration or self._frame_ticks)
        self.last_pts = pts
        if self._aspect_may_change:
            self._aspect = pixel_aspect(self._stream)
        return TimedFrame(
            frame=frame,
            pts=self._convert(pts),
            end_pts=self._convert(self.end_pts),
            stream=self._stream,
            pixel_aspect=self._aspect,
            crop=self._crop,
        )
