"""``--json``: one object on standard output, the words for people on standard error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.support.cli import SMALL, tokenize
from tests.support.videos import Recipe, write_video
from vidshard.jobs.cli import vidshard
from vidshard.jobs.runtime.terminal import print_json
from vidshard.pipeline.output.layout import shard_paths


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    (folder / "videos").mkdir()
    write_video(folder / "videos/good.mp4", Recipe(num_frames=40))
    (folder / "videos/text.mp4").write_text("no video")
    result = tokenize(folder / "videos", "--out", folder / "tokens", *SMALL)
    assert result.exit_code == 0, result.output
    return folder


def _printed(*arguments: object, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(vidshard, [*map(str, arguments), "--json"])
    assert result.exit_code == code, result.output
    [line] = result.stdout.splitlines()
    record = json.loads(line)
    assert isinstance(record, dict)
    return record


def test_inspect_gives_counts_provenance_and_rejections(folder: Path) -> None:
    record = _printed("inspect", folder / "tokens")
    assert (record["num_shards"], record["num_videos"], record["rejects"]) == (1, 1, {"not_a_video": 1})
    assert record["num_clips"] > 0
    assert record["provenance"]["tokenizer"] == "tiny"
    assert [column["name"] for column in record["payload"]] == ["tokens"]


def test_verify_says_whether_an_output_is_whole_and_what_is_broken(folder: Path, tmp_path: Path) -> None:
    record = _printed("verify", folder / "tokens")
    assert record["is_whole"]
    assert record["problems"] == []
    assert record["videos_by_status"] == {"tokenized": 1, "rejected": 1}
    assert record["num_pending_spans"] == 0

    result = tokenize(folder / "videos", "--out", tmp_path / "tokens", *SMALL)
    assert result.exit_code == 0
    [shard] = shard_paths(str(tmp_path / "tokens"))
    Path(shard).write_bytes(Path(shard).read_bytes()[:-100])
    record = _printed("verify", tmp_path / "tokens", code=1)
    assert not record["is_whole"]
    assert shard in record["problems"][0]


def test_plan_gives_the_forecast(folder: Path) -> None:
    record = _printed("plan", folder / "videos", *SMALL, "--local")
    assert (record["videos"], record["rejected_videos"]) == (2, 1)
    assert record["clips"] > 0


def test_numbers_that_json_lacks_and_control_characters_are_written_safely(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), 1.5], "b": "\x1b[2J\u202e"})
    assert capsys.readouterr().out == '{"a": [null, 1.5], "b": "\\u001b[2J\\u202e"}\n'
