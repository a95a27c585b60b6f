"""The kernels of the GPU path: equal to the layers in Triton's interpreter, and compiled for GPUs."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vidshard.models.vidtok import fused
from vidshard.models.vidtok.layers import TIME_RULES, ChannelNorm
from vidshard.models.vidtok.resampling import RepeatedTimeUp, SpaceUp, TimeDown

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, of `.[dev]` on Linux"
)


def said_by(module: str, *arguments: str, **environment: str) -> str:
    """Run a module of `tests.support` in a process of its own; returns what it prints."""
    command = [sys.executable, "-m", f"tests.support.{module}", *arguments]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_triton
@pytest.mark.parametrize(
    "checks",
    [
        ("norms", "sums", "resampling", "convolutions"),
        pytest.param(("models",), marks=pytest.mark.slow),  # half a minute
    ],
    ids=["layers", "models"],
)
def test_the_kernels_equal_the_layers_in_tritons_interpreter_on_ragged_shapes_and_with_a_past(
    checks: tuple[str, ...],
) -> None:
    assert said_by("kernels_interpreted", *checks, TRITON_INTERPRET="1").endswith("equal\n")


@needs_triton
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        (90, "fp16"),
        *(
            pytest.param(capability, dtype, marks=pytest.mark.slow)
            for dtype, capability in itertools.product(("fp16", "bf16", "fp32"), (80, 90, 100))
            if (capability, dtype) != (90, "fp16")
        ),
    ],
)
def test_the_kernels_compile_for_every_generation_without_spills(capability: int, dtype: str, tmp_path: Path) -> None:
    said = said_by("kernels_compiled", str(capability), dtype, TRITON_CACHE_DIR=str(tmp_path))
    assert said.count("norm_silu_kernel") == said.count("sum_taps_kernel") == 8


@needs_triton
@pytest.mark.parametrize(
    ("capability", "dtype", "number"),
    [
        (90, "fp16", 1),
        *(
            pytest.param(capability, dtype, 12, marks=pytest.mark.slow)
            for dtype, capability in itertools.product(("fp16", "bf16"), (80, 90, 100))
        ),
    ],
)
def test_convolutions_with_norms_compile_for_every_generation_without_spills(
    capability: int, dtype: str, number: int, tmp_path: Path
) -> None:
    said = said_by("kernels_compiled", str(capability), dtype, str(number), TRITON_CACHE_DIR=str(tmp_path))
    assert said.count("conv_norm_silu_kernel") == number


def test_a_cpu_and_gradients_take_the_layers_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the kernel is not for this")

    for name in ("norm_silu", "add_norm_silu", "sum_taps"):
        monkeypatch.setattr(fused, name, refuse)
    norm = ChannelNorm(8)
    with torch.no_grad():
        norm(torch.randn(1, 2, 3, 3, 8), silu=True)
    norm(torch.empty(1, 2, 3, 3, 8, device="cpu"), silu=True).sum().backward()
    on_meta = ChannelNorm(8).to("meta")
    on_meta(torch.empty(1, 2, 3, 3, 8, device="meta", requires_grad=True), silu=True)
    assert not fused.is_used(torch.empty(1, 1, 1, 1, 4096, device="meta"), on_meta.norm.weight.detach())


def test_folded_weights_give_the_bits_of_a_pass_and_end_when_the_parameters_change() -> None:
    layers = [SpaceUp(8), TimeDown(8, TIME_RULES["causal-v1.0"]), RepeatedTimeUp(8, TIME_RULES["causal-v1.0"])]
    x = torch.randn(2, 4, 4, 4, 8)
    for layer in layers:
        with torch.no_grad():
            expected = layer(x)[0]
            layer.fold(torch.float32)
            assert torch.equal(layer(x)[0], expected)
            assert layer.double()(x.double())[0].dtype == torch.float64  # casting ends it
            layer.float().fold(torch.float32)
            layer.load_state_dict({name: value * 2 for name, value in layer.state_dict().items()})
            assert not torch.equal(layer(x)[0], expected)
        assert "_folded" not in layer.state_dict()
