"""Pseudo-labels of generated images: teacher, refiner, filters, targets (paper section 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clouds.d2 import CfgNode
from clouds.data.datasets import generated
from clouds.data.structures import Targets, masks_from_label
from clouds.self_training.ema import EMATeacher
from clouds.self_training.refiners import Refiner, build_refiner
from clouds.self_training.refiners.base import NO_CLASS, PseudoLabel, RefinedLabel


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


class SelfTraining:
    """What joint training has beside the model; no `nn.Module`, see `EMATeacher`.

    Args:
        teacher: of the model's head.
        make_refiner: builds the refiner on a device; called in `prepare`, or for the first label.
        options: what becomes of uncovered and of doubtful pixels.

    Attributes:
        teacher: see there.
    """

    def __init__(
        self,
        teacher: EMATeacher,
        make_refiner: Callable[[torch.device], Refiner],
        options: PseudoLabelOptions,
    ) -> None:
        self.teacher = teacher
        self._make_refiner = make_refiner
        self._refiner: Refiner | None = None
        self._options = options

    @classmethod
    def from_config(cls, cfg: CfgNode, head: nn.Module) -> SelfTraining | None:
        """None when no dataset of DATASETS.TRAIN is a generated one."""
        if not generated(cfg.DATASETS.TRAIN):
            return None
        return cls(
            EMATeacher.from_config(cfg, head),
            lambda device: build_refiner(cfg, device),
            PseudoLabelOptions.from_config(cfg),
        )

    def prepare(self, device: torch.device) -> None:
        """Build the refiner now, so that weights which are not there are told before training."""
        if self._refiner is None:
            self._refiner = self._make_refiner(device)

    @torch.no_grad()
    def refine(
        self, images: Sequence[Tensor], labels: Sequence[PseudoLabel], seeds: Sequence[int]
    ) -> list[RefinedLabel]:
        """The refiner's labels.

        Args:
            images: clean pictures, uint8 (3, H, W) RGB.
            labels: the teacher's labels of them, on the device to work on.
            seeds: one per picture; random points are drawn from it.
        """
        self.prepare(labels[0].classes.device)
        assert self._refiner is not None
        return self._refiner.refine(images, labels, seeds)

    def targets(
        self, images: Sequence[Tensor], labels: Sequence[PseudoLabel], seeds: Sequence[int]
    ) -> list[Targets]:
        """What the student learns of each picture; arguments as of `refine`."""
        refined = self.refine(images, labels, seeds)
        return [
            targets(label, better, self._options)
            for label, better in zip(labels, refined, strict=True)
        ]
