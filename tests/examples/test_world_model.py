"""The example that trains a world model: better than a bigram model, continued, with actions, on latents."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tests.support.cli import tokenize
from tests.support.markdown import ROOT
from vidshard.jobs.tokenization.demo import SAMPLES, Sample, make_corpus, write_sample

EXAMPLE = ROOT / "examples/world_model/world_model.py"
SIZE = ("--fps", "10", "--frames", "17", "--size", "64")
SMALL = ("--width", "32", "--depth", "1", "--batch-size", "2", "--save-every", "10")


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a moving video, its signal and their manifest."""
    folder = tmp_path_factory.mktemp("moving")
    sample = Sample(name="v.mp4", codec="libx264", width=96, height=96, rate=Fraction(10), seconds=14)
    write_sample(folder / "v.mp4", sample, seed=0)
    seconds = np.arange(140) / 10
    np.savez(folder / "a.npz", seconds=seconds, values=np.stack([seconds, -seconds], axis=1).astype(np.float32))
    (folder / "m.csv").write_text(f"uri,actions\n{folder / 'v.mp4'},a.npz\n")
    return folder


def _run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    return capsys.readouterr().out


def _bits(said: str) -> tuple[float, float]:
    """Bits of the world model and of the bigram model."""
    found = re.search(r"world model ([-\d.]+) bits a \w+, bigram model ([-\d.]+), of \d+ clips", said)
    assert found, said
    return float(found[1]), float(found[2])


def test_the_example_is_short_enough_to_copy() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 300


def test_a_run_on_tokens_is_continued_and_beats_a_bigram_model(
    moving: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, out = tmp_path / "tokens", tmp_path / "world"
    assert tokenize(moving / "v.mp4", "--out", tokens, "--tokenizer", "tiny", *SIZE).exit_code == 0
    command = (tokens, "--out", out, *SMALL)
    said = _run(capsys, monkeypatch, *command, "--steps", "20")
    assert "step 10:" in said
    assert "step 20:" in said
    before = torch.load(out / "state.pt", weights_only=True)
    said = _run(capsys, monkeypatch, *command, "--steps", "60")
    assert "step 20:" not in said
    assert "step 60:" in said
    after = torch.load(out / "state.pt", weights_only=True)
    assert after["data"]["dataset"] == before["data"]["dataset"]
    assert after["step"] == 60
    model, bigram = _bits(said)
    assert model < bigram
    with av.open(str(out / "continuation.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert (len(frames), frames[0].shape) == (17, (64, 128, 3))


def test_clips_of_several_payloads_are_refused_before_training(
    moving: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = tmp_path / "latents"
    result = tokenize(moving / "v.mp4", "--out", latents, "--tokenizer", "vidtwin_tiny", "--fps", "10")
    assert result.exit_code == 0, result.output
    with pytest.raises(SystemExit, match="several payloads"):
        _run(capsys, monkeypatch, latents, "--out", tmp_path / "world", *SMALL)


def test_a_run_on_latents_takes_actions(
    moving: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--tokenizer", "tiny_kl", "--signals", "actions=linear", *SIZE)
    result = tokenize(moving / "m.csv", "--out", tmp_path / "latents", *flags)
    assert result.exit_code == 0, result.output
    command = (tmp_path / "latents", "--out", tmp_path / "world", "--actions", "actions", *SMALL)
    first, _ = _bits(_run(capsys, monkeypatch, *command, "--steps", "2"))
    last, _ = _bits(_run(capsys, monkeypatch, *command, "--steps", "30"))
    assert last < first
    assert (tmp_path / "world/continuation.mp4").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_on_the_demo_beat_a_bigram_model(tmp_path: Path) -> None:
    make_corpus(tmp_path / "videos")
    assert len(SAMPLES) > 1
    result = tokenize(tmp_path / "videos", "--out", tmp_path / "tokens")
    assert result.exit_code == 0, result.output
    command = [sys.executable, EXAMPLE, tmp_path / "tokens", "--out", tmp_path / "world", "--workers", "2"]
    for steps in ("20", "60"):
        done = subprocess.run(
            [*map(str, command), "--steps", steps], capture_output=True, text=True, timeout=800, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    model, bigram = _bits(done.stdout)
    assert model < bigram
