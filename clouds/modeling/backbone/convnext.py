"""ConvNeXt models of timm as backbones, with their own stages as features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clouds.d2 import Backbone
from clouds.modeling.backbone.adapters import AdaptedLayers, Adapter, MakeAdapter
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
        frozen: whether its own weights do not train.
        make_adapter: makes the adapter; None: nothing trains but what `frozen` says.
    """

    convnext: Any

    def __init__(
        self,
        *,
        convnext: Any,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        frozen: bool = True,
        make_adapter: MakeAdapter | None = None,
    ) -> None:
        super().__init__()
        self.convnext = convnext
        self.pixel_mean, self.pixel_std = tuple(pixel_mean), tuple(pixel_std)
        self._out_features = list(STAGES)
        channels = [info["num_chs"] for info in convnext.feature_info]
        self._out_feature_strides = dict(zip(STAGES, STRIDES, strict=True))
        self._out_feature_channels = dict(zip(STAGES, channels, strict=True))
        convnext.requires_grad_(False)
        self.adapter = Adapter() if make_adapter is None else make_adapter(self._adapted_layers())
        self.frozen = frozen and not self.adapter.trains_backbone
        if self.frozen:
            convnext.to(memory_format=torch.channels_last)
        else:
            for part in (convnext.stem, convnext.stages):
                part.requires_grad_(True)
        self.train(self.training)

    def _adapted_layers(self) -> AdaptedLayers:
        return AdaptedLayers(
            backbone="ConvNeXt",
            names=[f"convnext.stages.{i}" for i in range(len(STAGES))],
            blocks=list(self.convnext.stages),
            widths=[self._out_feature_channels[name] for name in STAGES],
            root="convnext",
            is_transformer=False,
        )

    def param_group_options(self) -> Mapping[str, Mapping[str, float]]:
        """Those of the adapter, see `clouds.engine.optimizer.TrainableGroups`."""
        return self.adapter.param_group_options()

    def blocks(self) -> list[list[nn.Module]]:
        """See `HasBlocks`."""
        return [[stage] for stage in self.convnext.stages]

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
        trains = any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            x = self.convnext.stem(x)
            for i, (name, stage) in enumerate(zip(STAGES, self.convnext.stages, strict=True)):
                x = features[name] = self.adapter.after_stage(i, convnext_ops.stage(stage, x))
        return features
