"""Pixel weights in the criterion: `Targets.weights`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from criterion_numpy import (
    NO_OBJECT_WEIGHT,
    NUM_CLASSES,
    NUM_LAYERS,
    SAMPLER,
    build,
    dice,
    entropy,
    image_of,
    leaves_of,
    left_half,
    losses_by_hand,
    predictions,
    some_weights,
    targets_of,
    with_weights,
)

from clouds.data.structures import Targets
from clouds.modeling.criterion import SetCriterion
from clouds.modeling.matcher import CostWeights, matching_costs
from clouds.modeling.points import mask_losses, point_sample, sample_weights


def assert_losses(losses, expected, factor=1.0):
    for name, loss in losses.items():
        torch.testing.assert_close(loss, factor * expected[name], rtol=1e-4, atol=1e-6)


def mask_terms(losses):
    return {name: loss for name, loss in losses.items() if not name.startswith("loss_ce")}


def test_weighted_losses_and_pairs_against_numpy(recorded_matches):
    """Three images: weights in [0, 1], weights of 0 and 1, and no weights."""
    outputs, targets = predictions(3), targets_of([0, 2, 3, 255], [1, 3], [255, 0, 1])
    targets = [
        with_weights(targets[0], some_weights()),
        with_weights(targets[1], left_half()),
        targets[2],
    ]
    seeds = [11, 5, 99]
    losses = build()(outputs, targets, seeds)
    expected, pairs = losses_by_hand(outputs, targets, seeds)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for layer, matched in zip([2, 0, 1], recorded_matches, strict=True):
        for i, (queries, indices) in enumerate(matched):
            assert list(zip(queries.tolist(), indices.tolist(), strict=True)) == pairs[layer, i]


def test_weights_of_more_targets_than_queries():
    outputs, (target,) = predictions(1, queries=2), targets_of([0, 1, 2, 3])
    targets = [with_weights(target, some_weights())]
    expected, _ = losses_by_hand(outputs, targets, [1])
    losses = build()(outputs, targets, [1])
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_weights_of_1_equal_no_weights():
    outputs, targets, seeds = predictions(2), targets_of([0, 2, 3], [1, 255]), [7, 8]
    leaves = leaves_of(outputs)
    results = []
    for these in (targets, [with_weights(t, torch.ones(24, 36)) for t in targets]):
        losses = build()(outputs, these, seeds)
        results.append((losses, torch.autograd.grad(sum(losses.values()), leaves)))
    (losses, gradients), (same, same_gradients) = results
    assert_losses(same, losses)
    torch.testing.assert_close(same_gradients, gradients)


@pytest.mark.parametrize("weight", [0.5, 0.01])
def test_a_constant_weight_scales_the_losses_of_its_image(weight):
    """With a class cost of 0 the pairs are the same, so the factor is exact."""
    outputs, targets, seeds = predictions(2), targets_of([0, 2, 3], [1, 2]), [7, 8]
    criterion = SetCriterion(NUM_CLASSES, CostWeights(0.0, 5.0, 3.0), NO_OBJECT_WEIGHT, SAMPLER)
    expected = criterion(outputs, targets, seeds)
    weighted = [with_weights(t, torch.full((24, 36), weight)) for t in targets]
    assert_losses(mask_terms(criterion(outputs, weighted, seeds)), expected, factor=weight)


def test_losses_of_four_points_by_hand_two_of_weight_0():
    """Logits 0 and ln 3, probabilities 1/2 and 3/4, targets 1 and 0; two points of weight 0.

    Cross-entropy (ln 2 + ln 4) / 4; dice 1/2 (1 - (2 * 2 * 1/2 + 1) / (2 * (5/4 + 1) + 1)) = 5/22.
    """
    logits = torch.tensor([[0.0, math.log(3), 50.0, -50.0]])
    weights = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    target = torch.tensor([[1.0, 0.0, 0.0, 1.0]]) * weights
    losses = mask_losses(logits, target, weights)
    torch.testing.assert_close(losses, torch.tensor([[math.log(8) / 4], [5 / 22]]))
    costs = matching_costs(
        torch.zeros(1, 1, 2),
        logits[None],
        torch.zeros(1, 1, dtype=torch.long),
        target[None],
        CostWeights(0.0, 2.0, 11.0),
        weights,
    )
    assert costs.item() == pytest.approx(math.log(8) / 2 + 5 / 2)


def test_a_second_half_of_weight_0_halves_the_losses():
    """An image, and the same image extended to twice its width with pixels of weight 0.

    At the same points of the image the losses are half as large: there are twice as many points.
    """
    plane = torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 24, 32)
    mask[..., 4:14, 5:20] = 1
    wide_plane = torch.cat((plane, plane.flip(-1)), dim=-1)
    wide_mask = torch.cat((mask, torch.ones_like(mask)), dim=-1)
    weights = left_half((24, 64))
    points = 1.6 * torch.rand(1, 30, 2, generator=torch.Generator().manual_seed(1)) - 0.8
    inside = torch.stack((points[..., 0] / 2 - 0.5, points[..., 1]), -1)
    outside = inside + torch.tensor([1.0, 0.0])
    both = torch.cat((inside, outside), dim=1)
    at_points = point_sample(wide_plane, both)[:, 0]
    target = point_sample(wide_mask * weights, both)[:, 0]
    entropies, dices = mask_losses(at_points, target, sample_weights(weights, both))
    narrow = point_sample(plane, points)[0, 0].numpy()
    narrow_target = point_sample(mask, points)[0, 0].numpy()
    assert entropies.item() == pytest.approx(entropy(narrow, narrow_target) / 2, rel=1e-5)
    # The smoothing term 1 belongs to 60 points, so each of the 30 has the relative weight 2.
    expected = dice(narrow, narrow_target, np.full(30, 2.0))
    assert dices.item() == pytest.approx(expected / 2, rel=1e-5)


def test_masks_at_pixels_of_weight_0_have_no_effect():
    outputs, (target,) = predictions(1), targets_of([0, 2, 3])
    leaves = leaves_of(outputs)
    other = target.masks.clone()
    other[:, :, 18:] = ~other[:, :, 18:]
    losses = build()(outputs, [with_weights(target, left_half())], [3])
    same = build()(outputs, [Targets(target.labels, other, left_half())], [3])
    differ = build()(outputs, [Targets(target.labels, other)], [3])
    for name, loss in losses.items():
        assert torch.equal(loss, same[name])
    assert losses["loss_mask"] != differ["loss_mask"]
    sum(losses.values()).backward()
    for leaf in leaves[NUM_LAYERS:]:  # column 6 of 9 begins at pixel 24 of 36
        assert leaf.grad[..., 6:].abs().max() == 0 < leaf.grad[..., :5].abs().max()


def test_an_image_of_weight_0():
    """Mask losses and their gradients are 0, not NaN; the class loss is not."""
    outputs, targets = predictions(2), targets_of([0, 2, 3], [1])
    leaves = leaves_of(outputs)
    weighted = [with_weights(t, torch.zeros(24, 36)) for t in targets]
    losses = build()(outputs, weighted, [1, 2])
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss > 0 if name.startswith("loss_ce") else loss == 0
    for leaf in leaves[:NUM_LAYERS]:
        assert leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0
    for leaf in leaves[NUM_LAYERS:]:
        assert leaf.grad.abs().max() == 0


def test_gradients_of_weighted_losses_against_finite_differences():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.rand(3, 7, dtype=torch.float64, generator=generator)
    weights[0], weights[1, :4] = 0, 0
    target = weights * torch.rand(3, 7, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x: mask_losses(x, target, weights), logits)


def test_weights_of_one_image_do_not_affect_another():
    outputs, targets, seeds = predictions(2), targets_of([0, 2, 3], [1, 2]), [7, 8]
    weighted = [with_weights(targets[0], some_weights()), targets[1]]
    both = build()(outputs, weighted, seeds)
    a, b = (build()(image_of(outputs, i), weighted[i : i + 1], seeds[i : i + 1]) for i in range(2))
    assert_losses(mask_terms(both), {name: (3 * a[name] + 2 * b[name]) / 5 for name in a})
