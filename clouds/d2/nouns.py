"""All nouns from the chosen side, never some from one and some from the other.

Type checkers always see the embedded side, so that one set of types serves both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clouds.d2.choice import BACKEND

if TYPE_CHECKING or BACKEND == "embedded":
    from clouds.d2.embedded import (
        BACKBONE_REGISTRY,
        META_ARCH_REGISTRY,
        SEM_SEG_HEADS_REGISTRY,
        Backbone,
        CfgNode,
        DatasetCatalog,
        DatasetEvaluator,
        ImageList,
        MetadataCatalog,
        Registry,
        ShapeSpec,
        configurable,
    )
else:
    from clouds.d2.installed import (
        BACKBONE_REGISTRY,
        META_ARCH_REGISTRY,
        SEM_SEG_HEADS_REGISTRY,
        Backbone,
        CfgNode,
        DatasetCatalog,
        DatasetEvaluator,
        ImageList,
        MetadataCatalog,
        Registry,
        ShapeSpec,
        configurable,
    )

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
