"""Compiles every kernel of the GPU path for a generation of GPUs that is not there, and checks that none spills.

    python -m tests.support.kernels_compiled 90 fp16

Prints one line a kernel: its name, its constants, and the registers of a thread.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vidshard.models.vidtok import fused
from vidshard.models.vidtok.fused_kernel import norm_silu_kernel, sum_taps_kernel

WIDTHS = (16, 128, 256, 512)
"""Channels of the levels of the small model and of the released ones."""


def variants(dtype: str) -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Kernels with the types of their arguments and their constants."""
    pointer = f"*{dtype}"
    for channels in WIDTHS:
        pointers = dict.fromkeys(("x", "residual", "weight", "bias", "y"), pointer)
        sizes = {"rows": "i32", "clip_rows": "i32", "lead_rows": "i32", "eps": "fp32"}
        for residual in (False, True):
            constants = {"C": channels, "SILU": True, "RESIDUAL": residual, **fused.block_of(channels)}
            yield norm_silu_kernel, pointers | sizes, constants
        tables = {"products": pointer, "first": "*i64", "second": "*i64", "share": "*fp32", "y": pointer}
        sizes = dict.fromkeys(("num_frames", "num_outputs", "frame_values", "num_blocks"), "i32")
        for mixed in (False, True):
            constants = {"C": channels, "BLOCK": fused.SUM_BLOCK, "MIXED": mixed}
            yield sum_taps_kernel, tables | sizes, constants


def usage_of(kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], capability: int) -> str:
    """Compile a kernel; returns the resources that it uses, in the words of ``cuobjdump``."""
    arguments = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, {name: arguments[name] for name in kernel.arg_names}, dict(constants))
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        return subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True).stdout


def main(capability: int, dtype: str) -> None:
    """Compile all of them."""
    for kernel, signature, constants in variants(dtype):
        usage = usage_of(kernel, signature, constants, capability)
        assert "STACK:0 " in usage, usage  # a spill would take it
        assert "LOCAL:0 " in usage, usage
        print(kernel.fn.__name__, constants, usage[usage.index("REG:") :].split()[0])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
