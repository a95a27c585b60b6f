"""Only listed decoders run: others are refused by name, and FFmpeg itself refuses them too."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest
from av.audio.stream import AudioStream
from av.codec import Codec, codecs_available

from tests.support.cli import SMALL, tokenize
from tests.support.combinations import write_combination
from tests.support.decoding import SPEC, probe
from tests.support.videos import Recipe, numbered_frame, write_video
from vidshard.pipeline.output.rejects import read_rejects
from vidshard.pipeline.video import container
from vidshard.pipeline.video.decode import decode_spans
from vidshard.pipeline.video.decoders import (
    DEFAULT_DECODERS,
    allowed_decoders,
    opening_whitelist,
    refuse_unknown_decoders,
)
from vidshard.pipeline.video.input_file import WatchedFile
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.errors import UserError
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Limits

RARE = ("cinepak", "msvideo1", "flashsv", "roqvideo", "snow", "zmbv", "smc", "targa", "sgi")


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Videos of codecs that are not on the list."""
    folder = tmp_path_factory.mktemp("rare")
    found = {name: write_combination(name, "nut", folder) for name in RARE}
    return {name: path for name, path in found.items() if path is not None}


def decoded(path: Path, limits: Limits) -> int:
    [span] = plan_spans(probe(path, limits), SPEC, 1000)
    [result] = decode_spans([span], SPEC, str(path), max_clips=100, limits=limits)
    if result.error is not None:
        raise result.error
    return len(result.clips)


def test_the_list_is_of_video_decoders_without_hardware_or_doubles() -> None:
    assert len(set(DEFAULT_DECODERS)) == len(DEFAULT_DECODERS) < 60
    refuse_unknown_decoders(DEFAULT_DECODERS)
    assert {"h264", "hevc", "vp9", "libdav1d", "mjpeg"} <= set(DEFAULT_DECODERS)


def test_a_codec_that_is_not_listed_is_refused_by_name_with_the_remedy(rare: dict[str, Path]) -> None:
    assert len(rare) > 4
    for name, path in rare.items():
        with pytest.raises(VideoError) as caught:
            probe(path, Limits())
        assert caught.value.reason is Reason.UNSUPPORTED
        assert f"--decoders default,{name} allows it" in caught.value.detail
        assert decoded(path, Limits(decoders=("default", name))) > 0
        assert decoded(path, Limits(decoders=("all",))) > 0


@pytest.mark.parametrize(("codec", "suffix"), [("libx264", "mp4"), ("libx265", "mkv"), ("libvpx-vp9", "webm")])
def test_common_codecs_run_and_can_be_forbidden(tmp_path: Path, codec: str, suffix: str) -> None:
    path = write_video(tmp_path / f"v.{suffix}", Recipe(codec=codec, num_frames=20))
    assert decoded(path, Limits()) > 0
    with pytest.raises(VideoError, match="not among the decoders of this run"):
        probe(path, Limits(decoders=("mpeg4",)))


def test_ffmpeg_itself_refuses_what_is_not_listed(rare: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The check by name does not stand alone: neither looking at a file nor decoding opens another decoder."""
    monkeypatch.setattr(container, "refuse_decoder", lambda *_: None)
    for path in rare.values():
        with (
            path.open("rb") as file,
            pytest.raises((VideoError, av.FFmpegError)),
            container.open_video(WatchedFile(file)) as (opened, stream),
        ):
            assert not list(opened.decode(stream))


def test_no_decoder_of_audio_or_subtitles_is_allowed() -> None:
    allowed = allowed_decoders(Limits().decoders)
    assert allowed is not None
    kinds = {Codec(name, "r").type for name in allowed if name in codecs_available}
    assert kinds == {"video"}
    names = opening_whitelist(Limits())["codec_whitelist"].split(",")
    assert {Codec(name, "r").type for name in names if name in codecs_available} == {"video", "audio"}


@pytest.mark.parametrize(
    ("suffix", "sound"),
    [("ts", "aac"), ("ts", "mp2"), ("ts", "ac3"), ("mpg", "mp2"), ("mpg", "ac3"), ("mkv", "aac"), ("avi", "ac3")],
)
def test_what_a_file_states_does_not_depend_on_the_list(tmp_path: Path, suffix: str, sound: str) -> None:
    path = tmp_path / f"v.{suffix}"
    with av.open(str(path), "w") as output:
        video = output.add_stream("mpeg2video" if suffix == "mpg" else "libx264", rate=25)
        audio = cast(AudioStream, output.add_stream(sound, rate=48000, layout="mono"))
        video.width, video.height = 96, 64
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, 96, 64), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            output.mux(video.encode(frame))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.float32), format="fltp", layout="mono")
            samples.pts, samples.rate, samples.time_base = number * 1920, 48000, Fraction(1, 48000)
            for resampled in av.AudioResampler(audio.format, "mono", 48000).resample(samples):
                output.mux(audio.encode(resampled))
        output.mux(video.encode(None))
    assert stated(path, ("default",)) == stated(path, ("all",))


def stated(path: Path, decoders: tuple[str, ...]) -> tuple[object, ...]:
    """Streams that FFmpeg finds on opening a file, and how much of the file it reads."""
    limits = Limits(decoders=decoders)
    with path.open("rb") as file, container.open_video(WatchedFile(file, limits=limits)) as (opened, stream):
        rates = (stream.average_rate, stream.base_rate, stream.guessed_rate)
        return (*rates, stream.time_base, stream.duration, stream.start_time, opened.duration, file.tell())


@pytest.mark.parametrize("name", ["h265", "libx264", "aac", "srt", "nothing"])
def test_a_name_that_is_no_video_decoder_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=name):
        refuse_unknown_decoders(["default", name])


def test_the_flag_allows_more_and_retries_what_was_rejected(rare: dict[str, Path], tmp_path: Path) -> None:
    [path, *_] = rare.values()
    out = tmp_path / "out"
    assert tokenize(path, "--out", out, *SMALL, "--max-reject-share", "1").exit_code in (0, 1)
    [row] = read_rejects(str(out)).to_pylist()
    assert (row["reason"], "--decoders default," in row["detail"]) == ("unsupported", True)
    again = tokenize(path, "--out", out, *SMALL, "--decoders", "default", "--decoders", path.stem, "--retry-rejected")
    assert again.exit_code == 0, again.output
    assert not read_rejects(str(out)).num_rows
    refused = tokenize(path, "--out", tmp_path / "other", *SMALL, "--decoders", "h265")
    assert refused.exit_code == 2
    assert "no video decoder 'h265'" in " ".join(refused.output.split())
