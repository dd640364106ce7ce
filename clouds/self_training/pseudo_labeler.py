"""Pseudo-labels of generated images: teacher, refiner, filters, targets (paper section 3.4)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from clouds.d2 import CfgNode
from clouds.data.datasets import generated
from clouds.data.label_space import IGNORE
from clouds.data.structures import Targets, masks_from_label
from clouds.self_training.ema import EMATeacher
from clouds.self_training.filters import Filter, build_filters
from clouds.self_training.filters.class_loss import ClassLosses
from clouds.self_training.refiners import Refiner, build_refiner
from clouds.self_training.refiners.base import (
    NoRefiner,
    PseudoLabel,
    RefinedLabel,
    TeacherPrediction,
)
from clouds.self_training.refiners.crop_classes import Classify, CropClasses, CropClassOptions
from clouds.self_training.sinkhorn import BalancedAssignment

MakeClassifier = Callable[[torch.device], Classify]
"""Builds a classifier of crops on a device."""


class PseudoLabeler:
    """Turns the teacher's predictions of clean generated images into targets for the student.

    It is no `nn.Module`: teacher and refiner are not in the model's state dict, optimizer or
    `train()`. The teacher's network is run by the model, which gives its prediction to this object.

    Args:
        teacher: the moving average of the model.
        make_refiner: builds the refiner on a device; called in `prepare`, or at the first use.
        options: how uncovered and uncertain pixels count.
        filters: change the targets, one after the other.
        assignment: gives pixels other classes than the best; None: the best.
        class_losses: losses on labelled images, which the model adds to; None: no filter needs
            them.
    """

    def __init__(
        self,
        teacher: EMATeacher,
        make_refiner: Callable[[torch.device], Refiner],
        options: PseudoLabelOptions,
        filters: Sequence[Filter] = (),
        assignment: BalancedAssignment | None = None,
        class_losses: ClassLosses | None = None,
    ) -> None:
        self.teacher = teacher
        self.class_losses = class_losses
        self._make_refiner = make_refiner
        self._refiner: Refiner | None = None
        self._options = options
        self._filters = tuple(filters)
        self._assignment = assignment

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        student: Mapping[str, nn.Module],
        make_classifier: MakeClassifier | None = None,
    ) -> PseudoLabeler | None:
        """None if no image needs pseudo-labels; for `student` see `EMATeacher`.

        Args:
            make_classifier: for MODEL.CLOUDS.CROP_CLASSES.

        None is returned if no dataset of DATASETS.TRAIN is generated, or by
        MODEL.CLOUDS.GENERATED_LABELS.
        """
        given = cfg.MODEL.CLOUDS.GENERATED_LABELS
        if not generated(cfg.DATASETS.TRAIN) or given == "given":
            return None
        node = cfg.MODEL.CLOUDS.PSEUDO_LABEL
        losses = None
        if node.MAX_CLASS_LOSS > 0:
            losses = ClassLosses(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
        assignment = None
        if node.ASSIGNMENT == "sinkhorn":
            assignment = BalancedAssignment(node.SINKHORN.ROUNDS, node.SINKHORN.TEMPERATURE)
        return cls(
            EMATeacher.from_config(cfg, student),
            functools.partial(configured_refiner, cfg, make_classifier),
            PseudoLabelOptions.from_config(cfg),
            build_filters(cfg, losses),
            assignment,
            losses,
        )

    def __call__(
        self,
        images: Sequence[Tensor],
        predictions: Iterable[TeacherPrediction],
        seeds: Sequence[int],
        given: Sequence[Targets] = (),
    ) -> list[Targets]:
        """Targets of generated images.

        Args:
            images: clean images, uint8 (3, H, W) RGB.
            predictions: the teacher's, of each.
            seeds: one per image; random points are drawn from it.
            given: targets of the labels that the images were generated for, which are filtered in
                place of the teacher's labels; empty: none.
        """
        labels = self.labels(predictions)
        if given:
            return [self._filtered(label, one) for label, one in zip(labels, given, strict=True)]
        refined = self.refine(images, labels, seeds)
        return [
            self._filtered(label, pseudo_targets(label, better, self._options))
            for label, better in zip(labels, refined, strict=True)
        ]

    def labels(self, predictions: Iterable[TeacherPrediction]) -> list[PseudoLabel]:
        """The teacher's labels, from its predictions."""
        labels = []
        for prediction in predictions:
            scores = prediction.scores
            needed = self.prepare(scores.device).needs_scores
            needed |= any(one.needs_scores for one in self._filters)
            label = label_from_scores(scores, keep_scores=needed)
            label = replace(label, query_confidence=prediction.query_confidence)
            labels.append(label if self._assignment is None else self._assignment(label, scores))
        return labels

    def _filtered(self, label: PseudoLabel, targets: Targets) -> Targets:
        for one in self._filters:
            targets = one(label, targets)
        if not self._filters or targets.weights is None:
            return targets
        return targets.without_empty_classes()

    @torch.no_grad()
    def refine(
        self, images: Sequence[Tensor], labels: Sequence[PseudoLabel], seeds: Sequence[int]
    ) -> list[RefinedLabel]:
        """The refiner's labels of clean images, from the teacher's; see `Refiner.refine`."""
        return self.prepare(labels[0].classes.device).refine(images, labels, seeds)

    def prepare(self, device: torch.device) -> Refiner:
        """The refiner, built at the first call; before training, so that errors come early."""
        if self._refiner is None:
            self._refiner = self._make_refiner(device)
        return self._refiner

    @property
    def teacher_parts(self) -> dict[str, nn.Module]:
        """The teacher's network; a copy of the student at the first use."""
        if not self.teacher.parts:
            self.teacher.reset()
        return self.teacher.parts


