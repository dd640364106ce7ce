"""Segment Anything as refiner: point prompts in the components of the teacher's label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from clouds.d2 import CfgNode
from clouds.data.structures import union_of_masks
from clouds.self_training.refiners.base import REFINER_REGISTRY, PseudoLabel, RefinedLabel, Refiner
from clouds.self_training.refiners.sam.backends import build_point_sam
from clouds.self_training.refiners.sam.frame import Points
from clouds.self_training.refiners.sam.predictor import Embed, PredictMasks
from clouds.self_training.refiners.sam.prompts import (
    Components,
    PointOptions,
    find_components,
    sample_points,
)


@dataclass(frozen=True)
class SamOptions:
    """Options of `SamRefiner`.

    Attributes:
        size_threshold: components of at most so many pixels get no mask.
        points: which point prompts a component gets.
        remove_overlap, overlap: see `merge_masks_by_class`.
    """

    size_threshold: int = 5000
    points: PointOptions = field(default_factory=PointOptions)
    remove_overlap: bool = True
    overlap: str = "classes"

    @classmethod
    def from_config(cls, cfg: CfgNode) -> SamOptions:
        """From MODEL.CLOUDS.SAM."""
        node = cfg.MODEL.CLOUDS.SAM
        return cls(
            size_threshold=node.SIZE_THRESHOLD,
            points=PointOptions.from_config(cfg),
            remove_overlap=node.RM_INTERSECTION,
            overlap=node.OVERLAP,
        )


class SamRefiner:
    """CLOUDS' refiner (paper section 3): for each component points, SAM's best mask for them.

    The masks of a class are merged; pixels in masks of different classes are in none of them.
    Components up to a size threshold get no mask. An image without a larger one keeps the teacher's
    label.

    Args:
        embed: clean images to embeddings.
        predict_masks: embeddings and points to masks.
        options: see there.
    """

    needs_scores = False

    def __init__(self, embed: Embed, predict_masks: PredictMasks, options: SamOptions) -> None:
        self.embed = embed
        self.predict_masks = predict_masks
        self.options = options

    def fill_cache(self, images: Sequence[Tensor]) -> None:
        """Compute what depends on the images alone, uint8 (3, H, W) RGB, and is not cached."""
        self.embed(images)

    @torch.no_grad()
    def refine(
        self, images: Sequence[Tensor], labels: Sequence[PseudoLabel], seeds: Sequence[int]
    ) -> list[RefinedLabel]:
        """See `Refiner`. `RefinedLabel.points` are the point prompts."""
        components = [
            find_components(label.classes.cpu().numpy(), self.options.size_threshold)
            for label in labels
        ]
        prompted = [i for i, found in enumerate(components) if len(found)]
        if not prompted:
            return [RefinedLabel.from_teacher(label) for label in labels]
        points = [
            sample_points(components[i], self.options.points, np.random.default_rng(seeds[i]))
            for i in prompted
        ]
        sizes = [(int(h), int(w)) for h, w in (labels[i].classes.shape for i in prompted)]
        predicted = self.predict_masks(self.embed([images[i] for i in prompted]), points, sizes)
        refined = {
            i: self._merge(labels[i], components[i], masks, own)
            for i, (masks, _), own in zip(prompted, predicted, points, strict=True)
        }
        return [refined.get(i) or RefinedLabel.from_teacher(x) for i, x in enumerate(labels)]

    def _merge(
        self, label: PseudoLabel, components: Components, masks: Tensor, points: Points
    ) -> RefinedLabel:
        device = label.classes.device
        merged = merge_masks_by_class(
            masks.to(device),
            torch.from_numpy(components.classes).to(device),
            label.classes,
            self.options.remove_overlap,
            self.options.overlap,
        )
        return replace(merged, points=torch.from_numpy(points).to(device))


def merge_masks_by_class(
    masks: Tensor,
    classes: Tensor,
    teacher: Tensor,
    remove_overlap: bool = True,
    overlap: str = "classes",
) -> RefinedLabel:
    """Remove overlaps, then merge the masks of each class.

    Args:
        masks: bool (M, H, W), M >= 1; not modified.
        classes: int64 (M,), train ids, ascending.
        teacher: uint8 (H, W), the teacher's classes, for the agreement with them.
        remove_overlap: whether pixels in several masks are removed from all of them.
        overlap: which pixels these are: in masks of different 'classes', or in any two masks
            ('published', where a class without a pixel left also stays, with an empty mask).

    Returns:
        Without points. The agreement is that of each component's mask after overlap removal.
    """
    labels, counts = torch.unique_consecutive(classes, return_counts=True)
    per_class = counts.tolist()
    if remove_overlap:
        covers = masks if overlap == "published" else _union_per_class(masks, per_class)
        masks = masks & ~_covered_twice(covers)
    unions = _union_per_class(masks, per_class)
    areas = torch.stack([mask.count_nonzero() for mask in masks])
    agreement = _agreement(masks, areas, classes, teacher)
    if overlap != "published":
        kept = torch.stack([own.any() for own in torch.split(areas, per_class)])
        labels, unions = labels[kept], unions[kept]
    return RefinedLabel(labels, unions, agreement)


# Masks are few and large: the loops below read each of them a few times at memory speed, which on a
# CPU is several times faster than reducing (M, H, W), and needs no other array of that size.


def _union_per_class(masks: Tensor, per_class: list[int]) -> Tensor:
    """(K, H, W), the union of each run of masks."""
    return torch.stack([union_of_masks(run) for run in torch.split(masks, per_class)])


def _covered_twice(masks: Tensor) -> Tensor:
    """bool (H, W), the pixels in more than one mask."""
    once = torch.zeros_like(masks[0])
    twice = torch.zeros_like(once)
    for mask in masks:
        twice |= once & mask
        once |= mask
    return twice


def _agreement(masks: Tensor, areas: Tensor, classes: Tensor, teacher: Tensor) -> Tensor:
    """float32 (H, W): share of a mask's pixels with the teacher's class; largest per pixel."""
    agreement = torch.zeros(teacher.shape, device=teacher.device)
    for mask, area, train_id in zip(masks, areas, classes, strict=True):
        same = torch.count_nonzero(mask & (teacher == train_id))
        share = (same / area.clamp(min=1)).to(torch.float32)
        agreement.masked_fill_(mask & (agreement < share), share)
    return agreement


def sam(cfg: CfgNode, device: torch.device) -> Refiner:
    """MODEL.CLOUDS.REFINER sam."""
    model = build_point_sam(cfg, device)
    return SamRefiner(model.embed, model.predict_masks, SamOptions.from_config(cfg))


REFINER_REGISTRY.register(sam)
