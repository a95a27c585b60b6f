"""Records of a video on its way from a file to clips: VideoRef, VideoProbe, Span, Clip.

Plain frozen records with their shape rules. Times are exact: the records hold a stream's integer ticks and its
rational time base; seconds are derived.
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
CutPolicy = Literal["crop", "stretch", "pad", "native"]
"""Ways to bring a frame to the size of a clip; ``native`` is for training alone."""
ClipPlacement = Literal["even", "random"]
SignalRule = Literal["previous", "nearest", "linear", "window", "frames"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoRef:
    """A file that may be a video: found, not yet opened."""

    uri: str
    """An absolute local path, or a URL that fsspec understands."""
    num_bytes: int
    """Size as the file system states it; -1 where it states none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoProbe:
    """A video's header, and the time of its first frame."""

    video_id: str
    """Hex digest of the content: copies of a file share it wherever they are."""
    uri: str
    num_bytes: int
    time_base: Fraction
    """Seconds per tick: the container's, or a fraction of it that puts the frames of a steady rate on ticks."""
    grid_start_pts: int
    """Presentation time of the first frame that decodes, in ticks: the start of the sampling grid."""
    duration_seconds_from_header: float
    """Seconds from the first frame to the end of the last, as claimed; never trusted for what is decoded."""
    source: VideoSource


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSource:
    """Facts about the source that are stored with every clip."""

    width: int
    """Display width, after rotation metadata and non-square pixels."""
    height: int
    """Display height, likewise."""
    codec: str
    fps: float
    """Average frame rate according to the header; 0.0 where it states none."""
    rotation_degrees: int
    """Clockwise turn that was applied for display: 0, 90, 180 or 270."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSpec:
    """Rules that turn any video into clips: the time grid, the length of a clip, and the geometry."""

    fps: Fraction
    """Grid rate in frames per second, positive and exact."""
    num_frames: int
    """Frames per clip, at least 1."""
    height: int
    width: int
    tail: TailPolicy = "pad"
    """Rule for a last clip that is not full: ``pad`` repeats its last frame, ``drop`` leaves it out."""
    resize: CutPolicy = "crop"
    """``crop`` scales until the frame is covered and cuts the center, ``stretch`` ignores the aspect ratio, ``pad``
    scales until it fits and adds black bars. ``native`` cuts at ``cut_place`` without scaling; only frames smaller than
    the clip are enlarged, until they cover it."""
    cut_place: tuple[float, float] = (0.5, 0.5)
    """Place of the cut with ``native``: shares, in [0, 1), of the places there are from the left and from the top."""
    continuous: bool = False
    """Whether the clips of a video are one sequence, each continuing the one before."""
    lead_frames: int = 0
    """Copies of the video's first frame put before it, so that the first clip is as long as the others."""
    halo_clips: int = 0
    """Clips before a span that are decoded with it, as far as there are any."""
    stride_seconds: Fraction | None = None
    """Seconds from the start of one clip to that of the next; None for clips without gap or overlap."""
    min_seconds: Fraction = Fraction(0)
    """A clip with fewer seconds of video is left out; the copies of a padded tail do not count."""
    clips_per_video: int | None = None
    """Number of clips of each video, or of each part; None for all there are."""
    placement: ClipPlacement = "even"
    """Positions of ``clips_per_video`` clips: spread evenly, or at random, one in each of as many equal stretches."""
    placement_seed: int = 0
    """Seed of random positions."""

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
        if not all(0 <= share < 1 for share in self.cut_place):
            raise ValueError(f"cut_place must lie in [0, 1), got {self.cut_place}")
        if self.clips_per_video is not None and self.clips_per_video < 1:
            raise ValueError(f"clips_per_video must be at least 1, got {self.clips_per_video}")

    @property
    def clip_seconds(self) -> Fraction:
        """Seconds that one clip covers: each frame stands for 1 / fps."""
        return self.num_frames / self.fps

    @property
    def stride(self) -> Fraction:
        """Seconds from one clip's start to the next one's, where clips are not placed one by one."""
        return self.clip_seconds if self.stride_seconds is None else self.stride_seconds

    @property
    def min_valid_frames(self) -> int:
        """Fewest frames of its own that a clip must have; the copies of a padded tail do not count."""
        return self.num_frames if self.tail == "drop" else max(1, math.ceil(self.min_seconds * self.fps))

    @property
    def bucket(self) -> str:
        """Name of the frame size: HEIGHTxWIDTH."""
        return f"{self.height}x{self.width}"

    @property
    def clip_bytes(self) -> int:
        """Size of one clip's frames as uint8 RGB."""
        return self.num_frames * self.height * self.width * 3

    def halo_of(self, first_clip: int) -> int:
        """Number of halo clips of a span that starts with this clip."""
        return min(self.halo_clips, first_clip)

    def digest(self, part: Part | None = None) -> str:
        """The middle of a clip id: eight hex digits that change with every setting and with the part."""
        text = f"{self.fps}|{self.num_frames}|{self.height}x{self.width}|{self.tail}|{self.resize}"
        if self.cut_place != (0.5, 0.5):
            text += f"|cut at {self.cut_place}"
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
        """Id of one clip: the same on every machine and in every run with these settings.

        Args:
            video_id: the video's content digest.
            clip_index: number of the clip in the video or part.
            part: the part of the video; None for the whole.
        """
        return f"{video_id}-{self.digest(part)}-{clip_index:06d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of a video: the interval [start, end) in seconds after its first frame."""

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
        """Make a part from times as people and files write them: 2.3 is 23/10, not the nearest double.

        Raises:
            ValueError: a time is not finite, or the interval is empty or starts before the video.
        """
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
        """Suffix of the video id in the ids of its spans: empty for the whole video, else a digest of the part."""
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
    """A unit of work: the clips [first_clip, end_clip) of one video, or of a part of it."""

    video_id: str
    uri: str
    time_base: Fraction
    grid_start_pts: int
    first_clip: int
    end_clip: int | None
    """None for the last span of a video or part, which runs to the end wherever that turns out to be."""
    duration_seconds_from_header: float
    """0.0 where the header states none, or an impossible one."""
    source: VideoSource
    part: Part = Part()

    @property
    def span_id(self) -> str:
        """Unique id, stable over reruns: the video, the part of it, the first clip and the end."""
        end = "end" if self.end_clip is None else f"{self.end_clip:06d}"
        return f"{self.video_id}{self.part.suffix}-{self.first_clip:06d}-{end}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """The transformation of each frame: scaled to ``scaled_*``, then cut (or padded) to the clip's size."""

    policy: CutPolicy
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
    """float64, (T - lead_frames,), non-decreasing: presentation time of each frame in the source, in seconds."""
    num_valid_frames: int
    """Frames from this one on repeat the last real frame; 1 to T - lead_frames."""
    geometry: Geometry
    lead_frames: int = 0
    """Frames at the start of ``frames`` that are copies of the video's first one, and have no time of their own."""

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
    """Limits on what one video may cost before it is refused, and the frame rate of image archives.

    Tokens do not depend on the limits, so they are no part of a run's identity. ``image_fps`` is, if it is not the
    default.
    """

    max_pixels: int = 8192 * 8192
    """Pixels of one coded picture; the decoder allocates no larger one."""
    max_seconds: float = 48 * 3600.0
    """Length of one video."""
    max_frames: int = 20_000_000
    """Frames of one video: 48 hours at 115 frames per second."""
    timeout_seconds: float = 600.0
    """Decoding time for one span, however short."""
    seconds_per_second: float = 30.0
    """Decoding time for one second of a span so long that this allows more than ``timeout_seconds``."""
    memory_bytes: int = 4 << 30
    """Memory that one decoding process may allocate: some twenty times what 4K video takes."""
    sandbox: Literal["auto", "required", "off"] = "auto"
    """Confinement of the processes that decode videos; "required" refuses where the kernel lacks a part."""
    videos_per_decoder: int = 16
    """Files that one confined decoding process may see, as one of them may take it over."""
    max_clips: int = 100_000
    """Clips of one video, or of one part of it, by its header."""
    image_fps: Fraction = Fraction(24)
    """Frames per second at which the images of an archive are shown."""
    sampled_ids: bool = False
    """Whether ids of small files digest samples, as outputs of earlier versions have them, and not the whole file."""
    decoders: tuple[str, ...] = ("default",)
    """FFmpeg's names of the decoders that may run; "default" stands for a list of them, "all" for every one."""
    private_hosts: tuple[str, ...] | None = None
    """Web servers that may have private addresses, all others may not; None for no such limit."""
    storage_hosts: tuple[str, ...] = ()
    """Web servers that the run depends on: if one does not answer, that is an outage and no fault of its rows."""

    def seconds_for(self, video_seconds: float) -> float:
        """Seconds that decoding this much video may take."""
        return max(self.timeout_seconds, self.seconds_per_second * video_seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanClips:
    """The result of decoding one span."""

    clips: list[Clip]
    """Clips in order, those of the halo first; empty where the span was refused."""
    error: VideoError | None = None
    """Reason for refusing the span, or for the clips that are missing where the others were kept."""
    num_errors: int = 0
    """Number of damaged places met while decoding, gaps in time included."""
    doubt: VideoError | None = None
    """POSSIBLE_LOSS: what may be wrong in clips that are kept; None where nothing is."""


def parse_rate(text: str | int | float | Fraction) -> Fraction:
    """Parse an exact rate in frames per second from ``8``, ``7.5`` or ``30000/1001``.

    Raises:
        ValueError: not a positive number.
    """
    if isinstance(text, str) and not re.fullmatch(r"\s*\d{1,12}(\.\d{1,15})?(\s*/\s*\d{1,12})?\s*", text, re.ASCII):
        raise ValueError(f"a rate is a number or a fraction such as 8, 7.5 or 30000/1001, got {text!r:.80}")
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
