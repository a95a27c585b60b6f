"""Kernels of the GPU path of `layers`: the work between convolutions in one pass over memory.

* `norm_silu` computes layer norm over channels and SiLU, and writes them behind the frames before a chunk.
* `add_norm_silu` also adds up the residual unit before it.
* `sum_taps` sums the frames of a doubled sequence.

For a clip of 17x256x256 in the 488 model PyTorch's own operators move 41.2 GB to encode and 69.2 GB to decode. With the
kernels 24.9 and 37.6 GB are left (`models.cost`; a test holds these counts).

They compute as PyTorch does: sums are rounded to the map's dtype, statistics are float32, the norm is rounded to the
map's dtype, and SiLU is computed in float32 from that.

They are used on CUDA without gradients, where Triton is installed, as it is with every CUDA build of torch. Elsewhere
the layers compute as ever. On the meta device the operators only count (`models.cost`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidshard.models.vidtok.constants import constant

HAS_TRITON = importlib.util.find_spec("triton") is not None

LONGEST_ROW = 2048
"""Most channels that the kernel takes: a row lies in the registers of one program."""

SUM_BLOCK = 1024
"""Values of a program of `sum_taps`."""


def is_used(x_BTHWC: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes this map: on a GPU or the meta device, without gradients."""
    if x_BTHWC.device.type not in ("cuda", "meta") or x_BTHWC.shape[-1] > LONGEST_ROW:
        return False
    if torch.is_grad_enabled() and (x_BTHWC.requires_grad or weight.requires_grad):
        return False
    if torch.compiler.is_compiling():  # a compiler fuses PyTorch's own operators by itself
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
    _fill_lead(y_BTHWC, lead, repeat_first)
    return y_BTHWC


@norm_silu.register_fake
def _shape_of(
    x_BTHWC: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool, lead: int, repeat_first: bool
) -> Tensor:
    del weight, bias, eps, silu, repeat_first
    B, T, H, W, C = x_BTHWC.shape
    return x_BTHWC.new_empty(B, lead + T, H, W, C)


@torch.library.custom_op("vidshard::add_norm_silu", mutates_args=("x_BTHWC",))
def add_norm_silu(
    x_BTHWC: Tensor,
    residual_BTHWC: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    lead: int,
    repeat_first: bool,
) -> Tensor:
    """Add ``residual`` to ``x`` in place, and return `norm_silu` of the sum: both from one pass over memory."""
    B, T, H, W, C = x_BTHWC.shape
    y_BTHWC = x_BTHWC.new_empty(B, lead + T, H, W, C)
    launch(x_BTHWC, weight, bias, y_BTHWC, residual_BTHWC.contiguous(), eps=eps, silu=silu)
    _fill_lead(y_BTHWC, lead, repeat_first)
    return y_BTHWC


@add_norm_silu.register_fake
def _shape_of_sum(
    x_BTHWC: Tensor,
    residual_BTHWC: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    lead: int,
    repeat_first: bool,
) -> Tensor:
    del residual_BTHWC, weight, bias, eps, silu, repeat_first
    B, T, H, W, C = x_BTHWC.shape
    return x_BTHWC.new_empty(B, lead + T, H, W, C)


def _fill_lead(y_BTHWC: Tensor, lead: int, repeat_first: bool) -> None:
    if repeat_first:
        y_BTHWC[:, :lead] = y_BTHWC[:, lead : lead + 1]
    elif lead:
        y_BTHWC[:, :lead].zero_()


def launch(
    x_BTHWC: Tensor,
    weight: Tensor,
    bias: Tensor,
    y_BTHWC: Tensor,
    residual_BTHWC: Tensor | None = None,
    *,
    eps: float,
    silu: bool,
) -> None:
    """Run the kernel: norm and SiLU of ``x``, plus ``residual`` if given, into the last frames of ``y``."""
    from vidshard.models.vidtok.fused_kernel import norm_silu_kernel

    assert x_BTHWC.is_contiguous()
    B, T, H, W, C = x_BTHWC.shape
    rows = B * T * H * W
    if rows == 0:
        return
    block = block_of(C)
    norm_silu_kernel[(-(-rows // block["ROWS"]),)](
        x_BTHWC,
        x_BTHWC if residual_BTHWC is None else residual_BTHWC,
        weight,
        bias,
        y_BTHWC,
        rows,
        T * H * W,
        (y_BTHWC.shape[1] - T) * H * W,
        eps,
        C=C,
        SILU=silu,
        RESIDUAL=residual_BTHWC is not None,
        num_warps=4,
        **block,
    )


def block_of(channels: int) -> dict[str, Any]:
    """Rows and columns of a program: 2048 values, 16 for each thread: 40 to 96 registers, by generation and width."""
    width = 1 << max(0, channels - 1).bit_length()
    return {"WIDTH": width, "ROWS": max(1, 2048 // width)}


@torch.library.custom_op("vidshard::sum_taps", mutates_args=())
def sum_taps(products_BTHWC: Tensor, first: Sequence[int], second: Sequence[int], shares: Sequence[float]) -> Tensor:
    """Sum the products of three taps into the frames of a doubled sequence, as `layers.summed_at_once`.

    Args:
        products_BTHWC: products of each source frame with each tap, (B, T, H, W, 3 C).
        first: source frame of each doubled frame, two more than there are output frames; -1 for a frame of zeros.
        second: source frame with which it is interpolated; the same one where it is not.
        shares: interpolation weight of the second frame.

    Returns:
        (B, number of output frames, H, W, C).
    """
    from vidshard.models.vidtok.fused_kernel import sum_taps_kernel

    products_BTHWC = products_BTHWC.contiguous()
    B, T, H, W, _ = products_BTHWC.shape
    y_BTHWC: Tensor = _sums_of(products_BTHWC, first, second, shares)
    C = y_BTHWC.shape[-1]
    if y_BTHWC.numel() == 0:
        return y_BTHWC
    num_blocks = -(-H * W * C // SUM_BLOCK)
    device = products_BTHWC.device
    sum_taps_kernel[(B * y_BTHWC.shape[1] * num_blocks,)](
        products_BTHWC,
        constant(tuple(first), torch.int64, device),
        constant(tuple(second), torch.int64, device),
        constant(tuple(shares), torch.float32, device),
        y_BTHWC,
        T,
        y_BTHWC.shape[1],
        H * W * C,
        num_blocks,
        C=C,
        BLOCK=SUM_BLOCK,
        MIXED=list(first) != list(second),
        num_warps=4,
    )
    return y_BTHWC


@sum_taps.register_fake
def _sums_of(products_BTHWC: Tensor, first: Sequence[int], second: Sequence[int], shares: Sequence[float]) -> Tensor:
    del second, shares
    B, _, H, W, channels = products_BTHWC.shape
    y_BTHWC: Tensor = products_BTHWC.new_empty(B, len(first) - 2, H, W, channels // 3)
    return y_BTHWC
