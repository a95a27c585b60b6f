"""The part of the stored pictures that a container says is shown: a clean aperture in mp4, cropping in Matroska.

The cropping that a codec states is applied by its decoder. FFmpeg leaves the container's to its callers, and PyAV does
not hand it on, so it is read from the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from av.video.stream import VideoStream

from vidshard.pipeline.video.input_file import WatchedFile
from vidshard.pipeline.video.matroska import read_video_tracks
from vidshard.pipeline.video.mp4 import read_clean_aperture, read_tracks


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """Rows and columns of the stored picture that are not shown."""

    left: int
    top: int
    right: int
    bottom: int
    stored_width: int
    stored_height: int
    """Size of the pictures that this is about; pictures of other sizes are shown whole."""
    pixel_aspect: Fraction | None = None
    """Pixel aspect ratio, where the container states it for the cropped picture; else it is that of the stream."""

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The shown (width, height) of a stored size, before orientation and pixel shape."""
        if (width, height) != (self.stored_width, self.stored_height):
            return width, height
        return width - self.left - self.right, height - self.top - self.bottom


def crop_of(watched: WatchedFile, stream: VideoStream) -> Crop | None:
    """The container's cropping of a stream; None where it shows the whole picture, or states what makes no sense."""
    formats = set(stream.container.format.name.split(","))
    crop: Crop | None = None
    if "mov" in formats:
        crop = _of_mp4(watched, stream)
    elif "matroska" in formats:
        crop = _of_matroska(watched, stream)
    if crop is None or not (crop.left or crop.top or crop.right or crop.bottom):
        return None
    return crop if min(crop.size(crop.stored_width, crop.stored_height)) > 0 else None


def _of_mp4(watched: WatchedFile, stream: VideoStream) -> Crop | None:
    track = next((track for track in read_tracks(watched) if track.track_id == stream.id), None)
    clean = read_clean_aperture(watched, track) if track is not None else None
    if track is None or clean is None:
        return None
    width = clean.width - clean.left - clean.right
    height = clean.height - clean.top - clean.bottom
    aspect = None
    if not clean.states_aspect and min(width, height) > 0 and track.shown_width and track.shown_height:
        # FFmpeg takes the track's size for that of the whole picture; it is that of the clean aperture, 8.3.2
        shape = track.shown_width / track.shown_height
        is_stored = shape == Fraction(clean.width, clean.height)
        aspect = Fraction(1) if is_stored else shape * height / width
    return Crop(
        left=clean.left,
        top=clean.top,
        right=clean.right,
        bottom=clean.bottom,
        stored_width=clean.width,
        stored_height=clean.height,
        pixel_aspect=aspect,
    )


def _of_matroska(watched: WatchedFile, stream: VideoStream) -> Crop | None:
    tracks = read_video_tracks(watched)
    number = [video.index for video in stream.container.streams.video].index(stream.index)
    if number >= len(tracks):
        return None
    track = tracks[number]
    return Crop(
        left=track.left,
        top=track.top,
        right=track.right,
        bottom=track.bottom,
        stored_width=track.width,
        stored_height=track.height,
    )