def configured_refiner(
    cfg: CfgNode, make_classifier: MakeClassifier | None, device: torch.device
) -> Refiner:
    """What refines the teacher's labels; nothing where the labels of generated images are given.

    Raises:
        ValueError: MODEL.CLOUDS.CROP_CLASSES is on, but there is no `make_classifier`.
    """
    if cfg.MODEL.CLOUDS.GENERATED_LABELS == "filtered":
        return NoRefiner()
    refiner = build_refiner(cfg, device)
    if cfg.MODEL.CLOUDS.CROP_CLASSES.WEIGHT <= 0:
        return refiner
    if make_classifier is None:
        raise ValueError(
            "MODEL.CLOUDS.CROP_CLASSES.WEIGHT is positive, but the model has no classifier of "
            "crops; set it to 0, or give `make_classifier`."
        )
    return CropClasses(refiner, make_classifier(device), CropClassOptions.from_config(cfg))


def label_from_scores(scores: Tensor, keep_scores: bool = False) -> PseudoLabel:
    """The class of the largest score of every pixel, and its confidence.

    Args:
        scores: (C, H, W), the semantic map: per class the sum over queries of class probability
            times mask probability, which may exceed 1 where queries overlap.
        keep_scores: keep them in the label.

    Returns:
        The confidence is the largest score's share in the sum of all scores, or the score itself
        where that sum is below 1, so that a pixel without a query has a low confidence.
    """
    best, classes = scores.max(0)
    confidence = confidence_of(best, scores).float()
    return PseudoLabel(classes.to(torch.uint8), confidence, scores if keep_scores else None)


def confidence_of(best: Tensor, scores: Tensor) -> Tensor:
    """Confidence (H, W) in [0, 1] of the largest scores (H, W) of `scores` (C, H, W).

    See `label_from_scores`.
    """
    return best / scores.sum(0).clamp(min=1)


