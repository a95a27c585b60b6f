"""Writes AVI files chunk by chunk: palettes, palette changes and empty chunks, which PyAV cannot write."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

FRAME, EMPTY, PALETTE = b"00db", b"00dc", b"00pc"


def write_avi(
    path: Path,
    chunks: Iterable[tuple[bytes, bytes]],
    *,
    width: int,
    height: int,
    codec: bytes = b"\0\0\0\0",
    bits: int = 24,
    palette: bytes = b"",
    rate: int = 25,
) -> Path:
    """Write an AVI of one video stream.

    Args:
        path: the file.
        chunks: kind (``FRAME``, ``EMPTY`` or ``PALETTE``) and content of each chunk. A frame is marked as a keyframe.
        width: of a picture, a multiple of 4.
        height: of a picture.
        codec: four characters; zeros for uncompressed pictures, whose rows stand bottom up.
        bits: per pixel.
        palette: of the header, four bytes (blue, green, red, 0) a color.
        rate: frames per second.
    """
    movi, index, count = b"movi", b"", 0
    for kind, data in chunks:
        flags = {FRAME: 16, PALETTE: 256}.get(kind, 0)
        index += kind + struct.pack("<III", flags, len(movi), len(data))
        movi += _chunk(kind, data)
        count += kind != PALETTE
    handler = codec if codec.strip(b"\0") else b"DIB "
    avih = struct.pack("<14I", 1_000_000 // rate, 0, 0, 16, count, 0, 1, 0, width, height, 0, 0, 0, 0)
    strh = (
        b"vids" + handler + struct.pack("<IHH8I4h", 0, 0, 0, 0, 1, rate, 0, count, 0, 2**32 - 1, 0, 0, 0, width, height)
    )
    colors = len(palette) // 4
    strf = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, bits, codec, width * height, 0, 0, colors, 0) + palette
    stream = _chunk(b"LIST", b"strl" + _chunk(b"strh", strh) + _chunk(b"strf", strf))
    header = _chunk(b"LIST", b"hdrl" + _chunk(b"avih", avih) + stream)
    path.write_bytes(_chunk(b"RIFF", b"AVI " + header + _chunk(b"LIST", movi) + _chunk(b"idx1", index)))
    return path


def _chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
