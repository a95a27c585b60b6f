"""Messages that FFmpeg writes into its log, where no return value tells: damage that its demuxers pass over."""

from __future__ import annotations

import av.logging

from vidshard.schemas.rejections import Reason, VideoError

Message = tuple[int, str, str]
"""Level, component and text."""


class ErrorsLogged:
    """Captures the errors FFmpeg logs within a block: level, component, text. Costs a microsecond."""

    __slots__ = ("_capture",)

    def __enter__(self) -> list[Message]:
        av.logging.set_level(av.logging.ERROR)
        av.logging.set_skip_repeated(False)  # else a message is end back until another one comes, of another file
        self._capture = av.logging.Capture()
        return self._capture.__enter__()

    def __exit__(self, *error: object) -> None:
        self._capture.__exit__(None, None, None)
        av.logging.set_level(None)


def refuse_lost_position(format_name: str, messages: list[Message], num_packets: int) -> None:
    """Raise for damage that FFmpeg's demuxer only writes into its log.

    The demuxer resumes at the next place it understands. The pictures in between are missing without a mark, and
    those after them would be wrong.

    Args:
        format_name: FFmpeg's name of the container.
        messages: what was logged.
        num_packets: packets before it.

    Raises:
        VideoError: DECODE_ERROR or TRUNCATED.
    """
    for _, name, text in messages:
        if name == format_name:
            cut_off = "prematurely" in text or "partial file" in text
            reason = Reason.TRUNCATED if cut_off else Reason.DECODE_ERROR
            raise VideoError(reason, f"after {num_packets} packets: {' '.join(text.split())}")


_READ_IN_ORDER = frozenset({"flv", "asf", "avi", "ivf", "gif", "apng", "rm", "nut", "wtv", "ogg", "gxf", "mpeg"})
"""Containers whose demuxers complain, while a file is opened, of packets that they pass over.

Others, mp4 and Matroska, complain there of headers alone, most of which do no harm; their packets come later.
"""


_SEARCH_FAILED = "read_timestamp failed."
"""Message of libavformat/seek.c."""


def of_lost_packets(format_name: str, messages: list[Message]) -> list[Message]:
    """The messages of opening a file that tell of packets that were passed over.

    FFmpeg reads the first seconds of a file to learn about its streams, and does not say it again when it hands these
    packets out. A search for a time that fails, as with an index that points nowhere, passes over none.
    """
    if not _READ_IN_ORDER & set(format_name.split(",")):
        return []
    return [message for message in messages if message[1] == format_name and message[2].strip() != _SEARCH_FAILED]


_DAMAGE_SAID = {
    "hevc": {"Could not find ref": "a picture that this one refers to is missing"},  # it then gives no picture
    "ffv1": {"slice CRC mismatch": "the checksum of a slice does not match"},
    "gif": {"LZW decode failed": "the compressed pixels are damaged"},
    "mjpeg": {
        "overread": "the picture ends before its last block",
        "error count": "a block of the picture is damaged",
        "error y=": "a block of the picture is damaged",
        "mjpeg_decode_dc": "a block of the picture is damaged",
    },
}
"""Beginnings of messages by decoder: damage that it shows, or shows the picture before for, without an error."""


def damage_said(messages: list[Message]) -> str | None:
    """The damage of a picture that its decoder only writes into its log, in our words; None for none."""
    for _, name, text in messages:
        for beginning, words in _DAMAGE_SAID.get(name, {}).items():
            if text.startswith(beginning):
                return words
    return None
