"""Compiled encoders: one graph, the tokens of the layers, and a cache that encoders share."""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.encoding import CONFIG, SMALL, clip_spec, decoded_row, encoder_spec
from vidshard.models.tokenizer import get_preset
from vidshard.models.vidtok.config import VidTokConfig
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import load_tokenizer
from vidshard.pipeline import encode_stage
from vidshard.pipeline.compiled import CompileCache, compile_encoder
from vidshard.pipeline.encode_stage import ClipEncoder
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.schemas.errors import UserError
from vidshard.schemas.runs import TokenizeRun


def model_of(variant: str) -> VidTok:
    assert isinstance(CONFIG, VidTokConfig)
    smaller = {"encoder_pairs": 1, "decoder_pairs": 1}
    model = load_tokenizer(CONFIG.model_copy(update={"variant": variant, **smaller}), None, seed=0)
    assert isinstance(model, VidTok)
    return model


@pytest.fixture(autouse=True)
def _without_compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "variant",
    ["causal-v1.1", *(pytest.param(variant, marks=pytest.mark.slow) for variant in ("causal-v1.0", "non-causal"))],
)
def test_encoder_and_decoder_are_one_graph_each_without_a_break(variant: str) -> None:
    model = model_of(variant)
    with torch.inference_mode():
        x_BTHWC = torch.zeros(2, 8, 16, 16, 3)
        z_BTHWC = torch.zeros(2, 2, 2, 2, model.config.latent_channels)
        for network, values in ((model.encoder, x_BTHWC), (model.decoder, z_BTHWC)):
            said = torch._dynamo.explain(network)(values)
            assert (said.graph_count, said.graph_break_count) == (1, 0), said


@pytest.mark.slow  # 20 s on busy cores
def test_a_compiled_encoder_gives_the_tokens_of_the_layers_for_clips_and_streams() -> None:
    model = model_of("causal-v1.0")
    x_BCTHW = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    with torch.inference_mode():
        expected = model.encode(x_BCTHW).tokens
        compile_encoder(model, backend="eager")
        first, past = model.encode_stream(x_BCTHW[:, :, :1])
        second, _ = model.encode_stream(x_BCTHW[:, :, 1:], past)
        assert expected is not None
        assert first.tokens is not None
        assert second.tokens is not None
        assert torch.equal(torch.cat([first.tokens, second.tokens], dim=1), expected)


def test_each_shape_has_a_folder_whose_first_passes_are_locked(tmp_path: Path) -> None:
    cache = CompileCache(str(tmp_path), "fsq/tiny float16")
    with cache.passes(5, (32, 48), 8):
        (folder,) = tmp_path.glob("fsq-tiny-float16/*/5x32x48-batch-8")
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "inductor")
        assert os.environ["TRITON_CACHE_DIR"] == str(folder / "triton")
        with open(folder / "lock") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # another encoder would wait
    with cache.passes(5, (32, 48), 8), open(folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # compiled passes need no lock
    with cache.passes(5, (32, 48), 4):
        assert len(list(folder.parent.iterdir())) == 2


def test_the_encode_stage_compiles_and_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = decoded_row(3, clip_spec(SMALL), 3)
    expected = ClipEncoder(encoder_spec(2))(rows)["tokens"]
    monkeypatch.setattr(encode_stage, "compile_encoder", lambda model: compile_encoder(model, backend="eager"))
    found = ClipEncoder(replace(encoder_spec(2), compile_cache=str(tmp_path)))(rows)["tokens"]
    assert found == expected
    assert [path.name for path in tmp_path.glob("tiny-float32/*/*")] == ["5x16x16-batch-2"]


def test_only_encoders_of_vidtok_on_gpus_are_compiled(tmp_path: Path) -> None:
    def resolved(**settings: object) -> ResolvedRun:
        run = {"inputs": ["a.mp4"], "out": str(tmp_path), "tokenizer": "tiny", "gpu_kernels": "compiled"}
        return ResolvedRun.of(TokenizeRun.model_validate(run | settings))

    placed = resolved(compile_cache="/shared").placed(device="cuda", precision="float16")
    assert placed.encoder_spec(batch_size=8, num_threads=1).compile_cache == "/shared"
    placed = resolved().placed(device="cuda", precision="float16")
    assert str(placed.encoder_spec(batch_size=8, num_threads=1).compile_cache).endswith("/vidshard/compiled")
    for settings, device in (({}, "cpu"), ({"gpu_kernels": "fused"}, "cuda")):
        placed = resolved(**settings).placed(device=device, precision="float16")  # type: ignore[arg-type]
        assert placed.encoder_spec(batch_size=8, num_threads=1).compile_cache is None
    for kernels in ("compiled", "convolution"):
        with pytest.raises(UserError, match=f"{kernels} is for encoders of the VidTok family"):
            resolved(tokenizer="vidtwin_tiny", gpu_kernels=kernels)
    placed = resolved(gpu_kernels="convolution").placed(device="cuda", precision="float16")
    assert placed.encoder_spec(batch_size=8, num_threads=1).fuses_convolutions
    with pytest.raises(ValueError, match="only encoders of the VidTok family"):
        compile_encoder(load_tokenizer(get_preset("vidtwin_tiny"), None, seed=0))
