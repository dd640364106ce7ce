"""The nouns of an installed Detectron2. Imported only when that side was chosen."""

from __future__ import annotations

from clouds.d2.backend import broken

try:
    from detectron2.config import CfgNode, configurable
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.evaluation import DatasetEvaluator
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import (
        BACKBONE_REGISTRY,
        META_ARCH_REGISTRY,
        SEM_SEG_HEADS_REGISTRY,
        Backbone,
    )
    from detectron2.structures import ImageList
    from detectron2.utils.registry import Registry
except ImportError as error:
    raise ImportError(broken(error)) from error

__all__ = [
    "BACKBONE_REGISTRY",
    "META_ARCH_REGISTRY",
    "SEM_SEG_HEADS_REGISTRY",
    "Backbone",
    "CfgNode",
    "DatasetCatalog",
    "DatasetEvaluator",
    "ImageList",
    "MetadataCatalog",
    "Registry",
    "ShapeSpec",
    "configurable",
]
