"""Every precision through every command: tokenize, verify, decode, and a second run that goes on."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import get_args

import av
import numpy as np
import pytest

from tests.support.cli import vidshard_exits
from tests.support.videos import Recipe, write_video
from vidshard.models.tokenizer import get_preset
from vidshard.models.weights import load_tokenizer, save_tokenizer, weights_digest
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.shard_reader import open_shard, read_clips
from vidshard.pipeline.tokenizer_source import PRECISIONS, TokenizerSource
from vidshard.schemas.errors import UserError
from vidshard.schemas.runs import TokenizeRun

ALL_PRECISIONS = [name for name in get_args(TokenizeRun.model_fields["precision"].annotation) if name != "auto"]
SMALL = ("--fps", "4", "--frames", "5", "--size", "32", "--local")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, num_frames in (("a.mp4", 40), ("b.mp4", 25)):
        write_video(folder / name, Recipe(num_frames=num_frames, rate=Fraction(10)))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Flags that name a tokenizer: weights from the box, of a file, and a seed."""
    folder = tmp_path_factory.mktemp("weights")
    flags = {"shipped": [], "seeded": ["--tokenizer", "tiny_kl", "--random-weights", "3"]}
    for name in ("tiny", "tiny_kl"):
        path = folder / f"{name}.safetensors"
        save_tokenizer(path, load_tokenizer(get_preset(name), None, seed=1))
        flags[f"file of {name}"] = ["--weights", str(path)]
    return flags


def test_the_setting_names_the_precisions_that_there_are() -> None:
    assert set(ALL_PRECISIONS) == set(PRECISIONS)


@pytest.mark.parametrize(
    ("source", "precision"),
    [
        *product(["shipped", "seeded", "file of tiny", "file of tiny_kl"], ["float32", "bfloat16"]),
        *product(["seeded", "file of tiny"], sorted({*ALL_PRECISIONS} - {"float32", "bfloat16"})),
    ],
)
def test_every_precision_tokenizes_goes_on_verifies_and_decodes(
    source: str, precision: str, videos: Path, weights: dict[str, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    run = ("tokenize", "--out", out, *weights[source], "--precision", precision, *SMALL)
    code, printed = vidshard_exits(*run, videos / "a.mp4")
    assert code == 0, printed
    first = {path: Path(path).read_bytes() for path in shard_paths(str(out))}
    code, printed = vidshard_exits(*run, videos)
    assert code == 0, printed
    after = {path: Path(path).read_bytes() for path in shard_paths(str(out))}
    assert first.items() < after.items()
    code, printed = vidshard_exits(*run, videos)
    assert code == 0, printed
    assert "0 written in 0 shards" in printed
    code, printed = vidshard_exits("verify", out, "--exact", 1)
    assert code == 0, printed
    assert "encoded 6 clips again" in printed
    code, printed = vidshard_exits("decode", out, "--all", tmp_path / "clips", "--each-clip")
    assert code == 0, printed
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 6


@pytest.mark.parametrize("precision", ALL_PRECISIONS)
def test_the_digest_is_that_of_the_float32_weights_in_every_precision(precision: str) -> None:
    config = get_preset("tiny")
    digest = weights_digest(load_tokenizer(config, None, seed=0).state_dict())
    source = TokenizerSource(config=config, weights=None, seed=0).with_digest()
    assert source.sha256 == digest
    assert source.load("cpu", PRECISIONS[precision]).dtype is PRECISIONS[precision]
    other = TokenizerSource(config=config, weights=None, seed=1, sha256=digest)
    with pytest.raises(UserError, match="not those expected"):
        other.load("cpu", PRECISIONS[precision])


def test_precisions_do_not_mix_in_an_output(videos: Path, tmp_path: Path) -> None:
    run = ("tokenize", videos / "a.mp4", "--out", tmp_path / "tokens", "--tokenizer", "tiny", *SMALL)
    assert vidshard_exits(*run)[0] == 0
    code, printed = vidshard_exits(*run, "--precision", "bfloat16")
    assert code == 2
    assert "precision: 'float32' there, 'bfloat16' now" in printed
    [path] = shard_paths(str(tmp_path / "tokens"))
    with open_shard(path) as (_, provenance):
        assert provenance.identity["precision"] == "float32"
    assert len(list(read_clips(path))) == 4


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two gray videos, a white one, and weights with which white overflows float16."""
    folder = tmp_path_factory.mktemp("overflowing")
    for name, level in (("gray.mkv", 128), ("white.mkv", 255), ("grayish.mkv", 129)):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("ffv1", rate=4, width=32, height=32, pix_fmt="bgr0")
            for _ in range(5):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8))))
            container.mux(stream.encode())
    model = load_tokenizer(get_preset("tiny"), None, seed=1)
    model.state_dict()["encoder.conv_in.conv.weight"].mul_(3e4)
    save_tokenizer(folder / "large.safetensors", model)
    return folder


def test_a_video_that_overflows_float16_costs_itself_and_a_run_of_nothing_else_fails(
    overflowing: Path, tmp_path: Path
) -> None:
    def tokenized(out: str, precision: str, *videos: str) -> tuple[int, str]:
        weights = overflowing / "large.safetensors"
        run = ("tokenize", "--out", tmp_path / out, "--weights", weights, "--precision", precision, *SMALL)
        return vidshard_exits(*run, *(overflowing / name for name in videos))

    code, printed = tokenized("half", "float16", "gray.mkv", "white.mkv", "grayish.mkv")
    assert code == 0, printed
    assert "2 written in" in printed
    assert "1 x not_finite: float16 ends at 65,504: give --precision bfloat16 or float32" in printed
    code, printed = tokenized("half", "float16", "gray.mkv", "white.mkv", "grayish.mkv")
    assert code == 0, printed
    code, printed = tokenized("alone", "float16", "white.mkv")
    assert code == 1, printed
    assert "1 of 1 video gave values that are not finite in float16" in printed
    code, printed = tokenized("wide", "bfloat16", "white.mkv")
    assert code == 0, printed
    assert "1 written in" in printed


def test_a_video_that_overflows_one_tokenizer_is_measured_by_none(overflowing: Path, tmp_path: Path) -> None:
    large = f"tiny={overflowing / 'large.safetensors'}"
    run = ("evaluate", "--tokenizer", "tiny", "--tokenizer", large, "--precision", "float16", *SMALL, "--no-lpips")
    videos = [overflowing / name for name in ("gray.mkv", "white.mkv", "grayish.mkv")]
    code, printed = vidshard_exits(*run, "--out", tmp_path / "all", *videos)
    assert code == 0, printed
    assert "Rejected: 1 x not_finite" in printed
    record = json.loads((tmp_path / "all" / "scores.json").read_text())
    assert [row["videos"] for row in record["rows"]] == [2, 2], "both are measured on the same clips"
    code, printed = vidshard_exits(*run, "--out", tmp_path / "alone", videos[1])
    assert code == 1, printed
    assert "no clip could be scored: all were rejected: 1 x not_finite" in printed
