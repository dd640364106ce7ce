"""Counts of labelled against predicted classes, and the scores that follow from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clouds import comm
from clouds.data.label_space import IGNORE

_PIXELS_AT_ONCE = 1 << 22


class ConfusionMatrix:
    """Counts pixels by label and prediction, over any number of images.

    Pixels whose label is `ignore` do not count. A class's intersection over union is
    TP / (TP + FP + FN) over all images together, as in the Cityscapes benchmark.

    Args:
        num_classes: classes are 0..num_classes - 1.
        ignore: label of pixels that do not count; not one of the classes.

    Attributes:
        counts: (num_classes, num_classes) int64; row: label, column: prediction. It lives on the
            device of the latest predictions.
    """

    def __init__(self, num_classes: int, ignore: int = IGNORE) -> None:
        assert not 0 <= ignore < num_classes, f"ignore value {ignore} is one of the classes"
        self.num_classes = num_classes
        self.ignore = ignore
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count one image, or a batch of them.

        Args:
            prediction: (H, W) or (N, H, W) integer classes, on any device.
            label: the same shape, integer classes or `ignore`, on any device.

        Raises:
            ValueError: the shapes differ, the type is not an integer one, or a value is neither a
                class nor (in the label) `ignore`. Nothing is counted then.
        """
        if prediction.shape != label.shape:
            raise ValueError(
                f"prediction and label differ in shape: {tuple(prediction.shape)} and "
                f"{tuple(label.shape)}; resize the prediction to the label's size first"
            )
        label = label.to(prediction.device)
        self._check_values("prediction", prediction, prediction)
        # ignored pixels stand in as class 0, which is always allowed
        self._check_values("label", label, label.masked_fill(label == self.ignore, 0))
        self.counts = self.counts.to(prediction.device)
        predicted, labelled = prediction.flatten(), label.flatten()
        for start in range(0, predicted.numel(), _PIXELS_AT_ONCE):
            piece = slice(start, start + _PIXELS_AT_ONCE)
            self.counts += self._count(predicted[piece], labelled[piece])

    def _check_values(self, what: str, values: Tensor, counted: Tensor) -> None:
        if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
            raise ValueError(f"{what} must hold integer classes, not {values.dtype}")
        if not counted.numel():
            return
        low, high = (int(v) for v in counted.aminmax())
        if low < 0 or high >= self.num_classes:
            allowed = f"0..{self.num_classes - 1}"
            if what == "label":
                allowed += f" or {self.ignore} (ignored)"
            raise ValueError(f"{what} holds values from {low} to {high}; allowed: {allowed}")

    def _count(self, predicted: Tensor, labelled: Tensor) -> Tensor:
        # ignored pixels go to one row more, which is cut off: cheaper than selecting pixels
        rows = labelled.to(torch.int32)
        rows = rows.masked_fill_(rows == self.ignore, self.num_classes)
        cells = rows.mul_(self.num_classes).add_(predicted)
        counts = torch.bincount(cells, minlength=(self.num_classes + 1) * self.num_classes)
        return counts.view(self.num_classes + 1, self.num_classes)[: self.num_classes]

    def all_reduce(self) -> ConfusionMatrix:
        """The sum over all processes, as a new matrix on every one of them.

        This matrix stays as it is. Every process has to call it.
        """
        total = ConfusionMatrix(self.num_classes, self.ignore)
        # as objects: a rank that saw no image has its counts on another device than the others
        total.counts = torch.stack(comm.all_gather(self.counts.cpu())).sum(0)
        return total

    def _per_class(self, classes: Sequence[int] | None, parts: Tensor, wholes: Tensor) -> Tensor:
        ratio = torch.where(wholes > 0, parts.double() / wholes.double(), torch.nan)
        return ratio if classes is None else ratio[list(classes)]

    def iou(self, classes: Sequence[int] | None = None) -> Tensor:
        """Intersection over union per class.

        Args:
            classes: which classes, in which order; None: all. Pixels predicted as a class that is
                left out still count against the class that they are labelled with.

        Returns:
            (len(classes),) float64 in 0..1 on the CPU; nan for a class that is neither labelled
            nor predicted anywhere.
        """
        counts = self.counts.cpu()
        true_positives = counts.diagonal()
        unions = counts.sum(0) + counts.sum(1) - true_positives
        return self._per_class(classes, true_positives, unions)

    def mean_iou(self, classes: Sequence[int] | None = None) -> float:
        """Mean of `iou(classes)` over those that are not nan; nan when all are."""
        return float(self.iou(classes).nanmean())

    def recall(self, classes: Sequence[int] | None = None) -> Tensor:
        """Share of each class's labelled pixels that is predicted right, like `iou`.

        nan for a class that is labelled nowhere.
        """
        counts = self.counts.cpu()
        return self._per_class(classes, counts.diagonal(), counts.sum(1))

    def mean_accuracy(self, classes: Sequence[int] | None = None) -> float:
        """Mean of `recall(classes)` over those that are not nan; nan when all are."""
        return float(self.recall(classes).nanmean())

    def pixel_accuracy(self) -> float:
        """Share of all counted pixels that is predicted right; nan when there are none."""
        counts = self.counts.cpu()
        pixels = int(counts.sum())
        return int(counts.trace()) / pixels if pixels else float("nan")

    def labelled_pixels(self) -> Tensor:
        """(num_classes,) int64 on the CPU: pixels labelled with each class."""
        return self.counts.cpu().sum(1)

    def predicted_pixels(self) -> Tensor:
        """(num_classes,) int64 on the CPU: counted pixels predicted as each class."""
        return self.counts.cpu().sum(0)
