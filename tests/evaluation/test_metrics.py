"""Metrics beyond mIoU against scikit-learn and the formulas of the toolkits."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from clouds.config import KEYS
from clouds.data.label_space import CITYSCAPES_19
from clouds.evaluation.metrics import METRICS, BoundaryMetric, ConfidenceMetric

CLASSES = range(19)


def images(count, size=(40, 60), seed=0):
    """(prediction, label, confidence) with ignored pixels; confidence has 16 bits."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        label = rng.integers(0, 19, (size[0] // 4, size[1] // 4)).repeat(4, 0).repeat(4, 1)
        confidence = rng.beta(4, 1, size)
        confidence = np.rint(confidence * 65535) / 65535
        correct = rng.random(size) < confidence**2
        prediction = np.where(correct, label, rng.integers(0, 19, size))
        label = np.where(rng.random(size) < 0.1, 255, label)
        yield prediction.astype(np.uint8), label.astype(np.uint8), confidence


def update(metric, prediction, label, confidence=None):
    confidence = None if confidence is None else torch.from_numpy(confidence)
    metric.update(torch.from_numpy(prediction), torch.from_numpy(label), confidence)


def ece_by_bins(confidence, correct, bins=15):
    """As the BRAVO toolkit's reference: bins [a, b), the last one closed, weights by pixels."""
    index = np.clip(np.digitize(confidence, np.linspace(0, 1, bins + 1)) - 1, 0, bins - 1)
    gaps = [
        np.sum(index == i) * abs(correct[index == i].mean() - confidence[index == i].mean())
        for i in range(bins)
        if np.any(index == i)
    ]
    return sum(gaps) / len(confidence)


def test_confidence_is_that_of_scikit_learn():
    data = list(images(3))
    metric = ConfidenceMetric(CITYSCAPES_19)
    for part in data:
        update(metric, *part)
    counted = np.concatenate([(label != 255).ravel() for _, label, _ in data])
    correct = np.concatenate([(p == label).ravel() for p, label, _ in data])[counted]
    confidence = np.concatenate([c.ravel() for *_, c in data])[counted]
    false, true, _ = roc_curve(correct, confidence, drop_intermediate=False)
    expected = {
        "ECE": ece_by_bins(confidence, correct),
        "AUROC": roc_auc_score(correct, confidence),
        "FPR95": false[np.argmax(true >= 0.95)],
        "AUPR-success": average_precision_score(correct, confidence),
        "AUPR-error": average_precision_score(~correct, -confidence),
    }
    found = metric.scores(CLASSES)
    assert found == pytest.approx({k: 100 * v for k, v in expected.items()}, abs=1e-8)
    assert 1 < found["ECE"] < 60 and 50 < found["AUROC"] < 99


def test_ece_is_exact_without_rounding_and_the_areas_nearly():
    rng = np.random.default_rng(4)
    confidence = rng.beta(6, 1, (200, 200))
    correct = rng.random((200, 200)) < confidence
    metric = ConfidenceMetric(CITYSCAPES_19)
    update(metric, np.where(correct, 3, 4).astype(np.uint8), np.full((200, 200), 3), confidence)
    scores = metric.scores(CLASSES)
    expected = 100 * ece_by_bins(confidence.ravel(), correct.ravel())
    assert scores["ECE"] == pytest.approx(expected, abs=1e-9)
    expected = 100 * roc_auc_score(correct.ravel(), confidence.ravel())
    assert scores["AUROC"] == pytest.approx(expected, abs=1e-3)


def test_ece_by_hand():
    """Bin [0.8, 0.8667): 0.82, 0.84, one of two correct; bin of 1.0: correct. (0.66 + 0) / 3."""
    metric = ConfidenceMetric(CITYSCAPES_19)
    label = np.array([[0, 0, 0, 255]], np.uint8)
    update(metric, np.array([[0, 1, 0, 1]], np.uint8), label, np.array([[0.82, 0.84, 1.0, 0.5]]))
    assert metric.scores(CLASSES)["ECE"] == pytest.approx(100 * 0.66 / 3)


