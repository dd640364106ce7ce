"""Means and t intervals against numbers by hand and another formula of scipy."""

from __future__ import annotations

import math

import pytest
from scipy.stats import ttest_rel

from clouds.ablation.statistics import paired_difference, summarize


def test_mean_and_deviation_by_hand():
    summary = summarize({0: 1.0, 1: 3.0, 2: 5.0})
    assert (summary.count, summary.mean, summary.std) == (3, 3.0, 2.0)
    one = summarize({4: 7.0})
    assert (one.count, one.mean) == (1, 7.0) and math.isnan(one.std)
    assert math.isnan(summarize({}).mean)


def test_interval_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.302653."""
    difference = paired_difference({0: 11.0, 1: 22.0, 2: 33.0}, {0: 10.0, 1: 20.0, 2: 30.0})
    half = 4.302653 / math.sqrt(3)
    assert (difference.count, difference.mean) == (3, 2.0)
    assert difference.low == pytest.approx(2 - half, abs=1e-6)
    assert difference.high == pytest.approx(2 + half, abs=1e-6)


def test_interval_is_that_of_the_paired_t_test():
    ours, theirs = [61.2, 59.8, 60.4, 62.0], [60.0, 60.1, 59.0, 60.2]
    expected = ttest_rel(ours, theirs).confidence_interval(0.9)
    found = paired_difference(dict(enumerate(ours)), dict(enumerate(theirs)), 0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_pairs_are_of_the_same_seed():
    difference = paired_difference({0: 1.0, 1: 5.0, 7: 9.0}, {1: 4.0, 0: 0.5, 3: 100.0})
    assert (difference.count, difference.mean) == (2, 0.75)


def test_too_few_pairs():
    one = paired_difference({0: 1.0, 1: 5.0}, {1: 4.0})
    assert (one.count, one.mean) == (1, 1.0) and math.isnan(one.low) and math.isnan(one.high)
    assert math.isnan(paired_difference({0: 1.0}, {1: 4.0}).mean)


def test_equal_differences_have_an_interval_without_length():
    difference = paired_difference({0: 1.5, 1: 2.5}, {0: 1.0, 1: 2.0})
    assert (difference.low, difference.mean, difference.high) == (0.5, 0.5, 0.5)
