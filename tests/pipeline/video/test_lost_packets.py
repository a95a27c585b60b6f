"""Packets and bytes that are missing in the middle of a video: never a wrong picture without a word."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import pytest

from tests.support.combinations import write_combination
from tests.support.lost_packets import (
    NUMBERED,
    UNNUMBERED,
    outcome_of,
    with_hole,
    with_times,
    without_packets,
    wrong_times,
)
from tests.support.videos import Recipe, write_video
from vidshard.pipeline.video.bit_reader import payload
from vidshard.pipeline.video.h264 import SequenceParameters


@pytest.mark.parametrize("codec", NUMBERED)
def test_a_packet_that_is_lost_in_any_container_gives_no_wrong_picture(codec: str, tmp_path: Path) -> None:
    silent = {}
    for container_format in NUMBERED[codec]:
        whole = write_combination(codec, container_format, tmp_path)
        assert whole is not None
        original = outcome_of(whole)
        assert original.told is None
        for lost in range(8, 14):  # a group of six pictures, wherever it begins
            path = without_packets(tmp_path / "lacking", whole, container_format, [lost], close=False)
            found = outcome_of(path)
            counted = container_format in (
                "m4v",
                "mpeg2video",
            )  # without times a lost B-picture moves all later ones up
            if found.told is None and not counted and (times := wrong_times(found.shown, original.shown)):
                silent[container_format, lost] = times
    assert not silent


@pytest.mark.parametrize("codec", UNNUMBERED)
def test_a_gap_in_constant_times_is_reported_where_pictures_have_no_numbers(codec: str, tmp_path: Path) -> None:
    silent, tried = {}, 0
    for container_format in UNNUMBERED[codec]:
        whole = write_combination(codec, container_format, tmp_path)
        if whole is None:
            continue
        original = outcome_of(whole)
        assert original.told is None
        for lost in range(8, 14):
            tried += 1
            found = outcome_of(without_packets(tmp_path / "lacking", whole, container_format, [lost], close=False))
            if found.told is None and (times := wrong_times(found.shown, original.shown)):
                silent[container_format, lost] = times
    assert not silent
    assert tried


@pytest.mark.parametrize("container_format", ["mp4", "matroska", "flv"])
def test_a_gap_in_constant_times_is_reported_where_h264_allows_gaps_between_its_numbers(
    container_format: str, tmp_path: Path
) -> None:
    options = (("x264-params", "ref=1"),)
    whole = write_video(tmp_path / "whole.mp4", Recipe(num_frames=60, gop=30, width=192, height=128, options=options))
    whole.write_bytes(_with_gaps_allowed(whole.read_bytes()))
    original = outcome_of(whole)
    assert original.told is None
    reported = 0
    for lost in (9, 13, 44):
        found = outcome_of(without_packets(tmp_path / "lacking", whole, container_format, [lost], close=False))
        reported += found.told is not None
        assert found.told is not None or not wrong_times(found.shown, original.shown)
    assert reported


def _with_gaps_allowed(data: bytes) -> bytes:
    """An mp4 of h264 that allows gaps between the numbers of pictures (gaps_in_frame_num_value_allowed_flag)."""
    at = data.index(b"avcC") + 12
    old = data[at : at + int.from_bytes(data[at - 2 : at], "big")]
    wanted = replace(SequenceParameters.read(payload(old, 1)), allows_gaps=True)
    for bit in range(8, 8 * len(old)):
        number = int.from_bytes(old, "big") ^ 1 << 8 * len(old) - 1 - bit
        new = number.to_bytes(len(old), "big")
        with suppress(EOFError):
            if SequenceParameters.read(payload(new, 1)) == wanted:
                return data[:at] + new + data[at + len(old) :]
    raise AssertionError("no such bit")


@pytest.mark.parametrize("steps", [[1, 2], [1, 1, 3, 2, 5], [1, 2, 4, 1, 1, 7]])
def test_gaps_of_a_varying_rate_say_nothing(steps: list[int], tmp_path: Path) -> None:
    times = [Fraction(0)]
    while len(times) < 60:
        times.append(times[-1] + Fraction(steps[len(times) % len(steps)], 30))
    path = write_video(tmp_path / "varying.webm", Recipe(codec="libvpx", num_frames=60, gop=60, times=times))
    assert outcome_of(path).told is None


@pytest.mark.parametrize("container_format", ["mp4", "matroska", "nut", "3gp"])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_a_picture_of_mpeg4_whose_time_is_not_that_of_the_container_follows_a_lost_one(
    b_frames: int, container_format: str, tmp_path: Path
) -> None:
    recipe = Recipe(codec="mpeg4", num_frames=40, gop=20, b_frames=b_frames)
    whole = write_video(tmp_path / "whole.nut", recipe)
    lost = 25 if b_frames == 0 else _reference_after(whole, 24)
    path = without_packets(tmp_path / "lacking", whole, container_format, [lost], close=True)
    told = outcome_of(path).told
    assert told is not None
    assert "a picture before it is missing" in told.detail or "refers to is missing" in told.detail


def _reference_after(path: Path, number: int) -> int:
    """The first packet from some number on that is a P-picture."""
    with av.open(str(path)) as reader:
        packets = [bytes(packet) for packet in reader.demux(video=0) if packet.size]
    kinds = [data[data.index(b"\0\0\1\xb6") + 4] >> 6 for data in packets]
    return next(at for at in range(number, len(kinds)) if kinds[at] == 1)


@pytest.mark.parametrize("times", ["varying", "of another rate"])
@pytest.mark.parametrize("container_format", ["mp4", "matroska", "nut"])
def test_a_whole_mpeg4_is_not_suspected_for_its_times(container_format: str, times: str, tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.nut", Recipe(codec="mpeg4", num_frames=40, gop=20, b_frames=2))
    factor = [1, 2, 5, 1, 1, 3] if times == "varying" else [2]
    path = with_times(tmp_path / "moved", whole, container_format, factor)
    assert outcome_of(path).told is None


@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg", "libvpx", "msmpeg4", "libx264"])
def test_a_chunk_of_an_avi_whose_header_is_lost_is_damage(codec: str, tmp_path: Path) -> None:
    recipe = Recipe(codec=codec, num_frames=30, gop=30, pixel_format="yuvj420p" if codec == "mjpeg" else "yuv420p")
    whole = write_video(tmp_path / "whole.avi", recipe)
    assert outcome_of(whole).told is None
    with av.open(str(whole)) as reader:
        entries = [(entry.pos, entry.size) for entry in reader.streams.video[0].index_entries]
    for number in (0, 15):
        told = outcome_of(with_hole(tmp_path / "hole.avi", whole, entries[number][0], 8)).told
        assert told is not None, number


@pytest.mark.parametrize(
    ("codec", "container_format"), [("libvpx-vp9", "flv"), ("libx265", "flv"), ("mpeg2video", "asf")]
)
def test_damage_that_the_demuxer_meets_while_the_file_is_opened_is_damage(
    codec: str, container_format: str, tmp_path: Path
) -> None:
    # the first seconds are read to learn about the streams; FFmpeg complains then, and not when it hands packets out
    whole = write_combination(codec, container_format, tmp_path)
    assert whole is not None
    original = outcome_of(whole)
    assert original.told is None
    num_bytes = whole.stat().st_size
    told = []
    for share in (0.55, 0.65, 0.75):
        found = outcome_of(with_hole(tmp_path / "hole", whole, int(share * num_bytes), 64))
        assert found.told is not None or found.shown.keys() == original.shown.keys(), share
        assert found.told is not None or not wrong_times(found.shown, original.shown), share
        told.append(found.told)
    assert any(told)
