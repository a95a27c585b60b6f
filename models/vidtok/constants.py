"""Small constant tensors, made once for each device.

Making one on a GPU copies it from pageable memory, for which the process waits until the GPU has nothing left to do.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1024)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a 1D tensor of these values, which nobody may change."""
    with torch.inference_mode(False):  # else a later backward pass could not use it
        return torch.tensor(values, dtype=dtype, device=device)
