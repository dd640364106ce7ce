"""Classes of regions by CLIP: the teacher's votes, and CLIP's zero-shot classes of a crop.

The teacher labels pixels, and is often wrong about a whole object; CLIP was trained to name what a
whole image shows. Each region of a refined label is cut out, and both decide its class together.
(Zero-shot classes of crops around masks: Ding et al., Decoupling Zero-Shot Semantic Segmentation,
2022; Liang et al., OVSeg, 2023.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clouds.d2 import CfgNode
from clouds.data.label_space import IGNORE
from clouds.self_training.refiners.base import PseudoLabel, RefinedLabel, Refiner
from clouds.self_training.refiners.sam.prompts import Components, find_components
from clouds.self_training.refiners.sam.region_filter import SMALLEST, region_means

CONTEXT = 1.2
"""Side of a crop, in units of the geometric mean of the sides of the region's box."""
SIDES = (0.15, 0.6)
"""Smallest and largest side of a crop, in units of the image's shorter side."""
ELONGATED = 2.0
"""Regions whose box is longer by more are cropped around one of their pixels."""

Box = tuple[int, int, int]
"""Top, left and side of a square, pixels."""

Classify = Callable[[Tensor, Sequence[Box]], Tensor]
"""Log-probabilities float32 (M, C) of the classes of M >= 1 squares of an image, uint8 (3, H, W)
RGB."""


def crop_box(components: Components, index: int) -> Box:
    """The square around a component, within the image.

    It lies around the center of the component's box. A long component is cut: the square lies
    around the pixel that is nearest to the median of its rows and columns.
    """
    shape = components.ids.shape
    top, left, bottom, right = components.boxes[index].tolist()
    height, width = bottom - top, right - left
    low, high = (round(share * min(shape)) for share in SIDES)
    side = int(np.clip(round(CONTEXT * (height * width) ** 0.5), max(low, 1), max(high, 1)))
    row, column = (top + bottom) / 2, (left + right) / 2
    if max(height, width) > ELONGATED * min(height, width):
        pixels = np.argwhere(components.crop(index))
        distances = np.abs(pixels - np.median(pixels, 0)).sum(1)
        nearest = pixels[distances.argmin()]
        row, column = top + nearest[0] + 0.5, left + nearest[1] + 0.5
    starts = (
        min(max(round(center - side / 2), 0), size - side)
        for center, size in zip((row, column), shape, strict=True)
    )
    return (*starts, side)


@dataclass(frozen=True)
class CropClassOptions:
    """Options of `CropClasses`.

    Attributes:
        weight: of CLIP's log-probabilities, beside the teacher's with weight 1.
        min_area: regions with fewer pixels keep their class.
        fill: pixels in no mask are regions of the teacher's class, too.
    """

    weight: float = 0.5
    min_area: int = 60
    fill: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> CropClassOptions:
        """From MODEL.CLOUDS.CROP_CLASSES and MODEL.CLOUDS.UNCOVERED."""
        node = cfg.MODEL.CLOUDS.CROP_CLASSES
        return cls(node.WEIGHT, node.MIN_AREA, cfg.MODEL.CLOUDS.UNCOVERED == "teacher")


class CropClasses:
    """Gives the regions of another refiner's labels the class that teacher and CLIP agree on.

    A region is a connected part of a segment of the refined label. Its class is the one with the
    largest sum of the log of the teacher's mean probability and `weight` times CLIP's
    log-probability. Its agreement is 0 where CLIP alone would choose another class, so that
    MODEL.CLOUDS.PSEUDO_LABEL.MIN_AGREEMENT keeps the regions for which both are of one mind.

    Args:
        refiner: whose labels they are.
        classify: CLIP's classes of crops.
        options: see there.
    """

    needs_scores = True

    def __init__(self, refiner: Refiner, classify: Classify, options: CropClassOptions) -> None:
        self.refiner = refiner
        self.classify = classify
        self.options = options

    @torch.no_grad()
    def refine(
        self, images: Sequence[Tensor], labels: Sequence[PseudoLabel], seeds: Sequence[int]
    ) -> list[RefinedLabel]:
        """See `Refiner`."""
        refined = self.refiner.refine(images, labels, seeds)
        return [self._refine(*each) for each in zip(images, labels, refined, strict=True)]

    def _refine(self, image: Tensor, label: PseudoLabel, refined: RefinedLabel) -> RefinedLabel:
        class_map = refined.class_map()
        if self.options.fill:
            class_map = torch.where(refined.covered, class_map, label.classes)
        numbers = segment_numbers(class_map, refined.segments)
        components = find_components(numbers, self.options.min_area - 1)
        if not len(components):
            return refined
        ids = torch.from_numpy(components.ids.astype(np.int64)).to(label.classes.device)
        inside, region = ids >= 0, ids.clamp(min=0)
        classes, agrees = self._classes(image, label, components, ids)
        made = torch.where(inside, classes[region].to(torch.uint8), class_map)
        same = (made == label.classes).float()[None]
        shares = region_means(same, ids, len(components))[:, 0] * agrees
        agreement = torch.where(inside, shares[region], refined.agreement)
        agreement = agreement.masked_fill(made == IGNORE, 0.0)
        targets = RefinedLabel.from_teacher(PseudoLabel(made, label.confidence))
        return replace(targets, agreement=agreement, points=refined.points)

    def _classes(
        self, image: Tensor, label: PseudoLabel, components: Components, ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(M,), train ids int64, and whether CLIP alone would choose the same, bool."""
        assert label.scores is not None, "the labels were made without their scores"
        boxes = [crop_box(components, index) for index in range(len(components))]
        clip = self.classify(image, boxes).to(ids.device)
        teacher = region_probabilities(label.scores.float(), ids, len(components)).log()
        classes = (teacher + self.options.weight * clip).argmax(1)
        return classes, clip.argmax(1) == classes


def segment_numbers(class_map: Tensor, segments: Tensor | None) -> npt.NDArray[np.int32]:
    """(H, W): the class of each pixel, 255 for none; above 255 the segment, where there is one.

    Args:
        class_map: uint8 (H, W), train ids, 255 for none.
        segments: see `RefinedLabel`.
    """
    numbers = class_map.int()
    if segments is not None:
        numbers = torch.where(segments >= 0, segments.int() + IGNORE + 1, numbers)
    found: npt.NDArray[np.int32] = numbers.cpu().numpy()
    return found


def region_probabilities(scores: Tensor, ids: Tensor, count: int) -> Tensor:
    """The teacher's mean probability of each class in each region, float32 (count, C).

    Args:
        scores: float32 (C, H, W), the teacher's semantic map. Probabilities are its shares in the
            sum over classes, or the scores themselves where that sum is below 1.
        ids: int64 (H, W), region of each pixel, -1: none; each of the `count` regions has pixels.

    Returns:
        At least SMALLEST.
    """
    probabilities = scores / scores.sum(0).clamp(min=1)
    return region_means(probabilities, ids, count).clamp(min=SMALLEST)
