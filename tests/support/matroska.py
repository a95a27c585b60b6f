"""Adds elements to the header of a Matroska file, as PyAV writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

CROP_LEFT, CROP_TOP, CROP_RIGHT, CROP_BOTTOM = 0x54CC, 0x54BB, 0x54DD, 0x54AA
_VIDEO, _TRACK, _TRACKS, _SEEK_HEAD, _VOID = 0xE0, 0xAE, 0x1654AE6B, 0x114D9B74, 0xEC


def with_video_elements(whole: Path, path: Path, values: Mapping[int, int]) -> Path:
    """A copy whose first video track has more elements of one number each; those behind it move, its index is void."""
    added = b"".join(
        key.to_bytes((key.bit_length() + 7) // 8, "big") + b"\x82" + value.to_bytes(2, "big")
        for key, value in values.items()
    )
    return _with_track(whole, path, added, b"")


def with_track_element(whole: Path, path: Path, element: bytes) -> Path:
    """A copy whose first track has one more element."""
    return _with_track(whole, path, b"", element)


def _with_track(whole: Path, path: Path, in_video: bytes, in_track: bytes) -> Path:
    data = whole.read_bytes()
    seek_head = data.index(_SEEK_HEAD.to_bytes(4, "big"))  # it lists positions: without it, all is found by reading on
    end = _content(data, seek_head + 4)[1]
    tracks = data.index(_TRACKS.to_bytes(4, "big"), end)
    tracks_start, tracks_end = _content(data, tracks + 4)
    track = tracks_start
    while data[track] != _TRACK:  # a checksum comes first
        track = _content(data, track + 1)[1]
    track_start, track_end = _content(data, track + 1)
    video = track_start
    while data[video] != _VIDEO:
        id_bytes = 9 - data[video].bit_length()
        video = _content(data, video + id_bytes)[1]
    video_start, video_end = _content(data, video + 1)
    inner = _element(_VIDEO, data[video_start:video_end] + in_video)
    entry = _element(_TRACK, data[track_start:video] + inner + data[video_end:track_end] + in_track)
    renewed = _element(_TRACKS, data[tracks_start:track] + entry + data[track_end:tracks_end])
    head = data[:seek_head] + _element(_VOID, bytes(end - seek_head - 9)) + data[end:tracks]
    path.write_bytes(_unknown_segment_size(head) + renewed + data[tracks_end:])
    return path


def _content(data: bytes, at: int) -> tuple[int, int]:
    size_bytes = 9 - data[at].bit_length()
    start = at + size_bytes
    return start, start + (int.from_bytes(data[at:start], "big") & ((1 << 7 * size_bytes) - 1))


def _element(kind: int, content: bytes) -> bytes:
    return kind.to_bytes((kind.bit_length() + 7) // 8, "big") + (len(content) | 1 << 56).to_bytes(8, "big") + content


def _unknown_segment_size(head: bytes) -> bytes:
    at = head.index(b"\x18\x53\x80\x67") + 4
    size_bytes = 9 - head[at].bit_length()
    return head[:at] + ((1 << 7 * size_bytes + 1) - 1).to_bytes(size_bytes, "big") + head[at + size_bytes :]
