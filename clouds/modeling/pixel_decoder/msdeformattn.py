"""Mask2Former's pixel decoder with multi-scale deformable attention (Cheng et al., section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clouds.d2 import ShapeSpec
from clouds.ops.deformable_attention import Size, deformable_attention


def sine_position_encoding(
    height: int,
    width: int,
    channels: int,
    device: torch.device | str | None = None,
    temperature: float = 10000.0,
) -> Tensor:
    """Encode where a pixel is (DETR, appendix A.4).

    Coordinates run over (0, 2 pi], the last row and column at 2 pi. The first half of the channels
    encodes y, the second x; in each, sines and cosines alternate, their frequencies falling.

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
    """Attention whose keys are a few learned sampling points around each query's own position.

    Args:
        channels: of queries and values.
        levels: number of feature maps.
        heads: attention heads; `channels` is a multiple of it.
        points: sampling points per head and level.
        implementation: see `deformable_attention`.
    """

    def __init__(
        self, channels: int, levels: int, heads: int, points: int, implementation: str = "auto"
    ) -> None:
        super().__init__()
        self.implementation = implementation
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
        # Over flat rows: on a CPU an operation whose last side is 2 takes several times as long.
        offsets = self.sampling_offsets(query).float()
        pixel = offsets.new_empty(self.heads, self.levels, self.points, 2)
        for level, (height, width) in enumerate(sizes):  # filled, as a copy would wait for a GPU
            pixel[:, level, :, 0].fill_(1 / width)
            pixel[:, level, :, 1].fill_(1 / height)
        pixel = pixel.flatten()
        centres = reference.repeat(1, pixel.numel() // 2)
        locations = torch.addcmul(centres, offsets, pixel).view(*shape, 2)
        # Over columns rather than short rows: on a CPU several times as fast.
        logits = self.attention_weights(query).view(-1, self.levels * self.points).t()
        weights = logits.softmax(0).t().view(shape)
        values = self.value_proj(value).view(n, -1, self.heads, value.shape[-1] // self.heads)
        out: Tensor = self.output_proj(
            deformable_attention(
                values, sizes, locations, weights.to(values.dtype), self.implementation
            )
        )
        return out


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


GROUPS = 32
MASK_STRIDE = 4


class Pointwise(nn.Conv2d):
    """A 1x1 convolution as a product of matrices.

    Memory is laid out with the channels last, as a ConvNeXt's features are and as the transformer
    wants its tokens: so nothing is copied on the way from the one to the other.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return _pointwise(x, self.weight, self.bias)


class ConvNorm(nn.Conv2d):
    """A convolution without bias, then GroupNorm, a part of it under the name `norm`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False
        )
        self.norm = nn.GroupNorm(GROUPS, out_channels)
        nn.init.kaiming_uniform_(self.weight, a=1)

    def forward(self, x: Tensor) -> Tensor:
        x = _pointwise(x, self.weight) if self.kernel_size == (1, 1) else super().forward(x)
        out: Tensor = self.norm(x)
        return out


class MSDeformAttnPixelDecoder(nn.Module):
    """Coarse backbone features through deformable attention, finer ones joined as in an FPN.

    Args:
        input_shape: name -> channels and stride of the backbone features it reads.
        transformer_in_features: those of them that go through the transformer.
        channels: width of the decoder.
        mask_dim: channels of the mask features.
        layers, heads, points, hidden, dropout: of the transformer.
        implementation: of its attention, see `deformable_attention`.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        transformer_in_features: Sequence[str],
        channels: int,
        mask_dim: int,
        layers: int,
        heads: int,
        points: int = 4,
        hidden: int,
        dropout: float,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        strides = {name: _stride(spec) for name, spec in input_shape.items()}
        fine_to_coarse = sorted(transformer_in_features, key=strides.__getitem__)
        self.transformer_features = fine_to_coarse[::-1]
        self.input_proj = nn.ModuleList(
            _projection(_channels(input_shape[name]), channels)
            for name in self.transformer_features
        )
        self.transformer = DeformableTransformer(
            channels, hidden, len(fine_to_coarse), layers, heads, points, dropout, implementation
        )
        # One step of the pyramid per halving of the stride, down to that of the masks.
        steps = int(math.log2(strides[fine_to_coarse[0]] // MASK_STRIDE))
        by_stride = sorted(input_shape, key=strides.__getitem__)
        self.fpn_features = by_stride[:steps][::-1]
        for i, name in enumerate(by_stride[:steps], start=1):
            self.add_module(f"adapter_{i}", ConvNorm(_channels(input_shape[name]), channels, 1))
            self.add_module(f"layer_{i}", ConvNorm(channels, channels, 3))
        self.mask_features = Pointwise(channels, mask_dim)
        nn.init.kaiming_uniform_(self.mask_features.weight, a=1)
        _zero_bias(self.mask_features)

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """
        Args:
            features: name -> (N, C, H / stride, W / stride)

        Returns:
            mask features (N, mask_dim, H / 4, W / 4), and the transformer's maps
            (N, channels, H / s, W / s), coarse to fine.
        """
        maps = self.transformer(
            [
                projection(features[name])
                for name, projection in zip(self.transformer_features, self.input_proj, strict=True)
            ]
        )
        fine = maps[-1]
        for i, name in zip(range(len(self.fpn_features), 0, -1), self.fpn_features, strict=True):
            lateral = self.get_submodule(f"adapter_{i}")(features[name])
            up = F.interpolate(fine, lateral.shape[-2:], mode="bilinear", align_corners=False)
            fine = F.relu(self.get_submodule(f"layer_{i}")(up + lateral), inplace=True)
        return self.mask_features(fine), maps


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def _projection(in_channels: int, channels: int) -> nn.Sequential:
    conv = Pointwise(in_channels, channels)
    nn.init.xavier_uniform_(conv.weight)
    _zero_bias(conv)
    return nn.Sequential(conv, nn.GroupNorm(GROUPS, channels))


def _zero_bias(conv: nn.Conv2d) -> None:
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


def _channels(spec: ShapeSpec) -> int:
    assert spec.channels is not None, "a backbone says how many channels its features have"
    return spec.channels


def _stride(spec: ShapeSpec) -> int:
    assert spec.stride is not None, "a backbone says what stride its features have"
    return spec.stride
