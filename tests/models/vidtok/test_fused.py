"""The kernel of norm, SiLU and padding: equal to the layers in Triton's interpreter, and compiled for GPUs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vidshard.models.vidtok import fused
from vidshard.models.vidtok.layers import ChannelNorm

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, of `.[dev]` on Linux"
)

INTERPRETED = """
import itertools
import torch
from vidshard.models.vidtok import fused
from vidshard.models.vidtok.layers import TIME_RULES, ChannelNorm

torch.manual_seed(0)
worst = {}
shapes = [(1, 1, 1, 1, 4), (3, 5, 3, 7, 16), (2, 4, 5, 3, 24), (1, 3, 4, 4, 128), (5, 2, 1, 9, 40)]
for shape, dtype, rule, with_past in itertools.product(
    shapes, (torch.float32, torch.float16), ("causal-v1.0", "causal-v1.1"), (False, True)
):
    norm = ChannelNorm(shape[-1])
    torch.nn.init.normal_(norm.norm.weight)
    torch.nn.init.normal_(norm.norm.bias)
    norm = norm.to(dtype).requires_grad_(False)
    x = (3 * torch.randn(shape) + 1).to(dtype)
    past = (torch.randn(shape[0], 2, *shape[2:]).to(dtype),) if with_past else ()
    expected, expected_past = norm.in_context(x, past, TIME_RULES[rule])
    plain = norm(x)
    fused.is_used = lambda x, weight: True
    found, found_past = norm.in_context(x, past, TIME_RULES[rule])
    found_plain = norm(x)
    fused.is_used = IS_USED
    for a, b in ((expected, found), (expected_past[0], found_past[0]), (plain, found_plain)):
        assert a.shape == b.shape and a.dtype == b.dtype
        worst[dtype] = max(worst.get(dtype, 0), float((a.float() - b.float()).abs().max()))
assert worst[torch.float32] < 5e-6, worst
assert worst[torch.float16] < 1e-2, worst
print("equal", worst)
""".replace("IS_USED", "original").replace("torch.manual_seed(0)", "original = fused.is_used\ntorch.manual_seed(0)")


@needs_triton
def test_the_kernel_equals_the_layers_in_tritons_interpreter_on_ragged_shapes_and_with_a_past() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("equal"), done.stderr[-2000:]


COMPILED = """
import subprocess
import sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vidshard.models.vidtok.fused import block_of
from vidshard.models.vidtok.fused_kernel import norm_silu_kernel

for channels in (16, 128, 256, 512):
    block = block_of(channels)
    pointers = dict.fromkeys(("x", "weight", "bias", "y"), sys.argv[2])
    signature = pointers | {"rows": "i32", "clip_rows": "i32", "lead_rows": "i32", "eps": "fp32"}
    constants = {"C": channels, "SILU": True, **block}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(norm_silu_kernel, signature, constants)
    kernel = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 4})
    Path("kernel.cubin").write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", "kernel.cubin"], capture_output=True, text=True).stdout
    assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage  # a spill would take either
    print(channels, usage[usage.index("REG:"):].split()[0])
"""


@needs_triton
@pytest.mark.parametrize(
    ("capability", "pointer"),
    [
        (90, "*fp16"),
        *(
            pytest.param(capability, pointer, marks=pytest.mark.slow)
            for capability, pointer in [(80, "*fp16"), (100, "*fp16"), (90, "*bf16"), (90, "*fp32")]
        ),
    ],
)
def test_the_kernel_compiles_for_every_generation_without_spills(capability: int, pointer: str, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", COMPILED, str(capability), pointer]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.findall(r"^(\d+) ", done.stdout, re.MULTILINE) == ["16", "128", "256", "512"]


def test_a_cpu_and_gradients_take_the_layers_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the kernel is not for this")

    monkeypatch.setattr(fused, "norm_silu", refuse)
    norm = ChannelNorm(8)
    with torch.no_grad():
        norm(torch.randn(1, 2, 3, 3, 8), silu=True)
    norm(torch.empty(1, 2, 3, 3, 8, device="cpu"), silu=True).sum().backward()
    on_meta = ChannelNorm(8).to("meta")
    on_meta(torch.empty(1, 2, 3, 3, 8, device="meta", requires_grad=True), silu=True)
    assert not fused.is_used(torch.empty(1, 1, 1, 1, 4096, device="meta"), on_meta.norm.weight.detach())
