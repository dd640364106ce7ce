"""Registries of what a config names: whole models, backbones, segmentation heads."""

from __future__ import annotations

from fvcore.common.registry import Registry

META_ARCH_REGISTRY = Registry("META_ARCH")
"""Whole models, called with (cfg)."""

BACKBONE_REGISTRY = Registry("BACKBONE")
"""Backbones, called with (cfg, input_shape: ShapeSpec)."""

SEM_SEG_HEADS_REGISTRY = Registry("SEM_SEG_HEADS")
"""Segmentation heads, called with (cfg, input_shape: dict[str, ShapeSpec])."""
