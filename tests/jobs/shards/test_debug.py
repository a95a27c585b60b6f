"""``vidshard debug``: what each stage gives for a span, as in the run, and nothing written to the output."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from tests.support.cli import SMALL, printed_by, run, tokenize
from tests.support.http_server import http_server
from tests.support.shards import clips_of
from tests.support.videos import Recipe, read_frame_number, write_damaged, write_video
from vidshard.pipeline.decode_stage import forget_processes
from vidshard.pipeline.output.committed import committed_spans


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``videos/`` (good, damaged, no video) and their output ``tokens/``."""
    folder = tmp_path_factory.mktemp("debug")
    videos = folder / "videos"
    videos.mkdir()
    write_video(videos / "good.mp4", Recipe(num_frames=40, width=160, height=96))
    whole = write_video(folder / "whole.mp4", Recipe(num_frames=300, gop=25, width=160, height=96))
    write_damaged(videos / "damaged.mp4", whole, share=0.5, num_bytes=900)
    (videos / "text.mp4").write_text("no video")
    result = tokenize(videos, "--out", folder / "tokens", *SMALL, "--clips-per-span", "4")
    assert result.exit_code == 0, result.output
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_stage_of_a_committed_span_is_shown_and_the_output_stays_as_it_is(output: Path, tmp_path: Path) -> None:
    before = _files(output)
    said = printed_by(
        "debug", output / "tokens", "--uri", output / "videos/good.mp4", "--pictures", tmp_path / "pictures"
    )
    clips = [clip for clip in clips_of(output / "tokens") if clip.values["uri"].endswith("good.mp4")]
    tokens = np.concatenate([clip.payload["tokens"].reshape(-1) for clip in clips])
    assert f"id {clips[0].values['video_id']}" in said
    assert ": committed" in said
    assert (
        f"encode tokens: {len(tokens):,} values of {len(clips)} clips, uint16, from {tokens.min()} to {tokens.max()}, "
        f"mean {tokens.astype(float).mean():.6g}, {len(np.unique(tokens))} different" in said
    )
    assert _files(output) == before


def test_a_place_that_can_hold_no_pictures_is_named(output: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        result = run("debug", output / "tokens", "--uri", output / "videos/good.mp4", "--pictures", place)
        assert result.exit_code == 2
        assert f"--pictures {place}: " in result.output
    assert (tmp_path / "file").read_text() == "mine"


def test_the_pictures_are_the_frames_that_the_run_sampled(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "numbered.mp4", Recipe(num_frames=40, width=256, height=256))
    size = ("--tokenizer", "tiny", "--fps", "5", "--frames", "5", "--size", "256")
    assert tokenize(videos, "--out", tmp_path / "tokens", *size).exit_code == 0
    command = ("debug", tmp_path / "tokens", "--uri", videos / "numbered.mp4", "--no-encode")
    assert "encode" not in printed_by(*command, "--pictures", tmp_path / "pictures")
    first = min((tmp_path / "pictures").iterdir())
    with av.open(str(first)) as container:
        sheet = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(np.uint8)
    assert sheet.shape == (256, 5 * 256, 3)
    [clip, *_] = clips_of(tmp_path / "tokens")
    shown = [read_frame_number(sheet[:, 256 * i : 256 * (i + 1)]) for i in range(5)]
    assert shown == [round(25 * seconds) for seconds in clip.values["frame_pts_seconds"]]


def test_the_rejected_spans_of_a_video_are_replayed_and_named_with_their_reason(output: Path) -> None:
    said = printed_by("debug", output / "tokens", "--uri", output / "videos/damaged.mp4", code=1)
    assert "rejected as decode_error" in said  # in the run
    assert "rejected, decode_error" in said  # again
    assert "of the video" in said


def test_a_video_that_could_not_be_opened_says_why_again(output: Path) -> None:
    said = printed_by("debug", output / "tokens", "--uri", output / "videos/text.mp4", code=1)
    assert "open rejected, not_a_video" in said


def test_a_span_is_found_by_the_beginning_of_its_id(output: Path) -> None:
    span = committed_spans(str(output / "tokens"))[0].as_py()
    said = printed_by("debug", output / "tokens", "--span", span[:-1])
    assert f"span {span}, clips" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--span", "nothing"), "--span nothing is no span of the plan, whose ids are such as"),
        (("--span", ""), "is the beginning of"),
        (("--uri", "other.mp4"), "other.mp4 is not in the plan of"),
        ((), "give one of --span ID and --uri VIDEO"),
        (("--span", "a", "--uri", "b"), "give one of --span ID and --uri VIDEO"),
    ],
)
def test_what_is_not_in_the_plan_is_refused_by_name(output: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in printed_by("debug", output / "tokens", *arguments, code=2)


def test_what_is_no_output_is_refused_by_name(tmp_path: Path) -> None:
    assert "has no run.json" in printed_by("debug", tmp_path, "--span", "a", code=2)


def test_a_remote_source_is_fetched_on_request_and_from_private_addresses_only_where_they_are_named(
    output: Path, tmp_path: Path
) -> None:
    content = (output / "videos/good.mp4").read_bytes()
    with http_server(lambda _path: content) as server:
        uri = f"{server.url}/good.mp4"
        assert tokenize(uri, "--out", tmp_path / "tokens", *SMALL).exit_code == 0
        span = committed_spans(str(tmp_path / "tokens"))[0].as_py()
        by_span, by_uri = (
            ("debug", tmp_path / "tokens", "--no-encode", *of) for of in (("--span", span), ("--uri", uri))
        )
        asked = len(server.asked)
        forget_processes()  # which keep a connection of that run, as no other command would
        assert "is not fetched by itself" in printed_by(*by_uri, code=2)
        assert "127.0.0.1 is refused" in printed_by(*by_span, "--fetch-sources", code=1)
        assert len(server.asked) == asked
        assert "decode" in printed_by(*by_span, "--fetch-sources", "--allow-private")
        assert "decode" in printed_by(*by_uri, "--fetch-sources")


def test_pictures_of_a_damaged_span_are_of_the_clips_that_are_whole(output: Path, tmp_path: Path) -> None:
    out, damaged = output / "tokens", output / "videos/damaged.mp4"
    said = printed_by("debug", out, "--uri", damaged, "--no-encode", "--pictures", tmp_path / "seen", code=1)
    assert "decode 0 clips of span" in said, "as the run did"
    assert "of the clips that are whole, which --damaged keep would store" in said
    assert list((tmp_path / "seen").glob("*.png"))
    kept = printed_by("debug", out, "--uri", damaged, "--damaged", "keep", code=1)
    assert "decode 0 clips" not in kept
    assert "--damaged keep" in said
    assert "--damaged keep" not in kept, "it is the remedy no longer"
    assert "encode" in kept
    printed_by(
        "debug", out, "--uri", damaged, "--no-encode", "--damaged", "reject", "--pictures", tmp_path / "none", code=1
    )
    assert not (tmp_path / "none").exists(), "an empty folder is left"
