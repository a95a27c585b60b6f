"""Rewrites boxes of an mp4 whose index lies behind its pictures, as PyAV writes it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

MOVIE_TIMESCALE = 1000


def replace_box(data: bytes, path: Sequence[bytes], content: bytes) -> bytes:
    """Replace the content of the first box at a path, and correct the sizes around it."""
    at, end = 0, len(data)
    starts = []
    for kind in path:
        while data[at + 4 : at + 8] != kind:
            at += int.from_bytes(data[at : at + 4], "big")
            assert at < end, f"no box {kind!r}"
        starts.append(at)
        end = at + int.from_bytes(data[at : at + 4], "big")
        at += 8
    change = len(content) - (end - at)
    changed = bytearray(data[:at] + content + data[end:])
    for start in starts:
        num_bytes = int.from_bytes(changed[start : start + 4], "big") + change
        changed[start : start + 4] = num_bytes.to_bytes(4, "big")
    return bytes(changed)


def with_edits(whole: Path, path: Path, edits: Sequence[tuple[Fraction, int, int]]) -> Path:
    """A copy whose edit list shows (seconds, first tick of the media, rate), the seconds rounded as writers do."""
    entries = b"".join(
        struct.pack(">IiHH", round(seconds * MOVIE_TIMESCALE), ticks, rate, 0) for seconds, ticks, rate in edits
    )
    elst = struct.pack(">II", 0, len(edits)) + entries
    path.write_bytes(replace_box(whole.read_bytes(), (b"moov", b"trak", b"edts", b"elst"), elst))
    return path


def with_long_last_frame(whole: Path, path: Path, *, seconds: int, rate: int) -> Path:
    """A copy of a video of a whole frame rate whose index shows the last frame for so many seconds."""
    data = whole.read_bytes()
    at = data.index(b"stts") + 12
    count, ticks = struct.unpack(">II", data[at : at + 8])
    stts = struct.pack(">6I", 0, 2, count - 1, ticks, 1, seconds * ticks * rate)
    path.write_bytes(replace_box(data, (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stts"), stts))
    return path


def with_clean_aperture(whole: Path, path: Path, entry: bytes, values: Sequence[int]) -> Path:
    """A copy whose sample entry has a clean aperture: width, height, and the offsets of its center, as fractions."""
    data = whole.read_bytes()
    at = data.index(entry, data.index(b"stsd")) - 4
    old = data[at + 8 : at + int.from_bytes(data[at : at + 4], "big")]
    clap = struct.pack(">I4sIIIIiIiI", 40, b"clap", *values)
    stsd = data.index(b"stsd") + 4
    inner = struct.pack(">I", len(old) + 8 + len(clap)) + entry + old + clap
    whole_path = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")
    path.write_bytes(replace_box(data, whole_path, data[stsd : stsd + 8] + inner))
    return path
