"""LPIPS, the perceptual loss and metric, from the ``lpips`` package, with the weights of VGG16 from torchvision."""

# F frames, C channels, H height, W width

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidshard.models.libraries.torchvision_operators import declare_torchvision_operators


class Perceptual(nn.Module):
    """LPIPS with VGG16 of the ``lpips`` package, frozen.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018. The module stays in
    eval mode whatever is called on it, since train mode would switch on the package's dropout. It is in no checkpoint.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Perceptual:  # noqa: ARG002
        return self

    def forward(self, real_FCHW: Tensor, fake_FCHW: Tensor, *, frames_at_once: int | None = None) -> Tensor:
        """Distance of each frame to its reconstruction: (F,).

        Args:
            real_FCHW: frames, (F, 3, H, W) in [-1, 1].
            fake_FCHW: their reconstruction, of the same shape.
            frames_at_once: frames in one pass; activations are then recomputed for gradients, to save memory.
                None takes all frames in one pass and keeps the activations.
        """
        size = frames_at_once or real_FCHW.shape[0]
        parts = list(zip(torch.split(real_FCHW, size), torch.split(fake_FCHW, size), strict=True))
        if len(parts) == 1:
            return self._distance(*parts[0])
        return torch.cat([checkpoint(self._distance, *part, use_reentrant=False) for part in parts])

    def _distance(self, real_FCHW: Tensor, fake_FCHW: Tensor) -> Tensor:
        distance: Tensor = self.network(real_FCHW, fake_FCHW)
        return distance.flatten()


def load_perceptual(vgg_weights: str | Path | None = None) -> Perceptual:
    """Load LPIPS on the CPU.

    Args:
        vgg_weights: file with torchvision's vgg16 state dict, read without executing anything. None takes
            torchvision's own download, kept under $TORCH_HOME.

    Raises:
        ValueError: the package or the weights cannot be had. The message says how to get them; the caller adds how
            to do without LPIPS.
    """
    try:
        declare_torchvision_operators()
        import lpips
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"LPIPS needs the package lpips with a torchvision that fits this torch ({error}): "
            "install 'vidshard[train]'"
        ) from error
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # torchvision's, about how lpips calls it
        if vgg_weights is not None:
            return Perceptual(_lpips_with(lpips, _vgg_features(Path(vgg_weights)), vgg_weights))
        try:
            return Perceptual(lpips.LPIPS(net="vgg", verbose=False))
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"LPIPS needs the weights of VGG16, and torchvision could not download them ({error}): give a file of "
                "them as vgg_weights (https://download.pytorch.org/models/vgg16-397923af.pth)"
            ) from error


def cached_vgg_weights() -> str | None:
    """Path of torchvision's download of VGG16, if it is on this machine; None otherwise."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"
    return str(path) if path.is_file() else None


def _lpips_with(lpips: ModuleType, trunk: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """Build the package's network with a given trunk.

    The network is made on the meta device: the random weights that it would begin with take 4.6 s to draw.
    """
    with torch.device("meta"):
        network: nn.Module = lpips.LPIPS(net="vgg", pnet_rand=True, pretrained=False, verbose=False)
    stored = Path(str(lpips.__file__)).parent / "weights" / "v0.1" / "vgg.pth"
    heads = torch.load(stored, map_location="cpu", weights_only=True)
    for name, module in network.named_modules():
        for kind, parameter in list(module.named_parameters(recurse=False)):
            if name.startswith("net."):
                key = f"features.{name.rpartition('.')[2]}.{kind}"
                value = trunk.get(key)
                if value is None or value.shape != parameter.shape:
                    found = "nothing" if value is None else tuple(value.shape)
                    raise ValueError(
                        f"{path} is not torchvision's vgg16: {key} should be {tuple(parameter.shape)}, found {found}"
                    )
            else:
                value = heads[f"{name}.{kind}"]
            setattr(module, kind, nn.Parameter(value.float(), requires_grad=False))
    return network


def _vgg_features(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"no VGG16 weights at {path}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is no state dict that can be read without executing code") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__} where vgg16's tensors by name should be")
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
