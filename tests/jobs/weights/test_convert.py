"""Checkpoints to files that say which model they hold, and what is answered where nothing says it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import Result

from tests.support.cli import run
from vidshard.models.vidtok.config import PRESETS
from vidshard.models.weights import load_weights, seeded_weights, weights_digest

TINY = PRESETS["tiny"]


def convert(*arguments: str | Path) -> Result:
    return run("convert", *arguments)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Weights of seed 0 and averages of seed 1."""
    last, averages = (seeded_weights(TINY, seed) for seed in (0, 1))
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": last | {f"model_ema.{n.replace('.', '')}": w for n, w in averages.items()}}, path)
    return path


@pytest.mark.parametrize(("flags", "seed"), [((), 0), (("--ema",), 1)])
def test_the_converted_file_states_its_model_and_holds_the_weights_asked_for(
    checkpoint: Path, tmp_path: Path, flags: tuple[str, ...], seed: int
) -> None:
    result = convert(checkpoint, tmp_path / "new" / "tiny.safetensors", "--tokenizer", "tiny", *flags)
    assert result.exit_code == 0, result.output
    config, weights = load_weights(tmp_path / "new" / "tiny.safetensors")
    assert config == TINY
    assert weights_digest(weights) == weights_digest(seeded_weights(TINY, seed))
    assert weights_digest(weights) in result.output
    again = convert(tmp_path / "new" / "tiny.safetensors", tmp_path / "again.safetensors")
    assert again.exit_code == 0, again.output
    assert weights_digest(weights) in again.output
    refused = convert(tmp_path / "again.safetensors", tmp_path / "other.safetensors", "--ema")
    assert refused.exit_code == 2
    assert "holds no averaged (EMA) weights" in refused.stderr
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vidtok_kl_causal_488_4chn_v1_1.ckpt", "(by its name it is --tokenizer kl_causal_488_4chn_v1_1)"),
        ("model.ckpt", "(--tokenizer NAME says which model it is)"),
    ],
)
@pytest.mark.parametrize("command", ["convert", "tokenize"])
def test_weights_that_name_no_model_are_answered_with_the_one_of_the_files_name(
    checkpoint: Path, tmp_path: Path, command: str, name: str, words: str
) -> None:
    checkpoint.rename(tmp_path / name)
    target = tmp_path / "x.safetensors"
    arguments = {
        "convert": [str(tmp_path / name), str(target)],
        "tokenize": ["clips", "--out", str(tmp_path / "tokens"), "--weights", str(tmp_path / name)],
    }
    result = run(command, *arguments[command])
    assert result.exit_code == 2
    assert "does not say which model it holds" in result.stderr
    assert words in result.stderr
    assert not target.exists()


@pytest.mark.parametrize(
    ("source", "target", "flags", "words"),
    [
        ("nowhere.ckpt", "x.safetensors", ("--tokenizer", "tiny"), "there is no such file"),
        ("last.ckpt", "x.ckpt", ("--tokenizer", "tiny"), "saved as .safetensors"),
        ("last.ckpt", "s3://bucket/x.safetensors", ("--tokenizer", "tiny"), "written to a local file"),
        ("last.ckpt", "x.safetensors", ("--tokenizer", "tinny"), "did you mean tiny"),
        ("hf://owner/models", "x.safetensors", ("--tokenizer", "tiny"), "hf://owner/models: it names no file"),
    ],
)
def test_what_cannot_be_converted_is_one_message_and_exit_code_2(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    target: str,
    flags: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = convert(source, target, *flags)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
