"""Reports of tokenizations: one safe file that covers all runs of an output, and never fails a run."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import sys
import time
from base64 import b64decode
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import pytest

from tests.support.cli import SMALL, printed_by, tokenize
from tests.support.corpus import BAD_VIDEOS
from tests.support.pages import PLAIN_SVG, parsed, report_text, section_ids, text_of
from vidshard.jobs.commands.reporting import page_of
from vidshard.jobs.report import job, page, wall
from vidshard.jobs.report.charts import ChartError
from vidshard.jobs.report.page import Card, Media, Note, Page, Wall, render
from vidshard.jobs.report.wall import WallSettings
from vidshard.jobs.tokenization import history
from vidshard.jobs.tokenization.history import Timeline
from vidshard.pipeline import storage
from vidshard.pipeline.output.rejects import write_rejects
from vidshard.pipeline.output.shard_reader import StoredClip
from vidshard.schemas.rejections import Reason, Rejection, Stage

HOSTILE = "<img src=x onerror=alert(1)>\"'><script>alert(2)</script>\u202e{{ 7*7 }}"
SECRET = "hunter2hunter2"


@pytest.fixture(autouse=True)
def _plain_charts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts as `PLAIN_SVG`, except in tests that ask for the real ones."""
    if "real_charts" not in request.fixturenames:
        monkeypatch.setattr(page, "draw", lambda specs: [PLAIN_SVG] * len(specs))


@pytest.fixture(autouse=True)
def _reports_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what ``tests/conftest.py`` sets for all other tests."""
    monkeypatch.delenv(job.VARIABLE)


@pytest.fixture
def real_charts() -> None:
    """Skip without the package that draws."""
    pytest.importorskip("vl_convert")


@pytest.fixture
def copy(output: Path, tmp_path: Path) -> Path:
    """A copy of the session's output, to spoil."""
    return Path(shutil.copytree(output, tmp_path / "tokens"))


def test_a_report_says_what_was_run_what_came_out_and_what_was_rejected(
    output: Path, tmp_path: Path, real_charts: None
) -> None:
    target = tmp_path / "page.html"
    assert "wrote" in printed_by("report", output, "--to", target)
    found = parsed(target.read_text())
    assert section_ids(found) == ["overview", "speed", "rejects", "wall", "clips", "codebook"]
    text = text_of(found)
    for words in ["Tokens of tiny", "complete", "clips 10 of", "RANDOM WEIGHTS", "perplexity", *BAD_VIDEOS.values()]:
        assert words in text
    for name in BAD_VIDEOS:
        assert name in text
    assert target.read_text().count("<svg") >= 8


