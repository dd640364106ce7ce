"""No refinement: the teacher's label as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clouds.d2 import CfgNode
from clouds.data.targets import masks_from_label
from clouds.self_training.pseudo_label import NO_CLASS, PseudoLabel, RefinedLabel
from clouds.self_training.refiners.registry import REFINER_REGISTRY, Refiner


def as_it_is(label: PseudoLabel) -> RefinedLabel:
    """All the teacher's classes, large or small; it agrees with itself wherever it names one."""
    split = masks_from_label(label.classes, NO_CLASS)
    agreement = (label.classes != NO_CLASS).to(torch.float32)
    return RefinedLabel(split.labels, split.masks, agreement)


class NoRefiner:
    """Hands the teacher's labels on."""

    def refine(
        self,
        images: Sequence[torch.Tensor],
        labels: Sequence[PseudoLabel],
        seeds: Sequence[int],
    ) -> list[RefinedLabel]:
        return [as_it_is(label) for label in labels]


def none(cfg: CfgNode, device: torch.device) -> Refiner:
    """MODEL.CLOUDS.REFINER none."""
    return NoRefiner()


REFINER_REGISTRY.register(none)
