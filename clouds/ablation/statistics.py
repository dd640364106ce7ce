"""Means over seeds, and paired differences with their confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """A score over seeds.

    Attributes:
        count: number of seeds.
        mean: nan without seeds.
        std: standard deviation with n - 1; nan with fewer than two seeds.
    """

    count: int
    mean: float
    std: float


@dataclass(frozen=True)
class Difference:
    """The mean difference to a baseline over the seeds that both have.

    Attributes:
        count: number of these seeds.
        mean: nan without seeds.
        low, high: ends of Student's t interval of the mean; nan with fewer than two seeds.
    """

    count: int
    mean: float
    low: float
    high: float


def summarize(values: Mapping[int, float]) -> Summary:
    """Mean and standard deviation of a score by seed."""
    scores = list(values.values())
    mean = statistics.fmean(scores) if scores else math.nan
    return Summary(len(scores), mean, statistics.stdev(scores) if len(scores) > 1 else math.nan)


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference:
    """Mean of value - baseline over common seeds, and its two-sided t interval.

    The interval assumes that differences of pairs are normally distributed; with two seeds it has
    one degree of freedom and is wide.

    Args:
        values, baseline: scores by seed.
        confidence: coverage of the interval, in (0, 1).
    """
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    count = len(differences)
    if count < 2:
        return Difference(count, differences[0] if differences else math.nan, math.nan, math.nan)
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(count)
    if error == 0:  # scipy's interval of a scale of 0 is nan
        return Difference(count, mean, mean, mean)
    low, high = stats.t.interval(confidence, count - 1, loc=mean, scale=error)
    return Difference(count, mean, float(low), float(high))
