"""Reads from an mp4 or mov file what FFmpeg keeps from its callers: the clean aperture and the edit list of a track.

Box names and layouts are those of ISO/IEC 14496-12. Only the headers on the way to these boxes are read, by seeking.
Anything that is damaged or missing counts as not stated, as FFmpeg decides whether the file can be read at all.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from vidshard.pipeline.video.input_file import WatchedFile, position_kept, read_exactly
from vidshard.schemas.rejections import Reason, VideoError

MP4_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")

_MAX_BOXES = 10_000
"""Boxes looked at on one level; fragmented files have their moov before thousands of fragments."""

_MAX_EDITS = 10_000

_MAX_INDEX_BYTES = 1 << 20
"""Bytes by which the index of a fragmented file is compared; it lists no pictures."""

_MAX_SAMPLES = 4_000_000
"""Samples whose times are read: two days at 24 per second."""

_VISUAL_ENTRY_BYTES = 78
"""Bytes of a visual sample entry before its boxes, 12.1.3."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """A box of the file: its type, and where its content lies."""

    kind: bytes
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """An entry of an edit list, 8.6.6."""

    seconds: Fraction
    """Length in the presentation."""
    media_time: int
    """First tick of the media that is shown; -1 for an empty edit."""
    dwells: bool
    """Whether the picture at that tick is held instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """A video track."""

    track_id: int
    movie_timescale: int
    """Ticks per second in which the lengths of edits are rounded."""
    timescale: int
    """Ticks per second of the media."""
    shown_width: Fraction
    shown_height: Fraction
    """Size at which the track's header wants to be shown."""
    boxes: dict[bytes, Box]
    """Boxes that are read later, by type."""


def read_tracks(watched: WatchedFile) -> list[Track]:
    """The video tracks of an mp4 or mov file; none for other files. The file's position is kept."""
    with position_kept(watched):
        watched.seek(0)
        if read_exactly(watched, 8)[4:8] not in MP4_FIRST_BOXES:
            return []
        moov = next((box for box in _boxes(watched, 0, watched.num_bytes) if box.kind == b"moov"), None)
        if moov is None:
            return []
        children = list(_boxes(watched, moov.start, moov.end))
        mvhd = next((box for box in children if box.kind == b"mvhd"), None)
        timescale = _timescale(watched, mvhd) if mvhd is not None else 0
        tracks = [_track(watched, box, timescale) for box in children if box.kind == b"trak"]
        return [track for track in tracks if track is not None]


def second_recording(watched: WatchedFile) -> int | None:
    """Offset of a second file type or index (moov) behind the first recording; None for none. The position is lost.

    It ends at the first fragment, as a long file has thousands: see :func:`other_fragments`.

    Raises:
        VideoError: TRUNCATED: another recording begins before an index, whose offsets do not hold in this file.
    """
    behind, has_index, has_media = 0, False, False
    for box in _boxes(watched, 0, watched.num_bytes):
        if box.kind == b"moof":
            return None
        if box.kind == b"ftyp" and has_media:
            if has_index:
                return behind
            raise VideoError(
                Reason.TRUNCATED, f"an mp4 without its index (moov), to which another is joined at byte {behind}"
            )
        if box.kind == b"moov" and has_index:
            return behind
        has_index = has_index or box.kind == b"moov"
        has_media = has_media or box.kind == b"mdat"
        behind = box.end
    return None


def other_fragments(watched: WatchedFile) -> int | None:
    """Offset of a second index (moov) in a fragmented file, unless its fragments go on with those before it.

    FFmpeg passes over a second index and reads the fragments behind it by the first. That does no harm if both are
    equal and the fragments' times go on, as where each segment of a stream was saved with its header. The position is
    kept.
    """
    with position_kept(watched):
        watched.seek(0)
        if read_exactly(watched, 8)[4:8] not in MP4_FIRST_BOXES:
            return None
        behind, index, fragment, joint = 0, None, None, None
        for box in _boxes(watched, 0, watched.num_bytes):
            if box.kind == b"ftyp" and fragment is not None:
                joint = behind
            elif box.kind == b"moov":
                if index is not None and fragment is not None:
                    first, other = (_content(watched, each, _MAX_INDEX_BYTES) for each in (index, box))
                    joint = behind if joint is None else joint
                    if first != other:
                        return joint
                index = index or box
            elif box.kind == b"moof":
                if fragment is not None and joint is not None:
                    times, times_before = _decoding_times(watched, box), _decoding_times(watched, fragment)
                    if any(time < times_before.get(track, 0) for track, time in times.items()):
                        return joint
                    joint = None
                fragment = box
            behind = box.end
    return None


