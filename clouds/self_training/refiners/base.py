"""What a refiner is, and how a config chooses one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from clouds.d2 import CfgNode, Registry
from clouds.data.structures import masks_from_label

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


REFINER_REGISTRY = Registry("REFINER")
REFINER_REGISTRY.__doc__ = """
Refiners: functions or classes, called with (cfg, device), that return a `Refiner`. The name they
are registered by, their own, is what MODEL.CLOUDS.REFINER says.
"""


class Refiner(Protocol):
    """Turns the teacher's labels of clean generated images into better ones.

    A refiner is no part of the model: it is no module, trains nothing and is not saved. Networks
    in it are frozen and in evaluation mode.
    """

    def refine(
        self,
        images: Sequence[torch.Tensor],
        labels: Sequence[PseudoLabel],
        seeds: Sequence[int],
    ) -> list[RefinedLabel]:
        """One refined label per image.

        Args:
            images: uint8 (3, H, W) RGB, clean; sizes may differ.
            labels: the teacher's, each (H, W) as its image.
            seeds: one per image, at least 0; whatever is drawn for an image is drawn from it.

        Returns:
            Tensors on the device of the labels.
        """
        ...


def build_refiner(cfg: CfgNode, device: torch.device | str) -> Refiner:
    """The refiner that MODEL.CLOUDS.REFINER names.

    'sam' with MODEL.CLOUDS.SAM.ENABLED False, the published way to do without, is 'none'.

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
