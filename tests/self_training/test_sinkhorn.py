"""Class-balanced assignment, against Sinkhorn's algorithm as a matrix scaling in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clouds.self_training.pseudo_labeler import label_from_scores
from clouds.self_training.sinkhorn import BalancedAssignment, sinkhorn


def scaled(scores, temperature, rounds):
    """Rows (classes) to sums of 1 / C, then columns (pixels) to sums of 1 / N, again and again."""
    matrix = np.asarray(scores, np.float64) ** (1 / temperature)
    for _ in range(rounds):
        matrix = matrix / matrix.sum(1, keepdims=True) / len(matrix)
        matrix = matrix / matrix.sum(0, keepdims=True) / matrix.shape[1]
    return matrix * matrix.shape[1]


def semantic_map(num_classes=5, size=(12, 17), seed=0):
    """Scores with common and rare classes, which may sum to more than 1."""
    logits = torch.randn(num_classes, *size, generator=torch.Generator().manual_seed(seed))
    logits += torch.linspace(1, 0, num_classes)[:, None, None]
    return 1.3 * logits.softmax(0)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0])
def test_probabilities_against_matrix_scaling(rounds, temperature):
    scores = semantic_map().flatten(1)
    found = sinkhorn(scores.double().log() / temperature, rounds)
    expected = torch.from_numpy(scaled(scores, temperature, rounds))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_class_shares_are_even_and_pixels_sum_to_1():
    scores = semantic_map(19, (40, 50)).flatten(1)
    assert (scores.argmax(0).bincount(minlength=19) / 2000 - 1 / 19).abs().max() > 0.05
    found = sinkhorn(scores.log() / 0.5, 20)
    torch.testing.assert_close(found.sum(0), torch.ones(2000))
    assert (found.mean(1) - 1 / 19).abs().max() < 1e-3
    assert (sinkhorn(scores.log() / 0.05, 300).mean(1) - 1 / 19).abs().max() < 1e-3


def test_scores_near_0_do_not_overflow():
    scores = torch.tensor([[1.0, 1e-30, 0.5], [1e-38, 1.0, 0.5]])
    found = sinkhorn(scores.log() / 0.05, 3)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, :2], torch.eye(2))


def test_the_label_is_balanced_among_the_classes_of_the_image():
    """The classes 1 and 3 are the best of some pixels, the others of none."""
    scores = torch.full((5, 1, 6), 0.01)
    scores[1] = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.55, 0.3]])
    scores[3] = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.45, 0.7]])
    label = label_from_scores(scores)
    assert label.classes.tolist() == [[1, 1, 1, 1, 1, 3]]
    balanced = BalancedAssignment(rounds=50, temperature=0.05)(label, scores)
    assert balanced.classes.tolist() == [[1, 1, 1, 3, 3, 3]]
    assert balanced.classes.dtype == torch.uint8 and balanced.confidence.dtype == torch.float32
    expected = scaled(scores[[1, 3], 0], 0.05, 50).max(0)
    assert balanced.confidence[0].tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_an_image_of_one_class_keeps_it():
    scores = torch.tensor([0.2, 0.7, 0.1])[:, None, None].expand(3, 4, 4)
    balanced = BalancedAssignment(3, 0.05)(label_from_scores(scores), scores)
    assert (balanced.classes == 1).all()
    torch.testing.assert_close(balanced.confidence, torch.ones(4, 4))
