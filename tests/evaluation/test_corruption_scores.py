"""Means over corruptions and severities, by hand."""

from __future__ import annotations

import math

import pytest

from clouds.data.corruption import COMMON, SEVERITIES
from clouds.evaluation.corruptions import CorruptionScores

MIOU = {
    "cityscapes_val": 50.0,
    "cityscapes_c_fog_1": 40.0,
    "cityscapes_c_fog_3": 20.0,
    "cityscapes_c_gaussian_noise_1": 10.0,
    "bdd_val": 33.0,
}


def test_means():
    scores = CorruptionScores.of(MIOU)
    assert scores.names == ["fog", "gaussian_noise"]
    assert scores.of_corruption("fog") == 30 and scores.of_severity(1) == 25
    assert math.isnan(scores.of_severity(5))
    assert scores.mean == 20 and scores.retention == 40
    assert len(scores.missing()) == 75 - 3
    assert scores.to_dict()["by-severity"] == {"1": 25.0, "3": 20.0}
    assert CorruptionScores.of({"bdd_val": 3.0}) is None


def test_relative_error():
    """Fog: (60 + 80) / (50 + 50); noise: 90 / 60."""
    reference = dict.fromkeys(MIOU, 50.0) | {"cityscapes_c_gaussian_noise_1": 40.0}
    ours, theirs = CorruptionScores.of(MIOU), CorruptionScores.of(reference)
    assert ours.mean_error(theirs) == pytest.approx(100 * (1.4 + 1.5) / 2)
    assert theirs.mean_error(theirs) == pytest.approx(100)
    del reference["cityscapes_c_fog_1"]
    with pytest.raises(ValueError, match="fog of severity 1 has a score of one of them only"):
        ours.mean_error(CorruptionScores.of(reference))


def test_the_table():
    lines = [line.split() for line in CorruptionScores.of(MIOU).table().splitlines()]
    assert lines[0][-3:] == ["1", "3", "mean"]
    assert lines[2] == ["fog", "40.0", "20.0", "30.0"]
    assert lines[3] == ["gaussian_noise", "10.0", "–", "10.0"]
    assert lines[4] == ["mean", "25.0", "20.0", "20.0"]
    assert " ".join(lines[5]).startswith("Without corruption 50.0; of that 40.0 % remain")


def test_nothing_is_missing_of_all():
    every = {f"cityscapes_c_{c}_{s}": 1.0 for c in COMMON for s in SEVERITIES}
    scores = CorruptionScores.of(every)
    assert scores.missing() == [] and math.isnan(scores.retention)
