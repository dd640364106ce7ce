"""Factors of an image's class and dice losses: `Targets.class_weight` and `Targets.dice_weight`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from criterion_numpy import NUM_LAYERS, build, image_of, leaves_of, predictions, targets_of

SEEDS = [7, 8]


def losses_of(targets, outputs=None, **options):
    return build(**options)(outputs or predictions(2), targets, SEEDS)


def test_the_dice_weight_of_an_image_scales_its_dice_losses_alone():
    """Of two images, of which one alone has the loss L1 * 3 / 5: 3 of the 5 masks are its own."""
    outputs, targets = predictions(2), targets_of([0, 2, 3], [1, 2])
    both = losses_of(targets, outputs)
    first = build()(image_of(outputs, 0), targets[:1], SEEDS[:1])
    weighted = losses_of([targets[0], replace(targets[1], dice_weight=0.0)], outputs)
    for name, loss in both.items():
        expected = first[name] * 3 / 5 if "dice" in name else loss
        torch.testing.assert_close(weighted[name], expected)


def test_a_class_weight_of_0_leaves_the_class_losses_of_the_other_image():
    """The normalizer is still that of both images: 3 + 2 pairs, 0.1 for 3 + 4 unmatched queries."""
    outputs, targets = predictions(2), targets_of([0, 2, 3], [1, 2])
    both = losses_of(targets, outputs)
    first = build()(image_of(outputs, 0), targets[:1], SEEDS[:1])
    weighted = losses_of([targets[0], replace(targets[1], class_weight=0.0)], outputs)
    for name, loss in both.items():
        expected = first[name] * (3 + 0.1 * 3) / (5 + 0.1 * 7) if "loss_ce" in name else loss
        torch.testing.assert_close(weighted[name], expected)


def test_a_constant_class_weight_per_pixel_is_that_number():
    outputs, targets = predictions(2), targets_of([0, 2, 3], [1, 2])
    number = losses_of([replace(t, class_weight=0.25) for t in targets], outputs)
    pixels = torch.full((24, 36), 0.25)
    per_pixel = losses_of([replace(t, class_weight=pixels) for t in targets], outputs)
    for name, loss in losses_of(targets, outputs).items():
        torch.testing.assert_close(per_pixel[name], number[name])
        factor = 0.25 if "loss_ce" in name else 1.0
        torch.testing.assert_close(number[name], factor * loss)


@pytest.mark.parametrize("over", ["batch", "rank"])
def test_a_batch_without_a_query_that_counts_has_losses_and_gradients_of_0(over):
    outputs = predictions(2)
    leaves = leaves_of(outputs)
    nothing = replace(targets_of([255])[0], weights=torch.zeros(24, 36), no_object_weight=0.0)
    losses = losses_of([nothing, nothing], outputs, normalize_class_loss_over=over)
    assert len(losses) == 3 * NUM_LAYERS and all(loss == 0 for loss in losses.values())
    gradients = torch.autograd.grad(sum(losses.values()), leaves)
    assert all((gradient == 0).all() for gradient in gradients)


def test_padding_keeps_the_factors():
    (target,) = targets_of([0, 2])
    weight = torch.full((24, 36), 0.5)
    padded = replace(target, class_weight=weight, dice_weight=0.5).padded(32, 40)
    assert padded.dice_weight == 0.5
    assert (padded.class_weight[:24, :36] == 0.5).all()
    assert padded.class_weight.sum() == 0.5 * 24 * 36 + 32 * 40 - 24 * 36
    assert replace(target, class_weight=0.5).padded(32, 40).class_weight == 0.5
