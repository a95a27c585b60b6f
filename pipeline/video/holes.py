"""Holes of zeros in pictures: blocks of a disk or parts of a download that are missing, where no decoder complains.

Coded pictures hold no long runs of zeros, and many decoders show a wrong picture for one without a word. How long a
run may be depends on the codec:

- H.264, H.265 and H.266 forbid three zero bytes in a row within a unit (7.4.1 of H.264).
- Entropy coders of other codecs leave short runs, measured over whole videos.
- Uncompressed pictures, and codecs whose headers or pictures may be all zeros, tell nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from av.video.stream import VideoStream

from vidshard.pipeline.video.bit_reader import unit_length_bytes, units

HoleCheck = Callable[[bytes], bool]
"""Whether the picture of a packet has a hole."""

_LONGEST = {
    "ffv1": 16,
    "magicyuv": 32, "huffyuv": 32, "ffvhuff": 32, "vp8": 32, "vp9": 32,
    "av1": 64, "vp6": 64, "vp6f": 64, "vp6a": 64, "vp7": 64, "utvideo": 64,
    "qtrle": 512,
}  # fmt: skip
"""Shortest run of zero bytes that is a hole, by codec.

In whole videos the longest run was 3 in ffv1, 5 in magicyuv and vp9, 7 in huffyuv and ffvhuff, 10 in vp8
and 23 in av1: black, white, noisy, striped, still and natural ones, at qualities from lossless to the lowest. One of
qtrle without repeats has at most 508 bytes.
"""

_UNIT = 16
"""Zeros that are looked at in codecs of units: only zeros behind a unit may be as many."""


_WITHIN = re.compile(rb"(?<!\x00)\x00{%d,}+[^\x00\x01]" % _UNIT)
"""Zeros that no start code ends; each run is looked at once, however many there are."""


def hole_check(stream: VideoStream) -> HoleCheck | None:
    """The check for the codec of a stream; None where zeros say nothing."""
    codec = stream.codec_context.codec.canonical_name
    extradata = bytes(stream.codec_context.extradata or b"")
    if codec in ("h264", "hevc", "vvc"):
        length_bytes = unit_length_bytes(codec, extradata)
        zeros = bytes(_UNIT)
        return lambda data: zeros in data and _has_zeros_within(data, length_bytes)
    if codec == "utvideo":
        return _utvideo
    if codec not in _LONGEST:
        return None
    run = bytes(_LONGEST[codec])
    return lambda data: run in data and run in data.rstrip(b"\0")


def _has_zeros_within(data: bytes, length_bytes: int) -> bool:
    """Whether 16 zeros lie elsewhere than behind a unit, where writers may put any number."""
    if not length_bytes:
        return _WITHIN.search(data) is not None
    for at in units(data, length_bytes):
        num_bytes = int.from_bytes(data[at - length_bytes : at], "big")
        unit = data[at : at + num_bytes].rstrip(b"\0")
        if not unit or bytes(3) in unit:
            return True
    return False


def _utvideo(data: bytes) -> bool:
    """Zeros in pictures that are predicted; the last four bytes state how. Pixels as they are may be zeros."""
    run = bytes(_LONGEST["utvideo"])
    return run in data and len(data) > 4 and data[-3] & 3 != 0
