"""Files that say that they are encrypted are refused with that reason, whatever a decoder would make of them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import pytest

from tests.support.decoding import SPEC, decode, numbers, rejection
from tests.support.matroska import with_track_element
from tests.support.videos import Recipe, write_video
from vidshard.schemas.rejections import Reason

KEY = {"encryption_key": "00112233445566778899aabbccddeeff", "encryption_kid": "0123456789abcdef0123456789abcdef"}


def refused(path: Path) -> str:
    error = rejection(path)
    assert error.reason is Reason.ENCRYPTED
    assert error.detail.startswith("its pictures are encrypted: ")
    return error.detail


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mjpeg", "mpeg4", "libvpx-vp9"])
@pytest.mark.parametrize("flags", ["", "frag_keyframe+empty_moov"])
def test_common_encryption_in_mp4_is_named(tmp_path: Path, codec: str, flags: str) -> None:
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    clear = write_video(tmp_path / "clear.mp4", Recipe(codec=codec, num_frames=10, pixel_format=pixels))
    path = tmp_path / "v.mp4"
    options = {"encryption_scheme": "cenc-aes-ctr", **KEY} | ({"movflags": flags} if flags else {})
    with av.open(str(clear)) as video, av.open(str(path), "w", container_options=options) as output:
        stream = output.add_stream_from_template(video.streams.video[0])
        for packet in video.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    assert refused(path).endswith("its sample entry is encv, of the scheme cenc")


def test_old_protection_of_quicktime_is_named(tmp_path: Path) -> None:
    data = write_video(tmp_path / "v.mp4", Recipe(num_frames=10)).read_bytes()
    path = tmp_path / "v.m4v"
    at = data.index(b"avc1", data.index(b"stsd"))
    path.write_bytes(data[:at] + b"drmi" + data[at + 4 :])
    assert refused(path).endswith("its sample entry is drmi")


@pytest.mark.parametrize("suffix", ["mkv", "webm"])
def test_encryption_in_matroska_is_named(tmp_path: Path, suffix: str) -> None:
    codec = "libvpx-vp9" if suffix == "webm" else "libx264"
    clear = write_video(tmp_path / f"clear.{suffix}", Recipe(codec=codec, num_frames=10))
    # ContentEncodings > ContentEncoding > ContentEncodingType 1 and ContentEncryption > ContentEncAlgo 5
    inner = b"\x50\x33\x81\x01" + b"\x50\x35\x84" + b"\x47\xe1\x81\x05"
    element = b"\x6d\x80" + bytes([0x80 | len(inner) + 3]) + b"\x62\x40" + bytes([0x80 | len(inner)]) + inner
    path = with_track_element(clear, tmp_path / f"v.{suffix}", element)
    assert refused(path).endswith("its track states a ContentEncryption")


ASF_GUIDS = [
    "fbb3112223bdd211b4b700a0c955fc6e",
    "14e68a292226174cb935dae07ee9289c",
    "338505438169e6499b74ad12cb86d58c",
]


@pytest.mark.parametrize("guid", ASF_GUIDS)
def test_encryption_in_asf_is_named(tmp_path: Path, guid: str) -> None:
    """An object of the header that is not needed here becomes the one that states encryption."""
    data = write_video(tmp_path / "v.wmv", Recipe(codec="wmv2", num_frames=10)).read_bytes()
    codec_list = bytes.fromhex("4052d1861d31d011a3a400a0c90348f6")
    assert codec_list in data
    path = tmp_path / "encrypted.wmv"
    path.write_bytes(data.replace(codec_list, bytes.fromhex(guid)))
    assert "encryption object" in refused(path)


def test_scrambled_transport_streams_are_named(tmp_path: Path) -> None:
    data = bytearray(write_video(tmp_path / "clear.ts", Recipe(num_frames=25)).read_bytes())
    for at in range(0, len(data), 188):
        if bytes(data[at + 1 : at + 3]) in (b"\x01\0", b"\x41\0"):
            data[at + 3] |= 0x80
    path = tmp_path / "v.ts"
    path.write_bytes(data)
    assert refused(path).endswith("its packets are marked as scrambled")


def test_scrambled_program_streams_are_named(tmp_path: Path) -> None:
    recipe = Recipe(codec="mpeg2video", num_frames=25)
    data = bytearray(write_video(tmp_path / "clear.vob", recipe).read_bytes())
    at = data.find(b"\0\0\1\xe0")
    while at >= 0:
        data[at + 6] |= 0x10
        at = data.find(b"\0\0\1\xe0", at + 1)
    path = tmp_path / "v.vob"
    path.write_bytes(data)
    assert refused(path).endswith("its packets are marked as scrambled")


def test_filtered_flash_is_named(tmp_path: Path) -> None:
    data = bytearray(write_video(tmp_path / "clear.flv", Recipe(num_frames=10)).read_bytes())
    at = 13
    while at < len(data):
        if data[at] == 9:
            data[at] |= 0x20
        at += 11 + int.from_bytes(data[at + 1 : at + 4], "big") + 4
    path = tmp_path / "v.flv"
    path.write_bytes(data)
    assert refused(path).endswith("its tags are marked as filtered")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "wmv", "ts", "flv", "vob", "mxf"])
def test_clear_files_are_not_taken_for_encrypted(tmp_path: Path, suffix: str) -> None:
    codec = {"wmv": "wmv2", "vob": "mpeg2video", "mxf": "mpeg2video"}.get(suffix, "libx264")
    path = write_video(tmp_path / f"v.{suffix}", Recipe(codec=codec, num_frames=10, rate=Fraction(25)))
    assert numbers(decode(path, SPEC))
