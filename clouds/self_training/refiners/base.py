"""What a refiner of pseudo-labels is, and how a config selects one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from clouds.d2 import CfgNode, Registry
from clouds.data.label_space import IGNORE
from clouds.data.structures import class_map, masks_from_label, union_of_masks


@dataclass(frozen=True)
class TeacherPrediction:
    """The teacher's prediction for one image.

    Attributes:
        scores: semantic map, float32 (C, H, W).
        query_confidence: (), mean over the queries of the largest class probability, no object
            among the classes.
    """

    scores: Tensor
    query_confidence: Tensor


@dataclass(frozen=True)
class PseudoLabel:
    """The teacher's label of one image.

    Attributes:
        classes: uint8 (H, W), train ids; 255 where there is none.
        confidence: float32 (H, W) in [0, 1].
        scores: float32 (C, H, W), the semantic map that both come from; None unless the refiner
            or a filter asks for it (`Refiner.needs_scores`, `Filter.needs_scores`).
        query_confidence: see `TeacherPrediction`; None: not known.
    """

    classes: Tensor
    confidence: Tensor
    scores: Tensor | None = None
    query_confidence: Tensor | None = None


@dataclass(frozen=True)
class RefinedLabel:
    """A refiner's label of one image.

    Attributes:
        labels: int64 (K,), train ids, ascending, each once.
        masks: bool (K, H, W), the pixels of each class. Masks overlap, or are empty, only where an
            option of the refiner keeps such masks.
        agreement: float32 (H, W) in [0, 1]: of the pixels in this pixel's refined segment, the
            share for which the teacher's class is the segment's; 0 outside of all masks. Where
            several segments overlap, the largest share.
        points: float32 (M, P, 2), point prompts (x, y) of M segments in pixels, for
            visualization; None from a refiner without point prompts.
        segments: int64 (H, W), number of the segment that labels each pixel, from 0; -1 outside
            of all masks. Neighboring segments may have the same class. None: the segments are the
            connected components of the classes.
    """

    labels: Tensor
    masks: Tensor
    agreement: Tensor
    points: Tensor | None = None
    segments: Tensor | None = None

    @classmethod
    def from_teacher(cls, label: PseudoLabel) -> RefinedLabel:
        """The teacher's classes unchanged, with an agreement of 1 wherever there is one."""
        targets = masks_from_label(label.classes, IGNORE)
        agreement = (label.classes != IGNORE).to(torch.float32)
        return cls(targets.labels, targets.masks, agreement)

    @property
    def covered(self) -> Tensor:
        """bool (H, W), the union of all masks."""
        return union_of_masks(self.masks)

    def class_map(self) -> Tensor:
        """uint8 (H, W) train ids, 255 outside of all masks; the larger id where masks overlap."""
        return class_map(self.labels, self.masks)


REFINER_REGISTRY = Registry("REFINER")
REFINER_REGISTRY.__doc__ = """
Refiners: functions or classes, called with (cfg, device), that return a `Refiner`. Their own name
is the value of MODEL.CLOUDS.REFINER that selects them.
"""


class Refiner(Protocol):
    """Refines the teacher's labels of clean generated images.

    A refiner is no part of the model: it is no module, does not train and is not saved. Networks
    in it are frozen and in evaluation mode.

    Attributes:
        needs_scores: whether `refine` reads `PseudoLabel.scores`, the teacher's full semantic map.
            It takes 4 * C bytes per pixel and image.
    """

    needs_scores: bool

    def refine(
        self, images: Sequence[Tensor], labels: Sequence[PseudoLabel], seeds: Sequence[int]
    ) -> list[RefinedLabel]:
        """One refined label per image.

        Args:
            images: clean images, uint8 (3, H, W) RGB; sizes may differ.
            labels: the teacher's, each (H, W) as its image.
            seeds: one per image, at least 0; all random numbers for an image are drawn from it.

        Returns:
            Tensors on the device of the labels.
        """
        ...


def build_refiner(cfg: CfgNode, device: torch.device | str) -> Refiner:
    """The refiner that MODEL.CLOUDS.REFINER names.

    'sam' with MODEL.CLOUDS.SAM.ENABLED False, the published way to disable it, is 'none'.

    Raises:
        ValueError: no refiner is registered by that name.
    """
    name = cfg.MODEL.CLOUDS.REFINER
    if name == "sam" and not cfg.MODEL.CLOUDS.SAM.ENABLED:
        name = "none"
    if name not in REFINER_REGISTRY:
        known = ", ".join(sorted(name for name, _ in REFINER_REGISTRY))
        raise ValueError(f"MODEL.CLOUDS.REFINER is {name!r}; registered are: {known}")
    refiner: Refiner = REFINER_REGISTRY.get(name)(cfg, torch.device(device))
    return refiner


class NoRefiner:
    """Returns the teacher's labels unchanged."""

    needs_scores = False

    def refine(
        self, images: Sequence[Tensor], labels: Sequence[PseudoLabel], seeds: Sequence[int]
    ) -> list[RefinedLabel]:
        """See `Refiner`."""
        return [RefinedLabel.from_teacher(label) for label in labels]


def none(cfg: CfgNode, device: torch.device) -> Refiner:
    """MODEL.CLOUDS.REFINER none."""
    return NoRefiner()


REFINER_REGISTRY.register(none)