def _decoding_times(watched: WatchedFile, fragment: Box) -> dict[bytes, int]:
    """Decoding time of a fragment's first sample (tfdt, 8.8.12), in ticks of the media, by id of the track."""
    times = {}
    for track in _boxes(watched, fragment.start, fragment.end):
        if track.kind == b"traf":
            parts = {box.kind: _content(watched, box, 12) for box in _boxes(watched, track.start, track.end)}
            time = parts.get(b"tfdt", b"")
            times[parts.get(b"tfhd", b"")[4:8]] = int.from_bytes(time[4:12] if time[:1] == b"\1" else time[4:8], "big")
    return times


def _boxes(watched: WatchedFile, start: int, end: int) -> Iterator[Box]:
    """The boxes between two positions; each costs a seek and a read of 16 bytes."""
    for _ in range(_MAX_BOXES):
        if start + 8 > end:
            return
        watched.seek(start)
        header = read_exactly(watched, 16)
        if len(header) < 8:
            return
        num_bytes, head = int.from_bytes(header[:4], "big"), 8
        if num_bytes == 1:
            num_bytes, head = int.from_bytes(header[8:16], "big"), 16
        elif num_bytes == 0:  # to the end
            num_bytes = end - start
        if num_bytes < head or start + num_bytes > end:
            return
        yield Box(kind=header[4:8], start=start + head, end=start + num_bytes)
        start += num_bytes


def _content(watched: WatchedFile, box: Box, num_bytes: int) -> bytes:
    """The first bytes of a box, fewer where it is shorter."""
    watched.seek(box.start)
    return read_exactly(watched, min(num_bytes, box.end - box.start))


def _timescale(watched: WatchedFile, header: Box) -> int:
    """Ticks per second of a mvhd or mdhd box, 8.2.2 and 8.4.2; 0 where it is cut off."""
    data = _content(watched, header, 32)
    at = 20 if data[:1] == b"\1" else 12
    return int.from_bytes(data[at : at + 4], "big") if len(data) >= at + 4 else 0


_PATHS = {b"edts", b"mdia", b"minf", b"stbl"}
_LEAVES = {b"tkhd", b"elst", b"mdhd", b"hdlr", b"stsd", b"stts", b"ctts"}


def _track(watched: WatchedFile, trak: Box, movie_timescale: int) -> Track | None:
    """A track, None where it holds no video or lacks a header."""
    found: dict[bytes, Box] = {}
    waiting = [trak]
    while waiting:
        box = waiting.pop()
        for child in _boxes(watched, box.start, box.end):
            if child.kind in _PATHS:
                waiting.append(child)
            elif child.kind in _LEAVES:
                found.setdefault(child.kind, child)
    if not {b"tkhd", b"mdhd", b"hdlr", b"stsd"} <= found.keys():
        return None
    if _content(watched, found[b"hdlr"], 12)[8:12] != b"vide":
        return None
    header = _content(watched, found[b"tkhd"], 96)
    at = 20 if header[:1] == b"\1" else 12
    size = header[at + 64 : at + 72]  # after the id, the length, and the matrix, 8.3.2
    timescale = _timescale(watched, found[b"mdhd"])
    if len(size) < 8 or timescale <= 0:
        return None
    width, height = struct.unpack(">2I", size)
    return Track(
        track_id=int.from_bytes(header[at : at + 4], "big"),
        movie_timescale=movie_timescale,
        timescale=timescale,
        shown_width=Fraction(width, 1 << 16),
        shown_height=Fraction(height, 1 << 16),
        boxes=found,
    )


