"""The weights that come with the package: what they are, what they say of themselves, and that they are the default."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.support.cli import run
from tests.support.markdown import ROOT
from vidshard.jobs.tokenization.demo import Sample, write_sample
from vidshard.models.metrics import psnr
from vidshard.models.vidtok.config import PRESETS, VidTokConfig
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import (
    DEFAULT,
    SHIPPED,
    load_weights,
    save_tokenizer,
    shipped_weights,
    training_summary,
    weights_digest,
)
from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import shard_paths


@pytest.mark.parametrize("name", SHIPPED)
def test_they_are_small_and_say_how_they_came_about(name: str) -> None:
    path = shipped_weights(name)
    assert path.stat().st_size <= 8_000_000
    config, weights = load_weights(path)
    assert config == PRESETS[name]
    summary = training_summary(path)
    assert summary["weights_sha256"] == weights_digest(weights)
    assert re.search(r"\d\d\.\d+ dB", summary["measured"])
    assert summary["stages"]
    assert summary["data"]
    assert "/" not in re.sub(r"https?://\S+|\w+/s\b", "", json.dumps(summary["data"])), "a path of somebody's machine"


def test_the_decoder_that_was_trained_with_lpips_takes_the_tokens_of_the_default() -> None:
    (_, default), (_, other) = (load_weights(shipped_weights(name)) for name in SHIPPED[:2])
    differing = {name.partition(".")[0] for name in default if not torch.equal(default[name], other[name])}
    assert differing == {"decoder"}


def test_the_notice_credits_every_picture_that_shipped_weights_were_trained_with() -> None:
    notice = " ".join((ROOT / "NOTICE").read_text().split())
    for path in (ROOT / "models" / "shipped").glob("*.safetensors"):
        assert path.name in notice
        for source in training_summary(path)["data"]:
            for license_name in re.findall(r"CC BY \d\.\d", source):
                assert license_name in notice
            for author in re.findall(r"by ([A-Z]\w+ [A-Z]\w+)", source):
                assert author in notice


def test_a_file_without_a_summary_has_an_empty_one(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert training_summary(tmp_path / "a.safetensors") == {}
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        training_summary(tmp_path / "b.safetensors")


def test_other_presets_have_none() -> None:
    with pytest.raises(FileNotFoundError, match=f"'tiny' come with vidshard; there are some of {', '.join(SHIPPED)}"):
        shipped_weights("tiny")
    with pytest.raises(storage.StorageError, match=DEFAULT), storage.local_copy("shipped://../../secret"):
        pass


def test_without_a_model_they_make_the_tokens_and_the_picture_again(tmp_path: Path) -> None:
    sample = Sample(name="a.mp4", codec="libx264", width=192, height=128, rate=Fraction(8), seconds=9 / 8)
    write_sample(tmp_path / "a.mp4", sample, seed=3)
    out = tmp_path / "tokens"
    result = run("tokenize", tmp_path / "a.mp4", "--out", out, "--size", "128", "--frames", "9", "--local")
    assert result.exit_code == 0, result.output
    assert "RANDOM" not in result.output
    (shard,) = shard_paths(str(out))
    metadata = pq.read_schema(shard).metadata
    assert metadata[b"vidshard.weights_source"].decode() == f"shipped://{DEFAULT}"
    assert json.loads(metadata[b"vidshard.tokenizer"])["name"] == DEFAULT

    result = run("decode", out, "--all", tmp_path / "shown", "--side-by-side")
    assert result.exit_code == 0, result.output
    (video,) = (tmp_path / "shown").iterdir()
    with av.open(str(video)) as container:
        pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert pictures.shape == (9, 128, 256, 3)
    source, decoded = (
        torch.from_numpy(half.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1 for half in np.split(pictures, 2, axis=2)
    )
    # strong colors that move are what it is worst at: 22.0 dB here, and random weights give 8
    assert psnr(source, decoded).mean() > 21.5


def test_an_output_of_the_weights_of_another_version_names_them_and_takes_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding, verifying and resuming say what to do, and work with the file that the output was made with."""
    config, weights = load_weights(shipped_weights())
    assert isinstance(config, VidTokConfig)
    former = VidTok(config)
    former.load_state_dict({name: tensor * 0.9 for name, tensor in weights.items()})
    file = tmp_path / "former.safetensors"
    save_tokenizer(file, former)
    sample = Sample(name="a.mp4", codec="libx264", width=64, height=64, rate=Fraction(8), seconds=5 / 8)
    write_sample(tmp_path / "a.mp4", sample, seed=3)
    out = tmp_path / "tokens"
    tokenizing = ("tokenize", tmp_path / "a.mp4", "--out", out, "--size", "64", "--frames", "5", "--local")
    with monkeypatch.context() as patch:
        patch.setattr("vidshard.models.weights.shipped_weights", lambda _name=DEFAULT: file)
        assert run(*tokenizing).exit_code == 0
    decoding = ("decode", out, "--all", tmp_path / "shown", "--local")
    for command in (decoding, ("verify", out, "--exact", 1)):
        said = " ".join(run(*command).output.split())
        assert f"expected {weights_digest(former.state_dict())}" in said
        assert "comes with other weights" in said
        assert f"models/shipped/{DEFAULT}.safetensors there, with --weights" in said
    assert run(*tokenizing).exit_code == 2
    for arguments in (decoding, ("verify", out, "--exact", 1), tokenizing):
        result = run(*arguments, "--weights", file)
        assert result.exit_code == 0, result.output
