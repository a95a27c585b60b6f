"""`vidshard evaluate`: several tokenizers and rates at once, resumed, from stored tokens, in every format."""

from __future__ import annotations

import csv
import io
import json
import urllib.error
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.support.cli import SMALL, printed_by, run, tokenize
from tests.support.http_server import http_server
from tests.support.i3d import Program, save_program
from tests.support.videos import Recipe, write_undecodable, write_video
from vidshard.jobs.evaluation.published import PUBLISHED
from vidshard.jobs.evaluation.resolve import resolve
from vidshard.jobs.runtime.progress import PhaseProgress
from vidshard.models.tokenizer import PRESETS
from vidshard.models.vidtok.config import PRESETS as VIDTOK
from vidshard.models.weights import load_tokenizer, save_tokenizer
from vidshard.pipeline.decode_stage import SpanDecoder, forget_processes
from vidshard.pipeline.evaluation import scorer
from vidshard.pipeline.evaluation.scores import ScoredSpans
from vidshard.schemas.evaluation import EvaluateRun

pytestmark = pytest.mark.usefixtures("one_thread")

CLIPS = ("--frames", "5", "--size", "32", "--local", "--no-lpips")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos of two and a half seconds, and one that opens and does not decode."""
    folder = tmp_path_factory.mktemp("videos")
    for n in range(3):
        write_video(folder / f"v{n}.mp4", Recipe(num_frames=20 + n, rate=Fraction(8), width=64, height=64))
    write_undecodable(folder / "broken.mp4", folder / "v0.mp4")
    return folder


def record_in(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "scores.json").read_text())
    return record


def rows_in(out: Path) -> list[dict[str, Any]]:
    rows = [row for path in sorted((out / "scores").iterdir()) for row in pq.read_table(path).to_pylist()]
    return sorted(rows, key=lambda row: (row["fps"], row["clip_id"], row["tokenizer"]))


@pytest.fixture(scope="module")
def evaluated(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two tokenizers at two rates, with FVD by a program of color means; the folder and what was printed."""
    out = tmp_path_factory.mktemp("evaluation")
    save_program(Program(), out / "i3d.pt")
    more = ("--tokenizer", "tiny", "--tokenizer", "tiny_kl", "--fps", "4,8", "--i3d", out / "i3d.pt")
    return out, printed_by("evaluate", videos, "--out", out, *more, *CLIPS)


def test_several_tokenizers_and_rates_are_measured_on_the_same_clips(evaluated: tuple[Path, str]) -> None:
    out, text = evaluated
    rows = record_in(out)["rows"]
    assert [(row["tokenizer"], row["fps"], row["clips"]) for row in rows] == [
        ("tiny", 4.0, 6),
        ("tiny_kl", 4.0, 6),
        ("tiny", 8.0, 12),
        ("tiny_kl", 8.0, 12),
    ]
    stored = rows_in(out)
    assert len(stored) == 36
    assert {tuple(row["features_source"]) for row in stored if row["tokenizer"] == "tiny"} == {
        tuple(row["features_source"]) for row in stored if row["tokenizer"] == "tiny_kl"
    }
    assert all(row["fvd"] > 0 and row["fvd_clips"] == row["clips"] for row in rows)
    assert rows[0]["codebook"]["ceiling"] == 6 * 2 * 4 * 4
    assert rows[1]["codebook"] is None
    assert record_in(out)["rejections"] == {"no_frames": 1}
    assert "RANDOM WEIGHTS" in text
    assert "FVD is of 6 clips" in text
    assert "LPIPS is not measured: --no-lpips" in text


def test_bits_are_those_of_tokens_and_of_float16_latents(evaluated: tuple[Path, str]) -> None:
    tokens, latents = record_in(evaluated[0])["rows"][:2]
    assert tokens["bits_per_pixel"] == pytest.approx(2 * 4 * 4 * 15 / (5 * 32 * 32))
    assert tokens["bits_per_second"] == pytest.approx(2 * 4 * 4 * 15 / (5 / 4))
    assert latents["bits_per_pixel"] == pytest.approx(2 * 4 * 4 * 4 * 16 / (5 * 32 * 32))


