"""Outputs that the first version of vidshard wrote are read, verified, decoded, exported, trained on and continued.

``tests/fixtures/format_1`` was written by the commit before the import name changed, from videos of
``tests.support.videos``: three outputs of ``a.mp4``, one of which also met ``text.mp4``, with random weights of seed 0.
The videos lie elsewhere now, as they do after a move to another machine.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import vidshard
from tests.support.cli import vidshard_exits
from tests.support.exports import tar_samples
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.shard_reader import open_shard, read_clips
from vidshard.schemas.tokens import FORMAT_VERSION, latents_payload, tokens_payload

FIXTURE = Path(__file__).parents[2] / "fixtures" / "format_1"
SMALL = ("--fps", "4", "--frames", "5", "--size", "32")
RUNS: dict[str, tuple[str, ...]] = {
    "tokens": ("--tokenizer", "tiny", *SMALL),
    "latents": ("--tokenizer", "tiny_kl", *SMALL, "--keep-logvar"),
    "continuous": ("--tokenizer", "tiny", *SMALL, "--continuous", "--clips-per-span", "4"),
}


@pytest.fixture(params=RUNS)
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE / request.param, tmp_path / request.param))


def test_the_payload_of_format_1_is_read(output: Path) -> None:
    [path] = shard_paths(str(output))
    with open_shard(path) as (_, provenance):
        assert provenance.format_version == FORMAT_VERSION
        if output.name == "latents":
            assert provenance.payload == latents_payload((4, 2, 4, 4), keep_logvar=True)
        else:
            assert provenance.payload == tokens_payload((2, 4, 4), 32768)
    clips = list(read_clips(path))
    expected = json.loads((FIXTURE / "values.json").read_text())[output.name]
    assert len(clips) == len(expected) > 0
    for clip in clips:
        (values,) = clip.payload.values()
        np.testing.assert_array_equal(values.reshape(-1)[:8].astype(np.float64), expected[clip.clip_id])


def test_the_same_command_continues_an_output_of_the_first_version(output: Path) -> None:
    before = {path: Path(path).read_bytes() for path in shard_paths(str(output))}
    run = ("tokenize", FIXTURE / "videos", "--out", output, *RUNS[output.name], "--local")
    code, printed = vidshard_exits(*run)
    assert code == 0, printed
    after = {path: Path(path).read_bytes() for path in shard_paths(str(output))}
    assert before.items() < after.items()  # a.mp4 is known again by its content, b.mkv is new
    assert len(after) == 2
    code, printed = vidshard_exits(*run)
    assert code == 0, printed
    assert {path: Path(path).read_bytes() for path in shard_paths(str(output))} == after
    code, printed = vidshard_exits("verify", output)
    assert code == 0, printed
    assert "verified 2 of 2 shards" in printed


def test_an_output_of_the_first_version_is_inspected_and_decoded(output: Path, tmp_path: Path) -> None:
    code, printed = vidshard_exits("inspect", output)
    assert code == 0, printed
    code, printed = vidshard_exits("decode", output, "--all", tmp_path / "clips", "--each-clip")
    assert code == 0, printed
    [path] = shard_paths(str(output))
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == len(list(read_clips(path)))


def test_an_output_of_the_first_version_is_exported_and_read_into_batches(output: Path, tmp_path: Path) -> None:
    [path] = shard_paths(str(output))
    ids = {clip.clip_id for clip in read_clips(path)}
    code, printed = vidshard_exits("export", output, tmp_path / "tars", "--to", "webdataset")
    assert code == 0, printed
    assert len(tar_samples(tmp_path / "tars")) == len(ids)
    batches = list(vidshard.TokenShards(str(output), batch_size=2, shuffle=False, columns=["clip_id"]))
    assert {clip_id for batch in batches for clip_id in batch["clip_id"]} == ids


def test_other_settings_than_those_of_the_first_version_are_refused(output: Path) -> None:
    code, printed = vidshard_exits(
        "tokenize", FIXTURE / "videos", "--out", output, *RUNS[output.name], "--tail", "drop"
    )
    assert code == 2
    assert "tail: 'pad' there, 'drop' now" in printed
