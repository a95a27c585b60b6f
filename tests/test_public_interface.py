"""`import vidshard` is light, typed and complete; its functions tokenize, read, decode and load without a console."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import vidshard
from tests.support.videos import Recipe, write_video
from vidshard.models.tokenizer import get_preset
from vidshard.models.weights import DEFAULT, shipped_weights, weights_digest
from vidshard.schemas.errors import RunFailedError, UserError
from vidshard.schemas.rejections import Reason
from vidshard.schemas.tokenizers import TokenizerConfig

HEAVY = {"torch", "ray", "av", "pyarrow", "numpy", "pydantic", "fsspec"}


def run_of(folder: Path, **settings: object) -> vidshard.TokenizeRun:
    small = {"tokenizer": "tiny", "fps": 25, "frames": 17, "size": 64, "max_reject_share": 0.5}
    inputs, out = [str(folder / "clips")], str(folder / "tokens")
    return vidshard.TokenizeRun.model_validate({"inputs": inputs, "out": out, **small, **settings})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two videos and a broken one in ``clips/``."""
    folder = tmp_path_factory.mktemp("public")
    (folder / "clips").mkdir()
    for name, num_frames in (("a.mp4", 34), ("b.mp4", 20)):
        write_video(folder / "clips" / name, Recipe(num_frames=num_frames))
    (folder / "clips" / "c.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="module")
def summary(corpus: Path) -> vidshard.Summary:
    return vidshard.tokenize(run_of(corpus), local=True)


@pytest.fixture
def output(corpus: Path, summary: vidshard.Summary) -> vidshard.Output:
    return vidshard.open_output(summary.out)


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


# names


def test_what_type_checkers_see_is_what_is_imported() -> None:
    assert vidshard.__file__ is not None
    tree = ast.parse(Path(vidshard.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names if str(node.module)[:9] == "vidshard."}
    assert seen == vidshard._MODULES
    assert sorted([*seen, "__version__"]) == vidshard.__all__


@pytest.mark.parametrize("name", vidshard.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert name in dir(vidshard)
    value = getattr(vidshard, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__doc__


def test_other_names_are_refused_as_by_any_module() -> None:
    assert not hasattr(vidshard, "tokenise")


def test_importing_loads_nothing_heavy() -> None:
    assert python(f"import sys, vidshard; print({HEAVY} & {{*sys.modules}} or 'nothing')") == "nothing"


def test_reading_an_output_loads_neither_torch_nor_ray(output: vidshard.Output) -> None:
    reads = f"out = vidshard.open_output({output.path!r}); out.provenance, out.rejects(), list(out.clips())"
    assert (
        python(f"import sys, vidshard; {reads}; print({{'torch', 'ray'}} & {{*sys.modules}} or 'neither')") == "neither"
    )


# tokenize


def test_tokenize_says_what_became_of_the_videos_and_prints_nothing(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    summary = vidshard.tokenize(run_of(corpus, out=str(tmp_path)), local=True)
    assert (summary.num_videos, summary.num_rejected_videos, summary.written.num_clips) == (3, 1, 4)
    assert capfd.readouterr() == ("", "")
    again = vidshard.tokenize(run_of(corpus, out=str(tmp_path)), local=True)
    assert (again.written.num_clips, again.pending_spans) == (0, 0)


def test_tokenize_prints_to_a_console_that_it_is_given(tmp_path: Path, corpus: Path) -> None:
    console = Console(record=True, quiet=False, file=(tmp_path / "log").open("w"))
    vidshard.tokenize(run_of(corpus, out=str(tmp_path / "out")), console=console, local=True)
    assert "4 written in 1 shard" in console.export_text()


def test_a_request_that_cannot_be_carried_out_raises(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(vidshard.VidshardError, match="unknown tokenizer"):
        vidshard.tokenize(run_of(corpus, out=str(tmp_path), tokenizer="tinny"), local=True)


def test_a_run_that_fails_raises_what_its_summary_says(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(RunFailedError, match="max-reject-share"):
        vidshard.tokenize(run_of(corpus, out=str(tmp_path), max_reject_share=0.01), local=True)


# open_output


def test_an_output_tells_its_provenance_clips_and_rejects(output: vidshard.Output) -> None:
    assert output.provenance.tokenizer["name"] == "tiny"
    clips = list(output.clips())
    assert [clip.payload["tokens"].shape for clip in clips] == [(5, 8, 8)] * 4
    one = clips[1]
    assert [clip.clip_id for clip in output.clips(one.clip_id)] == [one.clip_id]
    [reject] = output.rejects()
    assert (Path(reject.uri).name, reject.reason) == ("c.mp4", Reason.NOT_A_VIDEO)


def test_a_single_shard_is_an_output_without_rejects(output: vidshard.Output) -> None:
    shard = vidshard.open_output(output.shards[0])
    assert shard.rejects() == []
    assert len(list(shard.clips())) == 4


def test_reconstructing_decodes_with_the_tokenizer_that_made_the_clip(output: vidshard.Output) -> None:
    tokenizer = vidshard.load_tokenizer("tiny", seed=0)
    for clip in output.clips():
        frames = output.reconstruct(clip)
        assert (frames.dtype, frames.shape) == (np.dtype(np.uint8), (17, 64, 64, 3))
        tokens = torch.from_numpy(clip.payload["tokens"].astype(np.int64))[None]
        expected = vidshard.output_to_frames(tokenizer.decode_payload({"tokens": tokens}))[0].numpy()
        assert np.array_equal(frames, expected)


def test_a_clip_is_printed_as_one_line(output: vidshard.Output) -> None:
    clip = next(output.clips())
    shown = f"tokens {clip.payload['tokens'].dtype} {clip.payload['tokens'].shape}"
    assert repr(clip) == f"StoredClip({clip.clip_id}, {shown}, and {len(clip.values)} columns in .values)"


def test_an_output_that_is_all_rejects_can_be_opened(tmp_path: Path, corpus: Path) -> None:
    bad = str(corpus / "clips" / "c.mp4")
    vidshard.tokenize(run_of(corpus, inputs=[bad], out=str(tmp_path), max_reject_share=1.0), local=True)
    output = vidshard.open_output(str(tmp_path))
    assert len(output.rejects()) == 1
    assert list(output.clips()) == []
    with pytest.raises(vidshard.VidshardError, match=r"rejects\(\)"):
        output.provenance  # noqa: B018


def test_a_folder_that_is_no_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(vidshard.VidshardError, match="no token shards"):
        vidshard.open_output(str(tmp_path))


# load_tokenizer


def test_without_arguments_the_tokenizer_is_the_one_that_comes_with_the_package(tmp_path: Path) -> None:
    shipped = vidshard.load_tokenizer()
    assert shipped.config.name == DEFAULT
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(shipped_weights().read_bytes())
    for tokenizer in (vidshard.load_tokenizer(DEFAULT, str(copy)), vidshard.load_tokenizer(weights=str(copy))):
        assert weights_digest(tokenizer.state_dict()) == weights_digest(shipped.state_dict())


@pytest.mark.parametrize("tokenizer", ["tiny", get_preset("tiny")], ids=["name", "config"])
def test_a_tokenizer_is_named_by_its_preset_or_config(tokenizer: str | TokenizerConfig) -> None:
    loaded = vidshard.load_tokenizer(tokenizer, seed=1, dtype=torch.bfloat16)
    assert loaded.config == get_preset("tiny")
    assert loaded.dtype is torch.bfloat16


def test_a_tokenizer_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    for arguments, words in (
        ({"tokenizer": "tinny"}, "did you mean tiny"),
        ({"tokenizer": "fsq_causal_488_32768"}, "no weights for fsq_causal_488_32768"),
        ({"weights": str(tmp_path / "none.safetensors")}, "none.safetensors"),
        ({"weights": str(shipped_weights()), "seed": 1}, "either weights or a seed"),
        ({"tokenizer": "tiny", "weights": str(shipped_weights())}, "holds fsq_causal_488_small_haar"),
    ):
        with pytest.raises(UserError, match=words):
            vidshard.load_tokenizer(**arguments)
