"""Choice of the film among several video streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import pytest
from av.stream import Disposition

from tests.support.decoding import decode, numbers, probe, rejection
from tests.support.videos import Recipe, write_video
from vidshard.schemas.rejections import Reason


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds of 96x64."""
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", Recipe(num_frames=100))


def write_poster(path: Path, num_frames: int = 1, width: int = 384, height: int = 256) -> Path:
    recipe = Recipe(codec="mjpeg", pixel_format="yuvj420p", num_frames=num_frames, width=width, height=height)
    return write_video(path, recipe)


def join(path: Path, parts: Sequence[tuple[Path, Disposition]]) -> Path:
    """Copy the videos of some files into one; the suffix names the container."""
    with av.open(str(path), "w") as output:
        targets = []
        for part, disposition in parts:
            with av.open(str(part)) as source:
                target = output.add_stream_from_template(source.streams.video[0])
                target.disposition = disposition
                targets.append(target)
        for (part, _), target in zip(parts, targets, strict=True):
            with av.open(str(part)) as source:
                for packet in source.demux(source.streams.video[0]):
                    if packet.dts is not None:
                        packet.stream = target
                        output.mux(packet)
    return path


NONE = Disposition(0)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "nut"])
@pytest.mark.parametrize("num_frames", [1, 2, 25])
@pytest.mark.parametrize("first", ["film", "poster"])
def test_a_larger_poster_is_never_taken_for_the_film(
    tmp_path: Path, film: Path, suffix: str, num_frames: int, first: str
) -> None:
    parts = [(film, NONE), (write_poster(tmp_path / "poster.mp4", num_frames), NONE)]
    both = join(tmp_path / f"both.{suffix}", parts if first == "film" else parts[::-1])
    assert probe(both).source.codec == "h264"
    assert len(numbers(decode(both))) == 40


def test_a_still_that_is_shown_as_long_as_the_film_is_not_taken_for_it(tmp_path: Path, film: Path) -> None:
    slow = Recipe(codec="mjpeg", pixel_format="yuvj420p", num_frames=1, rate=Recipe().rate / 100, width=384, height=256)
    still = write_video(tmp_path / "still.mp4", slow)
    for suffix in ("mp4", "mkv"):
        both = join(tmp_path / f"both.{suffix}", [(still, Disposition.default), (film, NONE)])
        assert probe(both).source.codec == "h264"


def test_of_moving_streams_the_default_one_is_taken_and_else_the_largest(tmp_path: Path, film: Path) -> None:
    large = write_video(tmp_path / "large.mp4", Recipe(codec="mpeg4", num_frames=100, width=192, height=128))
    default = Disposition.default
    for first, second, codec in ((NONE, NONE, "mpeg4"), (default, NONE, "h264"), (default, default, "mpeg4")):
        both = join(tmp_path / "both.mkv", [(film, first), (large, second)])
        assert probe(both).source.codec == codec


def test_a_poster_alone_is_a_video_of_one_frame(tmp_path: Path) -> None:
    posters = [(write_poster(tmp_path / f"{n}.mp4", width=96 * n, height=64 * n), NONE) for n in (1, 2)]
    assert probe(join(tmp_path / "posters.mkv", posters)).source.width == 192


def test_the_poster_of_a_film_that_cannot_be_decoded_does_not_stand_for_it(tmp_path: Path, film: Path) -> None:
    both = join(tmp_path / "both.mp4", [(film, NONE), (write_poster(tmp_path / "poster.mp4"), NONE)])
    both.write_bytes(both.read_bytes().replace(b"avc1", b"zzzz"))
    assert rejection(both).reason is Reason.UNSUPPORTED
