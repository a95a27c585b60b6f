"""Discriminator and adversarial losses.

Section 3.3 of Tang et al., "VidTok", 2024, as the released code computes it, except for three defects of that code:
LeCam's averages are buffers that a checkpoint keeps and evaluation leaves alone, the adaptive weight is computed only
while it is used, and no part of this is loaded for inference.
"""

# B batch, C channels, T frames, H height, W width; F = B * T frames, or B clips for a 3D discriminator; P patches of
# one of these

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call

from vidshard.models.training.losses import frames_of


class Discriminator(nn.Module):
    """PatchGAN discriminator: scores each patch of a video, high for real ones.

    Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017, section 3.2.2. "2d" sees
    single frames: 4x4 convolutions with strides 2, 2, 2, 1, 1, whose parameters are named and initialized as in the
    released checkpoints. "3d" sees clips: 3x3x3 convolutions that halve height and width three times and time
    twice. Batch norm takes the statistics of one call's frames, real and reconstructed ones apart.
    """

    MIN_SIZE = 24
    """Smallest height and width for which "2d" has a score."""

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
        """Score several videos in one call, each by itself, since DDP allows one call per backward pass.

        Args:
            videos_BCTHW: (B, 3, T, H, W) in [-1, 1].

        Returns:
            For each video float32 (F, P), or (B, P) from a 3D discriminator, whose patches are of space and time.
        """
        return tuple(self._scores(x_BCTHW) for x_BCTHW in videos_BCTHW)

    def _scores(self, x_BCTHW: Tensor) -> Tensor:
        if self.kind == "2d":
            scores_FCHW: Tensor = self.main(frames_of(x_BCTHW))
            return scores_FCHW.flatten(1).float()
        # In bfloat16 on a CPU, gradients of 3D kernels on two frames hold uninitialized memory: NaN in 28 of 30
        # tries (torch 2.13, 8 to 16 channels of 8 x 8, strides 1, 2, 2).
        autocast = x_BCTHW.device.type != "cpu" and torch.is_autocast_enabled(x_BCTHW.device.type)
        with torch.autocast(x_BCTHW.device.type, enabled=autocast):
            scores_BCTHW: Tensor = self.main(x_BCTHW)
            return scores_BCTHW.flatten(1).float()


def scores_for_generator(discriminator: nn.Module, x_BCTHW: Tensor) -> Tensor:
    """Score a video with gradients for the video alone; the discriminator and its batch norm statistics stay.

    Args:
        discriminator: a `Discriminator` without wrapper.
        x_BCTHW: (B, 3, T, H, W) in [-1, 1].
    """
    weights = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in discriminator.named_buffers()}
    (scores_FP,) = functional_call(discriminator, {**weights, **buffers}, (x_BCTHW,))
    assert isinstance(scores_FP, Tensor)
    return scores_FP


def adversarial_loss(scores_FP: Tensor, kind: Literal["softplus", "hinge"]) -> Tensor:
    """Adversarial loss of the tokenizer: ``softplus(-mean score)`` of each frame, as released, or minus the mean score.

    The first is the non-saturating loss of Goodfellow et al., 2014, section 3, on the mean logit of a frame or, where
    the discriminator sees clips (3D), of a clip.
    """
    if kind == "softplus":
        return F.softplus(-scores_FP.mean(dim=1)).mean()
    return -scores_FP.mean()


def hinge_loss(real_FP: Tensor, fake_FP: Tensor) -> Tensor:
    """Hinge loss of the discriminator: zero for real scores above 1 and reconstructed scores below -1."""
    return 0.5 * (F.relu(1 - real_FP).mean() + F.relu(1 + fake_FP).mean())


class LeCam(nn.Module):
    """LeCam regularization: holds scores near their moving averages, against overfitting of the discriminator.

    Tseng et al., "Regularizing Generative Adversarial Networks under Limited Data", 2021, section 3.2. The averages
    are buffers, so a resumed run continues with them. They begin at 0 with the discriminator, and only `update` moves
    them; evaluation does not.
    """

    real: Tensor
    """Moving average of scores of real videos; scalar."""
    fake: Tensor
    """Moving average of scores of reconstructions; scalar."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def penalty(self, real_FP: Tensor, fake_FP: Tensor) -> Tensor:
        """Squared excess of real scores over the fake average, and of the real average over fake scores.

        As in the paper, each kind is drawn to the average of the other one; as in its code and in VidTok's, only from
        above or from below.
        """
        return F.relu(real_FP - self.fake).square().mean() + F.relu(self.real - fake_FP).square().mean()

    def update(self, real: Tensor, fake: Tensor) -> None:
        """Move the averages towards a batch's mean scores."""
        self.real.lerp_(real.detach(), 1 - self.decay)
        self.fake.lerp_(fake.detach(), 1 - self.decay)


def adaptive_weight(nll_gradient: Tensor, gan_gradient: Tensor) -> Tensor:
    """Weight that makes the adversarial gradient as large as the reconstruction gradient at the last layer.

    Esser et al., "Taming Transformers", 2021, section 3.1, with the limits of its code: at most 10,000.
    """
    ratio: Tensor = nll_gradient.norm() / (gan_gradient.norm() + 1e-4)
    return ratio.clamp(0.0, 1e4)


def last_layer_gradient(
    layer: nn.Module, features: Tensor, output_gradient: Tensor, *, weight: str = "conv.weight"
) -> Tensor:
    """Gradient at the weights of the decoder's last layer, from the gradient at its output.

    A convolution and a linear layer are linear in their weights, so the values of these do not matter and zeros stand
    in for them: the module may be wrapped or sharded, and no gradient passes through it into the decoder.

    Args:
        layer: a module that returns its output, or a tuple that begins with it, such as a `TimeConv`.
        features: input of the layer.
        output_gradient: gradient of a loss at its output.
        weight: name of the weight in the layer.
    """
    values = {
        name: torch.zeros(value.shape, device=features.device, requires_grad=name == weight)
        for name, value in layer.named_parameters()
    }
    with torch.enable_grad():
        output = functional_call(layer, values, (features.detach(),))
        output = output[0] if isinstance(output, tuple) else output
        (gradient,) = torch.autograd.grad(output, values[weight], output_gradient.to(output.dtype))
    return gradient
