"""VidTwin as one would write it from its description with PyTorch's own parts, in two structures, to compare with ours.

* "parts": attention is `torch.nn.MultiheadAttention`, and everything between is plain float32 arithmetic.
* "released": the order of work of the released code. Attention is written out (scores, softmax, product), and a block's
  residual stream is float64 until its MLP, as it is there. The released code does not run on a CPU, so two things
  differ: attention computes in float32 instead of half precision, and it is causal in time without flash-attn.

Both lay tokens out anew for each attention. They load the weights of ours and give the same latents and video.
"""

# B batch, T frames, S positions of a frame, C channels; Q queries, D their channels; H height, W width
# N sequences, L tokens of a sequence

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vidshard.models.vidtwin.branches import halvings
from vidshard.models.vidtwin.config import QFORMER_HEADS, VidTwinConfig
from vidshard.models.vidtwin.model import checkpoint_name

Structure = Literal["parts", "released"]


class PlainVidTwin(nn.Module):
    """The released architecture: clips to means and log-variances of three latents, and latents to clips."""

    def return_weights(self, value: bool) -> None:
        """Let attention return its weights too, as `nn.MultiheadAttention` does by default.

        Without them PyTorch takes its fused kernels.
        """
        for module in self.modules():
            if isinstance(module, PlainBlock | PlainQFormerLayer):
                module.need_weights = value

    def __init__(self, config: VidTwinConfig, structure: Structure = "parts") -> None:
        super().__init__()
        self.config = config
        width, query_width, grid = config.width, config.query_width, config.grid
        self.encoder = PlainEncoder(config, structure)
        self.decoder = PlainDecoder(config, structure)
        self.temporal_qformer = PlainQFormer(config, structure)
        widths = [config.structure_width << level for level in range(config.structure_halvings + 1)]
        self.conv_in = nn.Conv2d(query_width, widths[0], 3, padding=1)
        self.content_downsample_blocks = halvings(widths)
        self.bottle_down = nn.Conv2d(widths[-1], 2 * config.structure_channels, 3, padding=1)
        self.bottle_up = nn.Sequential(nn.Conv2d(config.structure_channels, widths[-1], 3, padding=1), nn.ReLU())
        doublings: list[nn.Module] = []
        for level in reversed(range(config.structure_halvings)):
            doublings += [
                nn.Conv2d(widths[level + 1], widths[level], 3, padding=1),
                nn.ReLU(),
                nn.Upsample(scale_factor=2),
            ]
        self.content_upsample_blocks = nn.Sequential(*doublings)
        self.conv_out = nn.Conv2d(widths[0], query_width, 3, padding=1)
        self.cont_emb = nn.Sequential(
            nn.Linear(query_width, width),
            nn.ReLU(),
            nn.Conv1d(config.num_queries, config.num_frames, 1),
            nn.ReLU(),
        )
        self.downsample_motion_module = halvings([width] * (config.dynamics_halvings + 1))
        self.motion_head = nn.Conv2d(width, 2 * config.dynamics_channels, 3, padding=1)
        self.motion_emb = nn.Sequential(
            nn.Linear(config.dynamics_channels, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.up_motion = nn.Sequential(
            nn.Linear(config.dynamics_size, grid), nn.ReLU(), nn.Linear(grid, grid), nn.ReLU()
        )

    def encode(self, x_BCTHW: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Compute mean and log-variance of each latent by payload column, channels last."""
        z_BCTHW = self.encoder(x_BCTHW)
        B, C, T, H, W = z_BCTHW.shape
        tokens = z_BCTHW.permute(0, 3, 4, 2, 1).reshape(B * H * W, T, C)
        queries = self.temporal_qformer(tokens)
        images = queries.view(B, H * W, -1, queries.shape[-1]).permute(0, 2, 3, 1).reshape(-1, queries.shape[-1], H, W)
        structure = self.bottle_down(self.content_downsample_blocks(self.conv_in(images)))
        frames = self.downsample_motion_module(z_BCTHW.transpose(1, 2).reshape(B * T, C, H, W))
        frames = frames.view(B, T, C, *frames.shape[2:]).transpose(1, 2)
        moments = {
            "structure": structure.view(B, -1, *structure.shape[1:]).permute(0, 1, 3, 4, 2),
            "dynamics_x": self.motion_head(frames.mean(dim=3)).permute(0, 2, 3, 1),
            "dynamics_y": self.motion_head(frames.mean(dim=4)).permute(0, 2, 3, 1),
        }
        halves = {name: value.chunk(2, dim=-1) for name, value in moments.items()}
        return {name: (mean, logvar.clamp(-30, 20)) for name, (mean, logvar) in halves.items()}

    def decode(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Decode latents by payload column to (B, 3, T, H, W)."""
        structure = latents["structure"]
        B, Q = structure.shape[:2]
        grid = self.config.grid
        images = self.bottle_up(structure.permute(0, 1, 4, 2, 3).flatten(0, 1))
        images = self.conv_out(self.content_upsample_blocks(images))
        first = (images.shape[2] - grid) // 2
        images = images[:, :, first : first + grid, first : first + grid]
        queries = images.view(B, Q, -1, grid * grid) if first == 0 else images.reshape(B, Q, -1, grid * grid)
        u_NTC = self.cont_emb(queries.permute(0, 3, 1, 2).reshape(B * grid * grid, Q, -1))
        u_BCTHW = u_NTC.view(B, grid, grid, *u_NTC.shape[1:]).permute(0, 4, 3, 1, 2)
        x_BCTW, y_BCTH = (
            self.up_motion(self.motion_emb(latents[name]).permute(0, 3, 1, 2)) for name in ("dynamics_x", "dynamics_y")
        )
        return self.decoder(u_BCTHW + x_BCTW[:, :, :, None] + y_BCTH[:, :, :, :, None])  # type: ignore[no-any-return]


class PlainTransformer(nn.Module):
    """Position codes and blocks."""

    pos_embed: Tensor
    pos_embed_temporal: Tensor

    def __init__(self, config: VidTwinConfig, structure: Structure) -> None:
        super().__init__()
        self.config = config
        dtype = torch.float64 if structure == "released" else torch.float32
        self.register_buffer("pos_embed", torch.zeros(1, config.num_positions, config.width, dtype=dtype))
        self.register_buffer("pos_embed_temporal", torch.zeros(1, config.num_frames, config.width, dtype=dtype))
        block = ReleasedBlock if structure == "released" else PlainBlock
        self.blocks = nn.ModuleList(block(config.width, config.num_heads) for _ in range(config.depth))

    def through_blocks(self, x_BNC: Tensor) -> Tensor:
        T, S = self.config.num_frames, self.config.num_positions
        x_BNC = (x_BNC.view(-1, T, S, x_BNC.shape[-1]) + self.pos_embed).flatten(1, 2)
        for index, block in enumerate(self.blocks):
            x_BNC = block(x_BNC, T, S, self.pos_embed_temporal if index == 0 else None)
        return x_BNC


class PlainEncoder(PlainTransformer):
    """Clips to tokens (B, C, T, H, W)."""

    def __init__(self, config: VidTwinConfig, structure: Structure) -> None:
        super().__init__(config, structure)
        patch = (1, config.patch_size, config.patch_size)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv3d(3, config.width, patch, stride=patch)})

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        tokens = self.x_embedder["proj"](x_BCTHW)
        x_BNC: Tensor = self.through_blocks(tokens.flatten(2).transpose(1, 2))
        return x_BNC.transpose(1, 2).view(tokens.shape)


class PlainDecoder(PlainTransformer):
    """Tokens (B, C, T, H, W) to clips."""

    def __init__(self, config: VidTwinConfig, structure: Structure) -> None:
        super().__init__(config, structure)
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(config.width, 3 * config.patch_size**2)})
        self.final_layer.scale_shift_table = nn.Parameter(torch.zeros(2, config.width))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)

    def forward(self, u_BCTHW: Tensor) -> Tensor:
        x_BNC = self.through_blocks(u_BCTHW.flatten(2).transpose(1, 2))
        shift, scale = self.final_layer.get_parameter("scale_shift_table")
        values = self.final_layer["linear"](self.norm(x_BNC) * (1 + scale) + shift)
        B, _, T, H, W = u_BCTHW.shape
        patch = self.config.patch_size
        cells = values.view(B, T, H, W, patch, patch, 3).permute(0, 6, 1, 2, 4, 3, 5)
        video: Tensor = cells.reshape(B, 3, T, H * patch, W * patch)
        return video


