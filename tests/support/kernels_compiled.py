"""Compiles every kernel of the GPU path for a generation of GPUs that is not there, and checks that none spills.

    python -m tests.support.kernels_compiled 90 fp16        norms and sums of taps
    python -m tests.support.kernels_compiled 90 fp16 12     the first 12 convolutions with norms

Prints one line a kernel: its name, its constants, and the registers of a thread.
"""

from __future__ import annotations

import itertools
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
from vidshard.models.vidtok.fused_convolution import tile_of
from vidshard.models.vidtok.fused_kernel import conv_norm_silu_kernel, norm_silu_kernel, sum_taps_kernel

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


def convolutions(dtype: str, generation: int) -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Convolutions with norms: as `variants`, and their options."""
    pointers = dict.fromkeys(("x", "kernel", "bias", "residual", "gain", "shift", "total", "y"), f"*{dtype}")
    sizes = {**dict.fromkeys("BTHW", "i32"), "eps": "fp32"}
    for (inputs, channels), (time, space) in itertools.product(((128, 128), (256, 256)), ((1, 3), (3, 1))):
        for residual, norm in ((True, True), (False, True), (True, False)):
            tile = tile_of(channels, inputs, generation)
            options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
            taps = {"TIME_TAPS": time, "SPACE_TAPS": space, "BEFORE": time - 1, "REPEAT_FIRST": False}
            parts = {"RESIDUAL": residual, "KEEP_TOTAL": residual, "NORM": norm}
            constants = {"INPUTS": inputs, "C": channels, **taps, **parts, **tile}
            yield conv_norm_silu_kernel, pointers | sizes, constants, options


def usage_of(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    options: Mapping[str, int],
) -> str:
    """Compile a kernel; returns the resources that it uses, in the words of ``cuobjdump``."""
    arguments = {**signature, **dict.fromkeys(constants, "constexpr")}
    types = {name: arguments[name] for name in kernel.arg_names}
    # Maps are aligned to 16 bytes, as torch allocates them; descriptors need it.
    aligned = {(at,): [["tt.divisibility", 16]] for at, type_ in enumerate(types.values()) if type_.startswith("*")}
    source = ASTSource(kernel, types, dict(constants), aligned if kernel is conv_norm_silu_kernel else {})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        return subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True).stdout


def main(capability: int, dtype: str, num_convolutions: int | None) -> None:
    """Compile the norms and sums, or a number of convolutions."""
    chosen = [(*variant, {"num_warps": 4}) for variant in variants(dtype)]
    if num_convolutions is not None:
        chosen = list(itertools.islice(convolutions(dtype, capability // 10), num_convolutions))
    for kernel, signature, constants, options in chosen:
        usage = usage_of(kernel, signature, constants, capability, options)
        assert "STACK:0 " in usage, usage  # a spill would take it
        assert "LOCAL:0 " in usage, usage
        print(kernel.fn.__name__, constants, usage[usage.index("REG:") :].split()[0])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
