"""Space-time transformer: encoder and decoder of VidTwin.

A block attends over the positions of each frame, then over the frames of each position (causally), then applies an
MLP. Both attentions share one gate. The residual stream is float32 at least, whatever the dtype of the weights.

Every map is ``x_BTSC``, contiguous, in the order that the linear layers read. Attention kernels take strided views of
it, so tokens are never laid out anew between attention over space and over time. On a CPU without gradients, a block
works on a few frames or positions at a time and overwrites its input (`add_gated`), and linear layers run in oneDNN
(`product_of`).

Parameter names are those of the released checkpoint.
"""

# B batch, T frames, S positions of a frame (row by row), C channels, P pixel values of a patch; H height, W width

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidshard.models.vidtwin.config import VidTwinConfig


class Transformer(nn.Module):
    """Base of encoder and decoder: position codes and blocks."""

    pos_embed: Tensor
    """float64 (1, S, C), added to all tokens before the first block."""
    pos_embed_temporal: Tensor
    """float64 (1, T, C), added to the input of the first block's temporal attention."""

    def __init__(self, config: VidTwinConfig) -> None:
        super().__init__()
        self.config = config
        for name, table in position_tables(config).items():
            self.register_buffer(name, table)
        self.blocks = nn.ModuleList(Block(config.width, config.num_heads) for _ in range(config.depth))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the position codes between devices but keep their dtype, whatever ``Module.to`` or ``half`` asks for."""
        tables = {name: getattr(self, name) for name in ("pos_embed", "pos_embed_temporal")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, table in tables.items():
            moved = getattr(self, name)
            if moved.dtype is not table.dtype:
                setattr(self, name, table.to(moved.device))
        return self

    def through_blocks(self, x_BTSC: Tensor, *, recompute: bool) -> Tensor:
        """Add the position codes and apply all blocks; the result is a new tensor, float32 at least.

        Args:
            recompute: recompute activations in the backward pass, which saves memory.
        """
        dtype = torch.promote_types(x_BTSC.dtype, torch.float32)
        x_BTSC = x_BTSC.to(dtype) + self.pos_embed.to(dtype)[:, None]
        code_TC: Tensor | None = self.pos_embed_temporal[0].to(dtype)
        for block in self.blocks:
            if recompute and torch.is_grad_enabled():
                x_BTSC = checkpoint(block, x_BTSC, code_TC, use_reentrant=False)
            else:
                x_BTSC = block(x_BTSC, code_TC)
            code_TC = None
        return x_BTSC


class Encoder(Transformer):
    """Clips to tokens."""

    def __init__(self, config: VidTwinConfig) -> None:
        super().__init__(config)
        self.x_embedder = PatchEmbedding(config.patch_size, config.width)
        self.final_layer = unused(FinalLayer(config.patch_size, config.width))

    def forward(self, x_BCTHW: Tensor, *, recompute: bool = False) -> Tensor:
        """Turn clips (B, 3, T, H, W) into tokens (B, T, S, C)."""
        return self.through_blocks(self.x_embedder(x_BCTHW), recompute=recompute)


class Decoder(Transformer):
    """Sums of aligned latents to clips."""

    def __init__(self, config: VidTwinConfig) -> None:
        super().__init__(config)
        self.x_embedder = unused(PatchEmbedding(config.patch_size, config.width))
        self.final_layer = FinalLayer(config.patch_size, config.width)
        self.final_layer.linear.reset_parameters()  # the original creates this layer after it has initialized the rest

    def forward(self, u_BTSC: Tensor, *, recompute: bool = False) -> Tensor:
        """Turn aligned latents (B, T, S, C) into clips (B, T, H, W, 3)."""
        return self.output(self.features(u_BTSC, recompute=recompute))

    def features(self, u_BTSC: Tensor, *, recompute: bool = False) -> Tensor:
        """Compute the input of the last linear layer: (B, T, S, C)."""
        features: Tensor = self.final_layer(self.through_blocks(u_BTSC, recompute=recompute))
        return features

    def output(self, features_BTSC: Tensor) -> Tensor:
        """Apply the last linear layer and put the patches together: (B, T, H, W, 3)."""
        values_BTSP = product_of(self.final_layer.linear)(features_BTSC)
        B, T = values_BTSP.shape[:2]
        grid, patch = self.config.grid, self.config.patch_size
        # the values of a patch are ordered (row, column, color)
        cells = values_BTSP.view(B, T, grid, grid, patch, patch, 3).transpose(3, 4)
        return cells.reshape(B, T, grid * patch, grid * patch, 3)


class PatchEmbedding(nn.Module):
    """Patches of frames to tokens: a convolution whose stride is its kernel, computed as a matrix product."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, width, (1, patch_size, patch_size), stride=(1, patch_size, patch_size))
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        B, _, T, H, W = x_BCTHW.shape
        patch = self.proj.kernel_size[1]
        cells = x_BCTHW.view(B, 3, T, H // patch, patch, W // patch, patch).permute(0, 2, 3, 5, 1, 4, 6)
        x_BTSP = cells.reshape(B, T, (H // patch) * (W // patch), 3 * patch * patch)
        return matrix_product(self.proj.weight.flatten(1), self.proj.bias)(x_BTSP)


class Block(nn.Module):
    """Attention over space, attention over time, MLP; each with a residual.

    The rows of ``scale_shift_table`` are shift, scale and gate of the attentions, then those of the MLP. They are
    learned, not conditioned on anything. The temporal attention has neither norm nor shift and scale of its own.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, width).div_(math.sqrt(width)))
        self.attn = Attention(width, num_heads)
        self.attn_temp = Attention(width, num_heads)
        self.mlp = Mlp(width)
        nn.init.zeros_(self.attn_temp.proj.weight)  # a fresh model treats frames independently

    def forward(self, x_BTSC: Tensor, code_TC: Tensor | None = None) -> Tensor:
        """Apply the block; without gradients on a CPU, the result overwrites the input.

        Args:
            code_TC: position codes of the frames, for the input of the temporal attention; None for none.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.scale_shift_table.to(x_BTSC.dtype)
        attn, attn_temp, mlp = self.attn.ready(), self.attn_temp.ready(), self.mlp.ready()

        def over_space(x_BTSC: Tensor) -> Tensor:
            return attn.over_space(modulated(x_BTSC, shift1, scale1))

        def over_time(x_BTSC: Tensor) -> Tensor:
            return attn_temp.over_time(x_BTSC if code_TC is None else x_BTSC + code_TC[:, None])

        x_BTSC = add_gated(over_space, x_BTSC, gate1, axis=1)
        x_BTSC = add_gated(over_time, x_BTSC, gate1, axis=2)
        return add_gated(lambda x_BTSC: mlp(modulated(x_BTSC, shift2, scale2)), x_BTSC, gate2, axis=1)


Product = Callable[[Tensor], Tensor]
"""Linear layer made ready by `product_of`."""


class Attention(nn.Module):
    """Weights of multi-head self-attention over the positions of each frame, or over the frames of each position."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = xavier(nn.Linear(width, 3 * width))
        self.proj = xavier(nn.Linear(width, width))

    def ready(self) -> ReadyAttention:
        """Make the weights ready for several blocks of tokens."""
        return ReadyAttention(num_heads=self.num_heads, qkv=product_of(self.qkv), proj=product_of(self.proj))


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadyAttention:
    """Attention with weights that were made ready."""

    num_heads: int
    qkv: Product
    proj: Product

    def over_space(self, x_BTSC: Tensor) -> Tensor:
        """Attend to all positions of the same frame."""
        q, k, v = self._split(x_BTSC).flatten(0, 1).permute(2, 0, 3, 1, 4)  # each (B * T, heads, S, C / heads)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(h.reshape(x_BTSC.shape))

    def over_time(self, x_BTSC: Tensor) -> Tensor:
        """Attend to the same position of this frame and of those before it."""
        q, k, v = self._split(x_BTSC).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # each (B * S, heads, T, C / heads)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        B, T, S, C = x_BTSC.shape
        return self.proj(h.view(B, S, self.num_heads, T, -1).permute(0, 3, 1, 2, 4).reshape(B, T, S, C))

    def _split(self, x_BTSC: Tensor) -> Tensor:
        """Compute queries, keys and values: (B, T, S, 3, heads, C / heads)."""
        return self.qkv(x_BTSC).view(*x_BTSC.shape[:-1], 3, self.num_heads, -1)


class Mlp(nn.Module):
    """Two linear layers with a GELU, in its tanh form, between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = xavier(nn.Linear(width, 4 * width))
        self.fc2 = xavier(nn.Linear(4 * width, width))

    def ready(self) -> Product:
        """Make the weights ready for several blocks of tokens."""
        fc1, fc2 = product_of(self.fc1, gelu=True), product_of(self.fc2)
        return lambda x_BTSC: fc2(fc1(x_BTSC))


class FinalLayer(nn.Module):
    """Norm, shift and scale before the decoder's last linear layer, which `Decoder.output` applies."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, width).div_(math.sqrt(width)))
        self.linear = nn.Linear(width, 3 * patch_size * patch_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_BTSC: Tensor) -> Tensor:
        shift, scale = self.scale_shift_table.to(x_BTSC.dtype)
        return modulated(x_BTSC, shift, scale)


def modulated(x_BTSC: Tensor, shift_C: Tensor, scale_C: Tensor) -> Tensor:
    """Layer norm without learned gain, then scale and shift."""
    return F.layer_norm(x_BTSC, x_BTSC.shape[-1:], 1 + scale_C, shift_C, eps=1e-6)


def product_of(layer: nn.Linear, *, gelu: bool = False) -> Product:
    """Make a linear layer ready for the last axis of several tensors, in the dtype of its weights; perhaps with a GELU.

    The GELU is that in tanh form.
    """
    return matrix_product(layer.weight, layer.bias, gelu=gelu)


def matrix_product(weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Product:
    """As `product_of`, from weight (out, in) and bias."""
    if weight.device.type == "cpu" and not is_recorded(weight) and _onednn_takes(weight.dtype):
        # F.linear takes MKL. oneDNN is no slower on any processor that we measured, and adds bias and GELU while the
        # result is in the cache: the MLP of 3136 tokens takes 307 instead of 362 ms on one core of an AMD EPYC (Zen 4).
        # Weights in oneDNN's own layout save 2 to 8 % of a product. They are laid out in each pass, which takes 1 % of
        # it, and are so not held twice.
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        name, algorithm = ("gelu", "tanh") if gelu else ("none", "")

        def by_onednn(x: Tensor) -> Tensor:
            if is_recorded(x):
                return by_pytorch(x)
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), packed, bias, name, [], algorithm)
            return product

        return by_onednn

    def by_pytorch(x: Tensor) -> Tensor:
        y = F.linear(x.to(weight.dtype), weight, bias)
        return F.gelu(y, approximate="tanh") if gelu else y

    return by_pytorch


@cache
def _onednn_takes(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has the oneDNN linear layer, and this processor the instructions for the dtype."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")):
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


BLOCK_TOKENS = 800
"""Largest number of tokens in a block: at 768 channels, the MLP's 3072 then fit into 10 MB."""


def add_gated(step: Callable[[Tensor], Tensor], x_BTSC: Tensor, gate_C: Tensor, *, axis: int) -> Tensor:
    """Add a gated change to the residual stream: by blocks of frames (axis 1) or positions (axis 2), in place.

    Where gradients are recorded, and on a GPU, the change is that of the whole map, which stays as it is.

    Args:
        step: function from the stream to the change; it treats frames, or positions, independently of one another.
    """
    if x_BTSC.device.type != "cpu" or is_recorded(x_BTSC, gate_C):
        return torch.addcmul(x_BTSC, step(x_BTSC).to(x_BTSC.dtype), gate_C)
    size = max(1, BLOCK_TOKENS * x_BTSC.shape[axis] // x_BTSC[..., 0].numel())
    for block in x_BTSC.split(size, dim=axis):  # type: ignore[no-untyped-call]
        block.addcmul_(step(block).to(block.dtype), gate_C)
    return x_BTSC


def is_recorded(*tensors: Tensor) -> bool:
    """Whether gradients are recorded for what is computed from these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def xavier(layer: nn.Linear) -> nn.Linear:
    """Initialize a linear layer: Xavier uniform weights, zero biases."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def unused(module: nn.Module) -> nn.Module:
    """Turn a module's parameters into buffers: they are in checkpoints, but nothing computes with them.

    Optimizers and gradient reduction then leave them alone.
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
    return module


def position_tables(config: VidTwinConfig) -> dict[str, Tensor]:
    """Compute the fixed sine and cosine codes of positions and of frames, float64, by the name of their buffer.

    A position's code is that of its column, then that of its row, each of half the channels. On the device "meta" they
    have shapes alone.
    """
    if torch.get_default_device().type == "meta":  # where `torch.arange` loads torch's compiler, which takes a second
        return {
            "pos_embed": torch.empty(1, config.grid**2, config.width, dtype=torch.float64),
            "pos_embed_temporal": torch.empty(1, config.num_frames, config.width, dtype=torch.float64),
        }
    column = torch.arange(config.grid, dtype=torch.float64).repeat(config.grid)
    row = torch.arange(config.grid, dtype=torch.float64).repeat_interleave(config.grid)
    frame = torch.arange(config.num_frames, dtype=torch.float64)
    half = config.width // 2
    return {
        "pos_embed": torch.cat([_sines(column, half), _sines(row, half)], dim=1)[None],
        "pos_embed_temporal": _sines(frame, config.width)[None],
    }


def _sines(at_N: Tensor, width: int) -> Tensor:
    """Code positions by all their sines, then all their cosines: (N, width); frequencies from 1 down to 1/10000."""
    frequency = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = at_N[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)
