"""One kernel for layer norm over channels, SiLU, and the frames before a chunk: the GPU path of `layers`.

PyTorch takes three passes over memory for them, and copies each map to put two frames before it. The kernel reads a map
once and writes it behind the frames before it: 28.1 of 41.7 GB are left for a clip of 17x256x256 in the 488 encoder.
It computes as PyTorch does: statistics in float32, the norm rounded to the map's dtype, and SiLU of that in float32.

It is used on CUDA without gradients, where Triton is installed, as it is with every CUDA build of torch. Elsewhere the
layers compute as ever. On the meta device the operator only counts (`models.cost`).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None

LONGEST_ROW = 2048
"""Most channels that the kernel takes: a row lies in the registers of one program."""


def is_used(x_BTHWC: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes this map: on a GPU or the meta device, without gradients."""
    if x_BTHWC.device.type not in ("cuda", "meta") or x_BTHWC.shape[-1] > LONGEST_ROW:
        return False
    if torch.is_grad_enabled() and (x_BTHWC.requires_grad or weight.requires_grad):
        return False
    if x_BTHWC.device.type == "meta":
        return True
    return HAS_TRITON and not torch.is_autocast_enabled("cuda")  # which would take the norm in float32


@torch.library.custom_op("vidshard::norm_silu", mutates_args=())
def norm_silu(
    x_BTHWC: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool, lead: int, repeat_first: bool
) -> Tensor:
    """Layer norm over the channels and, with ``silu``, SiLU of it, behind ``lead`` more frames.

    Args:
        lead: number of frames before the chunk.
        repeat_first: those frames are copies of the first one of the result; otherwise zeros.

    Returns:
        (B, lead + T, H, W, C) of the map's dtype.
    """
    x_BTHWC = x_BTHWC.contiguous()
    B, T, H, W, C = x_BTHWC.shape
    y_BTHWC = x_BTHWC.new_empty(B, lead + T, H, W, C)
    launch(x_BTHWC, weight, bias, y_BTHWC, eps=eps, silu=silu)
    if lead:
        y_BTHWC[:, :lead] = y_BTHWC[:, lead : lead + 1] if repeat_first else 0
    return y_BTHWC


@norm_silu.register_fake
def _shape_of(
    x_BTHWC: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool, lead: int, repeat_first: bool
) -> Tensor:
    del weight, bias, eps, silu, repeat_first
    B, T, H, W, C = x_BTHWC.shape
    return x_BTHWC.new_empty(B, lead + T, H, W, C)


def launch(x_BTHWC: Tensor, weight: Tensor, bias: Tensor, y_BTHWC: Tensor, *, eps: float, silu: bool) -> None:
    """Run the kernel: norm and SiLU of ``x``, into the last frames of ``y``."""
    from vidshard.models.vidtok.fused_kernel import norm_silu_kernel

    B, T, H, W, C = x_BTHWC.shape
    rows = B * T * H * W
    if rows == 0:
        return
    block = block_of(C)
    norm_silu_kernel[(-(-rows // block["ROWS"]),)](
        x_BTHWC,
        weight,
        bias,
        y_BTHWC,
        rows,
        T * H * W,
        (y_BTHWC.shape[1] - T) * H * W,
        eps,
        C=C,
        SILU=silu,
        num_warps=4,
        **block,
    )


def block_of(channels: int) -> dict[str, Any]:
    """Rows and columns of a program: 2048 values, 16 for each thread: 40 to 96 registers, by generation and width."""
    width = 1 << max(0, channels - 1).bit_length()
    return {"WIDTH": width, "ROWS": max(1, 2048 // width)}
