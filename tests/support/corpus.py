"""Names and recipes of the corpora that ``tests/conftest.py`` writes."""

from __future__ import annotations

from fractions import Fraction

from tests.support.videos import Recipe

GOOD_VIDEOS = {
    "a.mp4": Recipe(num_frames=50, rate=Fraction(25)),
    "b.mkv": Recipe(codec="libvpx-vp9", num_frames=40, rate=Fraction(30000, 1001), width=64, height=96),
    "deep/c.avi": Recipe(codec="mpeg4", num_frames=31, rate=Fraction(15), width=80, height=80),
    "deep/d.mp4": Recipe(num_frames=90, rate=Fraction(24), b_frames=2),
    "e.mp4": Recipe(num_frames=6, rate=Fraction(10)),
}
"""Their frames carry numbers; together 10 clips of 5 frames at 4 per second."""

BAD_VIDEOS = {
    "empty.mp4": "empty_file",
    "text.mp4": "not_a_video",
    "sound.mp4": "no_video_stream",
    "no_frames.avi": "no_frames",
    "cut.mp4": "truncated",
    "damaged.mp4": "decode_error",
}
"""The reason that each is rejected for."""
