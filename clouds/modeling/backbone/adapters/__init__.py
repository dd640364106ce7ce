"""Adapters of frozen backbones. A new one is a file here, registered in ADAPTER_REGISTRY."""

from __future__ import annotations

import clouds.modeling.backbone.adapters.full
import clouds.modeling.backbone.adapters.lora
import clouds.modeling.backbone.adapters.recycle
import clouds.modeling.backbone.adapters.rein
import clouds.modeling.backbone.adapters.soma  # noqa: F401 - all register themselves
from clouds.modeling.backbone.adapters.base import (
    ADAPTER_REGISTRY,
    AdaptedLayers,
    Adapter,
    MakeAdapter,
    adapter_of,
    build_adapter,
)
from clouds.modeling.backbone.adapters.low_rank import merge_updates

__all__ = [
    "ADAPTER_REGISTRY",
    "AdaptedLayers",
    "Adapter",
    "MakeAdapter",
    "adapter_of",
    "build_adapter",
    "merge_updates",
]
