"""Detectron2's nouns for machines without Detectron2.

Small implementations of the part of its interface that CLOUDS and code written against it use,
on the packages that it is built on itself (fvcore, iopath, yacs). The conformance tests in
`tests/d2` hold both sides to the same behaviour.
"""

from __future__ import annotations

from fvcore.common.config import CfgNode
from fvcore.common.registry import Registry

from clouds.d2.embedded.backbone import Backbone, ShapeSpec
from clouds.d2.embedded.catalog import DatasetCatalog, MetadataCatalog
from clouds.d2.embedded.configurable import configurable
from clouds.d2.embedded.evaluator import DatasetEvaluator
from clouds.d2.embedded.image_list import ImageList
from clouds.d2.embedded.registries import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
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
