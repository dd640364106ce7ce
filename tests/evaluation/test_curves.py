"""Areas and rates from histograms against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from clouds.evaluation.curves import LEVELS, ScoreCounts, count_levels


def counts_of(positive, level, levels=LEVELS):
    parts = [np.bincount(level[positive == value], minlength=levels) for value in (1, 0)]
    return ScoreCounts(*parts)


def samples(seed, n=3000, spread=0.1):
    """Labels, and 16-bit scores that depend on them; many are at the same level."""
    rng = np.random.default_rng(seed)
    positive = rng.integers(0, 2, n)
    score = np.clip(0.6 + 0.2 * positive + spread * rng.normal(size=n), 0, 1)
    return positive, np.rint(score * (LEVELS - 1)).astype(np.int64)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("spread", [0.02, 0.2, 1.0])
def test_areas_are_those_of_scikit_learn(seed, spread):
    positive, level = samples(seed, spread=spread)
    curves = counts_of(positive, level)
    assert curves.auroc() == pytest.approx(roc_auc_score(positive, level), abs=1e-12)
    expected = average_precision_score(positive, level)
    assert curves.average_precision() == pytest.approx(expected, abs=1e-12)
    errors = average_precision_score(1 - positive, -level)
    assert curves.reversed().average_precision() == pytest.approx(errors, abs=1e-12)
    false, true, _ = roc_curve(positive, level, drop_intermediate=False)
    assert curves.false_positive_rate() == pytest.approx(false[np.argmax(true >= 0.95)], abs=1e-12)


def test_by_hand():
    """Levels 0 to 3: positives 0, 1, 1, 2 and negatives 1, 0, 1, 0.

    Thresholds 3, 2, 1, 0: true positive rates 2/4, 3/4, 1, 1; false ones 0, 1/2, 1/2, 1.
    """
    curves = ScoreCounts(np.array([0, 1, 1, 2]), np.array([1, 0, 1, 0]))
    assert curves.auroc() == pytest.approx((0.5 * (0.5 + 0.75) / 2) + 0.5 * 1)
    assert curves.false_positive_rate() == 0.5
    assert curves.false_positive_rate(0.5) == 0
    assert curves.average_precision() == pytest.approx(0.5 * 1 + 0.25 * 3 / 4 + 0.25 * 4 / 5)


def test_one_kind_only():
    none, some = np.zeros(4, np.int64), np.ones(4, np.int64)
    for curves in (ScoreCounts(some, none), ScoreCounts(none, some)):
        assert math.isnan(curves.auroc()) and math.isnan(curves.false_positive_rate())
    assert ScoreCounts(some, none).average_precision() == 1
    assert math.isnan(ScoreCounts(none, some).average_precision())


def test_levels_by_hand():
    scores = torch.tensor([0.0, 0.6 / 65535, 1.0, 1.5, -2.0, 0.5])
    positive = torch.tensor([True, True, False, True, False, False])
    counts = count_levels(scores, positive)
    expected = {(0, 0): 1, (0, 32768): 1, (0, 65535): 1, (1, 0): 1, (1, 1): 1, (1, 65535): 1}
    assert {(r, c): int(counts[r, c]) for r, c in counts.nonzero().tolist()} == expected
    with pytest.raises(ValueError, match="not finite"):
        count_levels(torch.tensor([0.5, torch.nan]), torch.tensor([True, False]))
