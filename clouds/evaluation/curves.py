"""ROC and precision-recall curves from histograms of scores, whose size is constant."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LEVELS = 65536
"""Scores in [0, 1] are rounded to multiples of 1 / 65535, as in 16-bit images."""

Counts = npt.NDArray[np.int64]


def count_levels(scores: Tensor, positive: Tensor) -> Tensor:
    """Numbers of negative (row 0) and positive (row 1) samples at each level, int64 (2, LEVELS).

    Args:
        scores: (N,) floating, clamped to [0, 1].
        positive: bool (N,), on the same device.

    Raises:
        ValueError: a score is not finite.
    """
    if not scores.isfinite().all():
        raise ValueError("the confidence is not finite; the model's weights may have diverged")
    level = (scores.double().clamp(0, 1) * (LEVELS - 1)).round().long()
    cells = positive.long() * LEVELS + level
    return torch.bincount(cells, minlength=2 * LEVELS).view(2, LEVELS)


@dataclass(frozen=True)
class ScoreCounts:
    """Numbers of positive and negative samples at each level of a score, lowest level first.

    A higher score means that a sample is more likely to be positive. Samples of one level are
    ties, so curves equal those of scikit-learn for the rounded scores.

    Attributes:
        positives, negatives: (L,).
    """

    positives: Counts
    negatives: Counts

    def reversed(self) -> ScoreCounts:
        """With negatives as positives, which have low scores."""
        return ScoreCounts(self.negatives[::-1], self.positives[::-1])

    def _at_or_above(self) -> tuple[Counts, Counts]:
        """Positives and negatives at or above each level, highest level first."""
        return np.cumsum(self.positives[::-1]), np.cumsum(self.negatives[::-1])

    def _has_both(self) -> bool:
        return bool(self.positives.any() and self.negatives.any())

    def auroc(self) -> float:
        """Area under the ROC curve, in [0, 1]; nan without positives or negatives."""
        if not self._has_both():
            return float("nan")
        true, false = self._at_or_above()
        rates = np.concatenate(([0.0], true / true[-1]))
        areas = np.diff(np.concatenate(([0.0], false / false[-1]))) * (rates[1:] + rates[:-1]) / 2
        return float(areas.sum())

    def false_positive_rate(self, at_true_positive_rate: float = 0.95) -> float:
        """The false positive rate of the highest threshold that reaches a true positive rate.

        In [0, 1]; nan without positives or negatives.
        """
        if not self._has_both():
            return float("nan")
        true, false = self._at_or_above()
        reached = int(np.searchsorted(true / true[-1], at_true_positive_rate))
        return float(false[reached] / false[-1])

    def average_precision(self) -> float:
        """Sum over the levels of precision times increase of recall; nan without positives."""
        if not self.positives.any():
            return float("nan")
        true, false = self._at_or_above()
        precision = true / np.maximum(true + false, 1)
        return float(np.sum(np.diff(true, prepend=0) / true[-1] * precision))
