"""What training minimises: the terms, each a plain function or a small module, and the discriminator.

Section 3.3 of Tang et al., "VidTok", 2024, as its released code computes it, less that code's defects: averages of
scores are buffers that a checkpoint keeps and evaluation leaves alone, the adaptive weight is computed only while it
is used, LPIPS never runs with dropout, and nothing of all this exists at inference. Which head gives which
regularising terms is in `models.vidtok.heads`; here they get their weights.

Frames are in [-1, 1] throughout. Everything is float32 but what an enclosing autocast makes of convolutions.
"""

# B batch, C channels, T frames, H height, W width; F = B * T frames; P patches of a frame

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from vidshard.schemas.training import StageConfig

# The reconstruction


def frames_of(x_BCTHW: Tensor) -> Tensor:
    """All frames of all clips: (F, C, H, W)."""
    return x_BCTHW.movedim(2, 1).flatten(0, 1)


class Fidelity(NamedTuple):
    """How far a reconstruction is from its clips; scalars with gradients."""

    nll: Tensor
    """What is minimised, for each frame."""
    l1: Tensor
    """Mean absolute difference, in [0, 2] where the reconstruction keeps to [-1, 1]."""
    perceptual: Tensor | None
    """Mean LPIPS; None without."""


def fidelity(
    real_FCHW: Tensor,
    fake_FCHW: Tensor,
    perceptual_F: Tensor | None,
    logvar: Tensor,
    *,
    l1_weight: float,
    perceptual_weight: float,
) -> Fidelity:
    """Negative log likelihood of frames, with a learned scale ``exp(logvar)`` of their differences.

    A pixel's difference is its weighted L1 plus its frame's weighted LPIPS; ``difference / exp(logvar) + logvar`` is
    summed over a frame and averaged over frames. The density is that of Laplace but for a constant, after Esser et
    al., "Taming Transformers", 2021, whose code has it.
    """
    values = fake_FCHW[0].numel()
    l1 = (fake_FCHW.float() - real_FCHW.float()).abs().mean()
    difference = l1_weight * l1
    perceptual = None if perceptual_F is None else perceptual_F.float().mean()
    if perceptual is not None:
        difference = difference + perceptual_weight * perceptual
    return Fidelity(nll=values * (difference * torch.exp(-logvar) + logvar), l1=l1, perceptual=perceptual)


def weighted_regularization(terms: Mapping[str, Tensor], config: StageConfig, step: int) -> Tensor:
    """The sum of a head's terms with their weights at a step, which is counted in batches.

    The entropies of FSQ and LFQ have a weight that falls linearly from ``entropy_start_factor`` times its own to its
    own over ``entropy_anneal_steps``; the codebook's entropy is to be large and counts negative.
    """
    progress = min(step / config.entropy_anneal_steps, 1.0) if config.entropy_anneal_steps else 1.0
    entropy = config.entropy_weight * (config.entropy_start_factor + (1 - config.entropy_start_factor) * progress)
    weights = {
        "kl": config.kl_weight,
        "token_entropy": entropy,
        "codebook_entropy": -entropy * config.codebook_entropy_share,
        "commitment": config.commitment_weight,
        "codebook": config.codebook_weight,
    }
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


# The adversary


