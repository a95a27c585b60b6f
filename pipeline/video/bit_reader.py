"""Reads bits of codec headers, and finds the NAL units of H.264, H.265 and H.266."""

from __future__ import annotations

from collections.abc import Iterator


class Bits:
    """Reads the bits of a header, the most significant first; raises EOFError where there are no more."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big")
        self._left = 8 * len(data)

    def take(self, num_bits: int) -> int:
        """The next bits as an unsigned number."""
        if num_bits > self._left:
            raise EOFError
        self._left -= num_bits
        return self._value >> self._left & (1 << num_bits) - 1

    def take_unsigned(self) -> int:
        """The next unsigned Exp-Golomb number, ue(v): 9.1 of H.264."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)

    def take_signed(self) -> int:
        """The next signed Exp-Golomb number, se(v): 9.1.1 of H.264."""
        value = self.take_unsigned()
        return (value + 1) // 2 if value % 2 else -(value // 2)


def unit_length_bytes(codec: str, extradata: bytes) -> int:
    """Bytes of a unit's length in the packets of a stream; 0 for start codes.

    Args:
        codec: h264, hevc or vvc.
        extradata: the stream's header: an mp4's configuration record (ISO 14496-15), or units behind start codes.
    """
    if codec == "h264":
        return (extradata[4] & 3) + 1 if extradata[:1] == b"\1" and len(extradata) > 8 else 0
    if codec == "hevc":
        return (extradata[21] & 3) + 1 if extradata[:1] == b"\1" and len(extradata) > 22 else 0
    return (extradata[0] >> 1 & 3) + 1 if extradata and extradata[:3] not in (b"\0\0\1", b"\0\0\0") else 0


def units(data: bytes, length_bytes: int) -> Iterator[int]:
    """Offsets of the NAL units in a packet; ``length_bytes`` is 0 for start codes."""
    if length_bytes:
        at = 0
        while at + length_bytes < len(data):
            yield at + length_bytes
            at += length_bytes + int.from_bytes(data[at : at + length_bytes], "big")
        return
    at = data.find(b"\0\0\1")
    while 0 <= at < len(data) - 3:
        yield at + 3
        at = data.find(b"\0\0\1", at + 3)


def payload(data: bytes, at: int, num_bytes: int = 512) -> Bits:
    """The first bits of a unit, without its emulation prevention bytes: 7.4.1 of H.264."""
    return Bits(data[at : at + num_bytes].replace(b"\0\0\3", b"\0\0"))
