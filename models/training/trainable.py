"""Interface by which training uses a network of any family.

`Trainable` is everything that the step, evaluation, checkpoints and the job know of a network. A family that can be
trained implements it in a module beside this one, and has an entry in `models.training.families`.
"""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NotRequired, Protocol, TypedDict

from torch import Tensor, nn

from vidshard.models.vidtok.heads import Affinity
from vidshard.schemas.tokenizers import TokenizerConfig


class Made(TypedDict):
    """Result of a training forward pass."""

    decoded: Tensor
    """Output of the decoder's last layer, in the layout that `Trainable.video` reads; the graph of the losses ends
    here."""
    features: Tensor
    """Input of the decoder's last layer, without gradient."""
    terms: dict[str, Tensor]
    """Unweighted regularization terms of the latents by name, scalars; empty without gradients, and where the encoder
    does not learn."""
    tokens: NotRequired[Tensor]
    """Tokens, int32 (B, ...); only of networks that make some."""
    parts: NotRequired[dict[str, Tensor]]
    """Reconstructions from a part of the latents by the part's name, laid out as ``decoded``; only where asked for."""


class Trainable(Protocol):
    """Training interface of one network, with the choice of the weights that it trains."""

    @property
    def network(self) -> nn.Module:
        """The network."""
        ...

    @property
    def config(self) -> TokenizerConfig:
        """Configuration of the network."""
        ...

    @property
    def term_kinds(self) -> Mapping[str, str]:
        """Kind of each regularization term by its name; `regularization_weights` has the weight of each kind."""
        ...

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the parts of the latents that can be decoded alone; empty if there are none."""
        ...

    def parameters_to_train(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters that learn; those that no output depends on are never among them."""
        ...

    def layers(self) -> Iterator[nn.Module]:
        """Iterate over the layers that FSDP2 shards one by one."""
        ...

    def noise_shapes(self, num_frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the noise of one clip by latent, in the order of the draws; empty if latents are not sampled."""
        ...

    def forward(
        self, x_BCTHW: Tensor, noise: Mapping[str, Tensor], *, recompute: bool = False, with_parts: bool = False
    ) -> Made:
        """Encode and decode clips, latents and their terms in float32 whatever the autocast.

        Args:
            x_BCTHW: clips, (B, 3, T, H, W) in [-1, 1].
            noise: N(0, 1) by latent, (B, *shape); empty to decode the means.
            recompute: recompute activations in the backward pass, to save memory.
            with_parts: decode the parts of the latents too.
        """
        ...

    def video(self, decoded: Tensor, num_frames: int) -> Tensor:
        """Clips of an output of the decoder's last layer: float32 (B, 3, T, H, W), about [-1, 1]."""
        ...

    def last_layer_gradient(self, features: Tensor, output_gradient: Tensor) -> Tensor:
        """Gradient at the weight of the decoder's last layer, from the gradient at its output.

        No gradient enters the decoder, and the layer may be wrapped or sharded.
        """
        ...


class TrainableFamily(Protocol):
    """A family that can be trained: makes the `Trainable` of a network."""

    trains_in_stages: bool
    """Whether a run may have several stages, and a stage may train the decoder alone."""

    def __call__(self, network: Any, trainable: str, affinity: Affinity) -> Trainable:
        """Make the interface of a network.

        Args:
            trainable: "all" or, for a family that trains in stages, "decoder".
            affinity: affinity of the entropies of FSQ, for families that have it.
        """
        ...

    def start_differences(self, there: Any, here: Any) -> str:
        """List what keeps weights of config ``there`` from starting a training of config ``here``; empty if nothing.

        Both configs are of this family.
        """
        ...
