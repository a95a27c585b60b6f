"""Reports of evaluations and of training runs."""

from __future__ import annotations

import json
import re
import shutil
from fractions import Fraction
from pathlib import Path

import pytest

from tests.support.cli import SMALL, printed_by, run, tokenize
from tests.support.pages import PLAIN_SVG, parsed, section_ids, text_of
from tests.support.training_files import HOSTILE, SECRET
from tests.support.videos import Recipe, write_undecodable, write_video
from vidshard.jobs.commands.reporting import page_of
from vidshard.jobs.report import job, page
from vidshard.jobs.report.wall import WallSettings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _made_with_plain_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "draw", lambda specs: [PLAIN_SVG] * len(specs))
    monkeypatch.delenv(job.VARIABLE)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for n in range(2):
        write_video(folder / f"v{n}.mp4", Recipe(num_frames=20 + n, rate=Fraction(8), width=64, height=64))
    write_undecodable(folder / f"{HOSTILE}.mp4", folder / "v0.mp4")
    return folder


def report_of(out: Path, folder: Path, settings: WallSettings | None = None) -> str:
    target = folder / "other.html"
    job.write_report(str(out), page_of, target=str(target), wall=settings or WallSettings())
    assert parsed(target.read_text()) is not None
    return target.read_text()


def test_an_evaluation_has_a_report_with_published_figures_and_the_worst_clips(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation"
    tokenizers = ("--tokenizer", "tiny", "--tokenizer", "tiny_kl")
    printed = printed_by(
        "evaluate", videos, "--out", out, *tokenizers, "--frames", 5, "--size", 32, "--local", "--no-lpips"
    )
    assert "report.html" in printed
    html = report_of(out, tmp_path, WallSettings(num_clips=2))
    assert section_ids(parsed(html)) == ["overview", "rate", "quality", "wall", "codebook", "rejects"]
    text = text_of(parsed(html))
    rows = json.loads((out / "scores.json").read_text())["rows"]
    for row in rows:
        assert f"{row['tokenizer']} 8 {row['psnr']:.2f}" in text
    assert "RANDOM WEIGHTS" in text
    assert "no_frames" in text
    assert HOSTILE in text
    assert HOSTILE not in html
    worst = min((one for row in rows for one in row["worst"]), key=lambda one: float(one["psnr"]))
    assert worst["clip_id"] in html
    assert re.findall(r"<h3>([\d.]+) dB", html)[0] == f"{worst['psnr']:.2f}"
    assert html.count("<video") == 2 * 5  # the original, and two tokenizers with their differences
    assert (out / "report.html").exists()


def test_an_evaluation_whose_originals_or_weights_cannot_be_read_says_so(videos: Path, tmp_path: Path) -> None:
    video = Path(shutil.copy(videos / "v0.mp4", tmp_path / "v.mp4"))
    out = tmp_path / "evaluation"
    flags = ("--tokenizer", "tiny", "--frames", 5, "--size", 32, "--local", "--no-lpips", "--report", "none")
    assert run("evaluate", video, "--out", out, *flags).exit_code == 0
    assert not (out / "report.html").exists()
    video.unlink()
    assert "the originals could not be read" in report_of(out, tmp_path)
    record = json.loads((out / "run.json").read_text())
    record["settings"]["tokenizer"] = [f"tiny=https://user:{SECRET}@host/w.safetensors?sig={SECRET}"]
    (out / "run.json").write_text(json.dumps(record))
    html = report_of(out, tmp_path)
    assert "weights are remote" in html
    assert SECRET not in html


def test_an_evaluation_of_tokens_shows_their_clips(videos: Path, tmp_path: Path) -> None:
    tokens, out = tmp_path / "tokens", tmp_path / "evaluation"
    assert tokenize(videos / "v0.mp4", "--out", tokens, *SMALL, "--report", "none").exit_code == 0
    flags = ("--local", "--no-lpips", "--report", "none")
    assert run("evaluate", "--from", tokens, "--out", out, *flags).exit_code == 0
    html = report_of(out, tmp_path)
    assert f"vidshard decode {tokens} --clip" in html
    assert "difference" in html


def test_a_training_run_has_a_report_of_its_curves_pictures_and_rejections(training: Path, tmp_path: Path) -> None:
    html = report_of(training, tmp_path)
    found = parsed(html)
    assert section_ids(found) == ["overview", "stage1", "rejects"]
    text = text_of(found)
    for words in (
        "Training of tiny",
        "not finished",
        "20 of 20",
        "10.00 → 21.50",
        "not begun",
        "at step 20",
        "1,234",
        "5,678",
        HOSTILE,
    ):
        assert words in text
    assert HOSTILE not in html
    assert SECRET not in html
    assert html.count("<svg") == 3
    assert html.count("data:image/png") == 1


def test_a_training_run_that_was_killed_shows_how_far_it_came(training: Path, tmp_path: Path) -> None:
    (training / "stage1" / "result.json").unlink()
    text = text_of(parsed(report_of(training, tmp_path)))
    for words in ("20 of 20", "no result yet", "10.00 → 30.00"):
        assert words in text


def test_a_damaged_file_of_a_run_is_named(training: Path, videos: Path, tmp_path: Path) -> None:
    (training / "stage1" / "result.json").write_text("{")
    assert "damaged" in printed_by("report", training, code=2)
    (training / "run.json").write_text("[]")
    assert "damaged" in printed_by("report", training, code=2)