@dataclass(frozen=True)
class PseudoLabelOptions:
    """How the pixels of a pseudo-label count.

    Attributes:
        uncovered: pixels that no refined mask covers are negatives of every mask ('negative', as
            published), are ignored ('ignore'), or get the teacher's class ('teacher').
        min_confidence: pixels with a lower confidence of the teacher are ignored; 0: none.
        min_agreement: covered pixels with a lower agreement are ignored; 0: none.
        weight: weight of the other pixels: 'none' (1), 'confidence', 'agreement' (1 where a pixel
            is uncovered), or 'both' (the product).
        no_object_weight: see `Targets`; 1: as published.
    """

    uncovered: str = "negative"
    min_confidence: float = 0.0
    min_agreement: float = 0.0
    weight: str = "none"
    no_object_weight: float = 1.0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> PseudoLabelOptions:
        """From MODEL.CLOUDS.UNCOVERED and MODEL.CLOUDS.PSEUDO_LABEL."""
        node = cfg.MODEL.CLOUDS.PSEUDO_LABEL
        return cls(
            uncovered=cfg.MODEL.CLOUDS.UNCOVERED,
            min_confidence=node.MIN_CONFIDENCE,
            min_agreement=node.MIN_AGREEMENT,
            weight=node.WEIGHT,
            no_object_weight=node.NO_OBJECT_WEIGHT,
        )


def pseudo_targets(
    teacher: PseudoLabel, refined: RefinedLabel, options: PseudoLabelOptions | None = None
) -> Targets:
    """The student's targets of one generated image from teacher's and refiner's label, (H, W).

    Args:
        options: None: as published, where every pixel counts.

    Returns:
        Classes ascending. `weights` is None where every pixel has weight 1; otherwise ignored
        pixels have weight 0, and a class without a pixel of positive weight is left out. K = 0 if
        no class is left.
    """
    options = options or PseudoLabelOptions()
    labels, masks = refined.labels, refined.masks
    if options.uncovered == "teacher":
        labels, masks = _fill_with_teacher(teacher, refined)
    weights = _pixel_weights(teacher, refined, options)
    if weights is None:
        return Targets(labels, masks, no_object_weight=options.no_object_weight)
    targets = Targets(labels, masks, weights, options.no_object_weight)
    return targets.without_empty_classes()


def _fill_with_teacher(teacher: PseudoLabel, refined: RefinedLabel) -> tuple[Tensor, Tensor]:
    """Labels (K,) and masks (K, H, W), uncovered pixels in the mask of the teacher's class."""
    rest = masks_from_label(teacher.classes.masked_fill(refined.covered, IGNORE), IGNORE)
    both = torch.cat([refined.labels, rest.labels])
    labels, index = torch.unique(both, return_inverse=True)
    masks = refined.masks.new_zeros(len(labels), *refined.masks.shape[1:])
    # A class occurs at most once in each of the two lists, so no index occurs twice in a line.
    num_refined = len(refined.labels)
    masks[index[:num_refined]] = refined.masks
    masks[index[num_refined:]] |= rest.masks
    return labels, masks


def _pixel_weights(
    teacher: PseudoLabel, refined: RefinedLabel, options: PseudoLabelOptions
) -> Tensor | None:
    """float32 (H, W), the weight of each pixel; None: 1 everywhere."""
    by_confidence = options.weight in ("confidence", "both")
    by_agreement = options.weight in ("agreement", "both")
    thresholds = options.min_confidence > 0 or options.min_agreement > 0
    if not (by_confidence or by_agreement or thresholds or options.uncovered == "ignore"):
        return None
    covered = refined.covered
    weights = torch.ones_like(teacher.confidence)
    if by_confidence:
        weights = weights * teacher.confidence
    if by_agreement:
        weights = torch.where(covered, weights * refined.agreement, weights)
    ignored = teacher.confidence < options.min_confidence
    ignored |= covered & (refined.agreement < options.min_agreement)
    if options.uncovered == "ignore":
        ignored |= ~covered
    return weights.masked_fill(ignored, 0.0)
