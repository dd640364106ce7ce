"""What a filter of pseudo-labels is, and the filters that a config names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from clouds.d2 import CfgNode
from clouds.data.structures import Targets
from clouds.self_training.filters.boundary import BoundaryWeights
from clouds.self_training.filters.class_loss import ClassLosses, ClassLossFilter
from clouds.self_training.filters.image_quality import ImageConfidenceFilter, ImageQuality
from clouds.self_training.refiners.base import PseudoLabel


class Filter(Protocol):
    """Changes the weights of a generated image's targets by the teacher's prediction.

    Attributes:
        needs_scores: whether it reads `PseudoLabel.scores`.
    """

    needs_scores: bool

    def __call__(self, label: PseudoLabel, targets: Targets) -> Targets:
        """The targets of one image with other weights.

        Args:
            label: the teacher's, (H, W).
            targets: from the refined label, (H, W).
        """
        ...


@dataclass(frozen=True)
class DiceWeight:
    """Factor of the dice losses of generated images; SENSE: 0."""

    weight: float
    needs_scores = False

    def __call__(self, label: PseudoLabel, targets: Targets) -> Targets:
        return replace(targets, dice_weight=self.weight)


def build_filters(cfg: CfgNode, class_losses: ClassLosses | None) -> tuple[Filter, ...]:
    """The filters that MODEL.CLOUDS.PSEUDO_LABEL turns on, in the order in which they apply."""
    node = cfg.MODEL.CLOUDS.PSEUDO_LABEL
    filters: list[Filter] = []
    if class_losses is not None:
        filters.append(ClassLossFilter(class_losses, node.MAX_CLASS_LOSS))
    if node.BOUNDARY_WEIGHT > 0:
        filters.append(BoundaryWeights(node.BOUNDARY_WEIGHT, node.BOUNDARY_WIDTH))
    if node.QUALITY_THRESHOLD > 0:
        filters.append(ImageQuality(node.QUALITY_THRESHOLD))
    if node.MIN_IMAGE_CONFIDENCE > 0:
        filters.append(ImageConfidenceFilter(node.MIN_IMAGE_CONFIDENCE))
    if node.DICE_WEIGHT != 1:
        filters.append(DiceWeight(node.DICE_WEIGHT))
    return tuple(filters)
