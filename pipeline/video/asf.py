"""Top-level objects of an ASF file (wmv): where another recording begins behind the first one."""

from __future__ import annotations

from vidshard.pipeline.video.input_file import WatchedFile, read_exactly

HEADER_GUID = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
"""First bytes of a file, section 10.1 of the ASF specification."""

_MAX_OBJECTS = 1000


def second_recording(watched: WatchedFile) -> int | None:
    """Offset of the second header object; None for none, or where sizes do not lead there. The position is lost."""
    at = 0
    for _ in range(_MAX_OBJECTS):
        if at >= watched.num_bytes:
            break
        watched.seek(at)
        head = read_exactly(watched, 24)
        if at and head.startswith(HEADER_GUID):
            return at
        num_bytes = _object_bytes(head)
        if num_bytes is None:
            break
        at += num_bytes
    return None


def sizes_lead_to_end(watched: WatchedFile) -> bool:
    """Whether the sizes of the objects lead to the end of the file; the position is lost."""
    at = 0
    for _ in range(_MAX_OBJECTS):
        watched.seek(at)
        num_bytes = _object_bytes(read_exactly(watched, 24))
        if num_bytes is None:
            break
        at += num_bytes
    return at == watched.num_bytes


def _object_bytes(head: bytes) -> int | None:
    """Number of bytes of the object that begins with these 24; None where they are no object's."""
    num_bytes = int.from_bytes(head[16:24], "little")
    return num_bytes if len(head) == 24 and num_bytes >= 24 else None
