"""`vidshard verify`: what was stored, held against encoding it again."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.cli import printed_by, run, vidshard_exits
from tests.support.models import small
from tests.support.videos import Recipe, write_video
from vidshard.models.weights import load_tokenizer, save_tokenizer
from vidshard.pipeline.output.layout import shard_paths

FIXTURE = Path(__file__).parents[2] / "fixtures" / "format_1" / "tokens"
CASES: dict[str, tuple[str, list[Any]]] = {
    "clips": ("fsq_causal_488_262144", ["--frames", 9]),
    "a continuous sequence": ("fsq_causal_488_32768_v1_1", ["--frames", 9, "--continuous", "--clips-per-span", 4]),
    "not causal": ("fsq_noncausal_488_262144", ["--frames", 8]),
    "padded": ("fsq_causal_488_262144", ["--frames", 7, "--pad-frames", "repeat-first"]),
    "tiled": ("fsq_causal_488_262144", ["--frames", 9, "--size", 32, "--tile-size", 24, "--tile-overlap", 8]),
    "latents": ("kl_causal_288_8chn_v1_1", ["--frames", 8]),
}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "v.mp4", Recipe(num_frames=100, rate=Fraction(10)))


def tokenized(case: str, video: Path, folder: Path) -> Path:
    name, settings = CASES[case]
    save_tokenizer(folder / "small.safetensors", load_tokenizer(small(name), None, seed=0))
    size = [] if "--size" in settings else ["--size", 16]
    run = [video, "--out", folder / "out", "--weights", folder / "small.safetensors", "--fps", 8, *size, *settings]
    code, printed = vidshard_exits("tokenize", *run, "--local")
    assert code == 0, printed
    return folder / "out"


@pytest.mark.parametrize("case", CASES)
def test_encoding_again_by_another_cut_gives_what_is_stored(case: str, video: Path, tmp_path: Path) -> None:
    out = tokenized(case, video, tmp_path)
    code, printed = vidshard_exits("verify", out, "--exact", 1)
    assert code == 0, printed
    assert "verified 1 of 1 shard" in printed
    assert "clips again by another cut (100.00% of all, seed 0): 0 of" in printed


def test_a_share_of_the_clips_is_enough(video: Path, tmp_path: Path) -> None:
    out = tokenized("clips", video, tmp_path)
    code, printed = vidshard_exits("verify", out, "--exact", 0.3, "--seed", 1)
    assert code == 0, printed
    assert "encoded 3 clips again by another cut (30.00% of all, seed 1)" in printed


def test_a_token_that_was_changed_is_found(video: Path, tmp_path: Path) -> None:
    out = tokenized("a continuous sequence", video, tmp_path)
    (path,) = shard_paths(str(out))
    table = pq.read_table(path)
    tokens = table["tokens"].to_pylist()
    tokens[4][0] ^= 1
    changed = table.set_column(
        table.schema.get_field_index("tokens"),
        table.schema.field("tokens"),
        pa.array(tokens, table.schema.field("tokens").type),
    )
    pq.write_table(changed, path)
    code, printed = vidshard_exits("verify", out, "--exact", 1)
    assert code == 1, printed
    assert ": 1 of" in printed
    assert f"differs: {table['clip_id'][4].as_py()}" in printed


def test_a_source_that_is_gone_is_named_and_comparing_nothing_is_no_success(tmp_path: Path) -> None:
    video = write_video(tmp_path / "gone.mp4", Recipe(num_frames=20, rate=Fraction(10)))
    out = tokenized("clips", video, tmp_path)
    video.unlink()
    code, printed = vidshard_exits("verify", out, "--exact", 1)
    assert code == 1, printed
    assert "no clip was compared: none of their sources can be read" in printed
    assert "encoded 0 clips again" in printed
    assert "not compared: " in printed
    assert "gone.mp4" in printed


@pytest.mark.parametrize("share", [0, 1.5, "some"])
def test_a_share_lies_between_nothing_and_all(tmp_path: Path, share: Any) -> None:
    code, printed = vidshard_exits("verify", tmp_path, "--exact", share)
    assert code == 2
    assert "--exact" in json.dumps(printed)


def test_verify_names_a_clip_that_stands_in_two_shards(output: Path, tmp_path: Path) -> None:
    (path,) = shard_paths(str(output))
    (tmp_path / "shards").mkdir()
    for name in ("one", "two"):
        (tmp_path / "shards" / f"{name}.parquet").write_bytes(Path(path).read_bytes())
    result = run("verify", tmp_path)
    assert result.exit_code == 1
    assert "of another shard" in result.output


def test_the_former_name_of_audit_works_and_is_noted(tmp_path: Path) -> None:
    printed = printed_by("verify", FIXTURE, "--account", tmp_path / "videos.csv")
    assert "note: --account is now --audit" in printed
    assert (tmp_path / "videos.csv").exists()
    both = ("--account", tmp_path / "a.csv", "--audit", tmp_path / "b.csv")
    assert "give it once" in printed_by("verify", FIXTURE, *both, code=2)


def test_what_can_be_repaired_names_the_flag_that_does_it(tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    shutil.copytree(FIXTURE, out)
    [shard, *_] = map(Path, shard_paths(str(out)))
    shard.write_bytes(shard.read_bytes()[:-500])
    for where in (out, shard):
        said = printed_by("verify", where, code=1)
        assert f"`vidshard verify {out} --repair`" in said
    assert "repaired" in printed_by("verify", out, "--repair", code=1)
    assert "--repair" not in printed_by("verify", out)
