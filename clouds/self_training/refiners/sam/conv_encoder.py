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
COARSEST = 32
"""Stride of the coarsest features; what is encoded has a multiple of it as sides."""


class ConvEncoder(nn.Module):
    """Multi-scale features of a ResNet with group normalization, in one map of stride 8.

    The embedding has coarse features of stride 8, then fine ones of stride 2, whose blocks of 4 x 4
    pixels are stacked as channels. Padding of the input (zeros at the bottom and right) is not
    encoded: there the embedding is 0.

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
        channels: tuple[int, int, int, int] = (48, 96, 192, 256),
        layers: tuple[int, int, int, int] = (2, 2, 2, 2),
        dim: int = 64,
    ) -> None:
        super().__init__()
        import timm
        from timm.layers import GroupNorm

        self.img_size = img_size
        self.trunk = timm.create_model(
            "resnet18", features_only=True, channels=channels, layers=layers, stem_type="deep",
            stem_width=16, norm_layer=partial(GroupNorm, num_groups=8),
        )  # fmt: skip
        stem, *others = self.trunk.feature_info.channels()
        self.pyramid = FeaturePyramidNetwork(others, dim)
        self.coarse = nn.Sequential(
            GroupNorm(dim, num_groups=8), nn.ReLU(), nn.Conv2d(dim, coarse, 3, padding=1)
        )
        self.quarter = nn.Sequential(
            GroupNorm(dim, num_groups=8), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1),
            GroupNorm(dim, num_groups=8), nn.ReLU(), nn.Conv2d(dim, 4 * 32, 1), nn.PixelShuffle(2),
        )  # fmt: skip
        self.fine = nn.Sequential(
            nn.Conv2d(32 + stem, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, fine, 3, padding=1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, img_size, img_size), normalized, to (N, coarse + 16 fine, s, s)."""
        return torch.cat([self._encode(image[None]) for image in images])

    def _encode(self, image: Tensor) -> Tensor:
        """The embedding of one image; the others of a batch may have other padding."""
        height, width = (-(-side // COARSEST) * COARSEST for side in content_size(image))
        half, *others = self.trunk(image[..., :height, :width])
        quarter, eighth, *_ = self.pyramid(dict(enumerate(others))).values()
        fine = self.fine(torch.cat((self.quarter(quarter), half), 1))
        embedding = torch.cat((self.coarse(eighth), F.pixel_unshuffle(fine, FINE)), 1)
        missing = [(self.img_size - side) // STRIDE for side in (width, height)]
        return F.pad(embedding, (0, missing[0], 0, missing[1]))


def content_size(values: Tensor) -> tuple[int, int]:
    """Rows and columns of (C, H, W) or (1, C, H, W) before the zeros at its bottom and right.

    At least 1.
    """
    nonzero = (values != 0).flatten(0, -3).any(0)
    rows, columns = (nonzero.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    return (rows[-1] + 1 if rows else 1, columns[-1] + 1 if columns else 1)
