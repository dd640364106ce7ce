"""ConvNeXt models of timm as backbones, with their own stages as features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clouds.d2 import Backbone
from clouds.modeling.backbone.vit import STAGES
from clouds.modeling.backbone.vit_pyramid import STRIDES
from clouds.ops import convnext as convnext_ops


class ConvNeXtBackbone(Backbone):
    """A ConvNeXt with the features `res2` to `res5` (strides 4, 8, 16, 32) of its stages.

    A frozen one stays in evaluation mode and records no gradient. The final norm and the head never
    train: the features do not need them.

    Args:
        convnext: timm's `ConvNeXt`, of four stages.
        pixel_mean, pixel_std: of the images that it was trained on, RGB, 0-255.
        frozen: whether it does not train.
    """

    convnext: Any

    def __init__(
        self,
        *,
        convnext: Any,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        frozen: bool = True,
    ) -> None:
        super().__init__()
        self.convnext = convnext
        self.pixel_mean, self.pixel_std = tuple(pixel_mean), tuple(pixel_std)
        self.frozen = frozen
        self._out_features = list(STAGES)
        channels = [info["num_chs"] for info in convnext.feature_info]
        self._out_feature_strides = dict(zip(STAGES, STRIDES, strict=True))
        self._out_feature_channels = dict(zip(STAGES, channels, strict=True))
        convnext.requires_grad_(False)
        if frozen:
            convnext.to(memory_format=torch.channels_last)
        else:
            for part in (convnext.stem, convnext.stages):
                part.requires_grad_(True)
        self.train(self.training)

    @property
    def size_divisibility(self) -> int:
        return STRIDES[-1]

    def train(self, mode: bool = True) -> ConvNeXtBackbone:
        super().train(mode and not self.frozen)
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: normalized images (N, 3, H, W).

        Returns:
            name -> (N, C, H / stride, W / stride), rounded down.
        """
        if self.frozen:
            x = x.contiguous(memory_format=torch.channels_last)
        features = {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x = self.convnext.stem(x)
            for name, stage in zip(STAGES, self.convnext.stages, strict=True):
                x = features[name] = convnext_ops.stage(stage, x)
        return features
