"""Trying a checkpoint on images: `load` it, call the `Segmenter`, look at the `Segmentation`."""

from __future__ import annotations

from clouds.inference.load import load
from clouds.inference.segmentation import Segmentation
from clouds.inference.segmenter import Segmenter

__all__ = ["Segmentation", "Segmenter", "load"]