class Discriminator(nn.Module):
    """PatchGAN: scores of patches, high for what it takes for real.

    Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017, section 3.2.2. "2d" sees
    single frames: 4x4 convolutions of strides 2, 2, 2, 1, 1, whose parameters are named and initialised as in the
    released checkpoints. "3d" sees clips: 3x3x3 convolutions, which halve height and width three times and time
    twice. Batch norm sees the statistics of one call's frames, of real and of made ones apart.
    """

    MIN_SIZE = 24
    """Smallest height and width that "2d" has a score for."""

    def __init__(self, kind: Literal["2d", "3d"], width: int = 64) -> None:
        super().__init__()
        self.kind = kind
        layers: list[nn.Module] = []
        # (in, out) in units of width, and the stride in (time, space)
        for number, (inputs, outputs, strides) in enumerate(
            ((0, 1, (2, 2)), (1, 2, (2, 2)), (2, 4, (1, 2)), (4, 8, (1, 1)), (8, 0, (1, 1)))
        ):
            first_or_last = inputs == 0 or outputs == 0
            channels = (inputs * width or 3, outputs * width or 1)
            if kind == "2d":
                layers.append(nn.Conv2d(*channels, 4, strides[1], 1, bias=first_or_last))
                norm: nn.Module = nn.BatchNorm2d(channels[1])
            else:
                time, space = strides
                layers.append(nn.Conv3d(*channels, 3, (time, space, space), 1, bias=first_or_last))
                norm = nn.BatchNorm3d(channels[1])
            layers += [] if first_or_last else [norm]
            layers += [nn.LeakyReLU(0.2)] if number < 4 else []
        self.main = nn.Sequential(*layers)
        for module in self.main:
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, *videos_BCTHW: Tensor) -> tuple[Tensor, ...]:
        """Score videos, each by itself: float32 (F, P), or (B * T', P) of a 3D discriminator.

        Several in one call, since DDP takes one call for each backward pass.
        """
        return tuple(self._scores(x_BCTHW) for x_BCTHW in videos_BCTHW)

    def _scores(self, x_BCTHW: Tensor) -> Tensor:
        if self.kind == "2d":
            scores_FCHW: Tensor = self.main(frames_of(x_BCTHW))
            return scores_FCHW.flatten(1).float()
        # In bfloat16 on a CPU, gradients of 3D kernels on two frames hold memory that nobody wrote: NaN in 28 of 30
        # tries (torch 2.13, 8 to 16 channels of 8 x 8, strides 1, 2, 2).
        autocast = x_BCTHW.device.type != "cpu" and torch.is_autocast_enabled(x_BCTHW.device.type)
        with torch.autocast(x_BCTHW.device.type, enabled=autocast):
            return frames_of(self.main(x_BCTHW)).flatten(1).float()


def scores_without_trace(discriminator: nn.Module, x_BCTHW: Tensor) -> Tensor:
    """Score a video so that gradients reach the video alone, and the discriminator stays as it is, batch norm too."""
    weights = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in discriminator.named_buffers()}
    (scores_FP,) = functional_call(discriminator, {**weights, **buffers}, (x_BCTHW,))
    assert isinstance(scores_FP, Tensor)
    return scores_FP


def adversarial(scores_FP: Tensor, kind: Literal["softplus", "hinge"]) -> Tensor:
    """The tokenizer's part of the game: ``softplus(-mean score of a frame)``, as released, or minus the mean score.

    The first is the non-saturating loss of Goodfellow et al., 2014, section 3, on a frame's mean logit.
    """
    if kind == "softplus":
        return F.softplus(-scores_FP.mean(dim=1)).mean()
    return -scores_FP.mean()


def hinge(real_FP: Tensor, fake_FP: Tensor) -> Tensor:
    """The discriminator's part: scores above 1 for real patches and below -1 for made ones cost nothing."""
    return 0.5 * (F.relu(1 - real_FP).mean() + F.relu(1 + fake_FP).mean())


class LeCam(nn.Module):
    """Holds a discriminator's scores near their averages of late, against overfitting.

    Tseng et al., "Regularizing Generative Adversarial Networks under Limited Data", 2021, section 3.2. The averages
    are buffers, so a resumed run continues with them; they begin at 0 with the adversary and move by `update` alone,
    never in evaluation.
    """

    real: Tensor
    fake: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def penalty(self, real_FP: Tensor, fake_FP: Tensor) -> Tensor:
        """How far real scores pass the average made one, and the average real one made scores; squared.

        As in the paper, each kind is drawn to the average of the other; as in its code and VidTok's, only down from
        above it or up from below it.
        """
        return F.relu(real_FP - self.fake).square().mean() + F.relu(self.real - fake_FP).square().mean()

    def update(self, real: Tensor, fake: Tensor) -> None:
        """Move the averages towards a batch's mean scores."""
        self.real.lerp_(real.detach(), 1 - self.decay)
        self.fake.lerp_(fake.detach(), 1 - self.decay)


