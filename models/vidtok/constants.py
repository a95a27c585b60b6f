"""Small constant tensors, made once for each device.

Making one on a GPU copies it from pageable memory, for which the process waits until the GPU has nothing left to do.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a 1D tensor of these values, which nobody may change."""
    # A graph holds its own, and under FakeTensorMode a tensor would be of that mode alone.
    if torch.compiler.is_compiling() or (_get_current_dispatch_mode() is not None and detect_fake_mode() is not None):
        return torch.tensor(values, dtype=dtype, device=device)
    return _kept(values, dtype, device)


@lru_cache(maxsize=1024)
def _kept(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # else a later backward pass could not use it
        return torch.tensor(values, dtype=dtype, device=device)
