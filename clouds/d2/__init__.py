"""The one place where CLOUDS meets Detectron2.

Every Detectron2 noun that the project uses (configs, registries, catalogs, shapes, image lists,
evaluators) is taken from here and from nowhere else. With Detectron2 installed they are its own
objects, so a model registered here is found by its tools; without it they are the small versions
in `clouds.d2.embedded`, which behave alike.

The environment variable CLOUDS_D2 chooses: `auto` (the default: Detectron2 when there is one),
`detectron2`, or `embedded`. It is read once, and all the names come from the same side.
"""

from __future__ import annotations

from clouds.d2.build import build_model
from clouds.d2.choice import BACKEND, backend_version
from clouds.d2.nouns import (
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
    "build_model",
    "configurable",
]
