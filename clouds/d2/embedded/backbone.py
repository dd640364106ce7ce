"""What a backbone is, and how the shape of a feature map is described before there is one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass
class ShapeSpec:
    """What is known of a feature map; None where nothing is.

    Attributes:
        channels: C.
        height: H, pixels of the map.
        width: W, pixels of the map.
        stride: input pixels per pixel of the map.
    """

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


class Backbone(nn.Module, ABC):
    """Base of all backbones: images (N, 3, H, W) to a dict of named feature maps.

    A subclass either overrides `output_shape`, or sets `_out_features` (names, in order),
    `_out_feature_channels` and `_out_feature_strides` (by name), which Detectron2 reads too.
    """

    _out_features: list[str]
    _out_feature_channels: dict[str, int]
    _out_feature_strides: dict[str, int]

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Feature maps by name, each (N, C, H / stride, W / stride)."""

    @property
    def size_divisibility(self) -> int:
        """Height and width of the input must be multiples of it, pixels; 0: any size will do."""
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """How the input must be padded; `ImageList.from_tensors` takes it as it is.

        May hold "size_divisibility" and "square_size" (pixels), both optional.
        """
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature map, by name."""
        return {
            name: ShapeSpec(
                channels=self._out_feature_channels[name], stride=self._out_feature_strides[name]
            )
            for name in self._out_features
        }
