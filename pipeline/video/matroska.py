"""Reads from a Matroska or WebM file what FFmpeg keeps from its callers: cropping, encryption, a second recording.

Element ids are those of RFC 9559. Only the elements on the way to the tracks are read. Anything that is damaged or
missing counts as not stated, as FFmpeg decides whether the file can be read at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vidshard.pipeline.video.input_file import WatchedFile, position_kept, read_exactly

_EBML, _SEGMENT, _SEEK_HEAD, _SEEK, _SEEK_ID, _SEEK_POSITION = (
    0x1A45DFA3,
    0x18538067,
    0x114D9B74,
    0x4DBB,
    0x53AB,
    0x53AC,
)
_TRACKS, _TRACK, _TYPE, _VIDEO, _CLUSTER = 0x1654AE6B, 0xAE, 0x83, 0xE0, 0x1F43B675
_WIDTH, _HEIGHT = 0xB0, 0xBA
_ENCODINGS, _ENCODING, _ENCRYPTION = 0x6D80, 0x6240, 0x5035
_CROP_LEFT, _CROP_TOP, _CROP_RIGHT, _CROP_BOTTOM = 0x54CC, 0x54BB, 0x54DD, 0x54AA

_MAX_ELEMENTS = 1000
"""Elements looked at on one level."""
_MAX_TRACKS_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoTrack:
    """A video track: its stored size, what is cut off, in pixels, and whether it is encrypted."""

    width: int
    height: int
    left: int
    top: int
    right: int
    bottom: int
    is_encrypted: bool


def read_video_tracks(watched: WatchedFile) -> list[VideoTrack]:
    """The video tracks of a Matroska or WebM file, in order; none for other files. The file's position is kept."""
    with position_kept(watched):
        watched.seek(0)
        if read_exactly(watched, 4) != _EBML.to_bytes(4, "big"):
            return []
        tracks = []
        for kind, data in _elements(_tracks_element(watched)):
            entry = dict(_elements(data)) if kind == _TRACK else {}
            if int.from_bytes(entry.get(_TYPE, b""), "big") == 1:
                values = {key: int.from_bytes(value[:8], "big") for key, value in _elements(entry.get(_VIDEO, b""))}
                names = (_WIDTH, _HEIGHT, _CROP_LEFT, _CROP_TOP, _CROP_RIGHT, _CROP_BOTTOM)
                width, height, left, top, right, bottom = (values.get(name, 0) for name in names)
                tracks.append(
                    VideoTrack(
                        width=width,
                        height=height,
                        left=left,
                        top=top,
                        right=right,
                        bottom=bottom,
                        is_encrypted=_is_encrypted(entry.get(_ENCODINGS, b"")),
                    )
                )
        return tracks


def second_recording(watched: WatchedFile) -> int | None:
    """Offset of a second EBML header or segment; None for none, or where sizes do not lead there.

    The position is lost.
    """
    behind = 0
    seen: set[int] = set()
    for kind, start, num_bytes in _headers(watched, 0):
        if kind in (_EBML, _SEGMENT) and kind in seen:
            return behind
        seen.add(kind)
        behind = start + num_bytes
    return None


def sizes_lead_to_end(watched: WatchedFile) -> bool:
    """Whether the sizes of the top-level elements lead to the end of the file; the position is lost.

    They do not in a live or interrupted recording, which states none, nor in one that was cut off.
    """
    behind = 0
    for _, start, num_bytes in _headers(watched, 0):
        behind = start + num_bytes
    return behind == watched.num_bytes


def _is_encrypted(encodings: bytes) -> bool:
    encoding = (content for kind, content in _elements(encodings) if kind == _ENCODING)
    return any(kind == _ENCRYPTION for content in encoding for kind, _ in _elements(content))


def _tracks_element(watched: WatchedFile) -> bytes:
    """The content of the Tracks element, by the index of elements where the pictures come first; b"" for none."""
    segment = next((start for kind, start, _ in _headers(watched, 0) if kind == _SEGMENT), None)
    if segment is None:
        return b""
    listed: int | None = None
    for kind, start, num_bytes in _headers(watched, segment):
        if kind == _TRACKS:
            return _content(watched, start, num_bytes)
        if kind == _SEEK_HEAD:
            for seek, data in _elements(_content(watched, start, num_bytes)):
                entry = dict(_elements(data)) if seek == _SEEK else {}
                if int.from_bytes(entry.get(_SEEK_ID, b""), "big") == _TRACKS:
                    listed = segment + int.from_bytes(entry.get(_SEEK_POSITION, b"")[:8], "big")
        if kind == _CLUSTER:
            break
    if listed is not None:
        for kind, start, num_bytes in _headers(watched, listed):
            return _content(watched, start, num_bytes) if kind == _TRACKS else b""
    return b""


def _content(watched: WatchedFile, start: int, num_bytes: int) -> bytes:
    watched.seek(start)
    return read_exactly(watched, min(num_bytes, _MAX_TRACKS_BYTES))


def _headers(watched: WatchedFile, at: int) -> Iterator[tuple[int, int, int]]:
    """Id, first byte of the content and its number of bytes, of each element from a position of the file on."""
    for _ in range(_MAX_ELEMENTS):
        if at >= watched.num_bytes:
            return
        watched.seek(at)
        found = _header(read_exactly(watched, 12), 0)
        if found is None:
            return
        kind, head, num_bytes = found
        yield kind, at + head, num_bytes
        at += head + num_bytes


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Id and content of each element."""
    at = 0
    while (found := _header(data, at)) is not None:
        kind, start, num_bytes = found
        yield kind, data[start : start + num_bytes]
        at = start + num_bytes


def _header(data: bytes, at: int) -> tuple[int, int, int] | None:
    """Id of the element at an offset, the offset of its content and its number of bytes; None where it is cut off."""
    id_bytes = 9 - data[at].bit_length() if at < len(data) else 9
    size_at = at + id_bytes
    size_bytes = 9 - data[size_at].bit_length() if size_at < len(data) else 9
    start = size_at + size_bytes
    if id_bytes > 4 or size_bytes > 8 or start > len(data):
        return None
    kind = int.from_bytes(data[at:size_at], "big")
    num_bytes = int.from_bytes(data[size_at:start], "big") & ((1 << 7 * size_bytes) - 1)
    return kind, start, num_bytes
