"""Cost of a pass, counted operator by operator on the meta device: FLOPs, memory traffic, kernels and the largest map.

No value is computed, so a count takes a second and no memory, whatever the size of the model. The meta device takes the
path of a GPU: maps are not cut into blocks. `benchmarks.gpu` turns counts into rooflines, and a test bounds them so
that a lost fusion is noticed.
"""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import sdpa_flop_count

from vidshard.models.tokenizer import FAMILIES, Tokenizer, TokenizerConfig
from vidshard.models.vidtok.config import VidTokConfig
from vidshard.models.vidtok.model import VidTok

MOST_VALUES = 2**31 - 1
"""Largest number of values in one map of a GPU: kernels of cuDNN and of PyTorch count them in int32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Cost of one pass over a batch of one clip."""

    flops: int
    """Floating-point operations of convolutions, matrix products and attention, two for a multiplication."""
    traffic_bytes: int
    """Bytes that all kernels read and write, if none of their inputs is in a cache."""
    kernels: int
    """Operators that read or write memory; views are none."""
    largest_map: int
    """Number of values of the largest tensor that an operator writes."""
    bytes_by_operator: dict[str, int] = field(default_factory=dict)
    """``traffic_bytes`` by the operator's name, the largest first."""


class CostCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that run within it, as a context manager."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._flops = self._kernels = self._largest = 0
        self._bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and count it."""
        result = operator(*args, **(kwargs or {}))
        written = _written(operator, args, result)
        read = [] if operator.overloadpacket in _FACTORIES else _read(operator, args, kwargs or {})
        is_view = operator.is_view or not written or operator.overloadpacket in _FREE
        if not is_view:
            self._kernels += 1
            self._bytes[str(operator.overloadpacket).removeprefix("aten.")] += sum(map(_bytes, [*read, *written]))
            self._largest = max(self._largest, *(tensor.numel() for tensor in written))
        self._flops += _flops(operator.overloadpacket, args, written)
        return result

    def cost(self) -> Cost:
        """Cost of the operators so far."""
        return Cost(
            flops=self._flops,
            traffic_bytes=self._bytes.total(),
            kernels=self._kernels,
            largest_map=self._largest,
            bytes_by_operator=dict(self._bytes.most_common()),
        )


@lru_cache(maxsize=64)
def encoding_cost(
    config: TokenizerConfig,
    num_frames: int,
    height: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    fuses_convolutions: bool = False,
) -> Cost:
    """Count the cost of encoding one whole clip on a GPU.

    Args:
        num_frames: a length that the model takes.
        height, width: size of the frames, or of one tile, in pixels.
        fuses_convolutions: convolutions of a VidTok model compute the norms after them.

    Raises:
        ValueError: the model does not take this length or size.
    """
    clip = _clip(num_frames, height, width, dtype)
    return _cost_of(config, dtype, lambda model: model.encode(clip), fuses_convolutions)


@lru_cache(maxsize=64)
def decoding_cost(
    config: TokenizerConfig,
    num_frames: int,
    height: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    fuses_convolutions: bool = False,
) -> Cost:
    """Count the cost of decoding one whole clip on a GPU, as `encoding_cost`."""
    shapes = {column.name: (1, *column.shape) for column in config.payload(num_frames, height, width)}
    # Tokens would be checked against the codebook, which needs their values; latents of VidTok are what they stand for.
    if list(shapes) == ["tokens"]:
        assert isinstance(config, VidTokConfig)
        shapes = {"latents": (1, config.latent_channels, *shapes["tokens"][1:])}
    payload = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    return _cost_of(config, dtype, lambda model: model.decode_payload(payload, num_frames), fuses_convolutions)


def _cost_of(
    config: TokenizerConfig, dtype: torch.dtype, run: Callable[[Tokenizer], object], fuses_convolutions: bool
) -> Cost:
    with torch.device("meta"):
        network = FAMILIES[config.family].build(config).eval().requires_grad_(False).to("meta")
    model = cast(Tokenizer, network).set_precision(dtype)
    if fuses_convolutions:
        assert isinstance(network, VidTok)
        network.encoder.fuses_convolutions = network.decoder.fuses_convolutions = True
    with torch.inference_mode(), CostCounter() as counter:  # else operators split up, which they do not on a GPU
        run(model)
        cost: Cost = counter.cost()
    return cost


def _clip(num_frames: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(1, 3, num_frames, height, width, dtype=dtype, device="meta")


_FREE = frozenset(
    {
        torch.ops.aten._unsafe_view,
        torch.ops.aten.empty,
        torch.ops.aten.empty_like,
        torch.ops.aten.new_empty,
        torch.ops.aten.detach,
        torch.ops.aten.lift_fresh,
    }
)
"""Operators that move no bytes though they are no views."""

_FACTORIES = frozenset({torch.ops.aten.new_zeros, torch.ops.aten.new_ones, torch.ops.aten.zeros_like})
"""Operators that take only shape and dtype from their input."""


def _written(operator: Any, args: tuple[Any, ...], result: object) -> list[Tensor]:
    """Results of an operator, and the inputs that it overwrites without returning them."""
    written = _tensors(result)
    for argument, value in zip(operator._schema.arguments, args, strict=False):
        is_changed = argument.alias_info is not None and argument.alias_info.is_write
        if is_changed and isinstance(value, Tensor) and not any(value is tensor for tensor in written):
            written.append(value)
    return written


def _read(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Inputs of an operator, without a tensor that is only given to hold its result."""
    outputs = {argument.name for argument in operator._schema.arguments if argument.is_out}
    return _tensors((args, {name: value for name, value in kwargs.items() if name not in outputs}))


def _flops(operator: Any, args: tuple[Any, ...], written: list[Tensor]) -> int:
    if operator in (torch.ops.aten.conv2d, torch.ops.aten.conv3d, torch.ops.aten.linear):
        return 2 * written[0].numel() * int(args[1][0].numel())  # a weight is (out, in, *kernel)
    if operator is torch.ops.vidshard.conv_norm_silu:
        return 2 * written[0].numel() * int(args[1][0].numel())
    if operator in (torch.ops.aten.mm, torch.ops.aten.matmul):
        return 2 * written[0].numel() * int(args[0].shape[-1])
    if operator is torch.ops.aten.scaled_dot_product_attention:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))  # type: ignore[no-untyped-call]
    return 0


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
