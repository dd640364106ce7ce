"""Unmatched queries on unlabelled pixels of images that lack a class: weights per pixel."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from criterion_numpy import (
    NO_OBJECT_WEIGHT,
    NUM_CLASSES,
    NUM_LAYERS,
    WEIGHTS,
    build,
    image_of,
    leaves_of,
    left_half,
    predictions,
    softmax,
    some_weights,
    targets_of,
)
from test_criterion import TwoRanks
from tiny_model import tiny_model

from clouds import comm
from clouds.data.structures import Targets, labelled_targets, masks_from_label
from clouds.modeling.criterion import mean_over_masks
from clouds.modeling.transformer_decoder.decoder import Predictions

SEEDS = [7, 8]


def partly(target):
    """As of a dataset that lacks a class: weight 0 where no mask is."""
    return replace(target, no_object_weight=target.masks.any(0).float())


def hand_example():
    """One image of 4x8 pixels, three queries, one target: class 2 in the left half.

    Query 0 has the left half, so it is matched. Query 1 has the right half, which is unlabelled.
    Query 2 has a mask probability of 1/4 in the left half and of 3/4 in the right half.
    """
    label = torch.full((4, 8), 255, dtype=torch.uint8)
    label[:, :4] = 2
    left = torch.zeros(4, 8)
    left[:, :4] = 1
    masks = torch.stack([60 * left - 30, 30 - 60 * left, math.log(3) * (1 - 2 * left)])
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, NUM_CLASSES + 1, generator=generator)
    logits[0, :, 2] = torch.tensor([4.0, -2.0, -2.0])
    return Predictions([logits], [masks[None]]), partly(masks_from_label(label))


def test_the_class_loss_of_three_queries_by_hand(recorded_matches):
    outputs, target = hand_example()
    loss = build()(outputs, [target], [1])["loss_ce"]
    assert [pair.tolist() for pair in recorded_matches[0][0]] == [[0], [0]]
    log_p = [np.log(softmax(row)) for row in outputs.class_logits[0][0].double().numpy()]
    weight = NO_OBJECT_WEIGHT / 4  # the share of query 2 on labelled pixels
    expected = -(log_p[0][2] + weight * log_p[2][NUM_CLASSES]) / (1 + weight)
    assert loss.item() == pytest.approx(WEIGHTS.class_weight * expected, rel=1e-5)
    # published: queries 1 and 2 count alike
    loss = build()(outputs, [replace(target, no_object_weight=1.0)], [1])["loss_ce"]
    sums = log_p[0][2] + NO_OBJECT_WEIGHT * (log_p[1][NUM_CLASSES] + log_p[2][NUM_CLASSES])
    expected = -sums / (1 + 2 * NO_OBJECT_WEIGHT)
    assert loss.item() == pytest.approx(WEIGHTS.class_weight * expected, rel=1e-5)


def test_gradients_of_the_class_loss():
    """None of a query on unlabelled pixels, and none of masks: the weights are constants."""
    outputs, target = hand_example()
    logits, masks = leaves_of(outputs)
    build()(outputs, [target], [1])["loss_ce"].backward()
    matched, unlabelled, other = logits.grad[0]
    assert (unlabelled == 0).all() and matched.abs().max() > 0 and other.abs().max() > 0
    assert masks.grad is None or (masks.grad == 0).all()


def test_means_over_masks_against_sums_over_pixels():
    """Masks of a quarter of the size: each of their pixels has the mean of 4x4 values."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 6, 9, generator=generator)
    values = torch.rand(24, 36, generator=generator)
    means = mean_over_masks(values, logits)
    blocks = values.double().numpy().reshape(6, 4, 9, 4).mean((1, 3))
    for mask, mean in zip(logits.double().numpy(), means, strict=True):
        p = 1 / (1 + np.exp(-mask))
        assert mean.item() == pytest.approx((p * blocks).sum() / p.sum(), rel=1e-5)


def test_an_empty_mask_counts_as_on_labelled_pixels():
    assert mean_over_masks(torch.zeros(4, 8), torch.full((1, 4, 8), -200.0)).tolist() == [1.0]
    assert mean_over_masks(torch.zeros(4, 8), torch.full((1, 4, 8), 200.0)).tolist() == [0.0]


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_equal_values_of_all_pixels_are_the_value_of_the_image(value):
    outputs, targets = predictions(2), targets_of([0, 2, 255], [1, 3])
    expected = build()(outputs, [replace(t, no_object_weight=value) for t in targets], SEEDS)
    constant = torch.full((24, 36), value)
    losses = build()(outputs, [replace(t, no_object_weight=constant) for t in targets], SEEDS)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-6, atol=0)