def test_without_pixels_and_without_errors():
    metric = ConfidenceMetric(CITYSCAPES_19)
    assert all(math.isnan(value) for value in metric.scores(CLASSES).values())
    label = np.zeros((2, 2), np.uint8)
    update(metric, label, label, np.full((2, 2), 0.5))
    scores = metric.scores(CLASSES)
    assert scores["ECE"] == 50 and math.isnan(scores["AUROC"])
    with pytest.raises(ValueError, match="not finite"):
        update(metric, label, label, np.full((2, 2), np.nan))


def eroded_boundary(mask):
    """As the boundary IoU toolkit: padded by 0, eroded d times by a 3x3 kernel, subtracted."""
    height, width = mask.shape
    times = max(1, round(0.02 * np.sqrt(height**2 + width**2)))
    padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=times)[1:-1, 1:-1]
    return (mask - eroded).astype(bool)


@pytest.mark.parametrize("size", [(40, 60), (120, 200)])  # distances 1 and 5
def test_boundary_iou_is_that_of_the_toolkit(size):
    rng = np.random.default_rng(7)
    data = []
    for prediction, label, _ in images(2, size):
        patch = cv2.resize(rng.integers(0, 5, (4, 6), dtype=np.uint8), size[::-1], interpolation=0)
        near = np.roll(patch, 2, axis=1)
        ignored = cv2.resize((label[:8, :8] == 255).astype(np.uint8), size[::-1], interpolation=0)
        data.append((np.where(prediction < 1, prediction, near), np.where(ignored, 255, patch)))
    metric = BoundaryMetric(CITYSCAPES_19)
    both, either = np.zeros(19), np.zeros(19)
    for prediction, label in data:
        update(metric, prediction, label)
        for c in CLASSES:
            masks = [(prediction == c) & (label != 255), label == c]
            first, second = (eroded_boundary(mask.astype(np.uint8)) for mask in masks)
            both[c] += np.sum(first & second)
            either[c] += np.sum(first | second)
    with np.errstate(invalid="ignore"):
        iou = 100 * both / either
    scores = metric.scores(CLASSES)
    names = CITYSCAPES_19.names
    found = [scores[f"boundary-IoU-{name}"] for name in names]
    np.testing.assert_allclose(found, iou, rtol=1e-12)
    assert scores["boundary-mIoU"] == pytest.approx(np.nanmean(iou))
    assert 5 < scores["boundary-mIoU"] < 95
    assert set(BoundaryMetric(CITYSCAPES_19).scores([3])) == {
        "boundary-mIoU", f"boundary-IoU-{names[3]}",
    }  # fmt: skip


def test_inputs_are_not_changed():
    (prediction, label, _), before = next(images(1)), next(images(1))
    update(BoundaryMetric(CITYSCAPES_19), prediction, label)
    assert (prediction == before[0]).all() and (label == before[1]).all()


@pytest.mark.parametrize("name", METRICS)
def test_sums_of_processes(name, monkeypatch):
    first, second, whole = (METRICS[name](CITYSCAPES_19) for _ in range(3))
    for i, part in enumerate(images(4)):
        update((first, second)[i % 2], *part)
        update(whole, *part)
    monkeypatch.setattr("clouds.comm.all_gather", lambda sums: [sums, second.sums])
    for _ in range(2):
        assert first.all_reduce().scores(CLASSES) == pytest.approx(whole.scores(CLASSES))


def test_the_config_allows_all():
    (key,) = [key for key in KEYS if key.name == "TEST.METRICS"]
    assert key.rule.is_valid(tuple(METRICS)) and not key.rule.is_valid(("x",))
    assert not key.rule.is_valid((*METRICS, next(iter(METRICS))))
