"""Metrics beyond mIoU, computed as images are evaluated, in memory that does not grow."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clouds import comm
from clouds.data.label_space import LabelSpace
from clouds.evaluation.curves import LEVELS, ScoreCounts, count_levels

ECE_BINS = 15
BOUNDARY_RATIO = 0.02
"""Width of the boundary of a mask as a fraction of the image's diagonal."""

UInt8Array = npt.NDArray[np.uint8]


class Metric(ABC):
    """Sums over images, from which scores are computed.

    Attributes:
        needs_confidence: whether `update` needs the confidence.
        sums: what is summed over images and processes, on the CPU.
    """

    needs_confidence = False

    def __init__(self, label_space: LabelSpace) -> None:
        self.label_space = label_space
        self.sums: list[Tensor] = []

    @abstractmethod
    def update(self, prediction: Tensor, label: Tensor, confidence: Tensor | None) -> None:
        """Add an image.

        Args:
            prediction: (H, W) integer classes.
            label: (H, W) integer classes or `ignore`, on the same device.
            confidence: float (H, W) in [0, 1], of the prediction.
        """

    @abstractmethod
    def scores(self, classes: Sequence[int]) -> dict[str, float]:
        """Scores by name, in percent; nan: not defined.

        Args:
            classes: train ids in the label set of the dataset.
        """

    def all_reduce(self) -> Metric:
        """A copy with the sums over all processes; a collective operation."""
        total = copy.copy(self)
        ranks = comm.all_gather(self.sums)
        total.sums = [torch.stack(parts).sum(0) for parts in zip(*ranks, strict=True)]
        return total


class ConfidenceMetric(Metric):
    """How well the confidence of a pixel's class tells whether the class is correct.

    Scores: `ECE`, the expected calibration error over 15 bins of equal width [a, b), the last one
    closed (Guo et al., 2017); with correct pixels as positives, `AUROC`, `FPR95` (false positive
    rate at a true positive rate of 95 %) and `AUPR-success`; with wrong pixels as positives, by low
    confidence, `AUPR-error`. AUPR is average precision. ECE is exact; the others are of confidences
    rounded to 16 bits.
    """

    needs_confidence = True

    def __init__(self, label_space: LabelSpace) -> None:
        super().__init__(label_space)
        levels = torch.zeros(2, LEVELS, dtype=torch.int64)  # wrong, correct
        bins = torch.zeros(2, ECE_BINS, dtype=torch.int64)
        self.sums = [levels, bins, torch.zeros(ECE_BINS, dtype=torch.float64)]

    def update(self, prediction: Tensor, label: Tensor, confidence: Tensor | None) -> None:
        assert confidence is not None, "needs_confidence"
        counted = label != self.label_space.ignore
        correct = (prediction == label)[counted]
        levels = count_levels(confidence[counted], correct)
        values = confidence[counted].double().clamp(0, 1)
        bins = (values * ECE_BINS).long().clamp(max=ECE_BINS - 1)
        cells = correct.long() * ECE_BINS + bins
        found = (
            levels,
            torch.bincount(cells, minlength=2 * ECE_BINS).view(2, ECE_BINS),
            torch.bincount(bins, values, minlength=ECE_BINS),
        )
        for total, part in zip(self.sums, found, strict=True):
            total += part.cpu()

    def scores(self, classes: Sequence[int]) -> dict[str, float]:
        levels, bins, confidences = self.sums
        gaps = (bins[1].double() - confidences).abs().sum()
        pixels = int(bins.sum())
        curves = ScoreCounts(positives=levels[1].numpy(), negatives=levels[0].numpy())
        return {
            "ECE": 100 * float(gaps) / pixels if pixels else math.nan,
            "AUROC": 100 * curves.auroc(),
            "FPR95": 100 * curves.false_positive_rate(),
            "AUPR-success": 100 * curves.average_precision(),
            "AUPR-error": 100 * curves.reversed().average_precision(),
        }


class BoundaryMetric(Metric):
    """Boundary IoU (Cheng et al., 2021) per class, intersections and unions over all images.

    The boundary of a mask is the mask without its erosion, d times by a 3x3 kernel, where d is 2 %
    of the image's diagonal in pixels, rounded, at least 1; pixels outside of the image are not in
    the mask. Pixels whose label is ignored are in no mask.
    """

    def __init__(self, label_space: LabelSpace) -> None:
        super().__init__(label_space)
        shape = (3, label_space.num_classes)  # both boundaries, that of the prediction, the label's
        self.sums = [torch.zeros(shape, dtype=torch.int64)]

    def update(self, prediction: Tensor, label: Tensor, confidence: Tensor | None) -> None:
        truth: UInt8Array = label.cpu().numpy().astype(np.uint8)
        ignored = label.cpu().numpy() == self.label_space.ignore
        predicted: UInt8Array = prediction.cpu().numpy().astype(np.uint8)  # a copy
        predicted[ignored] = self.label_space.ignore
        ignore = self.label_space.ignore
        edges = [boundary_of(classes, ignore) & ~ignored for classes in (predicted, truth)]
        both = edges[0] & edges[1] & (predicted == truth)
        parts = (truth[both], predicted[edges[0]], truth[edges[1]])
        num_classes = self.label_space.num_classes
        counts = [np.bincount(part, minlength=num_classes)[:num_classes] for part in parts]
        self.sums[0] += torch.from_numpy(np.stack(counts))

    def scores(self, classes: Sequence[int]) -> dict[str, float]:
        both, predicted, labeled = self.sums[0].double()
        iou = 100 * both / (predicted + labeled - both)  # 0 / 0 is nan
        of_dataset = iou[list(classes)]
        names = self.label_space.names
        return {
            "boundary-mIoU": float(of_dataset.nanmean()),
            **{f"boundary-IoU-{names[c]}": float(iou[c]) for c in classes},
        }


def boundary_of(classes: UInt8Array, ignore: int) -> npt.NDArray[np.bool_]:
    """Pixels on the boundary of the mask of their class, see `BoundaryMetric`.

    Args:
        classes: (H, W) classes or `ignore`.
        ignore: value that is no class.
    """
    height, width = classes.shape
    distance = max(1, round(BOUNDARY_RATIO * math.hypot(height, width)))
    kernel = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    # A pixel is not in the eroded mask if another class, or the outside, is within the distance:
    # if minimum and maximum differ. One more pixel around the image stands for all of the outside.
    padded = cv2.copyMakeBorder(classes, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=(ignore,))
    low, high = cv2.erode(padded, kernel), cv2.dilate(padded, kernel)
    inside = np.s_[1:-1, 1:-1]
    return np.asarray(low[inside] != high[inside])


METRICS: dict[str, Callable[[LabelSpace], Metric]] = {
    "confidence": ConfidenceMetric,
    "boundary": BoundaryMetric,
}
"""Values of TEST.METRICS."""


def is_summary(name: str) -> bool:
    """Whether a score is shown in tables and loggers: not that of one class."""
    return "-IoU-" not in f"-{name}"
