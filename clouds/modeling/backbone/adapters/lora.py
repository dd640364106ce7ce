"""LoRA (Hu et al., ICLR 2022) on the linear layers and convolutions of a backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from clouds.d2 import CfgNode
from clouds.modeling.backbone.adapters.base import ADAPTER_REGISTRY, AdaptedLayers, Adapter
from clouds.modeling.backbone.adapters.low_rank import LowRankAdapter, LowRankUpdate, add_updates


def lora(cfg: CfgNode, layers: AdaptedLayers) -> Adapter:
    """W + s B A: A random, B zero at first, so that the network starts as without the adapter."""
    options = cfg.MODEL.BACKBONE.ADAPTER.LORA

    def make(weight: Tensor, parts: int) -> Mapping[str, LowRankUpdate]:
        update = LowRankUpdate(weight, options.RANK, options.ALPHA / options.RANK)
        nn.init.kaiming_uniform_(update.lora_A, a=math.sqrt(5))
        return {"lora": update}

    key = "MODEL.BACKBONE.ADAPTER.LORA.FIRST_BLOCK"
    add_updates(layers, make, first_block=options.FIRST_BLOCK, key=key)
    return LowRankAdapter()


ADAPTER_REGISTRY.register(lora)
