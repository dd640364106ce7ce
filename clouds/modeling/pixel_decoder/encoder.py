"""The deformable-attention encoder over flattened multi-scale features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clouds.modeling.pixel_decoder.attention_op import Size
from clouds.modeling.pixel_decoder.deformable_attention import MSDeformAttn
from clouds.modeling.position_encoding import sine_position_encoding


class EncoderLayer(nn.Module):
    """Deformable self-attention, then a feed-forward network, each with a norm after its sum."""

    def __init__(
        self,
        channels: int,
        hidden: int,
        levels: int,
        heads: int,
        points: int,
        dropout: float,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(channels, levels, heads, points, implementation)
        self.norm1 = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, hidden)
        self.linear2 = nn.Linear(hidden, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, sizes: Sequence[Size]
    ) -> Tensor:
        """x (N, S, C), position (1, S, C), reference (S, 2) -> (N, S, C)"""
        x = self.norm1(x + self.dropout(self.self_attn(x + position, reference, x, sizes)))
        hidden = self.dropout(F.relu(self.linear1(x), inplace=True))
        out: Tensor = self.norm2(x + self.dropout(self.linear2(hidden)))
        return out


class Encoder(nn.Module):
    """Encoder layers, one after the other."""

    def __init__(self, layers: Sequence[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, sizes: Sequence[Size]
    ) -> Tensor:
        for layer in self.layers:
            x = layer(x, position, reference, sizes)
        return x


class DeformableTransformer(nn.Module):
    """Feature maps of one width, coarse to fine, into maps that know of one another."""

    def __init__(
        self,
        channels: int,
        hidden: int,
        levels: int,
        layers: int,
        heads: int,
        points: int,
        dropout: float,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.empty(levels, channels))
        self.encoder = Encoder(
            [
                EncoderLayer(channels, hidden, levels, heads, points, dropout, implementation)
                for _ in range(layers)
            ]
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """L maps (N, C, H_l, W_l) -> L maps of the same shapes."""
        sizes: list[Size] = [(f.shape[-2], f.shape[-1]) for f in features]
        channels, device = features[0].shape[1], features[0].device
        position = torch.cat(
            [
                sine_position_encoding(h, w, channels, device).flatten(1).T + embed
                for (h, w), embed in zip(sizes, self.level_embed, strict=True)
            ]
        )
        flat = torch.cat([f.flatten(2).transpose(1, 2) for f in features], dim=1)
        flat = self.encoder(flat, position[None], reference_points(sizes, device), sizes)
        levels = flat.split([h * w for h, w in sizes], dim=1)
        return [
            # Unflattened last, a batch of one would not be known to have its channels last.
            level.unflatten(1, size).permute(0, 3, 1, 2)
            for level, size in zip(levels, sizes, strict=True)
        ]


def reference_points(sizes: Sequence[Size], device: torch.device) -> Tensor:
    """Centres of the pixels of every map, (S, 2) as (x, y) in (0, 1)."""
    centres = []
    for h, w in sizes:
        y = (torch.arange(h, dtype=torch.float32, device=device) + 0.5) / h
        x = (torch.arange(w, dtype=torch.float32, device=device) + 0.5) / w
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        centres.append(torch.stack((grid_x, grid_y), dim=-1).flatten(0, 1))
    return torch.cat(centres)
