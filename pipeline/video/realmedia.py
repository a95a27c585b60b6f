"""Top-level chunks of a RealMedia file: where another recording begins behind the first one."""

from __future__ import annotations

from vidshard.pipeline.video.input_file import WatchedFile, read_exactly

_MAX_CHUNKS = 1000
_FIRST = b".RMF\0\0\0"
_SLACK_BYTES = 32
"""Writers are a few bytes off in the size of the pictures."""


def second_recording(watched: WatchedFile) -> int | None:
    """Offset of the second file header; None for none, or where sizes do not lead there. The position is lost."""
    at = 0
    for _ in range(_MAX_CHUNKS):
        before = min(at, _SLACK_BYTES)
        watched.seek(at - before)
        around = read_exactly(watched, before + _SLACK_BYTES)
        if at and (found := around.find(_FIRST)) >= 0 and at - before + found:
            return at - before + found
        head = around[before:]
        num_bytes = int.from_bytes(head[4:8], "big")
        if len(head) < 8 or num_bytes < 8:
            break
        at += num_bytes
    return None
