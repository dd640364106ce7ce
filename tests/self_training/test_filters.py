"""Filters of pseudo-labels, each against its formula written down once more."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from clouds.config import get_cfg
from clouds.data.structures import Targets, masks_from_label
from clouds.self_training.filters import build_filters
from clouds.self_training.filters.boundary import BoundaryWeights, boundary_mask
from clouds.self_training.filters.class_loss import (
    MOMENTUM,
    ClassLosses,
    ClassLossFilter,
    pixel_losses,
)
from clouds.self_training.filters.image_quality import ImageConfidenceFilter, ImageQuality
from clouds.self_training.pseudo_labeler import label_from_scores
from clouds.self_training.refiners.base import PseudoLabel

NUM_CLASSES = 4


def scores_of(size=(9, 12), seed=0, num_classes=NUM_CLASSES):
    generator = torch.Generator().manual_seed(seed)
    return 1.2 * torch.randn(num_classes, *size, generator=generator).mul(2).softmax(0)


def labelled(scores):
    """The teacher's label, and targets of its classes."""
    label = label_from_scores(scores, keep_scores=True)
    return label, masks_from_label(label.classes)


def losses_by_hand(scores, classes):
    """-log of a class's share in the scores of each pixel; 0 without a class."""
    scores, classes = scores.numpy().astype(np.float64), classes.numpy()
    losses = np.zeros(classes.shape)
    for y, x in np.ndindex(*classes.shape):
        if classes[y, x] < len(scores):
            total = max(scores[:, y, x].sum(), 1.0)
            losses[y, x] = -math.log(max(scores[classes[y, x], y, x] / total, 2**-23))
    return losses


def some_classes(size=(9, 12), seed=1):
    classes = torch.randint(NUM_CLASSES + 1, size, generator=torch.Generator().manual_seed(seed))
    return classes.masked_fill(classes == NUM_CLASSES, 255).to(torch.uint8)


# ---------------------------------------------------------------- FreeMask's filter


def test_the_loss_of_each_pixel():
    scores, classes = scores_of(), some_classes()
    scores[:, 0] *= 0.1  # sums below 1
    scores[:, 1] = 0.0
    expected = torch.from_numpy(losses_by_hand(scores, classes)).float()
    torch.testing.assert_close(pixel_losses(scores, classes), expected, rtol=1e-5, atol=1e-6)


def test_means_of_classes_over_iterations():
    """Three iterations of one, two and no labelled images; class 3 is in none of them."""
    images = [(scores_of(seed=i), some_classes(seed=10 + i)) for i in range(3)]
    for _, classes in images:
        classes[classes == 3] = 255
    statistics, totals = ClassLosses(NUM_CLASSES), np.zeros((2, NUM_CLASSES))
    for numbers in ((0,), (1, 2), ()):
        batch = np.zeros((2, NUM_CLASSES))
        for i in numbers:
            statistics.observe(*images[i])
            losses = losses_by_hand(*images[i])
            for c in range(NUM_CLASSES):
                batch[:, c] += losses[(images[i][1] == c).numpy()].sum(), (images[i][1] == c).sum()
        before = statistics.means.clone()
        statistics.commit(torch.device("cpu"))
        totals = MOMENTUM * totals + (1 - MOMENTUM) * batch
        assert len(numbers) == 0 or not torch.equal(before, statistics.means)
    expected = totals[0, :3] / totals[1, :3]
    assert statistics.means[:3].tolist() == pytest.approx(expected.tolist())
    assert statistics.means[3] == math.inf


def test_what_a_failed_iteration_observed_is_discarded_and_the_state_comes_back():
    statistics, other = ClassLosses(NUM_CLASSES), ClassLosses(NUM_CLASSES)
    statistics.observe(scores_of(), some_classes())
    statistics.commit(torch.device("cpu"))
    other.load_state_dict(statistics.state_dict())
    statistics.observe(scores_of(seed=5), some_classes(seed=5))
    statistics.discard()
    for one in (statistics, other):
        one.observe(scores_of(seed=2), some_classes(seed=2))
        one.commit(torch.device("cpu"))
    assert torch.equal(statistics.means, other.means)
    with pytest.raises(ValueError, match="4 classes are saved, but there are 5"):
        ClassLosses(5).load_state_dict(statistics.state_dict())


