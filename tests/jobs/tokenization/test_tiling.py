"""Runs that cut frames into tiles: tiled as asked, decoded with the same tiles, and refused where they cannot be."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from tests.support.cli import run
from tests.support.videos import Recipe, write_video
from vidshard.models.tokenizer import frames_to_input
from vidshard.models.vidtok.model import VidTok
from vidshard.models.vidtok.tiling import Tiling
from vidshard.pipeline.decode_stage import decode_again
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.shard_reader import read_clips
from vidshard.schemas.video import ClipSpec

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_job_tiles_and_decodes_with_the_tiles_that_it_had(tmp_path: Path, tiny: VidTok) -> None:
    video = write_video(tmp_path / "v.mp4", Recipe(num_frames=5, rate=Fraction(8)))
    command = (
        "tokenize",
        video,
        "--out",
        tmp_path / "out",
        "--tokenizer",
        "tiny",
        "--frames",
        5,
        "--size",
        "48x64",
        "--local",
    )
    tiles = ("--tile-size", 32, "--tile-overlap", 16)
    tokenized = run(*command, *tiles)
    assert tokenized.exit_code == 0, tokenized.output
    (path,) = shard_paths(str(tmp_path / "out"))
    (clip,) = read_clips(path)
    spec = ClipSpec(fps=Fraction(8), num_frames=5, height=48, width=64)
    frames = torch.from_numpy(decode_again(str(video), clip.values["video_id"], 0, spec)[0].frames)[None]
    with torch.inference_mode():
        tokens = tiny.encode(frames_to_input(frames), tiling=Tiling(height=32, width=32, overlap=16)).tokens
        whole = tiny.encode(frames_to_input(frames)).tokens
    assert tokens is not None
    assert whole is not None
    assert clip.payload["tokens"].tolist() == tokens[0].tolist() != whole[0].tolist()

    files = {}
    for name, more in {"as stored": (), "tiled": tiles, "one tile": ("--tile-size", "48x64")}.items():
        target = tmp_path / f"{name}.mp4"
        decoded = run("decode", tmp_path / "out", "--clip", clip.clip_id, "--to", target, *more)
        assert decoded.exit_code == 0, decoded.output
        files[name] = target.read_bytes()
    assert files["as stored"] == files["tiled"] != files["one tile"]

    again = run(*command, "--tile-size", 40, "--tile-overlap", 16)
    assert again.exit_code == 2
    assert "tile_size: '32x32' there, '40x40' now" in again.output
    assert "tile_size: '32x32' there, None now" in run(*command).output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tile-size", 100), "tile height must be divisible by 8, got 100; nearest: 96 or 104"),
        (("--tile-size", 32), "tiles must be larger than their overlap"),
        (("--tile-size", "big"), "height x width"),
        (("--tile-size", 64, "--tile-overlap", -8), "greater than or equal to 0"),
    ],
)
def test_the_job_refuses_impossible_tiles_before_it_starts(
    tmp_path: Path, arguments: tuple[object, ...], words: str
) -> None:
    result = run("tokenize", "v.mp4", "--out", tmp_path / "out", "--tokenizer", "tiny", "--local", *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
