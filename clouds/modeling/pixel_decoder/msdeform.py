"""Mask2Former's pixel decoder (Cheng et al., Masked-attention Mask Transformer, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from clouds.d2 import ShapeSpec
from clouds.modeling.pixel_decoder.encoder import DeformableTransformer

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
        points: int,
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