def test_clips_are_shown_beside_their_sources_the_worst_first_with_their_commands(output: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    printed_by("report", output, "--to", target, "--clips", 3)
    html = target.read_text()
    decibels = [float(text) for text in re.findall(r"<h3>([-\d.]+) dB", html)]
    assert len(decibels) == 3
    assert decibels == sorted(decibels)
    ids = re.findall(r"--clip (\S+) --to clip.mp4", html)
    assert len({clip_id.split("-")[0] for clip_id in ids}) == 3  # a clip of each of three videos
    films = [b64decode(data) for data in re.findall(r'src="data:video/webm;base64,([^"]+)"', html)]
    assert len(films) == 9
    for film in films:
        with av.open(io.BytesIO(film), "r") as container:
            assert container.streams.video[0].codec_context.name in ("vp9", "libvpx-vp9")
            assert 1 <= sum(1 for _ in container.decode(video=0)) <= 5
    assert "<video" not in report_of(output, tmp_path, WallSettings(num_clips=0))


def test_originals_that_cannot_be_read_are_left_out_with_the_reason(good_videos: Path, tmp_path: Path) -> None:
    video = Path(shutil.copy(good_videos / "a.mp4", tmp_path / "gone.mp4"))
    out = tmp_path / "tokens"
    assert tokenize(video, "--out", out, *SMALL, "--report", "none").exit_code == 0
    video.unlink()
    html = report_of(out, tmp_path, WallSettings())
    assert "The original cannot be shown" in html
    assert "reconstruction" in html
    assert "difference" not in html


def test_the_worst_audited_clips_are_shown(good_videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    assert tokenize(good_videos, "--out", out, *SMALL, "--audit", "1", "--report", "none").exit_code == 0
    worst = json.loads((out / "summary.json").read_text())["quality"]["worst"]
    html = report_of(out, tmp_path, WallSettings(num_clips=2))
    assert re.findall(r"--clip (\S+) --to", html) == [one["clip_id"] for one in worst[:2]]
    assert f"{worst[0]['psnr']:.2f} dB" in html
    assert "audited clips" in html


def test_clips_are_decoded_within_a_share_of_the_time_of_the_runs(output: Path, tmp_path: Path) -> None:
    html = report_of(output, tmp_path, WallSettings(seconds=0.0))
    assert len(re.findall("<h3>", html)) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wall, "MAX_MEDIA_BYTES", 1)
        assert len(re.findall("<h3>", report_of(output, tmp_path, WallSettings()))) == 1
        patch.setattr(wall, "MAX_PIXELS", 1)
        assert "are not decoded for a report" in report_of(output, tmp_path, WallSettings())


def test_parts_of_a_payload_are_shown_alone(good_videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    run = ("--tokenizer", "vidtwin_tiny", "--random-weights", "0", "--limit", "1", "--report", "none")
    assert tokenize(good_videos, "--out", out, *run).exit_code == 0
    html = report_of(out, tmp_path, WallSettings(num_clips=1))
    assert "<figcaption>structure alone</figcaption>" in html
    assert "<figcaption>dynamics alone</figcaption>" in html


def report_of(out: Path, folder: Path, settings: WallSettings) -> str:
    """Text of a report, after the checks that hold for every one."""
    target = folder / "other.html"
    job.write_report(str(out), page_of, target=str(target), wall=settings)
    assert parsed(target.read_text()) is not None
    return target.read_text()


def test_hostile_texts_of_files_are_shown_as_text_and_secrets_not_at_all(copy: Path) -> None:
    write_rejects(
        str(copy),
        [
            Rejection(
                uri=f"https://user:{SECRET}@host/{HOSTILE}?sig={SECRET}",
                video_id=None,
                span_id=None,
                start_seconds=None,
                stage=Stage.PROBE,
                reason=Reason.UNREADABLE,
                detail=f"GET https://host/x?X-Amz-Signature={SECRET} {HOSTILE} password={SECRET}",
            )
        ],
    )
    record = json.loads((copy / "run.json").read_text())
    record["notice"] = HOSTILE
    record["tokenizer"]["name"] = HOSTILE
    record["run"]["inputs"] = [f"s3://bucket/{HOSTILE}?token={SECRET}"]
    record["run"]["weights"] = f"https://host/w.safetensors?sig={SECRET}"
    (copy / "run.json").write_text(json.dumps(record))
    [latest] = copy.glob("history/*.json")
    latest.write_text(json.dumps(json.loads(latest.read_text()) | {"timeline": [], "problems": [HOSTILE]}))
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | {"problems": [f"{HOSTILE} key=1&token={SECRET}"]}))
    path, _ = job.write_report(str(copy), page_of)
    html = Path(path).read_text()
    assert SECRET not in html
    assert "<img" not in html
    assert html.count("<script>") == 1
    assert "\u202e" not in html
    text = report_text(Path(path))
    assert "onerror=alert(1)" in text
    assert "{{ 7*7 }}" in text


