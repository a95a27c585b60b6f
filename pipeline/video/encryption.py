"""Encryption that a file itself states: found before anything is decoded, and named instead of damage.

A decoder may show noise for encrypted pictures, and its errors sound like those of a broken file. Only headers are
read. Layouts: ISO/IEC 23001-7 and 14496-12 8.12 (mp4), RFC 9559 5.1.4.1.31 (Matroska), ISO/IEC 13818-1 2.4.3 (transport
and program streams), and the specifications of ASF (3.10 to 3.14) and FLV (annex F).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vidshard.pipeline.video.input_file import WatchedFile, position_kept, read_exactly
from vidshard.pipeline.video.matroska import read_video_tracks
from vidshard.pipeline.video.mp4 import MP4_FIRST_BOXES, read_protection, read_tracks
from vidshard.pipeline.video.transport_stream import packet_layout

_HEAD_BYTES = 1 << 18

_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_ENCRYPTION = {
    bytes.fromhex("fbb3112223bdd211b4b700a0c955fc6e"): "a content encryption object",
    bytes.fromhex("14e68a292226174cb935dae07ee9289c"): "an extended content encryption object",
    bytes.fromhex("338505438169e6499b74ad12cb86d58c"): "an advanced content encryption object",
}
_MXF_FIRST = bytes.fromhex("060e2b34020501")
_MXF_ENCRYPTED = bytes.fromhex("060e2b3404010107")
_MXF_ENCRYPTED_END = bytes.fromhex("0d010301020b01")

_MAX_TAGS = 200
"""Tags of an FLV that are looked at."""


def encryption_of(watched: WatchedFile) -> list[str | None]:
    """Encryption of each video stream of a file, in words, in the order of the streams; None where there is none.

    Formats that say it for the whole file give one entry; an empty list says nothing. The file's position is kept.
    """
    with position_kept(watched):
        watched.seek(0)
        head = read_exactly(watched, 16)
        if head[4:8] in MP4_FIRST_BOXES:
            return [_mp4_words(read_protection(watched, track)) for track in read_tracks(watched)]
        if head.startswith(b"\x1a\x45\xdf\xa3"):
            tracks = read_video_tracks(watched)
            return ["its track states a ContentEncryption" if track.is_encrypted else None for track in tracks]
        watched.seek(0)
        words = _of_start(read_exactly(watched, _HEAD_BYTES))
        return [] if words is None else [words]


def _mp4_words(protection: Sequence[str] | None) -> str | None:
    if protection is None:
        return None
    entry, *scheme = protection
    return f"its sample entry is {entry}" + (f", of the scheme {scheme[0]}" if scheme else "")


def _of_start(head: bytes) -> str | None:
    """Encryption by the first bytes of a file; None for none that is stated."""
    if head.startswith(_ASF_HEADER):
        end = int.from_bytes(head[16:24], "little")
        return next((f"its header has {words}" for guid, words in _ASF_ENCRYPTION.items() if guid in head[:end]), None)
    if head.startswith(b"FLV"):
        return "its tags are marked as filtered" if any(kind & 0x20 for kind in _flv_tags(head)) else None
    if head.startswith(_MXF_FIRST):
        at = head.find(_MXF_ENCRYPTED)
        while at >= 0:
            if head[at + 8 : at + 15] == _MXF_ENCRYPTED_END:
                return "its essence container is the encrypted one"
            at = head.find(_MXF_ENCRYPTED, at + 1)
        return None
    if head.startswith(b"\0\0\1\xba"):
        return "its packets are marked as scrambled" if _is_scrambled_program(head) else None
    layout = packet_layout(head)
    if layout is not None:
        return "its packets are marked as scrambled" if _is_scrambled_transport(head, *layout) else None
    return None


def _flv_tags(head: bytes) -> Iterator[int]:
    """First byte of each tag of pictures or sound."""
    at = int.from_bytes(head[5:9], "big") + 4
    for _ in range(_MAX_TAGS):
        if at + 11 > len(head):
            return
        if head[at] & 0x1F in (8, 9):
            yield head[at]
        at += 11 + int.from_bytes(head[at + 1 : at + 4], "big") + 4


def _is_scrambled_program(head: bytes) -> bool:
    """Whether most packets of pictures have scrambling bits; 2.4.3.7."""
    scrambled = total = 0
    at = head.find(b"\0\0\1")
    while 0 <= at < len(head) - 7:
        if 0xE0 <= head[at + 3] <= 0xEF and head[at + 6] >> 6 == 2:
            total += 1
            scrambled += head[at + 6] & 0x30 != 0
            at += 6 + int.from_bytes(head[at + 4 : at + 6], "big") - 3
        at = head.find(b"\0\0\1", at + 3)
    return scrambled * 2 > total


def _is_scrambled_transport(head: bytes, start: int, size: int) -> bool:
    """Whether most packets of the largest stream have scrambling bits; 2.4.3.2."""
    count = (len(head) - start) // size
    packets = np.frombuffer(head, np.uint8, count * size, start).reshape(count, size)
    packets = packets[packets[:, 0] == 0x47]
    pids = (packets[:, 1].astype(np.int64) & 31) << 8 | packets[:, 2]
    pids = pids[(pids >= 0x20) & (pids < 0x1FFF)]
    if not len(pids):
        return False
    largest = np.bincount(pids).argmax()
    own = packets[((packets[:, 1].astype(np.int64) & 31) << 8 | packets[:, 2]) == largest]
    return bool((own[:, 3] >> 6 != 0).mean() > 0.5)