def test_a_second_run_measures_nothing_again_and_a_broken_off_one_goes_on_to_the_same_bits(
    evaluated: tuple[Path, str], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = evaluated
    more = ("--tokenizer", "tiny", "--tokenizer", "tiny_kl", "--fps", "4,8", "--i3d", whole / "i3d.pt")
    command = ("evaluate", videos, "--out", tmp_path, *more, *CLIPS, "--commit-clips", "2")
    score, calls = scorer.ClipScorer._score, 0

    def interrupted(self: scorer.ClipScorer, *args: Any) -> ScoredSpans:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return score(self, *args)

    monkeypatch.setattr(scorer.ClipScorer, "_score", interrupted)
    assert run(*command).exit_code == 130
    before = rows_in(tmp_path)
    assert 0 < len(before) < 36
    assert run(*command).exit_code == 0
    assert rows_in(tmp_path) == rows_in(whole)
    assert record_in(tmp_path)["rows"] == record_in(whole)["rows"]
    done = calls
    printed_by(*command)
    assert calls == done


def test_a_folder_holds_scores_of_one_identity(evaluated: tuple[Path, str], videos: Path) -> None:
    text = printed_by("evaluate", videos, "--out", evaluated[0], "--tokenizer", "tiny", "--fps", "4", *CLIPS, code=2)
    assert "holds scores of other settings" in text
    assert "choose another --out" in text


@pytest.mark.parametrize("form", ["markdown", "csv", "json", "text"])
def test_the_table_has_every_format_and_each_is_stored(form: str, evaluated: tuple[Path, str], videos: Path) -> None:
    out = evaluated[0]
    more = ("--tokenizer", "tiny", "--tokenizer", "tiny_kl", "--fps", "4,8", "--i3d", out / "i3d.pt")
    result = run("evaluate", videos, "--out", out, *more, *CLIPS, "--format", form)
    printed = result.stdout
    psnr = record_in(out)["rows"][0]["psnr"]
    if form == "json":
        assert json.loads(printed)["rows"][0]["psnr"] == psnr
    elif form == "csv":
        [header, first, *_] = list(csv.reader(io.StringIO(printed)))
        assert dict(zip(header, first, strict=True))["PSNR dB"] == f"{psnr:.2f}"
        assert printed == (out / "scores.csv").read_text()
    elif form == "markdown":
        assert f"| tiny | 4 | {psnr:.2f} |" in printed
        assert printed == (out / "scores.md").read_text()
    else:
        assert f"tiny       4    {psnr:.2f}" in printed


def test_stored_tokens_are_measured_as_if_they_were_encoded_again(videos: Path, tmp_path: Path) -> None:
    assert tokenize(videos, "--out", tmp_path / "tokens", *SMALL, "--tail", "drop").exit_code == 0
    printed_by("evaluate", "--from", tmp_path / "tokens", "--out", tmp_path / "stored", "--local", "--no-lpips")
    again = ("--tokenizer", "tiny", "--fps", "4", *CLIPS)
    printed_by("evaluate", videos, "--out", tmp_path / "again", *again)
    stored, anew = (record_in(tmp_path / name)["rows"][0] for name in ("stored", "again"))
    assert stored["clips"] == anew["clips"] == 6
    assert stored["codebook"] == anew["codebook"]
    assert stored["psnr"] == pytest.approx(anew["psnr"], abs=0.02)  # frames of stored tokens are rounded to 8 bits
    (videos / "v1.mp4").rename(videos / "gone")
    try:
        printed_by("evaluate", "--from", tmp_path / "tokens", "--out", tmp_path / "fewer", "--local", "--no-lpips")
    finally:
        (videos / "gone").rename(videos / "v1.mp4")
    fewer = record_in(tmp_path / "fewer")
    assert fewer["rows"][0]["clips"] == 4
    assert sum(fewer["rejections"].values()) == 1


def test_servers_with_private_addresses_that_a_manifest_names_are_asked_only_on_request(
    videos: Path, tmp_path: Path
) -> None:
    content = (videos / "v0.mp4").read_bytes()
    with http_server(lambda _path: content) as server:
        manifest = tmp_path / "some.csv"
        manifest.write_text(f"uri\n{server.url}/v0.mp4\n")
        command = ("evaluate", manifest, "--tokenizer", "tiny", "--size", "64", "--fps", "25", "--local", "--no-lpips")
        forget_processes()
        refused = printed_by(*command, "--out", tmp_path / "no", code=1)
        assert "no clip could be scored: all were rejected" in refused
        assert not server.asked
        printed_by(*command, "--out", tmp_path / "yes", "--allow-private")
        assert record_in(tmp_path / "yes")["rows"][0]["clips"] > 0


def test_remote_sources_of_stored_tokens_are_fetched_only_on_request(videos: Path, tmp_path: Path) -> None:
    content = (videos / "v0.mp4").read_bytes()
    with http_server(lambda _path: content) as server:
        made = tokenize(f"{server.url}/v0.mp4", "--out", tmp_path / "tokens", *SMALL, "--tail", "drop")
        assert made.exit_code == 0, made.output
        forget_processes()  # which keep a connection of that run, as no other command would
        command = ("evaluate", "--from", tmp_path / "tokens", "--local", "--no-lpips", "--out")
        asked = len(server.asked)
        assert "is not fetched by itself" in printed_by(*command, tmp_path / "no", code=2)
        refused = printed_by(*command, tmp_path / "private", "--fetch-sources", code=1)
        assert "no clip could be scored: all were rejected" in refused
        assert len(server.asked) == asked
        printed_by(*command, tmp_path / "yes", "--fetch-sources", "--allow-private")
        assert record_in(tmp_path / "yes")["rows"][0]["clips"] > 0


def test_weights_files_are_compared_under_their_names(videos: Path, tmp_path: Path) -> None:
    files = []
    for seed in (1, 2):
        files.append(tmp_path / f"step{seed}.safetensors")
        save_tokenizer(files[-1], load_tokenizer(VIDTOK["tiny"], None, seed=seed))
    named = ("--tokenizer", files[0], "--tokenizer", f"tiny={files[1]}")
    printed_by("evaluate", videos / "v0.mp4", "--out", tmp_path / "out", *named, *CLIPS, "--clips-per-video", "1")
    labels = [row["tokenizer"] for row in record_in(tmp_path / "out")["rows"]]
    assert labels == ["tiny (step1)", "tiny (step2)"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("x.mp4", "--from", "tokens"), "give VIDEOS, or an output of tokens with --from"),
        ((), "give VIDEOS, or an output of tokens with --from"),
        (("--from", "tokens", "--fps", "8"), "leave --fps out"),
        (("x.mp4", "--fps", "8,8"), "the same frame rate is given twice"),
        (("x.mp4", "--tokenizer", "tiny", "--tokenizer", "tiny"), "the same --tokenizer is named twice"),
        (("x.mp4", "--tokenizer", "tiny_xl"), "unknown tokenizer preset 'tiny_xl'"),
        (("x.mp4", "--tokenizer", "tiny", "--vgg-weights", "/nowhere.pth"), "--vgg-weights: cannot read /nowhere.pth"),
        (("x.mp4", "--tokenizer", "tiny", "--no-lpips", "--i3d", "/nowhere.pt"), "--i3d: cannot read /nowhere.pt"),
        (("x.mp4", "--tokenizer", "vidtwin_tiny", "--size", "30", "--no-lpips"), "vidtwin_tiny"),
    ],
)
def test_what_cannot_be_is_refused(flags: tuple[str, ...], says: str, tmp_path: Path) -> None:
    assert says in printed_by("evaluate", *flags, "--out", tmp_path / "out", "--local", code=2)


