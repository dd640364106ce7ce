"""Scores of single images, against sums over pixels by hand and by scikit-learn."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from clouds.evaluation.confusion import ConfusionMatrix
from clouds.evaluation.image_scores import ImageScore, in_order, relative_names


def score(prediction, label, classes, num_classes=4):
    matrix = ConfusionMatrix(num_classes)
    matrix.update(torch.tensor(prediction), torch.tensor(label))
    return ImageScore.from_confusion("a.png", matrix, classes)


def test_by_hand():
    # road 2 of 3, sky 1 of 2 labeled pixels found; one pixel of each is predicted as class 3
    found = score([[0, 0, 3, 1, 3, 2]], [[0, 0, 0, 1, 1, 255]], range(4))
    assert found.miou == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
    assert found.pixel_accuracy == pytest.approx(60)
    # class 1 is not scored
    found = score([[0, 0, 3, 1, 3, 2]], [[0, 0, 0, 1, 1, 255]], (0, 2, 3))
    assert found.miou == pytest.approx(100 * 2 / 3)


def test_equals_scikit_learn():
    draw = np.random.default_rng(0)
    label = draw.integers(0, 3, (20, 30))  # class 3 is only predicted
    prediction = draw.integers(0, 4, (20, 30))
    expected = jaccard_score(
        label.ravel(), prediction.ravel(), labels=np.unique(label), average="macro"
    )
    assert score(prediction, label, range(4)).miou == pytest.approx(100 * expected)


def test_an_image_without_labeled_pixels_has_no_score():
    found = score([[0, 1]], [[255, 255]], range(4))
    assert math.isnan(found.miou) and math.isnan(found.pixel_accuracy)


@pytest.mark.parametrize(
    "paths,names",
    [
        (("/d/val/a/0.png", "/d/val/b/0.png"), ("a/0.png", "b/0.png")),
        (("/d/val/a/0.png", "/d/val/a/1.png"), ("0.png", "1.png")),
        (("/d/val/a.png", "/e/val/a.png"), ("d/val/a.png", "e/val/a.png")),
        (("/d/one.png",), ("one.png",)),
        ((), ()),
    ],
)
def test_names_are_relative_to_the_shared_folder(paths, names):
    assert relative_names([Path(path) for path in paths]) == dict(zip(paths, names, strict=True))


def test_scores_of_several_processes_are_in_the_order_of_the_dataset():
    a, b, c = (ImageScore(f"/d/{name}.png", number, 1.0) for number, name in enumerate("abc"))
    names = {"/d/a.png": "a.png", "/d/b.png": "b.png", "/d/c.png": "c.png"}
    ordered = in_order(names, [[c, a], [b]])
    assert [(s.file, s.miou) for s in ordered] == [("a.png", 0), ("b.png", 1), ("c.png", 2)]
