"""A convolutional image encoder for a small SAM, fast on a CPU: ResNet features and an FPN."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

STRIDE = 8
"""Pixels of the input per row and column of the embedding."""
FINE = 4
"""Fine features are at this times the resolution of the embedding."""


class ConvEncoder(nn.Module):
    """Multi-scale features of a ResNet with group normalization, in one map of stride 8.

    The embedding has coarse features of stride 8, then fine ones of stride 2, whose blocks of 4 x 4
    pixels are stacked as channels.

    Args:
        img_size: height and width of the input, pixels; a multiple of 32.
        coarse, fine: channels of the features of stride 8 and 2.
        channels, layers: of the four stages of the ResNet.
        dim: channels of the pyramid.
    """

    def __init__(
        self,
        img_size: int,
        coarse: int,
        fine: int,
        channels: tuple[int, int, int, int] = (48, 96, 160, 192),
        layers: tuple[int, int, int, int] = (1, 2, 2, 2),
        dim: int = 128,
    ) -> None:
        super().__init__()
        import timm
        from timm.layers import GroupNorm

        self.img_size = img_size
        self.trunk = timm.create_model(
            "resnet18", features_only=True, channels=channels, layers=layers, stem_type="deep",
            stem_width=16, norm_layer=partial(GroupNorm, num_groups=8),
        )  # fmt: skip
        stem, quarter, *others = self.trunk.feature_info.channels()
        self.pyramid = FeaturePyramidNetwork(others, dim)
        self.from_quarter = nn.Conv2d(quarter, dim, 2, 2)
        self.norm = nn.Sequential(GroupNorm(dim, num_groups=8), nn.ReLU())
        self.coarse = nn.Conv2d(dim, coarse, 3, padding=1)
        self.fine = nn.Conv2d(dim, FINE**2 * fine, 3, padding=1)
        self.from_half = nn.Conv2d(stem, fine, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, img_size, img_size), normalized, to (N, coarse + 16 fine, s, s)."""
        half, quarter, *others = self.trunk(images)
        merged = self.pyramid(dict(enumerate(others)))[0] + self.from_quarter(quarter)
        merged = self.norm(merged)
        details = F.pixel_unshuffle(self.from_half(half), FINE)
        return torch.cat((self.coarse(merged), self.fine(merged) + details), 1)
