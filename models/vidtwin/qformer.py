"""Q-Former: learned queries that summarize a short sequence of tokens.

Post-norm layers as in BERT: attention among the queries, in layers of even index attention to the tokens, and an MLP.
Its size is that of the config and does not grow with the transformer's. Parameter names are those of the released
checkpoint.
"""

# N sequences, L tokens of a sequence, C their channels; Q queries, D their channels

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vidshard.models.vidtwin.config import QFORMER_HEADS

DROPOUT = 0.1
"""Dropout probability during training."""
NORM_EPS = 1e-12


class QFormer(nn.Module):
    """Queries that read sequences of tokens. The order of the tokens does not matter."""

    def __init__(
        self, *, num_queries: int, query_width: int, token_width: int, mlp_width: int, num_layers: int
    ) -> None:
        super().__init__()
        self.query_embeds = nn.Parameter(torch.randn(num_queries, query_width))
        layers = nn.ModuleList(
            Layer(query_width, token_width if index % 2 == 0 else None, mlp_width) for index in range(num_layers)
        )
        self.qformer = nn.ModuleDict(
            {
                "layernorm": nn.LayerNorm(query_width, eps=NORM_EPS),
                "encoder": nn.ModuleDict({"layer": layers}),
            }
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @property
    def layers(self) -> nn.ModuleList:
        """All layers, in order."""
        encoder = self.qformer["encoder"]
        assert isinstance(encoder, nn.ModuleDict)
        layers = encoder["layer"]
        assert isinstance(layers, nn.ModuleList)
        return layers

    def forward(self, tokens_NLC: Tensor) -> Tensor:
        """Summarize sequences: (N, L, C) to (N, Q, D)."""
        q_QD = F.dropout(self.qformer["layernorm"](self.query_embeds), DROPOUT, self.training)
        q_NQD = q_QD.expand(tokens_NLC.shape[0], -1, -1)
        for layer in self.layers:
            q_NQD = layer(q_NQD, tokens_NLC)
        return q_NQD


class Layer(nn.Module):
    """One layer; without a token width it does not read the tokens."""

    def __init__(self, query_width: int, token_width: int | None, mlp_width: int) -> None:
        super().__init__()
        self.attention = ResidualAttention(query_width, query_width)
        self.crossattention = None if token_width is None else ResidualAttention(query_width, token_width)
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(query_width, mlp_width)})
        self.output_query = residual_output(mlp_width, query_width)

    def forward(self, q_NQD: Tensor, tokens_NLC: Tensor) -> Tensor:
        q_NQD = self.attention(q_NQD, q_NQD)
        if self.crossattention is not None:
            q_NQD = self.crossattention(q_NQD, tokens_NLC)
        return add_and_norm(self.output_query, F.gelu(self.intermediate_query["dense"](q_NQD)), q_NQD)


class ResidualAttention(nn.Module):
    """Attention of the queries to a sequence, with a residual and a norm after it."""

    def __init__(self, query_width: int, token_width: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {
                "query": nn.Linear(query_width, query_width),
                "key": nn.Linear(token_width, query_width),
                "value": nn.Linear(token_width, query_width),
            }
        )
        self.output = residual_output(query_width, query_width)

    def forward(self, q_NQD: Tensor, tokens_NLC: Tensor) -> Tensor:
        query = _heads(self.attention["query"](q_NQD))
        key, value = (_heads(self.attention[name](tokens_NLC)) for name in ("key", "value"))
        h = F.scaled_dot_product_attention(query, key, value, dropout_p=DROPOUT if self.training else 0.0)
        return add_and_norm(self.output, h.transpose(1, 2).flatten(2), q_NQD)


def residual_output(in_width: int, query_width: int) -> nn.ModuleDict:
    """Make the linear layer and the norm that end attention and MLP."""
    return nn.ModuleDict(
        {"dense": nn.Linear(in_width, query_width), "LayerNorm": nn.LayerNorm(query_width, eps=NORM_EPS)}
    )


def add_and_norm(output: nn.ModuleDict, h_NQD: Tensor, q_NQD: Tensor) -> Tensor:
    """Apply a `residual_output`: linear layer, residual, norm."""
    added: Tensor = output["LayerNorm"](F.dropout(output["dense"](h_NQD), DROPOUT, output.training) + q_NQD)
    return added


def _heads(x_NLD: Tensor) -> Tensor:
    """Split the channels into heads: (N, heads, L, D / heads)."""
    N, L, D = x_NLD.shape
    return x_NLD.view(N, L, QFORMER_HEADS, D // QFORMER_HEADS).transpose(1, 2)
