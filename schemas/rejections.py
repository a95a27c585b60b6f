"""Rejections: the closed list of reasons why an input gave no tokens, their remedies, the record and the error.

A bad video is data, not a failure of the run: each is counted and written to ``rejects/``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vidshard.schemas.errors import VidshardError


class Stage(StrEnum):
    """The stage of a run in which a rejection arose."""

    DISCOVER = "discover"
    PROBE = "probe"
    DECODE = "decode"
    ENCODE = "encode"


class Reason(StrEnum):
    """Reason why an input gave no tokens. A closed list: readers may branch on it."""

    UNREADABLE = "unreadable"
    """The file system refused: missing, no permission, connection lost."""
    EMPTY_FILE = "empty_file"
    """Zero bytes."""
    NOT_A_VIDEO = "not_a_video"
    """No container format was recognized."""
    NO_VIDEO_STREAM = "no_video_stream"
    """A container without moving pictures: audio only, or a cover image."""
    NO_FRAMES = "no_frames"
    """A video stream from which no frame could be decoded."""
    DECODE_ERROR = "decode_error"
    """The stream is damaged inside the span."""
    TRUNCATED = "truncated"
    """The frames end well before the header says they do."""
    LONGER_THAN_HEADER = "longer_than_header"
    """Far more frames than the header says, more than one task may hold."""
    TOO_SHORT = "too_short"
    """Shorter than one clip may be (``tail: drop``, ``min_seconds``), or a part that starts after the video's end."""
    DUPLICATE = "duplicate"
    """The same content as another input, which was tokenized."""
    DECODER_CRASHED = "decoder_crashed"
    """The decoding process died on it (signal or out of memory)."""
    DECODE_TIMEOUT = "decode_timeout"
    """Decoding took longer than allowed."""
    OVER_LIMIT = "over_limit"
    """Larger, longer or of more frames than the run's limits allow."""
    UNSUPPORTED = "unsupported"
    """A codec, pixel format or size that this build cannot handle."""
    ENCRYPTED = "encrypted"
    """The file says that its pictures are encrypted."""
    CHANGED = "changed"
    """The file was replaced after the run opened it."""
    BAD_SIGNAL = "bad_signal"
    """The file of samples beside the video does not hold a timestamped signal."""
    OUT_OF_MEMORY = "out_of_memory"
    """The encoder has too little memory for one clip of the video."""
    NOT_FINITE = "not_finite"
    """The network gave a value that is not finite for a clip of the span, so no token of it would be right."""
    BAD_ROW = "bad_row"
    """A row of a manifest that names no video, or holds something else than it should."""
    NOT_ALLOWED = "not_allowed"
    """A row of a manifest names a location that the run does not allow."""
    POSSIBLE_LOSS = "possible_loss"
    """The clips are kept: a picture may be missing in a gap in time, and those after it be wrong."""
    CUT_DEPENDENT = "cut_dependent"
    """Decoded again with another cut, the span gave other frames."""
    INTERNAL_ERROR = "internal_error"
    """An exception that nobody foresaw, in this program or a library, while the input was handled."""


_UNLESS_KEPT: dict[Reason, str] = {
    Reason.DECODE_ERROR: ", or keep the clips that are whole: --damaged keep",
    Reason.TRUNCATED: "; or keep the clips before it: --damaged keep",
}
"""End of the advice for spans of which no clip is kept."""

REMEDIES: dict[Reason, str] = {
    Reason.UNREADABLE: "check that the path exists, is a file, and that the workers may read it",
    Reason.EMPTY_FILE: "copy the file again from its source",
    Reason.NOT_A_VIDEO: "remove it from the input, or convert it to a video container",
    Reason.NO_VIDEO_STREAM: "remove it from the input",
    Reason.NO_FRAMES: "copy the file again, or re-encode it",
    Reason.DECODE_ERROR: "copy the file again" + _UNLESS_KEPT[Reason.DECODE_ERROR],
    Reason.TRUNCATED: "copy the file again: its end is missing" + _UNLESS_KEPT[Reason.TRUNCATED],
    Reason.LONGER_THAN_HEADER: "remux it (ffmpeg -i in.mp4 -c copy out.mp4) so that the header states its length",
    Reason.TOO_SHORT: "use --tail pad, fewer --frames, a higher --fps or a smaller --min-seconds; check a part's times",
    Reason.DUPLICATE: "nothing to do: the other copy was tokenized",
    Reason.DECODER_CRASHED: "re-encode it; the file may be hostile. Out of memory: raise --decode-memory",
    Reason.DECODE_TIMEOUT: "raise --decode-timeout or --decode-seconds-per-second, or re-encode the file",
    Reason.OVER_LIMIT: "raise the limit that the detail names, if the file is not hostile",
    Reason.UNSUPPORTED: "re-encode it to h264 in mp4",
    Reason.ENCRYPTED: "decrypt it with the program and key it came with, or remove it from the input",
    Reason.CHANGED: "run the same command again: the file is opened anew",
    Reason.BAD_SIGNAL: "write the signal again as the detail says, or leave the signal out",
    Reason.OUT_OF_MEMORY: (
        "choose a smaller --size, a --tile-size or --precision bfloat16, or run on a GPU with more memory"
    ),
    Reason.NOT_FINITE: (
        "float16 ends at 65,504: give --precision bfloat16 or float32 and another --out; there, check the weights"
    ),
    Reason.BAD_ROW: "mend the row that the detail names, and run the same command again",
    Reason.NOT_ALLOWED: (
        "if you trust the manifest, allow it: --allow-schemes or --allow-under, with --retry-rejected not_allowed"
    ),
    Reason.POSSIBLE_LOSS: "the clips are kept and have decode_errors above 0; copy the file again, or leave them out",
    Reason.CUT_DEPENDENT: "report it with the video; re-encode it to h264 in mp4 meanwhile",
    Reason.INTERNAL_ERROR: "report it with the detail and the traceback in the log; the other inputs are not affected",
}
"""Advice that is printed with each reason."""


def remedy_of(reason: Reason, *, can_keep: bool) -> str:
    """Advice for a rejection.

    Args:
        can_keep: whether keeping the clips that are whole is advice: the video opens, and they are not kept already.
    """
    return REMEDIES[reason] if can_keep else REMEDIES[reason].removesuffix(_UNLESS_KEPT.get(reason, ""))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """An input, or a stretch of one, that gave no tokens, and why."""

    uri: str
    video_id: str | None
    """None when the file could not be read far enough to have an id."""
    span_id: str | None
    """None when the whole video is meant."""
    start_seconds: float | None
    """Start of the span in seconds after the first frame; None for the whole video."""
    stage: Stage
    reason: Reason
    detail: str
    """One line for a person; without credentials."""
    kept_clips: int | None = 0
    """Clips of the span that were kept beside what is missing. None in outputs written before this was recorded."""
    place: str | None = None
    """Hex digest of a whole video's full address: addresses with the same public ``uri`` may differ in it."""


class VideoError(VidshardError):
    """A video cannot be used, for a reason from the closed list. A stage turns it into a Rejection.

    Any other exception that a row's bytes or address cause becomes INTERNAL_ERROR (``pipeline.row_errors``), except an
    ``OutageError``, which is no row's fault and ends the run.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        detail = detail.encode(errors="replace").decode()  # names and header fields may hold lone surrogates
        super().__init__(reason, detail)  # both, so that it survives pickling
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