def test_pixels_above_the_limit_of_their_class_are_ignored():
    scores = scores_of()
    label, targets = labelled(scores)
    classes = some_classes()
    targets = masks_from_label(classes)
    statistics = ClassLosses(NUM_CLASSES)
    statistics.observe(scores_of(seed=3), some_classes(seed=3).masked_fill(classes == 3, 255))
    statistics.commit(torch.device("cpu"))
    result = ClassLossFilter(statistics, 1.25)(label, targets)
    losses, means = losses_by_hand(scores, classes), statistics.means.numpy()
    limits = np.append(1.25 * means, np.inf)[np.minimum(classes.numpy(), NUM_CLASSES)]
    assert 0.1 < (losses > limits).mean() < 0.9
    assert torch.equal(result.weights, torch.from_numpy(losses <= limits).float())


def test_nothing_is_ignored_before_a_class_was_seen():
    label, targets = labelled(scores_of())
    assert (ClassLossFilter(ClassLosses(NUM_CLASSES), 1.25)(label, targets).weights == 1).all()


def regions(rng, num_regions, size=(96, 128), num_classes=19):
    """Regions around random centers, with random classes: (region numbers, class of each)."""
    centers = np.ones(size, bool)
    centers.flat[rng.choice(centers.size, num_regions, replace=False)] = False
    nearest = ndimage.distance_transform_edt(centers, return_distances=False, return_indices=True)
    numbers = nearest[0] * size[1] + nearest[1]
    numbers = np.unique(numbers, return_inverse=True)[1].reshape(size)
    return numbers, rng.integers(num_classes, size=num_regions)


def prediction(rng, truth, lead, noise, num_classes=19):
    """Scores of a model whose logits are 0, and `lead` for the true class, plus Gaussian noise."""
    logits = rng.normal(0, noise, (num_classes, *truth.shape))
    np.put_along_axis(logits, truth[None], rng.normal(lead, noise, (1, *truth.shape)), 0)
    return torch.from_numpy(logits).float().softmax(0)


def dropped(lead, noise, tolerance):
    """Shares of the pixels in wrong and in right regions that are ignored; 15 % are wrong."""
    rng = np.random.default_rng(0)
    statistics = ClassLosses(19)
    for _ in range(4):  # labelled images
        numbers, classes = regions(rng, 60)
        truth = classes[numbers]
        statistics.observe(prediction(rng, truth, lead, noise), torch.from_numpy(truth))
    statistics.commit(torch.device("cpu"))
    shares = []
    for _ in range(2):
        numbers, classes = regions(rng, 60)
        given = classes.copy()
        wrong = rng.choice(60, 9, replace=False)
        given[wrong] = (given[wrong] + rng.integers(1, 19, 9)) % 19
        scores = prediction(rng, classes[numbers], lead, noise)
        nothing = torch.zeros(numbers.shape)
        targets = masks_from_label(torch.from_numpy(given[numbers]).to(torch.uint8))
        label = PseudoLabel(nothing.byte(), nothing, scores)
        ignored = (ClassLossFilter(statistics, tolerance)(label, targets).weights == 0).numpy()
        is_wrong = np.isin(numbers, wrong)
        shares.append((ignored[is_wrong].mean(), ignored[~is_wrong].mean()))
    return np.mean(shares, 0)


@pytest.mark.parametrize(
    ("lead", "noise", "tolerance"),
    [(2.5, 0.2, 1.25), (2.5, 0.3, 3.0), (4.0, 1.0, 3.0), (6.0, 1.0, 3.0), (6.0, 2.0, 3.0)],
)
def test_most_of_the_wrong_regions_are_ignored_and_few_right_pixels(lead, noise, tolerance):
    of_wrong, of_right = dropped(lead, noise, tolerance)
    assert of_wrong >= 0.8
    assert of_right <= 0.1


def test_the_published_tolerance_ignores_many_right_pixels_of_a_confident_model():
    """A loss of exponential distribution exceeds 1.25 times its mean with probability e^-1.25."""
    assert dropped(6.0, 1.0, 1.25)[1] == pytest.approx(math.exp(-1.25), abs=0.06)


# ---------------------------------------------------------------- boundaries


