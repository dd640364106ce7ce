"""benchmarks/whole_evaluation.py: both implementations compute the same."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("transformers")
pytest.importorskip("segment_anything")
sys.path.insert(0, str(ROOT / "benchmarks"))
import whole_evaluation  # noqa: E402
from part_clock import PartClock  # noqa: E402
from test_benchmark_step import SETTINGS  # noqa: E402

WORDS = ["--clip", "clouds_tiny", "--image", "128", "192", *SETTINGS]


def test_both_predict_and_count_the_same():
    args = whole_evaluation.parse(WORDS)
    names = (whole_evaluation.PUBLISHED, whole_evaluation.OURS)
    sample, ways = whole_evaluation.build(args)
    clocks = {name: PartClock(lambda: None) for name in names}
    (before, counted), (after, ours) = (ways[name](sample, clocks[name]) for name in names)
    assert before.shape == after.shape == (128, 192)
    assert len(before.unique()) >= 3
    assert (before == after).float().mean() > 0.999
    assert set(clocks[names[0]].seconds) <= set(clocks[names[1]].seconds)
    expected = np.zeros((19, 19), np.int64)
    label = sample["label"].numpy()
    scored = label != 255
    np.add.at(expected, (label[scored], before.numpy()[scored]), 1)
    assert np.array_equal(counted, expected)
    assert ours.sum() == expected.sum() and np.abs(ours - expected).sum() <= 2 * 0.001 * label.size


def test_sides_that_would_be_padded_are_refused(capsys):
    with pytest.raises(SystemExit):
        whole_evaluation.parse(["--image", "100", "192"])
    assert "multiples of 32" in capsys.readouterr().err


def test_half_precision_applies_to_ours_only():
    args = whole_evaluation.parse([*WORDS, "--dtype", "bfloat16"])
    _, ways = whole_evaluation.build(args)
    assert ways[whole_evaluation.OURS].cfg.SOLVER.AMP.ENABLED
    dtypes = {p.dtype for p in ways[whole_evaluation.PUBLISHED].step.head.parameters()}
    assert dtypes == {torch.float32}
