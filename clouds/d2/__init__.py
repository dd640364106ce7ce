"""The one place where CLOUDS meets Detectron2.

Every Detectron2 name that the project uses is imported from here and from nowhere else. With
Detectron2 installed they are its own objects, so a model registered here is found by its tools;
without it they are the small versions in `clouds.d2.embedded`, which behave alike.

The environment variable CLOUDS_D2 chooses: `auto` (the default: Detectron2 when it is installed),
`detectron2`, or `embedded`. It is read once, and all names come from the same side. Type checkers
always see the embedded side, so that one set of types serves both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clouds.d2.backend import BACKEND, backend_version, broken

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
    "BACKEND",
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
    "backend_version",
    "configurable",
]