class PlainBlock(nn.Module):
    """Spatial attention, causal temporal attention, MLP."""

    need_weights = True

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.attn_temp = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x_BNC: Tensor, T: int, S: int, code_1TC: Tensor | None) -> Tensor:
        B, _, C = x_BNC.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.scale_shift_table
        a = (self.norm(x_BNC) * (1 + scale1) + shift1).view(B * T, S, C)
        x_BNC = x_BNC + gate1 * self.attn(a, a, a, need_weights=self.need_weights)[0].reshape(B, T * S, C)
        t = x_BNC.view(B, T, S, C).transpose(1, 2).reshape(B * S, T, C)
        if code_1TC is not None:
            t = t + code_1TC
        mask = nn.Transformer.generate_square_subsequent_mask(T, device=t.device)
        t = self.attn_temp(t, t, t, attn_mask=mask, need_weights=self.need_weights)[0]
        x_BNC = x_BNC + gate1 * t.view(B, S, T, C).transpose(1, 2).reshape(B, T * S, C)
        m = self.norm(x_BNC) * (1 + scale2) + shift2
        return x_BNC + gate2 * self.mlp["fc2"](F.gelu(self.mlp["fc1"](m), approximate="tanh"))  # type: ignore[no-any-return]


class ReleasedBlock(nn.Module):
    """As `PlainBlock`, in the released order of work: a float64 residual stream until the MLP."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = ReleasedAttention(width, num_heads)
        self.attn_temp = ReleasedAttention(width, num_heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x_BNC: Tensor, T: int, S: int, code_1TC: Tensor | None) -> Tensor:
        B, _, C = x_BNC.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.scale_shift_table
        x_BNC = x_BNC.double()
        a = (self.norm(x_BNC) * (1 + scale1) + shift1).view(B * T, S, C)
        x_BNC = x_BNC + gate1 * self.attn(a.float()).view(B, T * S, C)
        t = x_BNC.view(B, T, S, C).transpose(1, 2).reshape(B * S, T, C)
        if code_1TC is not None:
            t = t + code_1TC
        t = self.attn_temp(t.float(), causal=True)
        x_BNC = x_BNC + gate1 * t.view(B, S, T, C).transpose(1, 2).reshape(B, T * S, C)
        x_BNC = x_BNC.float()
        m = self.norm(x_BNC) * (1 + scale2) + shift2
        return x_BNC + gate2 * self.mlp["fc2"](F.gelu(self.mlp["fc1"](m), approximate="tanh"))  # type: ignore[no-any-return]


class ReleasedAttention(nn.Module):
    """Self-attention written out, with the weights of queries, keys and values in one."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_NLC: Tensor, *, causal: bool = False) -> Tensor:
        N, L, C = x_NLC.shape
        q, k, v = self.qkv(x_NLC).view(N, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if causal:
            scores = scores.masked_fill(torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
        h: Tensor = scores.softmax(dim=-1) @ v
        return self.proj(h.transpose(1, 2).reshape(N, L, C))  # type: ignore[no-any-return]


class PlainQFormer(nn.Module):
    """Learned queries that read the frames of each position."""

    def __init__(self, config: VidTwinConfig, structure: Structure) -> None:
        super().__init__()
        self.query_embeds = nn.Parameter(torch.zeros(config.num_queries, config.query_width))
        layer = ReleasedQFormerLayer if structure == "released" else PlainQFormerLayer
        layers = nn.ModuleList(layer(config, index % 2 == 0) for index in range(config.qformer_layers))
        norm = nn.LayerNorm(config.query_width, eps=1e-12)
        self.qformer = nn.ModuleDict({"layernorm": norm, "encoder": nn.ModuleDict({"layer": layers})})

    def forward(self, tokens_NLC: Tensor) -> Tensor:
        q = self.qformer["layernorm"](self.query_embeds).expand(tokens_NLC.shape[0], -1, -1)
        for layer in self.qformer.get_submodule("encoder.layer").children():
            q = layer(q, tokens_NLC)
        return q  # type: ignore[no-any-return]


class PlainQFormerLayer(nn.Module):
    """Post-norm layer as in BERT."""

    need_weights = True

    def __init__(self, config: VidTwinConfig, reads: bool) -> None:
        super().__init__()
        width, token_width = config.query_width, config.width
        self.attention = nn.MultiheadAttention(width, QFORMER_HEADS, batch_first=True)
        self.crossattention = (
            nn.MultiheadAttention(width, QFORMER_HEADS, kdim=token_width, vdim=token_width, batch_first=True)
            if reads
            else None
        )
        steps = ("attention", "crossattention", "mlp") if reads else ("attention", "mlp")
        self.norms = nn.ModuleDict({step: nn.LayerNorm(width, eps=1e-12) for step in steps})
        self.intermediate_query = nn.Linear(width, config.qformer_mlp_width)
        self.output_query = nn.Linear(config.qformer_mlp_width, width)

    def forward(self, q: Tensor, tokens_NLC: Tensor) -> Tensor:
        q = self.norms["attention"](self.attention(q, q, q, need_weights=self.need_weights)[0] + q)
        if self.crossattention is not None:
            q = self.norms["crossattention"](
                self.crossattention(q, tokens_NLC, tokens_NLC, need_weights=self.need_weights)[0] + q
            )
        return self.norms["mlp"](self.output_query(F.gelu(self.intermediate_query(q))) + q)  # type: ignore[no-any-return]


class ReleasedQFormerLayer(nn.Module):
    """As `PlainQFormerLayer`, with attention written out and the published names."""

    def __init__(self, config: VidTwinConfig, reads: bool) -> None:
        super().__init__()
        width = config.query_width
        self.attention = ReleasedQFormerAttention(width, width)
        self.crossattention = ReleasedQFormerAttention(width, config.width) if reads else None
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(width, config.qformer_mlp_width)})
        self.output_query = _output(config.qformer_mlp_width, width)

    def forward(self, q: Tensor, tokens_NLC: Tensor) -> Tensor:
        q = self.attention(q, q)
        if self.crossattention is not None:
            q = self.crossattention(q, tokens_NLC)
        h = self.output_query["dense"](F.gelu(self.intermediate_query["dense"](q)))
        return self.output_query["LayerNorm"](h + q)  # type: ignore[no-any-return]


