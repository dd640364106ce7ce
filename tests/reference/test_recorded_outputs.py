"""Outputs equal those recorded from a model that agreed with the published code."""

from __future__ import annotations

import numpy as np
import pytest
from recorded_outputs import FILE, compute_outputs

RECORDED = dict(np.load(FILE))
TOLERANCE = 1e-4
PIXELS = ("teacher", "masks", "pseudo masks")
"""Decisions per pixel, which rounding errors may change where two classes are nearly equal."""


@pytest.fixture(scope="module")
def outputs():
    return compute_outputs()


def test_the_names_are_the_recorded_ones(outputs):
    assert outputs.keys() == RECORDED.keys()
    assert len(RECORDED) > 50


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_as_recorded(name, outputs):
    ours, recorded = outputs[name], RECORDED[name]
    assert ours.shape == recorded.shape and ours.dtype == recorded.dtype
    if name in PIXELS:
        assert (ours == recorded).mean() >= 0.999
    elif recorded.dtype.kind in "iu":
        assert np.array_equal(ours, recorded)
    else:
        np.testing.assert_allclose(ours, recorded, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_record_is_not_trivial():
    """Several classes, masks that are neither empty nor full, no gradient of 0."""
    assert len(np.unique(RECORDED["teacher"])) >= 3
    assert RECORDED["pseudo classes"].size >= 2
    share = RECORDED["masks"].mean((1, 2))
    assert (share > 0).any() and (share < 1).all()
    assert RECORDED["gradient norms"].min() > 0 and RECORDED["gradient norms"].size > 50
    assert len({tuple(RECORDED[f"matched {i} 0"][0]) for i in range(4)}) > 1
