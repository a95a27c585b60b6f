"""Convolution with bias, residual sum, norm and SiLU in one kernel of the GPU path (``--gpu-kernels convolution``).

A tile of positions holds all channels of its result, so that the norm of the next layer is computed before anything is
written. Frames before a clip and positions beyond its edges are zeros that the kernel fills in: maps are not padded.
It serves the levels of at most 256 channels, which hold three quarters of the large models' work. Wider maps, chunks
with a past and maps with gradients take the kernels of `models.vidtok.fused` or PyTorch's layers.

It computes as the layers do: the convolution's result and the sum are rounded to the map's dtype, statistics are
float32, the norm is rounded, and SiLU is computed in float32 from that.
"""

# B batch, T frames, H height, W width, C channels

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from vidshard.models.vidtok import fused

WIDEST = 256
"""Most channels of a result: those of a tile lie in the registers of one program."""


def takes(x_BTHWC: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes a convolution of this map with a weight (out, in, *sizes)."""
    out_channels, in_channels = weight.shape[:2]
    if not 16 <= out_channels <= WIDEST or out_channels & (out_channels - 1) or in_channels % 16:
        return False
    return is_half(x_BTHWC) and fused.is_used(x_BTHWC, weight)


def is_half(x_BTHWC: Tensor) -> bool:
    """Whether a map has a dtype of two bytes; in float32 tiles would not fit."""
    return x_BTHWC.dtype in (torch.float16, torch.bfloat16)


@torch.library.custom_op("vidshard::conv_norm_silu", mutates_args=())
def conv_norm_silu(
    x_BTHWC: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual_BTHWC: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    before: int,
    repeat_first: bool,
    keep_total: bool,
) -> list[Tensor]:
    """Convolve, add the residual, and compute norm and SiLU of the sum.

    Args:
        x_BTHWC: map of the dtype of the result, which has as many frames and positions.
        weight: (out, in, time), (out, in, height, width) or (out, in, time, height, width), of odd sizes in space;
            stored with ``in`` last, it is not copied.
        bias: (out).
        residual_BTHWC: map (B, T, H, W, out) to add; None for none.
        gain, shift: weight and bias of the norm, (out); None for neither norm nor SiLU.
        before: frames that an output frame sees before its own.
        repeat_first: frames before the clip are copies of its first one; otherwise zeros. Those after it are zeros.
        keep_total: return the sum too.

    Returns:
        Norm and SiLU if there is a norm, and with keep_total the sum, each (B, T, H, W, out).
    """
    from vidshard.models.vidtok.fused_kernel import conv_norm_silu_kernel

    x_BTHWC = x_BTHWC.contiguous()
    B, T, H, W, inputs = x_BTHWC.shape
    channels = weight.shape[0]
    outputs: list[Tensor] = _outputs(x_BTHWC, weight, gain, keep_total)
    if outputs[0].numel() == 0:
        return outputs
    if x_BTHWC.device.type == "cuda":
        _give_scratch_memory()
    sizes = tile_of(channels, inputs, _generation(x_BTHWC.device))
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    tiles = -(-H // sizes["ROWS"]) * -(-W // sizes["COLUMNS"])
    conv_norm_silu_kernel[(B * T * tiles,)](
        x_BTHWC,
        weight.movedim(1, -1).contiguous(),
        bias,
        x_BTHWC if residual_BTHWC is None else residual_BTHWC.contiguous(),
        bias if gain is None else gain,
        bias if shift is None else shift,
        outputs[-1],
        outputs[0],
        B,
        T,
        H,
        W,
        eps,
        INPUTS=inputs,
        C=channels,
        TIME_TAPS=1 if weight.ndim == 4 else weight.shape[2],
        SPACE_TAPS=1 if weight.ndim == 3 else weight.shape[-1],
        BEFORE=before,
        REPEAT_FIRST=repeat_first,
        RESIDUAL=residual_BTHWC is not None,
        KEEP_TOTAL=keep_total,
        NORM=gain is not None,
        **sizes,
        **options,
    )
    return outputs


@conv_norm_silu.register_fake
def _shapes_of(
    x_BTHWC: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual_BTHWC: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    before: int,
    repeat_first: bool,
    keep_total: bool,
) -> list[Tensor]:
    del bias, residual_BTHWC, shift, eps, before, repeat_first
    return _outputs(x_BTHWC, weight, gain, keep_total)


def _outputs(x_BTHWC: Tensor, weight: Tensor, gain: Tensor | None, keep_total: bool) -> list[Tensor]:
    number = int(gain is not None) + int(keep_total)
    return [x_BTHWC.new_empty(*x_BTHWC.shape[:4], weight.shape[0]) for _ in range(number)]


def tile_of(channels: int, inputs: int, generation: int = 9) -> dict[str, Any]:
    """Choose positions and input channels of a tile, warps, and tiles in flight, for a generation of GPUs."""
    # 256 x 128 or 128 x 256 sums take 128 registers of a thread, which leaves too few for the norm but in generation 9.
    sums = 256 * 128 if generation == 9 else 128 * 128
    rows = min(16, sums // (16 * max(channels, 128)))
    step = next(step for step in (64, 32, 16) if inputs % step == 0)
    return {"ROWS": rows, "COLUMNS": 16, "STEP": step, "num_warps": 8, "num_stages": 3}


def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


@cache
def _give_scratch_memory() -> None:
    """Let Triton allocate the descriptors of a launch, a few hundred bytes."""
    import triton

    triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device="cuda"))
