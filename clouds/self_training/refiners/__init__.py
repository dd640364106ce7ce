"""Refiners of the teacher's labels. A new one is a file here, registered in REFINER_REGISTRY."""

from __future__ import annotations

import clouds.self_training.refiners.sam.refiner
import clouds.self_training.refiners.sam.regions
import clouds.self_training.refiners.sam.text
import clouds.self_training.refiners.superpixel  # noqa: F401 - they register themselves
from clouds.self_training.refiners.base import REFINER_REGISTRY, Refiner, build_refiner

__all__ = ["REFINER_REGISTRY", "Refiner", "build_refiner"]
