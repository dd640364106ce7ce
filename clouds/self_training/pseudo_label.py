"""What teacher and refiner say of an image without a label, and what the student trains on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clouds.d2 import CfgNode
from clouds.data.targets import Targets, masks_from_label

NO_CLASS = 255
"""In a class map: no class here (the train ids' value for "ignore")."""


def union(masks: torch.Tensor) -> torch.Tensor:
    """bool (H, W), where any of the masks, bool (K, H, W), is."""
    # On a CPU mask after mask is several times faster than one reduction over all.
    where = masks.new_zeros(masks.shape[1:])
    for mask in masks:
        where |= mask
    return where


@dataclass(frozen=True)
class PseudoLabel:
    """What the teacher says of one image.

    Attributes:
        classes: uint8 (H, W), train ids; 255 where it names none.
        confidence: float32 (H, W) in [0, 1], how sure it is of that.
    """

    classes: torch.Tensor
    confidence: torch.Tensor


@dataclass(frozen=True)
class RefinedLabel:
    """What a refiner makes of it.

    Attributes:
        labels: int64 (K,), train ids, ascending, each once.
        masks: bool (K, H, W), where each of them is. Masks overlap only if the refiner was told
            to leave overlaps, and a mask is empty only if it was told to keep emptied ones.
        agreement: float32 (H, W) in [0, 1]: of the pixels in this pixel's refined segment, the
            share that the teacher gives the segment's class; 0 where no mask is. Where several
            segments meet, the best share.
        points: float32 (M, P, 2), the (x, y) points in pixels that M segments were asked with,
            for pictures; None from a refiner that asks with none.
    """

    labels: torch.Tensor
    masks: torch.Tensor
    agreement: torch.Tensor
    points: torch.Tensor | None = None

    @property
    def covered(self) -> torch.Tensor:
        """bool (H, W), where there is any mask."""
        return union(self.masks)

    def class_map(self) -> torch.Tensor:
        """uint8 (H, W) train ids, 255 where no mask is; the larger id where masks overlap."""
        classes = self.labels.new_full(self.masks.shape[1:], NO_CLASS, dtype=torch.uint8)
        for label, mask in zip(self.labels.tolist(), self.masks, strict=True):
            classes[mask] = label
        return classes


@dataclass(frozen=True)
class PseudoLabelOptions:
    """How far a pseudo-label is trusted.

    Attributes:
        uncovered: pixels that no refined mask covers are outside every mask ('negative', as
            published), do not count ('ignore'), or get the teacher's class ('teacher').
        min_confidence: pixels of which the teacher is less sure do not count; 0: all do.
        min_agreement: covered pixels with less agreement do not count; 0: all do.
        weight: how much the others count: 'none' (fully), by 'confidence', by 'agreement' (an
            uncovered pixel has none, and counts fully), or by 'both' (the product).
        void: see `Targets.void`; 1: as published.
    """

    uncovered: str = "negative"
    min_confidence: float = 0.0
    min_agreement: float = 0.0
    weight: str = "none"
    void: float = 1.0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> PseudoLabelOptions:
        """From MODEL.CLOUDS.UNCOVERED and MODEL.CLOUDS.PSEUDO_LABEL."""
        node = cfg.MODEL.CLOUDS
        return cls(
            uncovered=node.UNCOVERED,
            min_confidence=node.PSEUDO_LABEL.MIN_CONFIDENCE,
            min_agreement=node.PSEUDO_LABEL.MIN_AGREEMENT,
            weight=node.PSEUDO_LABEL.WEIGHT,
            void=node.PSEUDO_LABEL.NO_OBJECT_WEIGHT,
        )


def targets(
    teacher: PseudoLabel, refined: RefinedLabel, options: PseudoLabelOptions | None = None
) -> Targets:
    """What the student trains on for one generated image.

    Args:
        teacher: the teacher's label, (H, W).
        refined: what the refiner made of it, on the same device and of the same size.
        options: None: the published ones, where every pixel counts.

    Returns:
        Classes ascending. `weights` is None where every pixel counts fully; otherwise a pixel
        that is dropped has weight 0, and a class without any pixel of positive weight is left
        out. K = 0 when nothing is left.
    """
    options = options or PseudoLabelOptions()
    labels, masks = refined.labels, refined.masks
    if options.uncovered == "teacher":
        labels, masks = _with_teacher(teacher, refined)
    weights = _weights(teacher, refined, options)
    if weights is None:
        return Targets(labels, masks, void=options.void)
    counts = (masks & (weights > 0)).flatten(1).any(1)
    return Targets(labels[counts], masks[counts], weights, options.void)


def _with_teacher(teacher: PseudoLabel, refined: RefinedLabel) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and masks with uncovered pixels in the mask of the teacher's class there."""
    rest = masks_from_label(teacher.classes.masked_fill(refined.covered, NO_CLASS), NO_CLASS)
    both = torch.cat([refined.labels, rest.labels])
    labels, place = torch.unique(both, return_inverse=True)
    masks = refined.masks.new_zeros(len(labels), *refined.masks.shape[1:])
    # A class stands at most once in each of the two lists, so neither line meets a place twice.
    known = len(refined.labels)
    masks[place[:known]] = refined.masks
    masks[place[known:]] |= rest.masks
    return labels, masks


def _weights(
    teacher: PseudoLabel, refined: RefinedLabel, options: PseudoLabelOptions
) -> torch.Tensor | None:
    """float32 (H, W), how much each pixel counts; None: all of them fully."""
    by_confidence = options.weight in ("confidence", "both")
    by_agreement = options.weight in ("agreement", "both")
    drops = options.uncovered == "ignore" or options.min_confidence > 0 or options.min_agreement > 0
    if not (by_confidence or by_agreement or drops):
        return None
    covered = refined.covered
    weights = torch.ones_like(teacher.confidence)
    if by_confidence:
        weights = weights * teacher.confidence
    if by_agreement:
        weights = torch.where(covered, weights * refined.agreement, weights)
    dropped = teacher.confidence < options.min_confidence
    dropped |= covered & (refined.agreement < options.min_agreement)
    if options.uncovered == "ignore":
        dropped |= ~covered
    return weights.masked_fill(dropped, 0.0)
