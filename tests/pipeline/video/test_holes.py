"""Holes of zeros, and other damage within pictures whose decoders return no error: never a wrong picture silently."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from tests.support.lost_packets import outcome_of, with_hole, wrong_times
from tests.support.pictures import CODECS, PLAIN, places, write_pictures
from vidshard.pipeline.video.holes import hole_check

NOISE_IS_TOLD = ("ffv1", "mjpeg", "gif", "msmpeg4", "mpeg4", "mpeg2video")
"""Codecs whose decoders notice any damage: by checksums, or by the end of the picture."""


@pytest.mark.parametrize(
    ("codec", "container_format"), [(c, f) for c, formats in CODECS.items() for f in formats if c != "mjpeg"]
)
def test_a_hole_in_a_picture_is_damage(codec: str, container_format: str, tmp_path: Path) -> None:
    whole = write_pictures(tmp_path / "whole", codec, container_format)
    original = outcome_of(whole)
    assert original.told is None
    for offset, size in places(whole)[2:4]:  # one that others reference, and a keyframe
        if size < 200:
            continue
        found = outcome_of(with_hole(tmp_path / "hole", whole, offset + size // 2, 64))
        assert found.told is not None


@pytest.mark.parametrize("codec", NOISE_IS_TOLD)
def test_noise_in_a_picture_is_damage_where_its_codec_tells(codec: str, tmp_path: Path) -> None:
    whole = write_pictures(tmp_path / "whole", codec, CODECS[codec][0])
    original = outcome_of(whole)
    offset, size = places(whole)[3]
    data = bytearray(whole.read_bytes())
    data[offset + size // 2 : offset + size // 2 + 64] = np.random.default_rng(1).bytes(64)
    (tmp_path / "noisy").write_bytes(data)
    found = outcome_of(tmp_path / "noisy")
    assert found.told is not None or not wrong_times(found.shown, original.shown)
    assert found.told is not None


@pytest.mark.parametrize("codec", CODECS)
def test_whole_pictures_of_any_content_have_no_hole(codec: str, tmp_path: Path) -> None:
    for name, picture in PLAIN.items():
        path = write_pictures(tmp_path / name, codec, CODECS[codec][0], picture)
        with av.open(str(path)) as reader:
            [stream] = reader.streams.video
            has_hole = hole_check(stream)
            assert not any(has_hole is not None and has_hole(bytes(each)) for each in reader.demux(stream)), name
        assert outcome_of(path).told is None, name


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("container_format", ["mp4", "raw"])
def test_zeros_behind_a_unit_are_padding(codec: str, container_format: str, tmp_path: Path) -> None:
    whole = write_pictures(tmp_path / "whole", codec, "mp4" if container_format == "mp4" else CODECS[codec][-1])
    with av.open(str(whole)) as reader:
        [stream] = reader.streams.video
        has_hole = hole_check(stream)
        packets = [bytes(packet) for packet in reader.demux(stream) if packet.size]
    assert has_hole is not None
    for data in packets:
        if container_format == "mp4":  # the last unit grows
            at = 0
            while at + 4 + (size := int.from_bytes(data[at : at + 4], "big")) < len(data):
                at += 4 + size
            padded = data[:at] + (size + 300).to_bytes(4, "big") + data[at + 4 :] + bytes(300)
            assert not has_hole(padded + packets[1])
        else:
            assert not has_hole(data + bytes(300))
            assert not has_hole(data + bytes(300) + packets[0])
        assert has_hole(data[: len(data) // 2] + bytes(300) + data[len(data) // 2 + 300 :] + b"\x81") or len(data) < 700


def test_zeros_of_pixels_that_are_stored_as_they_are_say_nothing(tmp_path: Path) -> None:
    for codec, container_format in (("rawvideo", "avi"), ("v210", "mov"), ("jpeg2000", "mov"), ("ljpeg", "avi")):
        path = write_pictures(tmp_path / codec, codec, container_format, PLAIN["black"])
        with av.open(str(path)) as reader:
            assert hole_check(reader.streams.video[0]) is None
        assert outcome_of(path).told is None


def test_a_picture_that_is_stored_unpredicted_may_be_zeros(tmp_path: Path) -> None:
    with av.open(str(write_pictures(tmp_path / "utvideo.avi", "utvideo", "avi"))) as reader:
        [stream] = reader.streams.video
        has_hole = hole_check(stream)
        data = next(bytes(packet) for packet in reader.demux(stream) if packet.size)
    assert has_hole is not None
    with_zeros = data[:2000] + bytes(100) + data[2100:]
    assert has_hole(with_zeros)
    assert not has_hole(with_zeros[:-3] + bytes([with_zeros[-3] & ~3]) + with_zeros[-2:])


def test_a_packet_of_very_many_start_codes_is_looked_at_once(tmp_path: Path) -> None:
    with av.open(str(write_pictures(tmp_path / "whole", "libx264", CODECS["libx264"][-1]))) as reader:
        check = hole_check(reader.streams.video[0])
    assert check is not None
    hostile = (bytes(16) + b"\1x") * 300_000  # looking at the rest again for each of them would take minutes
    assert not check(hostile)
    assert check(hostile + bytes(16) + b"x")