@pytest.mark.parametrize("width", [1, 2])
def test_boundary_weights_against_the_formula(width):
    scores = scores_of((20, 25))
    label, _ = labelled(scores)
    blocks = some_classes((4, 5), seed=2).repeat_interleave(5, 0).repeat_interleave(5, 1)
    targets = masks_from_label(blocks)
    result = BoundaryWeights(3.0, width)(label, targets).weights.numpy()
    classes, size = blocks.numpy().astype(int), 2 * width + 1
    boundary = ndimage.maximum_filter(classes, size, mode="nearest") != ndimage.minimum_filter(
        classes, size, mode="nearest"
    )
    shares = scores.numpy() / scores.numpy().sum(0)
    entropy = -(shares * np.log(shares)).sum(0)
    mean, deviation = entropy[boundary].mean(), entropy[boundary].std()
    expected = 1 + 3 / (1 + np.exp(-(entropy - mean) / deviation)) * boundary
    assert 0.2 < boundary.mean() < 1
    np.testing.assert_allclose(result, expected, rtol=1e-4)


def test_without_boundary_or_without_spread_of_the_entropy():
    label = PseudoLabel(
        torch.zeros(4, 6, dtype=torch.uint8), torch.ones(4, 6), torch.full((2, 4, 6), 0.5)
    )
    one_class = masks_from_label(torch.zeros(4, 6, dtype=torch.uint8))
    assert (BoundaryWeights(3.0, 1)(label, one_class).weights == 1).all()
    halves = torch.zeros(4, 6, dtype=torch.uint8)
    halves[:, 3:] = 1
    weights = BoundaryWeights(3.0, 1)(label, masks_from_label(halves)).weights
    assert weights.tolist() == [[1, 1, 2.5, 2.5, 1, 1]] * 4  # sigmoid(0) = 1/2
    assert boundary_mask(halves, 1).tolist() == [[False, False, True, True, False, False]] * 4


def test_a_score_of_0_has_no_entropy():
    scores = torch.zeros(3, 4, 6)
    scores[0, :, :3], scores[1, :, 3:5] = 1.0, 0.4  # the last column has no score at all
    label, targets = labelled(scores)
    assert BoundaryWeights(3.0, 1)(label, targets).weights.isfinite().all()


# ---------------------------------------------------------------- whole images


def test_the_quality_of_an_image_multiplies_all_its_losses():
    confidence = torch.full((4, 5), 0.5)
    confidence[0, :3] = torch.tensor([0.968, 0.99, 1.0])
    label = PseudoLabel(torch.zeros(4, 5, dtype=torch.uint8), confidence)
    targets = masks_from_label(label.classes)
    result = ImageQuality(0.968)(label, targets)
    torch.testing.assert_close(result.weights, torch.full((4, 5), 3 / 20))
    assert result.class_weight == pytest.approx(3 / 20) and result.dice_weight == 1
    weighted = Targets(targets.labels, targets.masks, torch.full((4, 5), 0.5), 0.2)
    result = ImageQuality(0.968)(label, weighted)
    torch.testing.assert_close(result.weights, torch.full((4, 5), 3 / 40))
    assert result.no_object_weight == 0.2


def test_an_image_of_unsure_queries_is_no_target():
    _, targets = labelled(scores_of())
    for confidence, kept in ((0.95, True), (0.94, False)):
        label = PseudoLabel(
            some_classes(), torch.ones(9, 12), query_confidence=torch.tensor(confidence)
        )
        result = ImageConfidenceFilter(0.95)(label, targets)
        if kept:
            assert result is targets
        else:
            assert len(result.labels) == 0 and result.masks.shape == (0, 9, 12)
            assert (result.weights == 0).all() and result.no_object_weight == 0


# ---------------------------------------------------------------- which are on


def test_none_is_on_in_the_published_recipe():
    assert build_filters(get_cfg(), None) == ()


def test_filters_come_from_the_config():
    cfg = get_cfg()
    node = cfg.MODEL.CLOUDS.PSEUDO_LABEL
    node.BOUNDARY_WEIGHT, node.BOUNDARY_WIDTH = 2.0, 5
    node.QUALITY_THRESHOLD, node.MIN_IMAGE_CONFIDENCE = 0.9, 0.8
    node.DICE_WEIGHT, node.MAX_CLASS_LOSS = 0.0, 1.5
    losses = ClassLosses(NUM_CLASSES)
    *first, dice = build_filters(cfg, losses)
    assert first == [
        ClassLossFilter(losses, 1.5),
        BoundaryWeights(2.0, 5),
        ImageQuality(0.9),
        ImageConfidenceFilter(0.8),
    ]
    label, targets = labelled(scores_of())
    assert dice(label, targets).dice_weight == 0
