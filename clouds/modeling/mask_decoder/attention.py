"""The three sub-layers of a mask decoder layer, each with its sum and the norm after it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention`, batch first, with one mask for all heads.

    torch's own wants the mask copied for every head and as floats: with 100 queries on a stride-8
    map that copy is larger than everything else in the layer.
    """

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__(channels, heads, dropout=dropout, batch_first=True)

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            query: (N, Q, C)
            key, value: (N, K, C)
            allowed: bool (N, Q, K), True where a query may look; None: everywhere.

        Returns:
            (N, Q, C)
        """
        assert self.in_proj_weight is not None and self.in_proj_bias is not None
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if allowed is None else allowed[:, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return projected


class SelfAttentionLayer(nn.Module):
    """Queries look at one another."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(channels, heads, dropout)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        _init_xavier(self)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """x, position (N, Q, C) -> (N, Q, C)"""
        place = x + position
        out: Tensor = self.norm(x + self.dropout(self.self_attn(place, place, x)))
        return out


class CrossAttentionLayer(nn.Module):
    """Queries look at a feature map."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.multihead_attn = MultiheadAttention(channels, heads, dropout)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        _init_xavier(self)

    def forward(
        self, x: Tensor, position: Tensor, key: Tensor, value: Tensor, allowed: Tensor
    ) -> Tensor:
        """x, position (N, Q, C); key, value (N, K, C); allowed bool (N, Q, K) -> (N, Q, C)"""
        attended = self.multihead_attn(x + position, key, value, allowed)
        out: Tensor = self.norm(x + self.dropout(attended))
        return out


class FFNLayer(nn.Module):
    """Each query is worked on by itself."""

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, hidden)
        self.linear2 = nn.Linear(hidden, channels)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        _init_xavier(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, Q, C) -> (N, Q, C)"""
        hidden = self.dropout(F.relu(self.linear1(x), inplace=True))
        out: Tensor = self.norm(x + self.dropout(self.linear2(hidden)))
        return out


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, channels: int, hidden: int, out: int, layers: int) -> None:
        super().__init__()
        widths = [channels, *[hidden] * (layers - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.layers
        for layer in inner:
            x = F.relu(layer(x), inplace=True)
        out: Tensor = last(x)
        return out


def _init_xavier(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


@torch.no_grad()
def may_attend(mask_logits: Tensor) -> Tensor:
    """Where each query may look next: inside the mask it predicts now.

    A query whose mask is empty may look everywhere.

    Args:
        mask_logits: at the size of the map to be attended (N, Q, h, w).

    Returns:
        bool (N, Q, h * w)
    """
    inside = mask_logits.flatten(2) >= 0
    return inside | ~inside.any(-1, keepdim=True)
