"""What travels in memory on the way from a file to clips: VideoRef, VideoProbe, Span, Clip, Rejection.

Plain frozen records with their shape rules. Times are exact: a stream's own integer ticks and its rational
time base stand in the records, seconds are derived.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from vidshard.schemas.rejections import VideoError

TailPolicy = Literal["pad", "drop"]
ResizePolicy = Literal["crop", "stretch", "pad"]
ClipPlacement = Literal["even", "random"]
SignalRule = Literal["previous", "nearest", "linear", "window"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoRef:
    """A file that claims to be a video: found, not yet opened."""

    uri: str
    """Where it is: an absolute local path, or a URL that fsspec understands."""
    num_bytes: int
    """Size as the file system states it; -1 where it does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoProbe:
    """What a container's header says of its video stream, and the time of the first frame."""

    video_id: str
    """Hex digest of the content: the same for copies of a file anywhere, another when a byte count differs."""
    uri: str
    num_bytes: int
    time_base: Fraction
    """Seconds per tick: the container's, or a fraction of it in which the frames of a steady rate lie on ticks."""
    grid_start_pts: int
    """Presentation time of the first frame that decodes, in ticks: where the sampling grid begins."""
    duration_seconds_from_header: float
    """From the first frame to the end of the last, as claimed; never trusted for what is decoded."""
    source: VideoSource


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSource:
    """Facts of the source that are stored with every clip."""

    width: int
    """As displayed: after rotation metadata and non-square pixels."""
    height: int
    """As displayed."""
    codec: str
    fps: float
    """Average frame rate according to the header; 0.0 where it does not say."""
    rotation_degrees: int
    """Clockwise turn that was applied for display: 0, 90, 180 or 270."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSpec:
    """How any video becomes clips: the time grid, the length of a clip, and the geometry."""

    fps: Fraction
    """Grid rate in frames per second, positive and exact."""
    num_frames: int
    """Frames per clip, at least 1."""
    height: int
    width: int
    tail: TailPolicy = "pad"
    """A last clip that is not full: ``pad`` repeats its last frame, ``drop`` leaves it out."""
    resize: ResizePolicy = "crop"
    """``crop`` scales until the frame is covered and cuts the centre, ``stretch`` ignores the aspect
    ratio, ``pad`` scales until it fits and adds black bars."""
    continuous: bool = False
    """Whether the clips of a video are one sequence, each carrying on from the one before."""
    lead_frames: int = 0
    """Copies of the video's first frame that stand before it, so that its first clip is as long as the others."""
    halo_clips: int = 0
    """Clips before a span that are decoded with it, as far as there are any."""
    stride_seconds: Fraction | None = None
    """From the start of one clip to that of the next; None for clips that follow one another without a gap."""
    min_seconds: Fraction = Fraction(0)
    """A clip with less video than this is left out; the copies of a padded tail do not count."""
    clips_per_video: int | None = None
    """So many clips of each video, or of each part; None for all that there are."""
    placement: ClipPlacement = "even"
    """Where those lie: spread evenly, or one at random in each of as many equal stretches."""
    placement_seed: int = 0

    def __post_init__(self) -> None:
        if self.fps <= 0:
            raise ValueError(f"fps must be positive, got {self.fps}")
        for name in ("num_frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.stride_seconds is not None and self.stride_seconds <= 0:
            raise ValueError(f"stride_seconds must be positive, got {self.stride_seconds}")
        if self.min_seconds > self.clip_seconds:
            raise ValueError(f"min_seconds {self.min_seconds} is more than the {self.clip_seconds} s of a whole clip")
        if self.clips_per_video is not None and self.clips_per_video < 1:
            raise ValueError(f"clips_per_video must be at least 1, got {self.clips_per_video}")

    @property
    def clip_seconds(self) -> Fraction:
        """Time that one clip covers: each frame stands for 1 / fps."""
        return self.num_frames / self.fps

    @property
    def stride(self) -> Fraction:
        """Seconds from one clip's start to the next one's, where they are not placed one by one."""
        return self.clip_seconds if self.stride_seconds is None else self.stride_seconds

    @property
    def min_valid_frames(self) -> int:
        """A clip with fewer frames of its own is left out."""
        return self.num_frames if self.tail == "drop" else max(1, math.ceil(self.min_seconds * self.fps))

    @property
    def bucket(self) -> str:
        """Name of the frame size: height x width."""
        return f"{self.height}x{self.width}"

    @property
    def clip_bytes(self) -> int:
        """Size of one clip's frames as uint8 RGB."""
        return self.num_frames * self.height * self.width * 3

    def halo_of(self, first_clip: int) -> int:
        """Clips that are decoded before a span that begins with this clip."""
        return min(self.halo_clips, first_clip)

    def digest(self, part: Part | None = None) -> str:
        """Eight hex digits that change with every setting and with the part, the middle of a clip id."""
        text = f"{self.fps}|{self.num_frames}|{self.height}x{self.width}|{self.tail}|{self.resize}"
        if self.continuous:
            text += f"|continuous|{self.lead_frames}"
        if self.stride_seconds is not None:
            text += f"|every {self.stride_seconds}"
        if self.min_seconds:
            text += f"|at least {self.min_seconds}"
        if self.clips_per_video is not None:
            text += f"|{self.clips_per_video} {self.placement} {self.placement_seed}"
        if part is not None and not part.is_whole:
            text += f"|{part}"
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def clip_id(self, video_id: str, clip_index: int, part: Part | None = None) -> str:
        """Id of one clip, None for the whole video: the same on every machine and in every run with these settings."""
        return f"{video_id}-{self.digest(part)}-{clip_index:06d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Which part of a video is meant, in seconds after its first frame: from ``start`` to ``end``, exclusive."""

    start_seconds: Fraction = Fraction(0)
    end_seconds: Fraction | None = None
    """None for the end of the video."""

    def __post_init__(self) -> None:
        if self.start_seconds < 0:
            raise ValueError(f"a part cannot start before the video, got {float(self.start_seconds):g} s")
        if self.end_seconds is not None and self.end_seconds <= self.start_seconds:
            end, start = float(self.end_seconds), float(self.start_seconds)
            raise ValueError(f"a part must end after it starts, got {start:g} s to {end:g} s")

    @classmethod
    def of(cls, start_seconds: float | None, end_seconds: float | None) -> Part:
        """The part between two times as people and files write them: 2.3 is 23/10, not the nearest double."""
        return cls(
            start_seconds=_as_written(start_seconds or 0.0),
            end_seconds=None if end_seconds is None else _as_written(end_seconds),
        )

    @property
    def is_whole(self) -> bool:
        """Whether the whole video is meant."""
        return self.start_seconds == 0 and self.end_seconds is None

    @property
    def suffix(self) -> str:
        """What the ids of its spans have after the video's: nothing, or a digest of the part."""
        return "" if self.is_whole else "-" + hashlib.sha256(str(self).encode()).hexdigest()[:8]

    def __str__(self) -> str:
        end = "end" if self.end_seconds is None else repr(float(self.end_seconds))
        return f"{float(self.start_seconds)!r}..{end} s"


def _as_written(seconds: float) -> Fraction:
    if not math.isfinite(seconds):
        raise ValueError(f"a time must be a finite number of seconds, got {seconds}")
    return Fraction(str(seconds))


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A stretch of one video, or of a part of it, that is one unit of work: clips ``first_clip`` up to
    ``end_clip``, exclusive."""

    video_id: str
    uri: str
    time_base: Fraction
    grid_start_pts: int
    first_clip: int
    end_clip: int | None
    """None for the last span of a video or part: it runs to the end, wherever that turns out to be."""
    duration_seconds_from_header: float
    """0.0 where it says nothing, or nothing that can be."""
    source: VideoSource
    part: Part = Part()

    @property
    def span_id(self) -> str:
        """Unique and stable over reruns: the video, the part of it, the first clip and the end."""
        end = "end" if self.end_clip is None else f"{self.end_clip:06d}"
        return f"{self.video_id}{self.part.suffix}-{self.first_clip:06d}-{end}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """What was done to each frame: scaled to ``scaled_*``, then cut (or padded) to the clip's size."""

    policy: ResizePolicy
    scaled_width: int
    scaled_height: int
    left: int
    """Columns cut at the left; negative when bars were added."""
    top: int
    """Rows cut at the top; negative when bars were added."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """Consecutive frames of one video on a fixed time grid."""

    video_id: str
    clip_index: int
    frames: np.ndarray
    """uint8, (T, H, W, 3), RGB in [0, 255]."""
    start_seconds: float
    """Grid time of the first frame, in the source's presentation time."""
    frame_pts_seconds: np.ndarray
    """float64, (T,), non-decreasing: when the source shows each frame."""
    num_valid_frames: int
    """Frames from this one on repeat the last real frame; 1 to T."""
    geometry: Geometry
    lead_frames: int = 0
    """Frames at its beginning that are copies of the video's first one, and have no time of their own."""

    def __post_init__(self) -> None:
        name = f"{self.video_id} clip {self.clip_index}"
        if self.frames.dtype != np.uint8 or self.frames.ndim != 4 or self.frames.shape[-1] != 3:
            raise ValueError(f"{name}: frames must be uint8 (T, H, W, 3), got {self.frames.dtype} {self.frames.shape}")
        num_frames = len(self.frames) - self.lead_frames
        if self.frame_pts_seconds.shape != (num_frames,):
            raise ValueError(f"{name}: {num_frames} frames but {self.frame_pts_seconds.shape} times")
        if not 1 <= self.num_valid_frames <= num_frames:
            raise ValueError(f"{name}: num_valid_frames {self.num_valid_frames} of {num_frames} frames")

    def __repr__(self) -> str:
        pts = self.frame_pts_seconds
        return (
            f"Clip({self.video_id}[{self.clip_index}], frames={self.frames.shape}, "
            f"{pts[0]:.2f}s to {pts[-1]:.2f}s, valid={self.num_valid_frames})"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one video may cost before it is refused, and how it is read.

    No part of a run's identity, as tokens do not depend on them; only ``image_fps`` is, if it is not the default.
    """

    max_pixels: int = 8192 * 8192
    """Of one coded picture; the decoder allocates no larger one."""
    max_seconds: float = 48 * 3600.0
    """Of one video."""
    max_frames: int = 20_000_000
    """Of one video: 48 hours at 115 frames per second."""
    timeout_seconds: float = 600.0
    """For one stretch of video, however short."""
    seconds_per_second: float = 30.0
    """For one second of a stretch that is so long that this allows more than ``timeout_seconds``."""
    memory_bytes: int = 4 << 30
    """What one decoding process may allocate: some twenty times what 4K video takes."""
    image_fps: Fraction = Fraction(24)
    """Images of an archive are shown at this rate."""

    def seconds_for(self, video_seconds: float) -> float:
        """How long decoding this much video may take."""
        return max(self.timeout_seconds, self.seconds_per_second * video_seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanClips:
    """What came of one span."""

    clips: list[Clip]
    """In order, those of its halo first; none where it was refused."""
    error: VideoError | None = None
    """Why it was refused, or what is missing beside the clips where those were kept."""
    num_errors: int = 0
    """Damaged places that decoding it met."""


def parse_rate(text: str | int | float | Fraction) -> Fraction:
    """An exact rate in frames per second from ``8``, ``7.5`` or ``30000/1001``.

    Raises:
        ValueError: not a positive number.
    """
    if isinstance(text, str) and not re.fullmatch(r"\s*\d+(\.\d+)?(\s*/\s*\d+)?\s*", text):
        raise ValueError(f"a rate is a number or a fraction such as 8, 7.5 or 30000/1001, got {text!r}")
    try:
        if isinstance(text, str) and "/" in text:
            numerator, denominator = text.split("/")
            rate = Fraction(numerator.strip()) / Fraction(denominator.strip())
        else:
            rate = Fraction(str(text).strip())
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"a rate is a number or a fraction such as 8, 7.5 or 30000/1001, got {text!r}") from None
    if rate <= 0:
        raise ValueError(f"a rate must be positive, got {text!r}")
    return rate
