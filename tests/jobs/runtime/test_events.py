"""The event log: its schema, what it never holds, and files that cannot be written."""

from __future__ import annotations

import json
import os
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.cli import SMALL, run, tokenize
from vidshard.jobs.runtime.errors import Terminated
from vidshard.jobs.runtime.events import EVENTS, EventLog, events_of, mode_of, reported
from vidshard.jobs.runtime.progress import PhaseProgress, warn
from vidshard.pipeline.output.layout import shard_paths
from vidshard.schemas.errors import RunFailedError, UserError
from vidshard.schemas.fields import ProgressMode, ReportSettings


def events(path: Path) -> list[dict[str, Any]]:
    """The events of a file, each checked against the schema."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for event in found:
        assert event.keys() == {"time", "run", "event", *EVENTS[event["event"]][1]}
        assert event["time"].endswith("Z")
    return found


def named(found: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in found if event["event"] == name]


@pytest.fixture(scope="module")
def tokenized(good_videos: Path, bad_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run with its log ``log.json`` beside the output ``tokens``; the run was started twice."""
    folder = tmp_path_factory.mktemp("events")
    for _ in range(2):
        arguments = (good_videos, bad_videos, "--out", folder / "tokens", *SMALL, "--log-json", folder / "log.json")
        result = tokenize(*arguments)
        assert result.exit_code == 0, result.output
    return folder


def test_every_span_and_every_rejection_of_a_run_is_an_event(tokenized: Path) -> None:
    found = events(tokenized / "log.json")
    first = [event for event in found if event["run"] == found[0]["run"]]
    names = [event["event"] for event in first if event["event"] not in ("progress", "warning")]
    assert names[:2] == ["started", "run_started"]
    assert names[-2:] == ["summary", "ended"]
    [planned], [summary] = named(first, "planned"), named(first, "summary")
    assert summary["result"].keys() == json.loads((tokenized / "tokens" / "summary.json").read_text()).keys()
    written = summary["result"]["written"]
    finished, rejected = named(first, "span_finished"), named(first, "span_rejected")
    assert len(finished) == written["num_spans"]
    assert sum(event["clips"] for event in finished) == written["num_clips"] > 0
    assert len(rejected) == written["num_rejected_spans"] + written["num_damaged_spans"]
    assert len({event["span_id"] for event in finished}) == len(finished)
    shards = named(first, "shard_written")
    assert sorted(event["path"] for event in shards) == sorted(shard_paths(str(tokenized / "tokens")))
    for name, total in (("clips", "num_clips"), ("spans", "num_spans"), ("bytes", "file_bytes")):
        assert sum(event[name] for event in shards) == written[total]
    assert planned["left"] == len({e["span_id"] for e in [*finished, *rejected]})
    reasons = [event["reason"] for event in [*rejected, *named(first, "video_rejected")]]
    assert sorted(reasons) == sorted(
        reason for reason, count in summary["result"]["reasons"].items() for _ in range(count)
    )


def test_a_second_command_appends_its_own_run(tokenized: Path) -> None:
    found = events(tokenized / "log.json")
    runs = list(dict.fromkeys(event["run"] for event in found))
    assert len(runs) == 2
    second = [event for event in found if event["run"] == runs[1]]
    [planned] = named(second, "planned")
    assert planned["left"] == 0
    assert planned["reused"] > 0
    assert named(second, "span_finished") == []
    assert second[-1]["exit_code"] == 0


def test_what_a_run_tells_is_no_part_of_what_its_output_records(tokenized: Path) -> None:
    assert "log_json" not in (tokenized / "tokens" / "run.json").read_text()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("no s3://user:secret@host/v.mp4?sig=hidden"), 2),
        (RunFailedError("broke"), 1),
        (Terminated(), 143),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("a defect"), 1),
    ],
)
def test_every_end_has_its_exit_code_and_no_secret(tmp_path: Path, error: BaseException, code: int) -> None:
    path = tmp_path / "log.json"
    settings = ReportSettings(log_json=str(path))
    console = Console(file=StringIO())

    def fail() -> None:
        with reported(console, settings, command="tokenize", out="s3://a:secret@b/c?hidden"):
            warn(console, "look at https://host/x?token=secret")
            raise error

    with pytest.raises(type(error)):
        fail()
    [started, warning, ended] = events(path)
    assert (started["out"], ended["exit_code"]) == ("s3://b/c", code)
    assert warning["text"] == "look at https://host/x"
    assert "secret" not in path.read_text()
    assert "hidden" not in path.read_text()
    assert not events_of(console).is_open


