"""Recordings joined into one file, as ``cat`` does: the first one is read, and the others are named.

FFmpeg's demuxers read the first recording of most containers and stop at the next one without a word. Some continue
into the next one with the headers of the first, which shows wrong pictures. So packets end here where another recording
begins, and whoever reads to the end is told. Joined raw streams, transport streams and program streams are one stream,
and so is an AVI or GIF whose headers repeat those of the first one; these are read whole.

Where sizes in the container lead from one top-level element to the next, the next recording is found by them. Otherwise
its first bytes are looked for behind the last packet. They are looked for in everything up to each packet if sizes do
not lead to the end of the file: in a live recording, or one that was cut off before another one was joined to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

import vidshard.pipeline.video.asf as asf
import vidshard.pipeline.video.avi as avi
import vidshard.pipeline.video.matroska as matroska
import vidshard.pipeline.video.mp4 as mp4
import vidshard.pipeline.video.realmedia as realmedia
from vidshard.pipeline.video.input_file import WatchedFile, position_kept, read_exactly
from vidshard.schemas.rejections import Reason, VideoError

_WALKS: dict[str, Callable[[WatchedFile], int | None]] = {
    "asf": asf.second_recording,
    "avi": avi.second_recording,
    "matroska": matroska.second_recording,
    "mov": mp4.second_recording,
    "rm": realmedia.second_recording,
}
"""Functions that give the offset of the second recording in a file, by one of FFmpeg's names of its container."""

_BEGINNINGS = {
    "flv": rb"FLV\x01[\x00-\x07]\x00\x00\x00\x09\x00\x00\x00\x00",
    "matroska": rb"\x1a\x45\xdf\xa3.{1,60}?\x42\x82.{1,8}?(?:matroska|webm)",
    "asf": re.escape(asf.HEADER_GUID),
    "avi": rb"RIFF.{4}AVI LIST.{4}hdrl",
    "wtv": rb"\xb7\xd8\x00\x20\x37\x49\xda\x11\xa6\x4e\x00\x07\xe9\x5e\xad\x8d",
    "apng": rb"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR",
    "nut": rb"nut/multimedia container\x00",
    "ogg": rb"OggS\x00[\x02\x06]",
    "ivf": rb"DKIF\x00\x00\x20\x00",
}
"""First bytes of a recording, by one of FFmpeg's names of its container; for those whose sizes may not lead to it."""

_SCANNED = _BEGINNINGS.keys() - _WALKS.keys() | {"matroska"}
"""Containers of which the bytes behind the last packet are searched. A live Matroska file states no sizes."""
_ENDS: dict[str, Callable[[WatchedFile], bool]] = {
    "asf": asf.sizes_lead_to_end,
    "avi": avi.sizes_lead_to_end,
    "matroska": matroska.sizes_lead_to_end,
    "nut": lambda _: False,
    "ogg": lambda _: False,
}
"""Functions that say whether sizes lead to the end of a file, by one of FFmpeg's names of its container."""
_AT_THEIR_PLACE = frozenset({"avi", "matroska", "nut"})
"""Containers whose packets lie at their position as a whole."""
_MOST_SCANNED = 256 << 20
"""Bytes before a packet, to which a seek led, that are searched at most."""
_SCAN_BYTES = 4 << 20
_OVERLAP_BYTES = 80
"""Longest beginning."""
_USUAL_GAP_BYTES = 1 << 20
"""Bytes between packets of the video, of other streams and of the container, that arouse no suspicion."""


