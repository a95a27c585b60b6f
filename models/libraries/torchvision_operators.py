"""Import of torchvision beside a torch that its compiled operators were not built for."""

from __future__ import annotations

import torch

_declared: list[torch.library.Library] = []


def declare_torchvision_operators() -> None:
    """Make torchvision importable beside a torch that its compiled operators were not built for.

    lpips and diffusers import torchvision for parts that are plain torch. But torchvision 0.28 registers the shapes of
    ``nms`` and ``qnms`` at import, and fails with "operator torchvision::nms does not exist" where its compiled part
    could not be loaded, as beside a CPU build of torch. Declaring the two operators without code is enough for
    everything else to work; a call of ``nms`` still fails with a clear message. Nothing is declared where torchvision
    imports by itself.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _declared:
            raise
        # A declaration lives as long as its library object.
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _declared.append(library)
        import torchvision  # noqa: F401
