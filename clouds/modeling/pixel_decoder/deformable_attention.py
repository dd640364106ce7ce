"""Multi-scale deformable attention (Zhu et al., Deformable DETR, section 4.1) in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Size = tuple[int, int]


def deformable_attention(
    value: Tensor, sizes: Sequence[Size], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sum values sampled bilinearly at given places of several feature maps.

    Args:
        value: (N, S, M, D), the maps flattened one after another, M heads of D channels.
        sizes: (height, width) of each of the L maps; S is the sum of their areas.
        locations: (N, Q, M, L, P, 2) as (x, y), 0 the left or upper edge of a map and 1 the
            opposite one; outside of it values are zero.
        weights: (N, Q, M, L, P), the attention of each sample.

    Returns:
        (N, Q, M * D), of the type of `value`.
    """
    n, _, heads, channels = value.shape
    queries = locations.shape[1]
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, NM, Q, P, 2)
    levels = torch.split(value, [h * w for h, w in sizes], dim=1)
    # Places rounded to half precision would be off by up to a pixel on a map of 256 columns.
    dtype = torch.promote_types(value.dtype, locations.dtype)
    sampled = [
        F.grid_sample(
            level.permute(0, 2, 3, 1).reshape(n * heads, channels, h, w).to(dtype),
            grid.to(dtype),
            align_corners=False,
        )  # (NM, D, Q, P)
        for level, grid, (h, w) in zip(levels, grids, sizes, strict=True)
    ]
    attention = weights.permute(0, 2, 1, 3, 4).reshape(n * heads, 1, queries, -1)
    out = (torch.cat(sampled, dim=-1) * attention).sum(-1)  # (NM, D, Q)
    return out.reshape(n, heads * channels, queries).transpose(1, 2).to(value.dtype)


class MSDeformAttn(nn.Module):
    """Attention whose keys are a few learned sampling points around each query's own position.

    Args:
        channels: of queries and values.
        levels: number of feature maps.
        heads: attention heads; `channels` is a multiple of it.
        points: sampling points per head and level.
    """

    def __init__(self, channels: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each head looks in a direction of its own, its k-th point k pixels away."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * distances[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, reference: Tensor, value: Tensor, sizes: Sequence[Size]
    ) -> Tensor:
        """
        Args:
            query: (N, Q, C), positions added.
            reference: (Q, 2) as (x, y) in [0, 1], where each query is.
            value: (N, S, C), the maps flattened one after another.
            sizes: (height, width) of each map.

        Returns:
            (N, Q, C)
        """
        n, q, _ = query.shape
        shape = (n, q, self.heads, self.levels, self.points)
        # Places are computed in float32: half precision cannot tell neighbouring pixels apart.
        offsets = self.sampling_offsets(query).float().view(*shape, 2)
        scale = torch.tensor([[w, h] for h, w in sizes], dtype=torch.float32, device=query.device)
        locations = reference[:, None, None, None] + offsets / scale[:, None]
        weights = self.attention_weights(query).view(*shape[:3], -1).softmax(-1).view(shape)
        values = self.value_proj(value).view(n, -1, self.heads, value.shape[-1] // self.heads)
        out: Tensor = self.output_proj(
            deformable_attention(values, sizes, locations, weights.to(values.dtype))
        )
        return out