def read_edits(watched: WatchedFile, track: Track) -> list[Edit]:
    """The edit list of a track; empty where it has none. The file's position is kept."""
    box = track.boxes.get(b"elst")
    if box is None or track.movie_timescale <= 0:
        return []
    with position_kept(watched):
        data = _content(watched, box, 8 + 20 * _MAX_EDITS)
    entry = struct.Struct(">QqhH" if data[:1] == b"\1" else ">IihH")
    count = min(int.from_bytes(data[4:8], "big"), (len(data) - 8) // entry.size)
    edits = []
    for number in range(count):
        ticks, media_time, rate, fraction = entry.unpack_from(data, 8 + number * entry.size)
        seconds = Fraction(ticks, track.movie_timescale)
        edits.append(Edit(seconds=seconds, media_time=max(-1, media_time), dwells=not rate and not fraction))
    return edits


def read_frame_times(watched: WatchedFile, track: Track) -> npt.NDArray[np.int64] | None:
    """The times of a track's frames and the end of the last one, in ticks of the media, in presentation order.

    The file's position is kept.

    Returns:
        int64 (N + 1,), ascending; None where there are no or too many samples in the index, as in fragmented files.
    """
    with position_kept(watched):
        durations = _runs(watched, track.boxes.get(b"stts"), ">u4")
        offsets = _runs(watched, track.boxes.get(b"ctts"), ">i4")
    if durations is None or not len(durations):
        return None
    times = np.concatenate([np.zeros(1, np.int64), np.cumsum(durations)[:-1]])
    if offsets is not None and len(offsets):
        covered = min(len(offsets), len(times))
        times[:covered] += offsets[:covered]
    times.sort()
    return np.append(times, times[-1] + durations[-1])


def _runs(watched: WatchedFile, box: Box | None, kind: str) -> npt.NDArray[np.int64] | None:
    """The values of a run-length coded table, 8.6.1: int64 (N,); None where there is none, or it is too large."""
    if box is None:
        return None
    data = _content(watched, box, 8 + 8 * _MAX_SAMPLES)
    count = min(int.from_bytes(data[4:8], "big"), (len(data) - 8) // 8)
    table = np.frombuffer(data, np.dtype([("count", ">u4"), ("value", kind)]), count, 8)
    counts = table["count"].astype(np.int64)
    if counts.sum() > _MAX_SAMPLES:
        return None
    return np.repeat(table["value"].astype(np.int64), counts)


_MAX_ENTRIES = 100


def read_protection(watched: WatchedFile, track: Track) -> list[str] | None:
    """The encryption that a track's sample entries state, 8.12; None where all of them are clear.

    The file's position is kept.

    Returns:
        The type of the first protected entry, then its scheme where that is stated.
    """
    with position_kept(watched):
        stsd = track.boxes[b"stsd"]
        for number, entry in enumerate(_boxes(watched, stsd.start + 8, stsd.end)):
            if entry.kind in (b"encv", b"drmi"):
                found = [entry.kind.decode()]
                for box in _boxes(watched, entry.start + _VISUAL_ENTRY_BYTES, entry.end):
                    if box.kind == b"sinf":
                        for child in _boxes(watched, box.start, box.end):
                            if child.kind == b"schm":
                                found.append(_content(watched, child, 8)[4:8].decode("ascii", "replace").strip())
                return found
            if number >= _MAX_ENTRIES:
                break
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanAperture:
    """The part of a track's pictures that is shown, in pixels of the size that the track states."""

    left: int
    top: int
    right: int
    """Columns cut off on the right."""
    bottom: int
    """Rows cut off at the bottom."""
    states_aspect: bool
    """Whether the track states a pixel shape of its own (pasp)."""
    width: int
    height: int
    """The stored size that the track states."""


def read_clean_aperture(watched: WatchedFile, track: Track) -> CleanAperture | None:
    """The clean aperture of a track's first sample entry, 12.1.4; None where it has none, or one that makes no sense.

    Offsets are those of the center. Fractions of pixels are cut off towards zero, as in FFmpeg. The file's position is
    kept.
    """
    with position_kept(watched):
        stsd = track.boxes[b"stsd"]
        entry = next(_boxes(watched, stsd.start + 8, stsd.end), None)
        if entry is None:
            return None
        head = _content(watched, entry, _VISUAL_ENTRY_BYTES)
        if len(head) < _VISUAL_ENTRY_BYTES:
            return None
        children = {box.kind: box for box in _boxes(watched, entry.start + _VISUAL_ENTRY_BYTES, entry.end)}
        clap = _content(watched, children[b"clap"], 32) if b"clap" in children else b""
    if len(clap) < 32:
        return None
    width, height = struct.unpack(">2H", head[24:28])
    values = struct.unpack(">IIIIiIiI", clap)
    if not all(values[1::2]):
        return None
    shown_width, shown_height, x, y = (Fraction(*values[n : n + 2]) for n in (0, 2, 4, 6))
    if not (1 <= shown_width <= width and 1 <= shown_height <= height):
        return None
    left, top = (width - shown_width) / 2 + x, (height - shown_height) / 2 + y
    right, bottom = width - left - shown_width, height - top - shown_height
    if min(left, top, right, bottom) < 0:
        return None
    return CleanAperture(
        left=int(left),
        top=int(top),
        right=int(right),
        bottom=int(bottom),
        states_aspect=b"pasp" in children,
        width=width,
        height=height,
    )
