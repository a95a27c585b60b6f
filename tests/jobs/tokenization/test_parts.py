"""Runs on parts of videos: times of a manifest, flags that choose clips, frame sizes by aspect ratio."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.cli import run, tokenize
from tests.support.shards import clips_of
from tests.support.videos import Recipe, write_video
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.rejects import read_rejects
from vidshard.pipeline.output.shard_reader import open_shard

SMALL = ("--tokenizer", "tiny", "--fps", "5", "--frames", "5")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 seconds."""
    return write_video(tmp_path_factory.mktemp("parts") / "v.mp4", Recipe(num_frames=700, b_frames=2, gop=50))


def values_of(out: Path) -> list[dict[str, Any]]:
    return [clip.values for clip in clips_of(out)]


def test_rows_of_a_manifest_name_parts_of_videos(video: Path, tmp_path: Path) -> None:
    short = write_video(tmp_path / "short.mp4", Recipe(num_frames=30))
    names = ("uri", "start_seconds", "end_seconds", "caption")
    shots = [
        (str(video), 1.2, 3.2, "one"),
        (str(short), None, None, "all"),
        (str(video), 20.0, 21.4, "two"),
        (str(video), 3.2, 4.0, "three"),
        (str(video), 99.0, 100.0, "none"),
    ]
    manifest = tmp_path / "shots.parquet"
    pq.write_table(pa.Table.from_pylist([dict(zip(names, shot, strict=True)) for shot in shots]), manifest)
    out = tmp_path / "out"
    result = tokenize(manifest, "--out", out, *SMALL, "--size", "32")
    assert result.exit_code == 0, result.output
    assert "2 videos, 5 parts of them" in result.output
    rows = values_of(out)
    found = {(r["caption"], r["part_start_seconds"], r["part_end_seconds"], r["start_seconds"]) for r in rows}
    assert found == {
        ("one", 1.2, 3.2, 1.2),
        ("one", 1.2, 3.2, 2.2),
        ("two", 20.0, 21.4, 20.0),
        ("two", 20.0, 21.4, 21.0),
        ("three", 3.2, 4.0, 3.2),
        ("all", None, None, 0.0),
        ("all", None, None, 1.0),
    }
    assert Counter(r["num_valid_frames"] for r in rows if r["caption"] == "two") == {5: 1, 2: 1}
    [reject] = read_rejects(str(out)).to_pylist()
    assert (reject["reason"], reject["start_seconds"]) == ("too_short", 99.0)
    again = tokenize(manifest, "--out", out, *SMALL, "--size", "32")
    assert again.exit_code == 0, again.output
    assert "0 written" in again.output
    verified = run("verify", out, "--exact", 1)
    assert verified.exit_code == 0, verified.output
    assert "encoded 7 clips again" in verified.output


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"start_seconds": [None, 2.0], "end_seconds": [None, 1.0]}, "a part must end after it starts"),
        ({"start_seconds": [None, -1.0]}, "a part cannot start before the video"),
    ],
)
def test_a_row_with_impossible_times_is_rejected_and_the_others_are_tokenized(
    video: Path, tmp_path: Path, columns: dict[str, list[Any]], words: str
) -> None:
    manifest = tmp_path / "shots.parquet"
    pq.write_table(pa.table({"uri": [str(video)] * 2, **columns}), manifest)
    result = tokenize(manifest, "--out", tmp_path / "out", *SMALL, "--size", "32")
    assert result.exit_code == 0
    [rejected] = read_rejects(str(tmp_path / "out")).to_pylist()
    assert rejected["reason"] == "bad_row"
    assert "row 2" in rejected["detail"]
    assert words in rejected["detail"]
    assert clips_of(tmp_path / "out")


def test_each_video_goes_to_its_bucket_and_no_shard_mixes_them(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    sizes = {"wide": (112, 64), "tall": (64, 112), "square": (80, 80), "wide2": (128, 72)}
    for name, (width, height) in sizes.items():
        write_video(folder / f"{name}.mp4", Recipe(num_frames=30, width=width, height=height))
    write_video(folder / "turned.mp4", Recipe(num_frames=30, width=64, height=112, rotation_degrees=90))
    out = tmp_path / "out"
    arguments = (folder, "--out", out, *SMALL, "--buckets", "64x64,64x112,112x64", "--batch-size", "2")
    result = tokenize(*arguments)
    assert result.exit_code == 0, result.output
    buckets = {Path(row["uri"]).stem: row["bucket"] for row in values_of(out)}
    expected = {"wide": "64x112", "wide2": "64x112", "tall": "112x64", "square": "64x64", "turned": "112x64"}
    assert buckets == expected
    for path in shard_paths(str(out)):
        with open_shard(path) as (parquet, provenance):
            assert len(set(parquet.read(columns=["bucket"])["bucket"].to_pylist())) == 1
            height, width = map(int, parquet.read(columns=["bucket"])["bucket"][0].as_py().split("x"))
            assert provenance.payload[0].shape[-2:] == (height // 8, width // 8)
            assert Path(path).name.startswith(f"{height}x{width}-")
    assert json.loads((out / "run.json").read_text())["identity"]["buckets"] == "64x64,64x112,112x64"
    verified = run("verify", out, "--exact", 1)
    assert verified.exit_code == 0, verified.output
    decoded = run("decode", out, "--all", tmp_path / "clips", "--side-by-side")
    assert decoded.exit_code == 0, decoded.output
    assert len(list((tmp_path / "clips").iterdir())) == 10
    changed = tokenize(*arguments[:-4], "--buckets", "64x64,64x112", "--batch-size", "2")
    assert changed.exit_code == 2
    assert "buckets: '64x64,64x112,112x64' there, '64x64,64x112' now" in changed.output


def test_the_commands_flags_choose_parts(video: Path, tmp_path: Path) -> None:
    flags = ("--start", "0:10", "--end", "20", "--clips-per-video", "3", "--stride-seconds", "1", "--size", "32")
    result = tokenize(video, "--out", tmp_path / "out", *SMALL, *flags)
    assert result.exit_code == 0, result.output
    starts = [row["start_seconds"] for row in values_of(tmp_path / "out")]
    assert len(starts) == 3
    assert 10 <= min(starts) < max(starts) <= 19
    both = tokenize(video, "--out", tmp_path / "other", *SMALL, "--continuous", "--stride-seconds", "1", "--size", "32")
    assert both.exit_code == 2
    assert "--continuous is one sequence" in " ".join(both.output.split())