class RecordingEnd:
    """Finds the place in an opened file at which another recording begins."""

    def __init__(self, watched: WatchedFile, container: InputContainer) -> None:
        """Look for it as far as the container's sizes tell.

        Raises:
            VideoError: TRUNCATED: the first recording of an mp4 has no index.
        """
        self._watched = watched
        formats = container.format.name.split(",")
        self._format = next((name for name in formats if name in _BEGINNINGS or name in _WALKS), formats[0])
        self._is_gif = self._format == "gif"
        self._is_scanned = self._format in _SCANNED
        self._behind_last: int | None = None
        self._is_unsized = False
        self.offset: int | None = None
        """Offset of the next recording; None where none was found yet."""
        if self._format in _WALKS:
            with position_kept(watched):
                self.offset = _WALKS[self._format](watched)
        if self._format in _ENDS and self.offset is None:
            with position_kept(watched):
                self._is_unsized = not _ENDS[self._format](watched)
        self.may_follow = self.offset is not None or self._is_unsized or self._is_scanned or self._is_gif
        """Whether another recording may be found; False where the container's sizes rule it out."""

    def is_before(self, packet: Packet[VideoStream]) -> bool:
        """Whether the recording ends before a packet; packets are asked about in the order of the demuxer."""
        if packet.pos is None or not self.may_follow:
            return False
        if self.offset is None and (self._is_unsized or self._is_scanned):
            last, self._behind_last = self._behind_last, max(self._behind_last or 0, packet.pos + packet.size)
            if self._is_unsized:  # FFmpeg goes on with the pictures of another recording by the headers of the first
                start = max(1, self._behind_last - _MOST_SCANNED if last is None else last - _OVERLAP_BYTES)
                self.offset = self._scan(start, self._behind_last)
            elif last is not None and packet.pos - last > _USUAL_GAP_BYTES:
                self.offset = self._scan(last)
        elif self._is_gif and self.offset is None and packet.is_keyframe and packet.pos > 0:
            self.offset = self._other_screen(packet.pos, bytes(packet))
        end = packet.pos + (packet.size if self._is_unsized and self._format in _AT_THEIR_PLACE else 1)
        return self.offset is not None and end > self.offset

    def explains_complaint(self, packet: Packet[VideoStream] | None) -> bool:
        """Whether what the demuxer complains of is the next recording; ``packet`` is what it gave, None for nothing."""
        offset = self.at_end()
        is_behind = packet is None or packet.pos is None or (offset is not None and packet.pos >= offset)
        return offset is not None and is_behind and self._watched.tell() > offset

    def at_end(self) -> int | None:
        """Offset of the next recording, once the demuxer has no more packets; None if there is none."""
        if self.offset is None and self._behind_last is not None:
            self.offset = self._scan(self._behind_last)
        return self.offset

    def _scan(self, offset: int, end: int | None = None) -> int | None:
        """Offset of the first beginning of a recording behind an offset, up to ``end`` or for some MiB."""
        end = min(offset + _SCAN_BYTES if end is None else end, self._watched.num_bytes)
        pattern = re.compile(_BEGINNINGS[self._format], re.DOTALL)
        with position_kept(self._watched):
            self._watched.seek(offset)
            kept = b""
            for at in range(offset, end, 1 << 20):
                data = kept + read_exactly(self._watched, min(1 << 20, end - at))
                if found := pattern.search(data):
                    return at - len(kept) + found.start()
                kept = data[-_OVERLAP_BYTES:]
        return None

    def _other_screen(self, offset: int, data: bytes) -> int | None:
        """Offset of a header that differs from the file's, behind the picture of a packet; None for none.

        FFmpeg leaves it unread and draws the next pictures on the first screen.
        """
        at = data.find(b"GIF8")
        if at < 0:
            return None
        with position_kept(self._watched):
            self._watched.seek(0)
            first = read_exactly(self._watched, _GIF_HEAD_BYTES)
            self._watched.seek(offset + at)
            other = read_exactly(self._watched, _GIF_HEAD_BYTES)
        return offset + at if _gif_screen(other) != _gif_screen(first) else None


_GIF_HEAD_BYTES = 13 + 3 * 256


def _gif_screen(head: bytes) -> bytes:
    """The logical screen descriptor of a GIF and its palette, sections 18 and 19."""
    num_colors = 2 << (head[10] & 7) if len(head) > 10 and head[10] & 0x80 else 0
    return head[6 : 13 + 3 * num_colors]


def refuse_other_fragments(watched: WatchedFile) -> None:
    """Refuse a fragmented mp4 in which fragments of another recording follow, with an index of their own.

    Raises:
        VideoError: DECODE_ERROR.
    """
    offset = mp4.other_fragments(watched)
    if offset is not None:
        raise VideoError(
            Reason.DECODE_ERROR,
            f"fragments of another recording, with another index (moov), begin at byte {offset} of "
            f"{watched.num_bytes}: {_REMEDY}",
        )


_REMEDY = "split the file there, or join recordings with ffmpeg's concat demuxer"


def refuse_rest(watched: WatchedFile, offset: int) -> None:
    """Say that a file goes on behind the recording that was read.

    Args:
        watched: the file.
        offset: of the next recording.

    Raises:
        VideoError: DECODE_ERROR, always.
    """
    raise VideoError(
        Reason.DECODE_ERROR,
        f"at the end: another recording begins at byte {offset} of {watched.num_bytes}, and only the first is read: "
        f"{_REMEDY}",
    )