class ReleasedQFormerAttention(nn.Module):
    """Attention of the queries to a sequence, written out, with residual and norm."""

    def __init__(self, width: int, token_width: int) -> None:
        super().__init__()
        widths = {"query": width, "key": token_width, "value": token_width}
        self.attention = nn.ModuleDict({name: nn.Linear(inputs, width) for name, inputs in widths.items()})
        self.output = _output(width, width)

    def forward(self, q_NQD: Tensor, tokens_NLC: Tensor) -> Tensor:
        given = {"query": q_NQD, "key": tokens_NLC, "value": tokens_NLC}
        q, k, v = (
            self.attention[name](value).view(*value.shape[:2], QFORMER_HEADS, -1).permute(0, 2, 1, 3)
            for name, value in given.items()
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        h = (scores.softmax(dim=-1) @ v).permute(0, 2, 1, 3).contiguous().view(q_NQD.shape)
        return self.output["LayerNorm"](self.output["dense"](h) + q_NQD)  # type: ignore[no-any-return]


def _output(in_width: int, width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(in_width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})


def plain_vidtwin(config: VidTwinConfig, weights: Mapping[str, Tensor], structure: Structure) -> PlainVidTwin:
    """Build the model with weights of ours, by the network's names; only "released" shares memory with them."""
    with torch.device("meta"):
        model = PlainVidTwin(config, structure)
    unused = ("encoder.final_layer.", "decoder.x_embedder.")
    published = {checkpoint_name(name, config): tensor for name, tensor in weights.items()}
    published = {name: tensor for name, tensor in published.items() if not name.startswith(unused)}
    state = published if structure == "released" else _parts_state(published)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _parts_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names of `torch.nn.MultiheadAttention`."""
    state = {_plain_name(name): tensor.float() for name, tensor in published.items()}
    for prefix in {name[: -len("query.weight")] for name in list(state) if name.endswith(".query.weight")}:
        query, key, value = (
            [state.pop(f"{prefix}{part}.{kind}") for kind in ("weight", "bias")] for part in ("query", "key", "value")
        )
        state[f"{prefix}in_proj_bias"] = torch.cat([query[1], key[1], value[1]])
        if query[0].shape == key[0].shape:
            state[f"{prefix}in_proj_weight"] = torch.cat([query[0], key[0], value[0]])
        else:
            parts = zip("qkv", (query[0], key[0], value[0]), strict=True)
            state |= {f"{prefix}{part}_proj_weight": weight for part, weight in parts}
    return state


def _plain_name(name: str) -> str:
    """Name of a published weight in this model; queries, keys and values of the Q-Former are joined afterwards."""
    name = re.sub(r"\.(attn|attn_temp)\.qkv\.(weight|bias)$", r".\1.in_proj_\2", name)
    name = re.sub(r"\.(attn|attn_temp)\.proj\.", r".\1.out_proj.", name)
    name = re.sub(r"\.(attention|crossattention)\.attention\.", r".\1.", name)
    name = re.sub(r"\.(attention|crossattention)\.output\.dense\.", r".\1.out_proj.", name)
    name = re.sub(r"\.(attention|crossattention)\.output\.LayerNorm\.", r".norms.\1.", name)
    name = name.replace(".output_query.LayerNorm.", ".norms.mlp.")
    return re.sub(r"\.(intermediate_query|output_query)\.dense\.", r".\1.", name)
