"""Tokens that change with the precision of the encoder, by emulation on a CPU: no GPU is needed.

    python -m benchmarks.precision VIDEO... [--clips 5] [--size 256] [--json precision.json]

The encoder runs in float32, and the result of every operator is rounded to the precision, as kernels do that accumulate
in float32. In TF32 the factors of convolutions and products are rounded to 10 bits of mantissa. The trained weights of
the package are used, and the quantizer gets float32. Kernels of a GPU sum in another order: that changes about as many
tokens as float32 itself does there, of which `benchmarks.gpu` has the share.
"""

from __future__ import annotations

import statistics
from itertools import islice
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import vidshard
from benchmarks.report import Row, report
from vidshard.models.tokenizer import frames_to_input
from vidshard.models.vidtok.model import VidTok
from vidshard.pipeline.devices import make_reproducible
from vidshard.pipeline.tokenizer_source import PRECISIONS

PRODUCTS = (torch.ops.aten.conv2d, torch.ops.aten.conv3d, torch.ops.aten.linear, torch.ops.aten.matmul)


class Rounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rounds what operators give, or in TF32 what products take, as a context manager."""

    def __init__(self, precision: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._precision = precision

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator with rounding."""
        if self._precision == "tf32":
            if operator.overloadpacket in PRODUCTS:
                args = (*map(to_tf32, args[:2]), *args[2:])
            return operator(*args, **(kwargs or {}))
        result = operator(*args, **(kwargs or {}))
        if operator.is_view:
            return result
        dtype = getattr(torch, self._precision)
        return tree_map_only(Tensor, lambda values: round_in_place(values, dtype), result)


def round_in_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 values to what a dtype holds."""
    return values.copy_(values.to(dtype)) if values.dtype is torch.float32 else values


def to_tf32(values: Tensor) -> Tensor:
    """Round float32 values to 10 bits of mantissa, to the nearest and ties away from zero, as tensor cores do."""
    return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.argument("videos", nargs=-1, required=True)
@click.option("--clips", default=5, show_default=True, help="Clips in all, taken from the videos in turn.")
@click.option("--size", default=256, show_default=True, help="Height and width of the frames.")
@click.option("--json", "json_path", metavar="FILE", help="Write the table there too.")
def main(videos: tuple[str, ...], clips: int, size: int, json_path: str | None) -> None:
    """Measure, and print the table."""
    make_reproducible("cpu", torch.get_num_threads())
    tokenizer = rounded_tokenizer("float32")
    batches = [frames_to_input(torch.from_numpy(frames)[None]) for frames in frames_of(videos, clips, size)]
    tokens = {name: [tokens_of(rounded_tokenizer(name), x_BCTHW, name) for x_BCTHW in batches] for name in NAMES}
    rows: list[Row] = []
    for name in NAMES[1:]:
        shares = [float((a == b).mean()) for a, b in zip(tokens["float32"], tokens[name], strict=True)]
        rows.append(
            {
                "precision": name,
                "tokens": sum(t.size for t in tokens[name]),
                "equal to float32": f"{statistics.mean(shares):.2%}",
                "worst clip": f"{min(shares):.2%}",
            }
        )
    report(f"tokens of {tokenizer.config.name}, {len(batches)} clips of 17x{size}x{size}", rows, json_path)


NAMES = ("float32", "tf32", "float16", "bfloat16")


def frames_of(videos: tuple[str, ...], clips: int, size: int) -> list[np.ndarray]:
    """First clips of the videos, in turn: uint8 (17, size, size, 3) each."""
    found: list[np.ndarray] = []
    readers = [vidshard.sample_clips(video, fps=8, frames=17, size=size) for video in videos]
    while len(found) < clips and readers:
        for reader in list(readers):
            clip = next(islice(reader, 1), None)
            if clip is None:
                readers.remove(reader)
            else:
                found.append(clip.frames)
    return found[:clips]


def rounded_tokenizer(precision: str) -> VidTok:
    """The trained tokenizer of the package in float32, with the weights that it has in a precision."""
    tokenizer = vidshard.load_tokenizer()
    assert isinstance(tokenizer, VidTok)
    return tokenizer.set_precision(PRECISIONS[precision]).set_precision(torch.float32)


def tokens_of(tokenizer: VidTok, x_BCTHW: Tensor, precision: str) -> np.ndarray:
    """Tokens of a clip whose encoder computes in an emulated precision."""
    with torch.inference_mode():
        if precision == "float32":
            z_BCTHW = tokenizer.encoder_output(x_BCTHW)
        else:
            x_BCTHW = x_BCTHW.to(PRECISIONS[precision]).float()
            with Rounded(precision):
                z_BCTHW = tokenizer.encoder_output(x_BCTHW)
        tokens = tokenizer.head.quantize(z_BCTHW).tokens
    assert tokens is not None
    return tokens.numpy()


if __name__ == "__main__":
    main()