def test_a_fully_labelled_image_of_a_partly_labelled_dataset():
    outputs, targets = predictions(2), targets_of([0, 2], [1, 3])
    expected = build()(outputs, targets, SEEDS)
    assert build()(outputs, [partly(t) for t in targets], SEEDS) == expected


def test_other_images_of_the_batch_and_mask_losses_are_as_without():
    outputs, targets = predictions(2), targets_of([0, 2, 255], [1, 255])
    plain = build()(outputs, targets, SEEDS)
    losses = build()(outputs, [partly(targets[0]), targets[1]], SEEDS)
    for name, loss in losses.items():
        assert (loss == plain[name]) == (not name.startswith("loss_ce"))
    leaves = leaves_of(outputs)
    for these in (targets, [partly(targets[0]), targets[1]]):
        criterion = build(normalize_class_loss_over="rank")
        (gradient,) = torch.autograd.grad(criterion(outputs, these, SEEDS)["loss_ce"], leaves[2:3])
        if these is targets:
            before = gradient
    ratio = gradient[1] / before[1]  # the total weight, by which the loss is divided, is smaller
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
    assert ratio.mean() > 1


def test_the_mean_over_two_ranks_is_the_loss_of_the_whole_batch(monkeypatch):
    """One rank has an image with weights per pixel; each prediction has its own normalizer."""
    outputs, targets = predictions(2), targets_of([0, 2, 255], [1, 255])
    targets[0] = replace(targets[0], no_object_weight=some_weights())
    whole = build()(outputs, targets, SEEDS)
    sent = []
    for rank in range(2):
        fake = TwoRanks(torch.zeros(1 + NUM_LAYERS))
        monkeypatch.setattr(comm, "dist", fake)
        build()(image_of(outputs, rank), [targets[rank]], [SEEDS[rank]])
        sent.append(fake.sent)
    assert len(set(sent[0][1:].tolist())) == NUM_LAYERS
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(comm, "dist", TwoRanks(sent[1 - rank]))
        ranks.append(build()(image_of(outputs, rank), [targets[rank]], [SEEDS[rank]]))
    monkeypatch.undo()
    for name, loss in whole.items():
        torch.testing.assert_close((ranks[0][name] + ranks[1][name]) / 2, loss)


def test_padding_of_targets():
    masks = torch.ones(1, 3, 5, dtype=torch.bool)
    labels = torch.tensor([4])
    targets = Targets(labels, masks, torch.zeros(3, 5), torch.zeros(3, 5))
    assert targets.padded(3, 5) is targets
    padded = targets.padded(4, 8)
    assert padded.masks.shape == (1, 4, 8) and padded.masks.sum() == 15
    for weights in (padded.weights, padded.no_object_weight):
        assert weights[:3, :5].sum() == 0 and weights.sum() == 32 - 15
    plain = Targets(labels, masks, no_object_weight=0.5).padded(4, 8)
    assert (plain.weights, plain.no_object_weight) == (None, 0.5)


# ---------------------------------------------------------------- in the model


def sample(**more):
    generator = torch.Generator().manual_seed(0)
    label = torch.full((64, 96), 255, dtype=torch.uint8)
    label[:, :48] = 3
    image = torch.randint(0, 256, (3, 64, 96), generator=generator, dtype=torch.uint8)
    return {"image": image, "sem_seg": label, "seed": 5, **more}


def test_samples_that_are_partly_labelled():
    model = tiny_model().train()
    assert model.unlabeled_classes == "ignore"
    plain = labelled_targets(sample(), "ignore", model.device)
    assert plain.no_object_weight == 1
    assert (
        labelled_targets(sample(partly_labelled=False), "ignore", model.device).no_object_weight
        == 1
    )
    target = labelled_targets(sample(partly_labelled=True), "ignore", model.device)
    assert torch.equal(target.no_object_weight, left_half((64, 96)))
    losses, others = model([sample()]), model([sample(partly_labelled=True)])
    assert {name for name in losses if losses[name] != others[name]} == {
        name for name in losses if name.startswith("loss_ce")
    }


def test_absent_is_the_published_loss():
    losses = tiny_model().train()([sample()])
    model = tiny_model(MODEL__MASK_FORMER__UNLABELED_CLASSES="absent").train()
    assert model([sample(partly_labelled=True)]) == losses
