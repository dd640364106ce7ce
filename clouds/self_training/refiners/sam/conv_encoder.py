"""A convolutional image encoder for a small SAM, fast on a CPU: ResNet features and an FPN."""

from __future__ import annotations

from functools import partial

import timm
from timm.layers import GroupNorm
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

STRIDE = 8
"""Pixels of the input per row and column of the embedding."""


class ConvEncoder(nn.Module):
    """Multi-scale features of a ResNet with group normalization, in one map of stride 8.

    Strides 8, 16, 32 are merged by a feature pyramid; strides 2 and 4, in which thin objects are
    visible, by convolutions of their stride.

    Args:
        img_size: height and width of the input, pixels; a multiple of 32.
        out_chans: channels of the embedding.
        channels, layers: of the four stages.
        dim: channels of the pyramid.
    """

    def __init__(
        self,
        img_size: int,
        out_chans: int,
        channels: tuple[int, int, int, int] = (48, 96, 160, 192),
        layers: tuple[int, int, int, int] = (1, 2, 2, 2),
        dim: int = 128,
    ) -> None:
        super().__init__()
        self.img_size = img_size
        self.trunk = timm.create_model(
            "resnet18", features_only=True, channels=channels, layers=layers, stem_type="deep",
            stem_width=16, norm_layer=partial(GroupNorm, num_groups=8),
        )  # fmt: skip
        stem, quarter, *others = self.trunk.feature_info.channels()
        self.fine = nn.ModuleList([nn.Conv2d(stem, dim, 4, 4), nn.Conv2d(quarter, dim, 2, 2)])
        self.pyramid = FeaturePyramidNetwork(others, dim)
        self.neck = nn.Sequential(
            GroupNorm(dim, num_groups=8), nn.ReLU(), nn.Conv2d(dim, out_chans, 3, padding=1),
            GroupNorm(out_chans, num_groups=8),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, img_size, img_size), normalized, to (N, out_chans, s, s), s = img_size / 8."""
        half, quarter, *others = self.trunk(images)
        merged = self.pyramid(dict(enumerate(others)))[0]
        merged = merged + self.fine[0](half) + self.fine[1](quarter)
        embedding: Tensor = self.neck(merged)
        return embedding
