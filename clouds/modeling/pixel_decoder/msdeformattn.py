"""Mask2Former's pixel decoder with multi-scale deformable attention (Cheng et al., section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clouds.d2 import ShapeSpec
from clouds.ops.deformable_attention import deformable_attention

Size = tuple[int, int]
"""Height and width of a feature map."""

MASK_STRIDE = 4
NORM_GROUPS = 32


def sine_position_encoding(
    height: int,
    width: int,
    channels: int,
    device: torch.device | str | None = None,
    temperature: float = 10000.0,
) -> Tensor:
    """Sine encoding of pixel coordinates (DETR, appendix A.4).

    Coordinates are in (0, 2 pi], the last row and column at 2 pi. The first half of the channels
    encodes y, the second x; in each, sines and cosines alternate, with falling frequencies.

    Returns:
        (channels, height, width) float32
    """
    half = channels // 2
    index = torch.arange(half, dtype=torch.float32, device=device)
    wavelength = temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / half)

    def encode(length: int) -> Tensor:
        steps = torch.arange(1, length + 1, dtype=torch.float32, device=device)
        angle = (steps / (length + 1e-6) * 2 * math.pi)[:, None] / wavelength
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=2).flatten(1)

    y = encode(height).T[:, :, None].expand(half, height, width)
    x = encode(width).T[:, None, :].expand(half, height, width)
    return torch.cat((y, x))


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, section 4.1).

    Keys are a few sampling points per level around each query's reference point; their offsets
    and weights are linear functions of the query.

    Args:
        d_model: channels of queries and values, a multiple of `num_heads`.
        num_levels: number of feature maps.
        num_points: sampling points per head and level.
        implementation: see `deformable_attention`.
    """

    def __init__(
        self,
        d_model: int,
        num_levels: int,
        num_heads: int,
        num_points: int,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.implementation = implementation
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        self.sampling_offsets = nn.Linear(d_model, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(d_model, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial offsets: head h at angle 2 pi h / num_heads, its k-th point k pixels away."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * distances[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, reference_points: Tensor, value: Tensor, spatial_shapes: Sequence[Size]
    ) -> Tensor:
        """
        Args:
            query: (N, Q, C), position encoding added.
            reference_points: (Q, 2) as (x, y) in [0, 1], the position of each query.
            value: (N, S, C), the maps flattened one after another.
            spatial_shapes: (height, width) of each map.

        Returns:
            (N, Q, C)
        """
        locations = self._sampling_locations(query, reference_points, spatial_shapes)
        # Softmax over the first dimension: on a CPU several times as fast as over short rows.
        logits = self.attention_weights(query).view(-1, self.num_levels * self.num_points).t()
        weights = logits.softmax(0).t().view(locations.shape[:-1])
        values = self.value_proj(value).view(
            value.shape[0], -1, self.num_heads, value.shape[-1] // self.num_heads
        )
        attended = deformable_attention(
            values, spatial_shapes, locations, weights.to(values.dtype), self.implementation
        )
        out: Tensor = self.output_proj(attended)
        return out

    def _sampling_locations(
        self, query: Tensor, reference_points: Tensor, spatial_shapes: Sequence[Size]
    ) -> Tensor:
        """(N, Q, M, L, P, 2) in float32: half precision is coarser than a pixel.

        Computed on flat rows: on a CPU an operation whose last dimension is 2 takes several times
        as long.
        """
        offsets = self.sampling_offsets(query).float()
        pixel = offsets.new_empty(self.num_heads, self.num_levels, self.num_points, 2)
        for level, (height, width) in enumerate(spatial_shapes):
            # Filled, as the host would wait for a copy to a GPU.
            pixel[:, level, :, 0].fill_(1 / width)
            pixel[:, level, :, 1].fill_(1 / height)
        pixel = pixel.flatten()
        centers = reference_points.repeat(1, pixel.numel() // 2)
        locations = torch.addcmul(centers, offsets, pixel)
        return locations.view(*query.shape[:2], self.num_heads, self.num_levels, self.num_points, 2)


class MSDeformAttnTransformerEncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each followed by sum and LayerNorm."""

    def __init__(
        self, attention: MSDeformAttn, d_model: int, dim_feedforward: int, dropout: float
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.norm1 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, position: Tensor, reference_points: Tensor, spatial_shapes: Sequence[Size]
    ) -> Tensor:
        """x (N, S, C), position (1, S, C), reference_points (S, 2) -> (N, S, C)"""
        attended = self.self_attn(x + position, reference_points, x, spatial_shapes)
        x = self.norm1(x + self.dropout(attended))
        hidden = self.dropout(F.relu(self.linear1(x), inplace=True))
        out: Tensor = self.norm2(x + self.dropout(self.linear2(hidden)))
        return out


class MSDeformAttnTransformerEncoderOnly(nn.Module):
    """A transformer encoder over the pixels of all feature maps together.

    Args:
        level_embed: uninitialized (L, C), one row per feature map.
        layers: in the order in which they are applied.
    """

    def __init__(
        self, level_embed: Tensor, layers: Sequence[MSDeformAttnTransformerEncoderLayer]
    ) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(level_embed)
        # A dictionary for the published names, `encoder.layers.0.…`.
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
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
        """L maps (N, C, H_l, W_l), coarse to fine -> L maps of the same shapes."""
        sizes: list[Size] = [(f.shape[-2], f.shape[-1]) for f in features]
        channels, device = features[0].shape[1], features[0].device
        position = torch.cat(
            [
                sine_position_encoding(h, w, channels, device).flatten(1).T + embed
                for (h, w), embed in zip(sizes, self.level_embed, strict=True)
            ]
        )
        flat = torch.cat([f.flatten(2).transpose(1, 2) for f in features], dim=1)
        centers = pixel_centers(sizes, device)
        for layer in self.encoder["layers"].children():
            flat = layer(flat, position[None], centers, sizes)
        levels = torch.split(flat, [h * w for h, w in sizes], dim=1)
        return [
            # Unflatten, then permute: the reverse order loses the channels-last layout where N = 1.
            torch.unflatten(level, 1, size).permute(0, 3, 1, 2)
            for level, size in zip(levels, sizes, strict=True)
        ]


def pixel_centers(spatial_shapes: Sequence[Size], device: torch.device) -> Tensor:
    """Centers of the pixels of every map, (S, 2) as (x, y) in (0, 1): the reference points."""
    centers = []
    for h, w in spatial_shapes:
        y = (torch.arange(h, dtype=torch.float32, device=device) + 0.5) / h
        x = (torch.arange(w, dtype=torch.float32, device=device) + 0.5) / w
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        centers.append(torch.stack((grid_x, grid_y), dim=-1).flatten(0, 1))
    return torch.cat(centers)


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution as a matrix product, its initial bias zero.

    It keeps the channels-last memory layout, which a frozen ConvNeXt's features have and which the
    transformer's tokens need, so that nothing is copied between them.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return _conv1x1(x, self.weight, self.bias)


class ConvNorm(nn.Conv2d):
    """A convolution without bias and its GroupNorm, the submodule `norm`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False
        )
        self.norm = nn.GroupNorm(NORM_GROUPS, out_channels)
        nn.init.kaiming_uniform_(self.weight, a=1)

    def forward(self, x: Tensor) -> Tensor:
        x = _conv1x1(x, self.weight) if self.kernel_size == (1, 1) else super().forward(x)
        out: Tensor = self.norm(x)
        return out


class MSDeformAttnPixelDecoder(nn.Module):
    """A deformable transformer on coarse backbone features, and an FPN down to stride 4.

    Args:
        input_shape: name -> channels and stride of the backbone features that it reads.
        transformer_in_features: names of those that go through the transformer.
        conv_dim: channels of the decoder.
        mask_dim: channels of the mask features.
        num_layers, num_heads, num_points, dim_feedforward, dropout: of the transformer.
        implementation: of its attention, see `deformable_attention`.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        transformer_in_features: Sequence[str],
        conv_dim: int,
        mask_dim: int,
        num_layers: int,
        num_heads: int,
        num_points: int = 4,
        dim_feedforward: int,
        dropout: float,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        strides = {name: _stride(spec) for name, spec in input_shape.items()}
        fine_to_coarse = sorted(transformer_in_features, key=strides.__getitem__)
        self.transformer_features = fine_to_coarse[::-1]
        self.input_proj = nn.ModuleList(
            _input_projection(_channels(input_shape[name]), conv_dim)
            for name in self.transformer_features
        )
        num_levels = len(fine_to_coarse)
        self.transformer = MSDeformAttnTransformerEncoderOnly(
            torch.empty(num_levels, conv_dim),
            [
                MSDeformAttnTransformerEncoderLayer(
                    MSDeformAttn(conv_dim, num_levels, num_heads, num_points, implementation),
                    conv_dim,
                    dim_feedforward,
                    dropout,
                )
                for _ in range(num_layers)
            ],
        )
        # One FPN level per halving of the stride, down to the stride of the masks.
        num_fpn_levels = int(math.log2(strides[fine_to_coarse[0]] // MASK_STRIDE))
        by_stride = sorted(input_shape, key=strides.__getitem__)
        self.fpn_features = by_stride[:num_fpn_levels][::-1]
        for i, name in enumerate(by_stride[:num_fpn_levels], start=1):
            self.add_module(f"adapter_{i}", ConvNorm(_channels(input_shape[name]), conv_dim, 1))
            self.add_module(f"layer_{i}", ConvNorm(conv_dim, conv_dim, 3))
        self.mask_features = Conv1x1(conv_dim, mask_dim)
        nn.init.kaiming_uniform_(self.mask_features.weight, a=1)

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """
        Args:
            features: name -> (N, C, H / stride, W / stride)

        Returns:
            mask features (N, mask_dim, H / 4, W / 4), and the transformer's maps
            (N, conv_dim, H / stride, W / stride), coarse to fine.
        """
        projections = zip(self.transformer_features, self.input_proj, strict=True)
        maps = self.transformer([projection(features[name]) for name, projection in projections])
        fine = maps[-1]
        for i, name in zip(range(len(self.fpn_features), 0, -1), self.fpn_features, strict=True):
            lateral = self.get_submodule(f"adapter_{i}")(features[name])
            up = F.interpolate(fine, lateral.shape[-2:], mode="bilinear", align_corners=False)
            fine = F.relu(self.get_submodule(f"layer_{i}")(up + lateral), inplace=True)
        return self.mask_features(fine), maps


def _conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def _input_projection(in_channels: int, conv_dim: int) -> nn.Sequential:
    conv = Conv1x1(in_channels, conv_dim)
    nn.init.xavier_uniform_(conv.weight)
    return nn.Sequential(conv, nn.GroupNorm(NORM_GROUPS, conv_dim))


def _channels(spec: ShapeSpec) -> int:
    assert spec.channels is not None, "output_shape of the backbone has no channels"
    return spec.channels


def _stride(spec: ShapeSpec) -> int:
    assert spec.stride is not None, "output_shape of the backbone has no stride"
    return spec.stride
