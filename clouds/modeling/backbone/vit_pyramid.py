"""Feature pyramids from the maps of a vision transformer, which all have one stride."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

STRIDES = (4, 8, 16, 32)
"""Of `res2` to `res5`."""


class PlainPyramid(nn.Module):
    """Maps resized bilinearly, without a learned layer (as in Rein and SoMA).

    Args:
        patch_size: stride of the maps, pixels.
    """

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.factors = tuple(patch_size / stride for stride in STRIDES)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (N, C, h, w) to (N, C, h * f, w * f), rounded down."""
        pairs = zip(maps, self.factors, strict=True)
        return [_rescale(feature, factor) for feature, factor in pairs]


class LearnedPyramid(nn.Module):
    """Maps resized by transposed convolutions and max pooling, for patches of 16 pixels.

    This is the pyramid of BEiT's segmentation code, and of tqdm and VLTSeg. Its batch norm is
    synchronized over processes, which torch supports on GPUs only.

    Args:
        channels: C of the maps.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()

        def double() -> nn.Module:
            return nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)

        self.fpn1 = nn.Sequential(double(), nn.SyncBatchNorm(channels), nn.GELU(), double())
        self.fpn2 = nn.Sequential(double())
        self.fpn3 = nn.Identity()
        self.fpn4 = nn.MaxPool2d(kernel_size=2, stride=2)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (N, C, h, w) to (N, C, h * f, w * f), f of 4, 2, 1 and 0.5, rounded down."""
        layers = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [layer(feature) for layer, feature in zip(layers, maps, strict=True)]


class NeckPyramid(nn.Module):
    """A 1x1 convolution, bilinear resizing and a 3x3 convolution per map (as Rein's CLIP baseline).

    Args:
        channels: C of the maps and of the results.
        patch_size: stride of the maps, pixels.
    """

    def __init__(self, channels: int, patch_size: int) -> None:
        super().__init__()
        self.factors = tuple(patch_size / stride for stride in STRIDES)
        self.lateral_convs = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in STRIDES)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in STRIDES)
        for conv in (*self.lateral_convs, *self.convs):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (N, C, h, w) to (N, C, h * f, w * f), rounded down."""
        layers = zip(self.lateral_convs, self.factors, self.convs, strict=True)
        return [
            conv(_rescale(lateral(feature), factor))
            for feature, (lateral, factor, conv) in zip(maps, layers, strict=True)
        ]


def _rescale(feature: Tensor, factor: float) -> Tensor:
    if factor == 1:
        return feature
    return F.interpolate(feature, scale_factor=factor, mode="bilinear", align_corners=False)


def build_pyramid(name: str, channels: int, patch_size: int) -> nn.Module:
    """The pyramid that MODEL.BACKBONE.PYRAMID names: 'plain', 'learned' or 'neck'."""
    if name == "plain":
        return PlainPyramid(patch_size)
    if name == "neck":
        return NeckPyramid(channels, patch_size)
    if patch_size != 16:
        raise ValueError(
            f"MODEL.BACKBONE.PYRAMID learned needs patches of 16 pixels, and "
            f"MODEL.BACKBONE.PATCH_SIZE is {patch_size}. Use 'plain', or patches of 16."
        )
    return LearnedPyramid(channels)
