"""On a real GPU: every precision through the commands, transfers, memory, faults and values that are not finite."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.cli import printed_by
from tests.support.encoding import CONFIG, SMALL, clip_spec, decoded_row, encoder_spec, rows_of_two_sizes
from tests.support.videos import Recipe, write_video
from vidshard.models.tokenizer import frames_to_input, get_preset
from vidshard.models.training.state import _adam
from vidshard.models.vidtok import fused, fused_convolution
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import load_tokenizer
from vidshard.pipeline.devices import examine_gpu, is_out_of_memory, make_reproducible
from vidshard.pipeline.encode import encode_clips
from vidshard.pipeline.encode_stage import ClipEncoder
from vidshard.pipeline.tokenizer_source import PRECISIONS
from vidshard.schemas.training import StageConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_this_gpu_is_usable_in_every_precision() -> None:
    report = examine_gpu()
    assert [report.problem(precision) for precision in PRECISIONS] == [None] * len(PRECISIONS)


@pytest.mark.parametrize(
    ("precision", "least"), [("float32", 0.995), ("tf32", 0.97), ("float16", 0.97), ("bfloat16", 0.8)]
)
def test_tokens_are_nearly_those_of_the_cpu(precision: str, least: float) -> None:
    rows = rows_of_two_sizes()
    expected, found = (
        np.concatenate([np.ravel(clip) for row in ClipEncoder(spec)(rows)["tokens"].to_pylist() for clip in row])
        for spec in (encoder_spec(2), replace(encoder_spec(2), device="cuda", precision=precision))
    )
    assert (expected == found).mean() >= least


@pytest.mark.parametrize("num_clips", [1, 3, 8])
def test_overlapped_batches_give_the_bits_of_single_passes(num_clips: int) -> None:
    make_reproducible("cuda", 1, "float16")
    model = load_tokenizer(CONFIG, None, seed=0, device="cuda", dtype=torch.float16)
    clips = list(np.random.default_rng(0).integers(0, 256, (num_clips, 5, 32, 32, 3), np.uint8))
    encoded = encode_clips(model, clips, CONFIG.payload(5, 32, 32), batch_size=2)["tokens"]
    for clip, tokens in zip(clips, encoded, strict=True):
        pair = torch.from_numpy(np.stack([clip, clip])).cuda()
        with torch.inference_mode():
            alone = model.encode(frames_to_input(pair, model.dtype)).payload["tokens"][0]
        assert alone.flatten().tolist() == tokens.tolist()


def test_a_second_call_gives_the_same_bits() -> None:
    rows = rows_of_two_sizes()
    encoder = ClipEncoder(replace(encoder_spec(4), device="cuda", precision="float16"))
    assert encoder(rows)["tokens"] == encoder(rows)["tokens"]


def test_a_batch_that_does_not_fit_is_a_shortage_of_memory() -> None:
    model = load_tokenizer(CONFIG, None, seed=0, device="cuda")
    total = torch.cuda.get_device_properties().total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (256 << 20)) / total)
    try:
        with torch.inference_mode(), pytest.raises(RuntimeError) as caught:
            model.encode(torch.zeros(64, 3, 17, 256, 256, device="cuda"))
        assert is_out_of_memory(caught.value, num_clips=64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_a_failed_kernel_is_a_fault() -> None:
    said = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--fault"], capture_output=True, text=True).stdout
    assert said.startswith("recognized: "), said


def test_a_value_that_is_not_finite_rejects_the_span() -> None:
    encoder = ClipEncoder(replace(encoder_spec(2), device="cuda", precision="float16"))
    weight = next(iter(encoder._tokenizer().state_dict().values()))
    weight.view(-1)[0] = float("nan")
    [row] = encoder(decoded_row(3, clip_spec(SMALL), 3)).to_pylist()
    assert row["rejection"]["reason"] == "not_finite"
    assert row["rejection"]["detail"].startswith("clip 2 in float16")


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_every_precision_tokenizes_goes_on_verifies_and_decodes(precision: str, tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", Recipe(num_frames=40, rate=Fraction(10)))
    out = tmp_path / "tokens"
    run = ("tokenize", video, "--out", out, "--fps", "4", "--frames", "5", "--size", "32", "--local")
    assert "device cuda" in printed_by(*run, "--device", "cuda", "--precision", precision)
    assert "0 written in 0 shards" in printed_by(*run)
    assert "encoded 4 clips again" in printed_by("verify", out, "--exact", 1)
    printed_by("decode", out, "--all", tmp_path / "clips", "--each-clip")


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_the_fused_kernels_give_what_pytorch_gives_for_clips_and_pictures(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_reproducible("cuda", 1, precision)
    model = load_tokenizer(CONFIG, None, seed=0, device="cuda", dtype=PRECISIONS[precision])
    assert isinstance(model, VidTok)
    x_BCTHW = (2 * torch.rand(3, 3, 9, 48, 32, device="cuda") - 1).to(model.dtype)
    with torch.inference_mode():
        z_BCTHW = model.encoder_output(x_BCTHW)
        frames = model.decode(z_BCTHW.tanh())
        monkeypatch.setattr(fused, "is_used", lambda *_: False)
        within = 1e-3 if precision == "float32" else 0.1
        torch.testing.assert_close(z_BCTHW, model.encoder_output(x_BCTHW), atol=within, rtol=within)
        torch.testing.assert_close(frames, model.decode(z_BCTHW.tanh()), atol=within, rtol=within)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_convolutions_with_norms_give_what_pytorch_gives_for_clips_and_pictures(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []
    convolve = fused_convolution.conv_norm_silu

    def counted(*arguments: object) -> list[Tensor]:
        calls.append(tuple(arguments[0].shape))  # type: ignore[attr-defined]
        return list(convolve(*arguments))

    make_reproducible("cuda", 1, precision)
    config = get_preset("fsq_causal_488_small")  # `tiny` has too few channels
    model = load_tokenizer(config, None, seed=0, device="cuda", dtype=PRECISIONS[precision])
    assert isinstance(model, VidTok)
    x_BCTHW = (2 * torch.rand(2, 3, 9, 48, 32, device="cuda") - 1).to(model.dtype)
    with torch.inference_mode():
        z_BCTHW = model.encoder_output(x_BCTHW)
        frames = model.decode(z_BCTHW.tanh())
        model.encoder.fuses_convolutions = model.decoder.fuses_convolutions = True
        monkeypatch.setattr(fused_convolution, "conv_norm_silu", counted)
        torch.testing.assert_close(model.encoder_output(x_BCTHW), z_BCTHW, atol=0.1, rtol=0.1)
        assert calls
        torch.testing.assert_close(model.decode(z_BCTHW.tanh()), frames, atol=0.1, rtol=0.1)


def test_a_pass_never_waits_for_the_gpu() -> None:
    make_reproducible("cuda", 1, "float16")
    model = load_tokenizer(CONFIG, None, seed=0, device="cuda", dtype=torch.float16)
    frames = torch.zeros(2, 5, 32, 32, 3, dtype=torch.uint8, device="cuda")
    with torch.inference_mode():
        model.encode(frames_to_input(frames, model.dtype))  # makes the constants and compiles the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.encode(frames_to_input(frames, model.dtype))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow  # compiles for a minute
def test_a_compiled_encoder_gives_nearly_the_same_tokens_and_leaves_its_kernels_in_the_cache(tmp_path: Path) -> None:
    rows = decoded_row(3, clip_spec(SMALL), 3)
    spec = replace(encoder_spec(2), device="cuda", precision="float16")
    expected, found = (
        np.concatenate([np.ravel(clip) for clip in ClipEncoder(each)(rows)["tokens"].to_pylist()[0]])
        for each in (spec, replace(spec, compile_cache=str(tmp_path)))
    )
    assert (expected == found).mean() >= 0.97
    assert any(path.is_file() for path in tmp_path.glob("**/inductor/**/*"))


def test_adam_is_fused_on_a_gpu() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, device="cuda"))
    optimizer = _adam([parameter], StageConfig())
    parameter.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert optimizer.param_groups[0]["fused"] is True
    assert bool((parameter < 1).all())