def test_a_resumed_runs_report_covers_all_runs(good_videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    assert tokenize(good_videos, "--out", out, *SMALL, "--limit", 2).exit_code == 0
    assert tokenize(good_videos, "--out", out, *SMALL).exit_code == 0
    assert len(list(out.glob("history/*.json"))) == 2
    assert tokenize(good_videos, "--out", out, *SMALL).exit_code == 0  # which finds nothing to do
    assert len(list(out.glob("history/*.json"))) == 2
    path, _ = job.write_report(str(out), page_of)
    text = report_text(Path(path))
    assert re.search(r"clips 10 of 10", text)
    assert "runs 2" in text
    assert "5" in text


def test_where_a_run_writes_its_report_is_a_setting(
    good_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = (good_videos / "a.mp4", *SMALL, "--out")
    assert "report.html" in tokenize(*run, tmp_path / "a").output
    assert (tmp_path / "a" / "report.html").exists()
    assert not tokenize(*run, tmp_path / "b", "--report", "none").exit_code
    assert not (tmp_path / "b" / "report.html").exists()
    monkeypatch.setenv(job.VARIABLE, "none")
    assert not tokenize(*run, tmp_path / "c").exit_code
    assert not (tmp_path / "c" / "report.html").exists()
    named = tmp_path / "pages" / "named.html"
    assert str(named) in tokenize(*run, tmp_path / "d", "--report", named).output
    assert report_text(named)
    refused = tokenize(*run, tmp_path / "e", "--report", "page.txt")
    assert refused.exit_code == 2
    assert "ends in .html" in refused.output


def test_a_report_that_cannot_be_made_costs_a_run_one_line(
    good_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(error: BaseException) -> str:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(job, "write_report", fail)
        result = tokenize(good_videos / "a.mp4", *SMALL, "--out", tmp_path / "out")
        assert result.exit_code == 0, result.output
        [line] = [line for line in result.output.splitlines() if "no report" in line]
        return line

    assert "RuntimeError: why" in failing(RuntimeError("why"))
    assert "full" in failing(storage.StorageError("the disk is full"))
    assert "vidshard report" in failing(KeyboardInterrupt())


def test_a_missing_package_is_named_with_how_to_get_it(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def undrawn(_: object) -> list[str]:
        raise ChartError("charts need vl-convert-python: pip install vl-convert-python")

    monkeypatch.setattr(page, "draw", undrawn)
    path, _ = job.write_report(str(copy), page_of)
    assert "pip install vl-convert-python" in report_text(Path(path))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "needs the package jinja2" in printed_by("report", copy, code=2) + capsys.readouterr().err


def test_an_output_without_history_or_shards_has_a_report_and_another_folder_none(
    bad_videos: Path, copy: Path, tmp_path: Path
) -> None:
    for old in ("history", "summary.json"):  # outputs of earlier versions
        target = copy / old
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        assert report_text(Path(job.write_report(str(copy), page_of)[0]))
    empty = tmp_path / "empty"
    assert tokenize(bad_videos, "--out", empty, *SMALL).exit_code == 0
    assert "No clip was written" in report_text(empty / "report.html")
    assert "no output of vidshard" in printed_by("report", bad_videos, code=2)


def test_a_report_of_a_remote_output_is_written_beside_it(good_videos: Path, s3: str) -> None:
    out = "s3://videos/report/tokens"
    result = tokenize(good_videos / "a.mp4", "--out", out, *SMALL)
    assert f"{out}/report.html" in result.output
    html = storage.read_bytes(f"{out}/report.html").decode()
    assert "complete" in text_of(parsed(html))
    assert "a-secret-that-must-not-be-seen" not in html


def test_a_page_holds_data_of_its_own_kinds_alone() -> None:
    def with_media(uri: str) -> str:
        card = Card(title="", remark="", command="", media=[Media(title="", uri=uri, width=1, height=1)])
        whole = Page(title="", place="", status="", tone="good", made="")
        whole.add("x", "x", Note(text="x"), Wall(cards=[card]))
        return render(whole)

    assert parsed(with_media("data:video/webm;base64,AAAA")) is not None
    for uri in ("https://host/x", "javascript:alert(1)", "data:text/html;base64,AAAA", 'data:image/png;base64,"><b>'):
        with pytest.raises(ValueError, match="data URIs"):
            with_media(uri)


def test_a_timeline_of_any_length_keeps_its_end_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in (1, 100, 5000):
        now = [0.0]
        monkeypatch.setattr(time, "monotonic", partial(now.__getitem__, 0))
        timeline = Timeline(started=0.0)
        for _ in range(steps):
            now[0] += 1.0
            timeline.count(2, 1)
        points = timeline.end()
        assert points[-1] == (steps, 2 * steps, steps)
        assert len(points) <= history.MAX_POINTS
        assert points == sorted(points)


def test_a_command_to_paste_quotes_the_ids_of_foreign_shards() -> None:
    foreign = "x; rm -rf ~ #"
    clip = StoredClip(values={"clip_id": foreign, "uri": "a.mp4", "frame_pts_seconds": [0.0]}, payload={})
    card = wall.clip_card("my tokens", clip, {}, Fraction(8), None, "")
    assert shlex.split(card.command)[1:5] == ["decode", "my tokens", "--clip", foreign]