def adaptive_weight(nll_gradient: Tensor, gan_gradient: Tensor) -> Tensor:
    """What makes the adversarial term as strong as the reconstruction's, given both gradients at the last weights.

    Esser et al., "Taming Transformers", 2021, section 3.1, with the limits of its code: at most 10,000.
    """
    ratio: Tensor = nll_gradient.norm() / (gan_gradient.norm() + 1e-4)
    return ratio.clamp(0.0, 1e4)


def last_layer_gradient(conv: nn.Module, input_BTHWC: Tensor, output_gradient: Tensor) -> Tensor:
    """The gradient at the weights of the decoder's output convolution, given that at its output.

    A convolution is linear in its weights, so their values don't matter and zeros take their place: the module may
    be wrapped or sharded, and no gradient passes through it into the decoder.

    Args:
        conv: a `TimeConv`.
    """
    values = {
        name: torch.zeros(weight.shape, device=input_BTHWC.device, requires_grad=name == "conv.weight")
        for name, weight in conv.named_parameters()
    }
    with torch.enable_grad():
        output, _ = functional_call(conv, values, (input_BTHWC.detach(),))
        (gradient,) = torch.autograd.grad(output, values["conv.weight"], output_gradient.to(output.dtype))
    return gradient


# LPIPS


class Perceptual(nn.Module):
    """LPIPS with VGG of the `lpips` package, frozen: Zhang et al., "The Unreasonable Effectiveness ...", 2018.

    Stays in eval mode whatever is called on it, as the package's dropout would come on otherwise. Not part of any
    checkpoint.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Perceptual:  # noqa: ARG002
        return self

    def forward(self, real_FCHW: Tensor, fake_FCHW: Tensor, *, frames_at_once: int | None = None) -> Tensor:
        """Distance of each frame: (F,).

        Args:
            frames_at_once: take so many at a time and compute them again for gradients, to save memory.
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
    """LPIPS, ready to use, on the CPU.

    Args:
        vgg_weights: a file with torchvision's vgg16 state dict, read without executing anything; None takes
            torchvision's own download, kept under $TORCH_HOME.

    Raises:
        ValueError: where the package or the weights cannot be had, saying what there is to do.
    """
    try:
        declare_torchvision_operators()
        import lpips
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"LPIPS needs the package lpips with a torchvision that fits this torch ({error}): install "
            "'vidshard[train]', or set the perceptual weight to 0"
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
                "them as vgg_weights (https://download.pytorch.org/models/vgg16-397923af.pth), or set the perceptual "
                "weight to 0"
            ) from error


def _lpips_with(lpips: ModuleType, trunk: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """The package's network with a given trunk, made without the random weights that it would begin with: 4.6 s."""
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
        raise ValueError(f"no VGG16 weights at {path}; without LPIPS, set the perceptual weight to 0")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is no state dict that can be read without executing code") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__} where vgg16's tensors by name should be")
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


_declared: list[torch.library.Library] = []


def declare_torchvision_operators() -> None:
    """Let torchvision be imported beside a torch that its compiled operators were not built for.

    lpips imports torchvision for VGG alone, which is plain torch. But torchvision 0.28 describes shapes of ``nms``
    and ``qnms`` when it is imported, and fails with "operator torchvision::nms does not exist" where its compiled
    part could not be loaded, as beside a CPU build of torch. It asks for their declaration, not for code: given
    that, everything else works, and who calls ``nms`` is still told that it is not there. Nothing is declared where
    torchvision imports by itself.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _declared:
            raise
        # It declares as long as it lives.
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _declared.append(library)
        import torchvision  # noqa: F401
