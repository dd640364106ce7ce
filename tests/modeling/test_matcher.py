"""Matching costs against NumPy, and assignments against all permutations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from criterion_numpy import WEIGHTS, cost_matrix, predictions, targets_of

from clouds.modeling.matcher import match, matching_costs
from clouds.modeling.points import point_sample


def test_costs_against_numpy():
    outputs, targets = predictions(2), targets_of([0, 2, 3], [1, 0, 2])
    points = torch.rand(1, 20, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.stack([t.labels for t in targets])
    masks = torch.stack([t.masks for t in targets]).float()
    costs = matching_costs(
        outputs.class_logits[0],
        point_sample(outputs.mask_logits[0], 2 * points.expand(2, -1, -1) - 1),
        labels,
        point_sample(masks, 2 * points.expand(2, -1, -1) - 1),
        WEIGHTS,
        torch.ones(2, 20),
    )
    for i in range(2):
        expected = cost_matrix(
            outputs.class_logits[0][i].double().numpy(),
            outputs.mask_logits[0][i].double().numpy(),
            labels[i].numpy(),
            masks[i].double().numpy(),
            points[0].numpy(),
        )
        np.testing.assert_allclose(costs[i].numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_queries", [6, 3, 2])
def test_matching_is_the_cheapest_of_all_assignments(num_queries):
    """3 targets: with 2 queries one stays unmatched. Padding columns are never matched."""
    costs = torch.randn(2, 2, num_queries, 5, generator=torch.Generator().manual_seed(num_queries))
    costs[..., 3:] = -1000  # padding
    for layer, matched in zip(costs, match(costs, [3, 0]), strict=True):
        (rows, columns), (no_rows, no_columns) = matched
        assert len(no_rows) == len(no_columns) == 0
        cost = layer[0, rows, columns].sum().item()
        # All injective maps of the smaller side to the larger one.
        larger, smaller = max(num_queries, 3), min(num_queries, 3)
        cheapest = min(
            sum(
                layer[0, a, b].item() if num_queries >= 3 else layer[0, b, a].item()
                for a, b in zip(permutation, range(smaller), strict=True)
            )
            for permutation in itertools.permutations(range(larger), smaller)
        )
        assert cost == pytest.approx(cheapest, abs=1e-5)
        assert len(rows) == smaller == len(set(rows.tolist())) == len(set(columns.tolist()))


@pytest.mark.parametrize("counts", [[3], [3, 1, 2]])
def test_one_count_for_each_image(counts):
    with pytest.raises(ValueError, match="zip"):
        match(torch.zeros(1, 2, 4, 3), counts)
