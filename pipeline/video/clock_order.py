"""Clocks of MPEG transport and program streams that run back where recordings were joined.

These streams have no index: FFmpeg seeks by their clock alone, as if it only grew. In recordings joined by ``cat``, of
which each counts from the same time, a seek may lead into another one, and its pictures would be shown in place of
those of the first. So the clock up to the place that a seek led to is looked at. Where it runs back, the place does not
count, and the file is decoded from its start, until its times run back.

Samples of 64 KiB are looked at. In a large file they may miss an end of a recording that is later than the place, if it
is less than a sixteenth of the bytes before that. Layouts: ISO/IEC 13818-1, 2.4.3.7 and 2.5.3.4; ISO/IEC 11172-1,
2.4.3.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from av.packet import Packet
from av.video.stream import VideoStream

from vidshard.pipeline.video.input_file import WatchedFile, position_kept
from vidshard.pipeline.video.transport_stream import packet_layout

_NUM_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16
_WRAP = 1 << 33
"""Ticks after which clocks begin again."""
_TOLERANCE = 45_000
"""Ticks of 90 kHz by which packets of one recording may come out of order."""


def clock_runs_back(watched: WatchedFile, stream: VideoStream, packet: Packet[VideoStream]) -> bool:
    """Whether the clock runs back before a packet, to which a seek led; False for containers that have none.

    The file's position is kept.
    """
    container = stream.container.format.name
    times: Callable[[bytes], list[int]]
    if container == "mpegts":
        times = partial(_times_of_pictures, pid=stream.id)
    elif container == "mpeg":
        times = _times_of_packs
    else:
        return False
    if not packet.pos:
        return False
    with position_kept(watched):
        last: int | None = None
        for sample in _samples_until(watched, packet.pos):
            for time in times(sample):
                if last is not None and _ticks_after(time, last) < -_TOLERANCE:
                    return True
                last = time
    return False


def _samples_until(watched: WatchedFile, end: int) -> Iterator[bytes]:
    """Everything up to an offset, or samples spread over it; then what is behind it."""
    if end <= _NUM_SAMPLES * _SAMPLE_BYTES:
        yield watched.samples([0], end)[0][:end]
        yield from watched.samples([end], 4 * _SAMPLE_BYTES)
        return
    step = (end - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1)
    yield from watched.samples([*(number * step for number in range(_NUM_SAMPLES)), end], _SAMPLE_BYTES)


def _ticks_after(time: int, other: int) -> int:
    """Ticks from one time of a clock to another, which may have begun again in between."""
    return (time - other + _WRAP // 2) % _WRAP - _WRAP // 2


def _times_of_pictures(data: bytes, pid: int) -> list[int]:
    """Times of decoding, where stated, of the PES packets of a stream that begin in a piece of a transport stream."""
    layout = packet_layout(data)
    if layout is None:
        return []
    start, size = layout
    count = (len(data) - start) // size
    packets = np.frombuffer(data, np.uint8, count * size, start).reshape(count, size)
    heads = packets[:, :4].astype(np.int32)
    begins = (heads[:, 0] == 0x47) & (heads[:, 1] & 0x40 != 0) & ((heads[:, 1] & 31) << 8 | heads[:, 2] == pid)
    found = []
    for row in packets[begins & (heads[:, 3] & 0x10 != 0)]:
        packet = row[:188].tobytes()
        at = 5 + packet[4] if packet[3] & 0x20 else 4
        if packet[at : at + 3] == b"\0\0\1" and len(packet) >= at + 19 and packet[at + 7] & 0x80:
            time = packet[at + 14 if packet[at + 7] & 0x40 else at + 9 :][:5]
            found.append((time[0] >> 1 & 7) << 30 | time[1] << 22 | time[2] >> 1 << 15 | time[3] << 7 | time[4] >> 1)
    return found


def _times_of_packs(data: bytes) -> list[int]:
    """System clocks of the packs in a piece of a program stream."""
    found = []
    for match in re.finditer(rb"\x00\x00\x01\xba(.{5})", data, re.DOTALL):
        a, b, c, d, e = match[1]
        if a >> 6 == 1:  # MPEG-2
            found.append((a >> 3 & 7) << 30 | (a & 3) << 28 | b << 20 | c >> 3 << 15 | (c & 3) << 13 | d << 5 | e >> 3)
        elif a >> 4 == 2:  # MPEG-1
            found.append((a >> 1 & 7) << 30 | b << 22 | c >> 1 << 15 | d << 7 | e >> 1)
    return found
