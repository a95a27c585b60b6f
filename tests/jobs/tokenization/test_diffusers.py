"""Autoencoders of diffusers through the commands: tokenize, verify, decode, read; and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed (pip install -e '.[dev]')")

import vidshard
from tests.support.cli import printed_by, tokenize, vidshard_exits
from tests.support.shards import clips_of
from tests.support.vae_configs import vae_of, write_vae
from tests.support.videos import Recipe, write_video
from vidshard.models.tokenizer import frames_to_input, parse_config
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.shard_reader import open_shard
from vidshard.pipeline.reconstruct import source_frames
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.schemas.tokens import Provenance

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = ("--size", "16")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "v.mp4", Recipe(num_frames=40, rate=Fraction(8)))
    return folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a repository has it: the autoencoder in vae/."""
    return write_vae(tmp_path_factory.mktemp("wan") / "vae", "wan-2.1").parent


@pytest.fixture(scope="module")
def output(videos: Path, wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    result = tokenize(videos, "--out", out, "--tokenizer", f"diffusers:{wan}", *SIZE, "--keep-logvar")
    assert result.exit_code == 0, result.output
    assert "17x16x16 frames become [3, 5, 2, 2] float16 latents" in result.output
    return out


def provenance_of(out: Path) -> Provenance:
    with open_shard(shard_paths(str(out))[0]) as (_, provenance):
        return provenance


def test_a_shard_holds_the_raw_mean_and_says_what_made_it(output: Path) -> None:
    provenance = provenance_of(output)
    config = parse_config(provenance.tokenizer)
    assert provenance.tokenizer["class_name"] == "AutoencoderKLWan"
    assert provenance.tokenizer["flags"] == {"use_tiling": False, "use_slicing": False}
    assert len(provenance.tokenizer["config_sha256"]) == 64
    assert provenance.libraries["diffusers"]
    assert provenance.weights_source.endswith("vae/diffusion_pytorch_model.safetensors")
    assert provenance.run["tokenizer"].endswith("/vae")
    assert provenance.run["precision"] == "float32"
    assert provenance.normalization is not None
    assert provenance.normalization.record()["mean"] == [0.5, -0.25, 1.0]
    resolved = ResolvedRun.from_provenance(provenance)
    clips = clips_of(output)
    assert len(clips) == 3
    rows = pq.read_table(shard_paths(str(output))[0], columns=["latents", "latents_logvar"]).to_pylist()
    for clip, row in zip(clips, rows, strict=True):
        assert clip.payload["latents"].shape == config.payload(17, 16, 16)[0].shape
        x_BCTHW = frames_to_input(torch.from_numpy(source_frames(clip, resolved))[None])
        with torch.inference_mode():
            encoded = vae_of("wan-2.1").encode(x_BCTHW)
        for name, values in encoded.payload.items():
            np.testing.assert_array_equal(np.array(row[name], np.float16), values.flatten().numpy().astype(np.float16))


def test_an_output_resumes_verifies_and_decodes(output: Path, wan: Path, videos: Path, tmp_path: Path) -> None:
    before = [Path(path).read_bytes() for path in shard_paths(str(output))]
    result = tokenize(videos, "--out", output, "--tokenizer", f"diffusers:{wan}/vae", *SIZE, "--keep-logvar")
    assert result.exit_code == 0, result.output
    assert [Path(path).read_bytes() for path in shard_paths(str(output))] == before
    assert "3 clips again by another cut (100.00% of all, seed 0): 0 of" in printed_by("verify", output, "--exact", 1)
    clip = clips_of(output)[0]
    decoded = tmp_path / "clip.mp4"
    printed_by("decode", output, "--clip", clip.clip_id, "--to", decoded)
    assert decoded.stat().st_size > 0


def test_the_reader_applies_the_stored_normalization_on_request(output: Path) -> None:
    raw = next(iter(vidshard.TokenShards(str(output), batch_size=3, columns=["latents"])))
    scaled = next(iter(vidshard.TokenShards(str(output), batch_size=3, columns=["latents"], normalize=True)))
    mean, std = torch.tensor([[0.5, -0.25, 1.0], [2.0, 4.0, 0.5]]).view(2, 1, 3, 1, 1, 1)
    torch.testing.assert_close(scaled["latents"], (raw["latents"].float() - mean) / std)


def test_a_video_of_any_length_is_one_sequence_whoever_encodes_its_spans(
    videos: Path, wan: Path, tmp_path: Path
) -> None:
    long = tmp_path / "videos"
    long.mkdir()
    write_video(long / "v.mp4", Recipe(num_frames=130, rate=Fraction(8)))
    flags = ("--tokenizer", f"diffusers:{wan}", "--size", "16", "--frames", "9", "--continuous")
    for name, clips_per_span in (("one", 100), ("many", 2)):
        result = tokenize(long, "--out", tmp_path / name, *flags, "--clips-per-span", clips_per_span)
        assert result.exit_code == 0, result.output
    one, many = (
        np.concatenate([clip.payload["latents"] for clip in clips_of(tmp_path / name)], axis=1)
        for name in ("one", "many")
    )
    np.testing.assert_array_equal(one, many)
    resolved = ResolvedRun.from_provenance(provenance_of(tmp_path / "many"))
    assert resolved.largest.halo_clips * resolved.largest.num_frames >= resolved.config.history_frames
    assert ": 0 of" in printed_by("verify", tmp_path / "many", "--exact", 0.3)
    for name in ("one", "many"):
        printed_by("decode", tmp_path / name, "--all", tmp_path / f"{name}-decoded", "--local")
    films = [next((tmp_path / f"{name}-decoded").glob("*.mp4")).read_bytes() for name in ("one", "many")]
    assert films[0] == films[1]


REFUSED = {
    "wan-2.1": (("--frames", "19"), "takes clips of 1, 5, 9, 13, 17 ... frames, got 19; .*nearest: 17 or 21"),
    "mochi": (("--frames", "17"), "takes clips of 1, 7, 13, 19, 25 ... frames, got 17; .*nearest: 13 or 19"),
    "hunyuan": (("--frames", "17"), "takes clips of 1, 5, 9, 13 frames, got 17; .*nearest: 13"),
    "allegro": (("--size", "120"), "height must be 128 . a multiple of 8, .*; got 120; nearest: 128"),
    "minimax": (("--continuous",), "AutoencoderKLMiniMaxH3 cannot encode a video piece by piece: "),
    "ltx": (("--tile-size", "128"), "takes whole frames .* no tiles"),
    "cosmos": (("--keep-logvar",), "has no log-variance|gives tokens"),
    "sd": (("--continuous",), "AutoencoderKL cannot encode a video piece by piece: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_class_would_get_wrong_is_refused_before_anything_is_read(name: str, tmp_path: Path) -> None:
    flags, message = REFUSED[name]
    folder = write_vae(tmp_path / "vae", name, weights=False)
    code, printed = vidshard_exits(
        "tokenize", tmp_path, "--out", tmp_path / "out", "--tokenizer", f"diffusers:{folder}", "--local",
        "--random-weights", 0, *flags,
    )  # fmt: skip
    assert code == 2
    assert re.search(message, " ".join(printed.split())), printed
    assert not (tmp_path / "out").exists()


def test_frames_can_be_padded_to_a_length_that_the_class_takes(videos: Path, wan: Path, tmp_path: Path) -> None:
    flags = ("--tokenizer", f"diffusers:{wan}", *SIZE, "--frames", "19", "--pad-frames", "repeat-last", "--limit", 1)
    result = tokenize(videos, "--out", tmp_path, *flags)
    assert result.exit_code == 0, result.output
    assert clips_of(tmp_path)[0].payload["latents"].shape == (3, 6, 2, 2)


def broken_folder(what: str, wan: Path, folder: Path) -> Path:
    shutil.copytree(wan / "vae", folder)
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(weights)
    if what == "foreign entry":
        safetensors.torch.save_file(state | {"decoder.extra": torch.zeros(1)}, weights)
    elif what == "missing entry":
        safetensors.torch.save_file(dict(list(state.items())[1:]), weights)
    elif what == "other shape":
        name = next(iter(state))
        safetensors.torch.save_file(state | {name: torch.zeros(2, 2)}, weights)
    elif what == "pickle":
        torch.save(state, folder / "diffusion_pytorch_model.bin")
        weights.unlink()
    elif what == "huge config":
        config.write_text(json.dumps({"_class_name": "AutoencoderKLWan", "x": "y" * (1 << 20)}))
    elif what == "huge header":
        weights.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    elif what == "no JSON":
        config.write_text("{" * 100)
    elif what == "remote code":
        (folder / "vae.py").write_text("raise SystemExit('executed')")
        config.write_text(json.dumps({"_class_name": "Vae", "auto_map": {"AutoModel": "vae.Vae"}}))
    return folder


BROKEN = {
    "foreign entry": "1 foreign: decoder.extra",
    "missing entry": "1 missing: ",
    "other shape": "1 mis-shaped: ",
    "pickle": "no weights for AutoencoderKLWan",
    "huge config": "has more than 1,048,576 bytes",
    "huge header": "at most 16,777,216 are read",
    "no JSON": "is no JSON",
    "remote code": "'Vae' is not a class that is taken",
}


@pytest.mark.parametrize("what", BROKEN)
def test_files_that_are_not_those_of_the_class_are_refused_by_name(what: str, wan: Path, tmp_path: Path) -> None:
    folder = broken_folder(what, wan, tmp_path / "vae")
    printed = printed_by(
        "tokenize", tmp_path, "--out", tmp_path / "out", "--tokenizer", f"diffusers:{folder}", "--local", *SIZE, code=2
    )
    assert BROKEN[what] in printed


@pytest.mark.parametrize("place", ["nothing", "/no/such/folder", "s3://bucket/vae", "a/b/../c", "hf://a"])
def test_a_place_that_is_no_folder_and_no_repository_is_refused(place: str, tmp_path: Path) -> None:
    printed = printed_by(
        "tokenize", tmp_path, "--out", tmp_path / "out", "--tokenizer", f"diffusers:{place}", "--local", code=2
    )
    assert "OWNER/REPO[@REVISION][/SUBFOLDER]" in printed or "has no config.json" in printed
