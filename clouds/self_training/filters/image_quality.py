"""Weights of whole images, by how sure the teacher is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from clouds.data.structures import Targets
from clouds.self_training.refiners.base import PseudoLabel


@dataclass(frozen=True)
class ImageQuality:
    """Multiplies all losses of an image by q, its share of pixels of high confidence.

    Tranheden et al., DACS: Domain Adaptation via Cross-domain Mixed Sampling, WACV 2021; the
    quality estimate of MIC, too.

    Attributes:
        threshold: of the confidence; DACS: 0.968.
    """

    threshold: float
    needs_scores = False

    def __call__(self, label: PseudoLabel, targets: Targets) -> Targets:
        quality = float((label.confidence >= self.threshold).float().mean())
        return replace(
            targets,
            weights=quality * targets.pixel_weights,
            class_weight=quality * targets.class_weight,
        )


@dataclass(frozen=True)
class ImageConfidenceFilter:
    """Ignores an image if the teacher's queries are not sure of their classes on average (SENSE).

    Attributes:
        threshold: of `PseudoLabel.query_confidence`; SENSE: 0.95.
    """

    threshold: float
    needs_scores = False

    def __call__(self, label: PseudoLabel, targets: Targets) -> Targets:
        assert label.query_confidence is not None
        if label.query_confidence >= self.threshold:
            return targets
        return replace(
            targets,
            labels=targets.labels[:0],
            masks=targets.masks[:0],
            weights=torch.zeros_like(label.confidence),
            no_object_weight=0.0,
        )