def test_a_run_that_fails_says_in_its_last_event_why(bad_videos: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.json"
    arguments = (bad_videos, "--out", tmp_path / "tokens", *SMALL, "--log-json", log, "--max-reject-share", "0.1")
    assert tokenize(*arguments).exit_code == 1
    [ended] = named(events(log), "ended")
    assert ended["exit_code"] == 1
    assert "--max-reject-share 0.1 allows" in ended["error"]


def test_a_run_that_is_interrupted_says_by_what_in_its_last_event() -> None:
    log = EventLog()
    log.will_end(143, [], Terminated())
    assert (log.exit_code, log.error) == (143, "Terminated")
    log.will_end(0)
    assert (log.exit_code, log.error) == (0, None)


@pytest.mark.parametrize("value", [float("nan"), "\x1b]0;title\x07", "\u202e", "a\nb", b"bytes", {1, 2}])
def test_any_value_is_one_line_of_ascii_json(tmp_path: Path, value: object) -> None:
    path = tmp_path / "log.json"
    EventLog(str(path)).emit("warning", text=value)
    assert path.read_bytes().isascii()
    assert len(events(path)) == 1
    assert "\x1b" not in path.read_text()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/log.json", "No such file or directory"),
        (".", "Is a directory"),
        ("pipe", "No such device or address"),
        ("s3://user:secret@bucket/log", "give a local file"),
        ("nul\0", "embedded null byte"),
        ("video.mp4", "this file is no event log"),
        ("run.json", "this file is no event log"),
        ("out/log.json", "it lies in the output"),
    ],
)
def test_a_file_that_cannot_be_appended_to_is_refused_before_the_job(tmp_path: Path, name: str, reason: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    contents = {"video.mp4": b"\0\0\0\x18ftypisom", "run.json": b'{\n  "format": 2\n}\n'}
    for file, content in contents.items():
        (tmp_path / file).write_bytes(content)
    path = name if "://" in name else f"{tmp_path}/{name}"
    with pytest.raises(UserError, match=reason) as caught:
        EventLog(path, out=str(tmp_path / "out"))
    assert {file: (tmp_path / file).read_bytes() for file in contents} == contents
    assert str(caught.value).startswith("--log-json ")
    assert "secret" not in str(caught.value)


def test_a_log_that_can_no_longer_be_written_costs_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    log = EventLog("/dev/full")
    for _ in range(3):
        log.emit("warning", text="x")
    assert capsys.readouterr().err.count("--log-json /dev/full: No space left on device") == 1


@pytest.mark.parametrize(
    ("terminal", "mode", "is_live", "is_plain"),
    [
        (False, None, False, True),
        (True, None, True, False),
        (True, "plain", False, True),
        (True, "none", False, False),
        (False, "none", False, False),
        (False, "live", True, False),
    ],
)
def test_progress_is_shown_as_asked(
    tmp_path: Path, terminal: bool, mode: ProgressMode | None, is_live: bool, is_plain: bool
) -> None:
    text = StringIO()
    console = Console(file=text, force_terminal=terminal, width=100)
    settings = ReportSettings(progress=mode, log_json=str(tmp_path / "log.json"))
    with reported(console, settings, command="tokenize", out=None):
        with PhaseProgress(console, "tokenizing", 4) as display:
            display.update(1, "some figures")
        console.print("the end")
    assert ("\x1b[" in text.getvalue().replace("\x1b[0m", "")) == is_live
    assert ("tokenizing: 25% · some figures" in text.getvalue()) == is_plain
    assert "the end" in text.getvalue()
    [progress] = named(events(tmp_path / "log.json"), "progress")
    assert (progress["phase"], progress["done"], progress["total"]) == ("tokenizing", 1, 4)
    assert mode_of(console) == ("live" if terminal else "plain")


def test_plain_progress_is_printed_where_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidshard.jobs.runtime.progress.PLAIN_INTERVAL_SECONDS", 0.0)
    text = StringIO()
    with PhaseProgress(Console(file=text, width=200), "stage1", 150, begun=100) as display:
        for step in (125, 125, 125, 150):
            display.update(step, f"step {step} of 150")
    lines = [line.partition(" · ")[0] for line in text.getvalue().splitlines()]
    assert lines == ["stage1: 83%", "stage1: 100%"]  # of the whole, also of what an earlier run did


def test_the_time_left_follows_from_what_this_run_did(monkeypatch: pytest.MonkeyPatch) -> None:
    text = StringIO()
    with PhaseProgress(Console(file=text, width=200), "stage1", 150, begun=100) as display:
        display._started -= 100.0
        display.update(110, "step 110 of 150")
    assert "7 min left" in text.getvalue()  # 10 steps in 100 s, 40 to go


def test_every_job_with_progress_takes_both_flags(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "none" / "log.json")
    for command in (
        ("tokenize", "clips", "--out", tmp_path / "out", "--local"),
        ("plan", "clips", "--local"),
        ("evaluate", "clips", "--out", tmp_path / "out", "--local"),
        ("decode", "tokens", "--all", tmp_path / "out", "--local"),
        ("decode", "tokens", "--clip", "a", "--to", tmp_path / "clip.mp4"),
        ("train", "two_stage", "--videos", "clips", "--out", tmp_path / "out", "--preset", "tiny"),
    ):
        result = run(*command, "--progress", "plain", "--log-json", nowhere)
        assert result.exit_code == 2, (command, result.output)
        assert f"--log-json {nowhere}: No such file or directory" in result.output
