"""Training of the whole backbone, with lower learning rates in earlier blocks."""

from __future__ import annotations

from collections.abc import Mapping

from clouds.d2 import CfgNode
from clouds.modeling.backbone.adapters.base import ADAPTER_REGISTRY, AdaptedLayers, Adapter


class Full(Adapter):
    """The backbone's own layers train.

    Args:
        layers: of the backbone.
        layer_decay: factor of the learning rate from a block to the one before it. That of the last
            block is the backbone's, and what precedes the blocks is counted as one before the
            first.
    """

    trains_backbone = True

    def __init__(self, layers: AdaptedLayers, layer_decay: float) -> None:
        super().__init__()
        depth = len(layers.names)
        self.factors = {layers.root: layer_decay**depth}
        for i, name in enumerate(layers.names):
            self.factors[name] = layer_decay ** (depth - 1 - i)

    def param_group_options(self) -> Mapping[str, Mapping[str, float]]:
        if all(factor == 1 for factor in self.factors.values()):
            return {}
        return {name: {"lr_factor": factor} for name, factor in self.factors.items()}


def full(cfg: CfgNode, layers: AdaptedLayers) -> Adapter:
    """Full fine-tuning."""
    return Full(layers, cfg.MODEL.BACKBONE.ADAPTER.FULL.LAYER_DECAY)


ADAPTER_REGISTRY.register(full)
