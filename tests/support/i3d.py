"""TorchScript programs with the signature of the published I3D programs, for the Fréchet video distance."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


class Program(torch.nn.Module):
    """The signature of the published I3D programs; its features are the means of the colors."""

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        assert not rescale
        assert not resize
        assert return_features
        assert x.size(3) == x.size(4) == 224
        return x.mean(dim=[2, 3, 4])


def save_program(module: torch.nn.Module, path: Path) -> None:
    torch.jit.script(module).save(str(path))  # type: ignore[no-untyped-call]
