"""Confusion matrix of labeled against predicted classes, and scores computed from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clouds import comm
from clouds.data.label_space import IGNORE

_CHUNK_SIZE = 1 << 22
"""Pixels counted at a time, which bounds the memory of the cell indices."""


class ConfusionMatrix:
    """Counts pixels by label and prediction, over any number of images.

    Pixels whose label is `ignore` are not counted. The intersection over union of a class is
    TP / (TP + FP + FN) over all images together, as in the Cityscapes benchmark.

    Args:
        num_classes: classes are 0..num_classes - 1.
        ignore: label of pixels that are not counted; outside 0..num_classes - 1.

    Attributes:
        counts: (num_classes, num_classes) int64; row: label, column: prediction. On the device of
            the latest predictions.
    """

    def __init__(self, num_classes: int, ignore: int = IGNORE) -> None:
        assert not 0 <= ignore < num_classes, f"the ignore value {ignore} is one of the classes"
        self.num_classes = num_classes
        self.ignore = ignore
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count one image, or a batch of them.

        Args:
            prediction: (H, W) or (N, H, W) integer classes, on any device.
            label: the same shape, integer classes or `ignore`, on any device.

        Raises:
            ValueError: the shapes differ, the type is not an integer type, or a value is neither
                a class nor (in the label) `ignore`. The counts are unchanged.
        """
        if prediction.shape != label.shape:
            raise ValueError(
                f"prediction and label differ in shape: {tuple(prediction.shape)} and "
                f"{tuple(label.shape)}; resize the prediction to the label's size first"
            )
        label = label.to(prediction.device)
        self._check_values("prediction", prediction, prediction)
        # ignored pixels are checked as class 0, which is always valid
        self._check_values("label", label, label.masked_fill(label == self.ignore, 0))
        self.counts = self.counts.to(prediction.device)
        predicted, labeled = prediction.flatten(), label.flatten()
        for start in range(0, predicted.numel(), _CHUNK_SIZE):
            chunk = slice(start, start + _CHUNK_SIZE)
            self.counts += self._count(predicted[chunk], labeled[chunk])

    def add(self, other: ConfusionMatrix) -> None:
        """Add the counts of another matrix of the same classes."""
        self.counts = self.counts.to(other.counts.device) + other.counts

    def _check_values(self, name: str, values: Tensor, counted: Tensor) -> None:
        if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
            raise ValueError(f"{name} must have an integer type, not {values.dtype}")
        if not counted.numel():
            return
        low, high = (int(v) for v in counted.aminmax())
        if low < 0 or high >= self.num_classes:
            allowed = f"0..{self.num_classes - 1}"
            if name == "label":
                allowed += f" or {self.ignore} (ignored)"
            raise ValueError(f"{name} has values from {low} to {high}; allowed: {allowed}")

    def _count(self, predicted: Tensor, labeled: Tensor) -> Tensor:
        # ignored pixels are counted in an additional row, which is dropped: faster than a mask
        rows = labeled.to(torch.int32)
        rows = rows.masked_fill_(rows == self.ignore, self.num_classes)
        cells = rows.mul_(self.num_classes).add_(predicted)
        counts = torch.bincount(cells, minlength=(self.num_classes + 1) * self.num_classes)
        return counts.view(self.num_classes + 1, self.num_classes)[: self.num_classes]

    def all_reduce(self) -> ConfusionMatrix:
        """The sum over all processes, as a new matrix; a collective operation."""
        total = ConfusionMatrix(self.num_classes, self.ignore)
        # as objects: a rank without images has its counts on another device than the others
        total.counts = torch.stack(comm.all_gather(self.counts.cpu())).sum(0)
        return total

    def _ratio(
        self, classes: Sequence[int] | None, numerator: Tensor, denominator: Tensor
    ) -> Tensor:
        ratio = numerator.double() / denominator.double()  # 0 / 0 is nan
        return ratio if classes is None else ratio[list(classes)]

    def iou(self, classes: Sequence[int] | None = None) -> Tensor:
        """Intersection over union per class.

        Args:
            classes: the classes to score, in this order; None: all. A pixel that is predicted as a
                class outside of them is a false negative of its labeled class.

        Returns:
            (len(classes),) float64 in 0..1 on the CPU; nan for a class that is neither labeled nor
            predicted anywhere.
        """
        counts = self.counts.cpu()
        true_positives = counts.diagonal()
        unions = counts.sum(0) + counts.sum(1) - true_positives
        return self._ratio(classes, true_positives, unions)

    def mean_iou(self, classes: Sequence[int] | None = None) -> float:
        """Mean of `iou(classes)` without nan; nan if all are nan."""
        return float(self.iou(classes).nanmean())

    def recall(self, classes: Sequence[int] | None = None) -> Tensor:
        """Fraction of the labeled pixels of each class that is predicted correctly, as `iou`.

        nan for a class that is not labeled anywhere.
        """
        counts = self.counts.cpu()
        return self._ratio(classes, counts.diagonal(), counts.sum(1))

    def mean_accuracy(self, classes: Sequence[int] | None = None) -> float:
        """Mean of `recall(classes)` without nan; nan if all are nan."""
        return float(self.recall(classes).nanmean())

    def pixel_accuracy(self) -> float:
        """Fraction of all counted pixels that is predicted correctly; nan if there are none."""
        counts = self.counts.cpu()
        pixels = int(counts.sum())
        return int(counts.trace()) / pixels if pixels else float("nan")
