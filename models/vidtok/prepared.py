"""Preparation of a network for many passes: blends folded, and on a GPU weights laid out, once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vidshard.models.vidtok.resampling import Folding


def prepare_passes(network: nn.Module) -> None:
    """Do once what every pass would do again. Results keep their bits on a CPU; later changes of weights are not seen.

    Loading weights, moving and casting the network end it. A network without such layers stays as it is.
    """
    folding = [module for module in network.modules() if isinstance(module, Folding)]
    if not folding:
        return
    parameters = list(network.parameters())
    on_gpu = parameters[0].device.type == "cuda"
    if on_gpu:
        for parameter in parameters:
            parameter.data = channels_last(parameter.data)
    with torch.no_grad():
        for module in folding:
            module.fold(next(module.parameters()).dtype, channels_last if on_gpu else None)


def channels_last(kernel: Tensor) -> Tensor:
    """Store a kernel (out, in, *sizes) with ``in`` last, as cuDNN reads it; one of fewer dimensions stays as it is."""
    return kernel.movedim(1, -1).contiguous().movedim(-1, 1) if kernel.ndim > 2 else kernel