def test_without_vgg16_an_evaluation_goes_on_and_names_its_own_flags(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    clips = [flag for flag in CLIPS if flag != "--no-lpips"]
    text = printed_by(
        "evaluate", videos / "v0.mp4", "--out", tmp_path / "o", "--tokenizer", "tiny", "--fps", "4", *clips
    )
    said = " ".join(text.split()).partition("LPIPS is not measured: ")[2].partition(" FVD is not measured")[0]
    for words in ("no route to host", "--vgg-weights FILE", "--no-lpips"):
        assert words in said
    assert "perceptual" not in said


def test_an_evaluation_of_broken_videos_alone_is_an_error(videos: Path, tmp_path: Path) -> None:
    command = ("evaluate", videos / "broken.mp4", "--out", tmp_path, "--tokenizer", "tiny", "--fps", "4", *CLIPS)
    assert "no clip could be scored: all were rejected: 1 x no_frames" in printed_by(*command, code=1)


def test_progress_ends_at_its_total_though_videos_have_no_whole_clip_or_are_rejected(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan expects two clips of v0 and one of the short video, which has none."""
    (tmp_path / "in").mkdir()
    for name in ("v0.mp4", "broken.mp4"):
        (tmp_path / "in" / name).symlink_to(videos / name)
    write_video(tmp_path / "in" / "short.mp4", Recipe(num_frames=4, rate=Fraction(8), width=64, height=64))
    shown: list[tuple[float, float]] = []
    update = PhaseProgress.update

    def noted(display: PhaseProgress, done: float, figures: str) -> None:
        if display._title == "scoring":
            shown.append((done, display._total))
        update(display, done, figures)

    monkeypatch.setattr(PhaseProgress, "update", noted)
    printed_by("evaluate", tmp_path / "in", "--out", tmp_path / "out", "--tokenizer", "tiny", "--fps", "4", *CLIPS)
    assert len(rows_in(tmp_path / "out")) == 2
    assert shown[-1] == (3, 3)


# Protocols and published figures


@pytest.mark.parametrize(
    ("protocol", "tokenizer", "clip"),
    [
        ("mcl_jcv", "tiny", (30.0, 17, 256, 256)),
        ("webvid_val", "tiny", (30.0, 17, 256, 256)),
        ("long_video", "tiny", (30.0, 129, 256, 256)),
        ("vidtwin", "vidtwin_structure_7_7_4_dynamics_7_8", (25.0, 16, 224, 224)),
    ],
)
def test_a_protocol_decides_the_clips_of_a_tokenizer(
    protocol: Any, tokenizer: str, clip: tuple[float, ...], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from rich.console import Console

    from vidshard.pipeline.tokenizer_source import TokenizerSource

    monkeypatch.setattr(TokenizerSource, "with_digest", lambda self: self)  # no weights are made
    monkeypatch.setattr("vidshard.pipeline.resolved_run._with_weights", lambda run, _config: run)
    run = EvaluateRun(inputs=["x"], tokenizer=[tokenizer], protocol=protocol, lpips=False)
    spec = resolve(run, Console(quiet=True)).groups[0].resolved.largest
    assert (float(spec.fps), spec.num_frames, spec.height, spec.width) == clip
    assert spec.tail == "drop"
    assert run.shown_average == ("clips" if protocol == "vidtwin" else "frames")


def test_published_figures_are_of_known_presets_and_stand_beside_ours(videos: Path, tmp_path: Path) -> None:
    assert all(name in PRESETS for rows in PUBLISHED.values() for name in rows)
    published = PUBLISHED["MCL-JCV"]["fsq_causal_488_32768"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PUBLISHED["MCL-JCV"], "tiny", published)
        text = printed_by("evaluate", videos / "v0.mp4", "--out", tmp_path, "--tokenizer", "tiny", "--fps", "4", *CLIPS)
    row = record_in(tmp_path)["rows"][0]
    assert row["difference"]["psnr"] == pytest.approx(row["psnr"] - published.psnr)
    assert row["difference"]["lpips"] is None
    assert f"published, MCL-JCV {published.psnr:.2f} {published.ssim:.3f}" in text
    assert "The published figures are of other videos" in text


def test_points_of_rate_and_distortion_hold_what_was_measured_and_every_published_model(
    evaluated: tuple[Path, str],
) -> None:
    record = record_in(evaluated[0])
    points = record["rate_distortion"]
    assert [p["bits_per_pixel"] for p in points] == sorted(p["bits_per_pixel"] for p in points)
    measured = {(p["tokenizer"], p["fps"]): p for p in points if p["source"] == "measured"}
    assert measured.keys() == {(row["tokenizer"], row["fps"]) for row in record["rows"]}
    for row in record["rows"]:
        names = ("bits_per_pixel", "bits_per_second", "psnr", "ssim", "lpips", "clip")
        assert {n: measured[row["tokenizer"], row["fps"]][n] for n in names} == {n: row[n] for n in names}
    published = {p["preset"]: p for p in points if p["source"] == "published"}
    assert published.keys() == PUBLISHED["MCL-JCV"].keys()
    # 5 x 32 x 32 tokens of 15 bits in 17 frames of 256 x 256, at 30 frames a second
    tokens = published["fsq_causal_488_32768"]
    assert tokens["bits_per_second"] == pytest.approx(5 * 32 * 32 * 15 * 30 / 17)
    assert tokens["bits_per_pixel"] == pytest.approx(5 * 32 * 32 * 15 / (17 * 256 * 256))
    assert (tokens["psnr"], tokens["lpips"]) == (29.16, 0.117)
    assert published["fsq_noncausal_488_262144"]["clip"] == [16, 256, 256]
    assert published["vidtwin_structure_7_7_4_dynamics_7_8"]["clip"] == [16, 224, 224]
    assert published["vidtwin_structure_7_7_4_dynamics_7_8"]["fps"] == 25.0
    text = (evaluated[0] / "scores.md").read_text().partition("## Rate and distortion")[2]
    assert text.count("published, MCL-JCV") == len(published)


def test_frames_of_a_video_are_decoded_once_for_all_rates(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[set[Fraction]] = []
    together = SpanDecoder.decode_together

    def counted(self: SpanDecoder, spans: Any, specs: Any, fingerprint: Any) -> Any:
        passes.append({spec.fps for spec in specs})
        return together(self, spans, specs, fingerprint)

    monkeypatch.setattr(SpanDecoder, "decode_together", counted)
    printed_by("evaluate", videos / "v0.mp4", "--out", tmp_path, "--tokenizer", "tiny", "--fps", "4,8", *CLIPS)
    assert passes == [{Fraction(4), Fraction(8)}]
