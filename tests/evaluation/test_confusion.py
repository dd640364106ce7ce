from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from color_model import LABEL_IDS, blocks
from PIL import Image
from sklearn.metrics import confusion_matrix

from clouds.evaluation import confusion
from clouds.evaluation.confusion import ConfusionMatrix


def count_pairs(pairs, num_classes=19, **options):
    matrix = ConfusionMatrix(num_classes, **options)
    for prediction, label in pairs:
        matrix.update(torch.as_tensor(prediction), torch.as_tensor(label))
    return matrix


def random_pair(seed, shape=(37, 53)):
    rng = np.random.default_rng(seed)
    prediction = rng.integers(0, 19, shape, dtype=np.uint8)
    label = rng.integers(0, 19, shape, dtype=np.uint8)
    label[rng.random(shape) < 0.2] = 255
    return prediction, label


def noisy_pair(seed, shape=(40, 64)):
    """Mostly correct, not all classes, ignored border, whole objects predicted as another class."""
    label = blocks(seed, shape, 8, [0, 1, 2, 8, 10, 13, 15, 18])
    prediction = label.copy()
    prediction[label == 15] = 14
    prediction[:, :5] = 16
    label[-6:] = 255
    return prediction, label


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_counts_are_those_of_scikit_learn(dtype):
    pairs = [random_pair(seed, shape) for seed, shape in enumerate([(37, 53), (1, 1), (20, 64)])]
    matrix = count_pairs([(torch.tensor(p, dtype=dtype), torch.tensor(t)) for p, t in pairs])
    prediction = np.concatenate([p.ravel() for p, _ in pairs])
    label = np.concatenate([t.ravel() for _, t in pairs])
    scored = label != 255
    expected = confusion_matrix(label[scored], prediction[scored], labels=range(19))
    assert matrix.counts.dtype == torch.int64
    np.testing.assert_array_equal(matrix.counts.numpy(), expected)


@pytest.mark.parametrize("pair", [random_pair, noisy_pair])
def test_agrees_exactly_with_the_cityscapes_benchmark(tmp_path, pair):
    benchmark = importlib.import_module(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling"
    )
    from cityscapesscripts.helpers.labels import id2label

    pairs = [pair(seed) for seed in range(3)]
    files = ([], [])
    for i, both in enumerate(pairs):
        for which, classes in enumerate(both):
            # label ids of the benchmark; ignored pixels get several of its ignored ids
            ignored = np.resize(np.array([0, 3, 4, 5, 6, 9, 10, 14, 15, 29, 30], np.uint8), (64,))
            raw = np.where(classes == 255, 0, LABEL_IDS[np.minimum(classes, 18)])
            raw = np.where(classes == 255, ignored[np.arange(classes.shape[1]) % 64], raw)
            files[which].append(str(tmp_path / f"{i}_{which}.png"))
            Image.fromarray(raw.astype(np.uint8)).save(files[which][-1])
    benchmark.args.evalInstLevelScore = False
    benchmark.args.JSONOutput = False
    benchmark.args.quiet = True
    theirs = benchmark.evaluateImgLists(*files, benchmark.args)

    ours = count_pairs(pairs)
    cells = np.array(theirs["confMatrix"]).astype(np.int64)
    np.testing.assert_array_equal(ours.counts.numpy(), cells[np.ix_(LABEL_IDS, LABEL_IDS)])
    iou = ours.iou().tolist()
    for train_id, label_id in enumerate(LABEL_IDS):
        their_iou = theirs["classScores"][id2label[int(label_id)].name]
        assert iou[train_id] == their_iou or (math.isnan(iou[train_id]) and math.isnan(their_iou))
    assert ours.mean_iou() == pytest.approx(theirs["averageScoreClasses"], abs=1e-15)
    assert sum(math.isnan(v) for v in iou) == (0 if pair is random_pair else 9)


def test_scores_by_hand():
    label = [0, 0, 0, 0, 1, 1, 2, 255]
    prediction = [0, 0, 1, 3, 1, 0, 3, 2]
    matrix = count_pairs([([prediction], [label])], num_classes=5)
    assert matrix.counts.tolist() == [
        [2, 1, 0, 1, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    iou = matrix.iou().tolist()
    assert iou[:4] == pytest.approx([2 / 5, 1 / 3, 0, 0])  # class 3: predicted, never labeled
    assert math.isnan(iou[4])  # in neither
    assert matrix.mean_iou() == pytest.approx((2 / 5 + 1 / 3) / 4)
    assert matrix.mean_iou([0, 1, 2]) == pytest.approx((2 / 5 + 1 / 3) / 3)
    assert matrix.iou([1, 0]).tolist() == pytest.approx([1 / 3, 2 / 5])
    assert matrix.pixel_accuracy() == pytest.approx(3 / 7)
    assert matrix.recall([0, 1, 2]).tolist() == pytest.approx([1 / 2, 1 / 2, 0])
    assert matrix.mean_accuracy() == pytest.approx(1 / 3)  # class 3 has no labeled pixel
    assert matrix.mean_accuracy([0, 2]) == pytest.approx(1 / 4)
    assert matrix.counts.sum(1).tolist() == [4, 2, 1, 0, 0]
    assert matrix.counts.sum(0).tolist() == [3, 2, 0, 2, 0]


def test_scores_without_counted_pixels_are_nan():
    empty = ConfusionMatrix(19)
    all_ignored = count_pairs([(random_pair(0)[0], np.full((37, 53), 255, np.uint8))])
    for matrix in (empty, all_ignored):
        assert matrix.counts.sum() == 0
        assert matrix.iou().isnan().all()
        values = [matrix.mean_iou(), matrix.pixel_accuracy(), matrix.mean_accuracy()]
        assert all(math.isnan(value) for value in [*values, matrix.mean_iou([])])


def test_large_images_are_counted_in_chunks(monkeypatch):
    pair = random_pair(5)
    expected = count_pairs([pair]).counts
    monkeypatch.setattr(confusion, "_CHUNK_SIZE", 100)  # 1961 pixels: the last chunk is shorter
    assert torch.equal(count_pairs([pair]).counts, expected)


def test_another_ignore_value():
    matrix = count_pairs([([[0, 1, 1]], [[0, -1, 1]])], num_classes=2, ignore=-1)
    assert matrix.counts.tolist() == [[1, 0], [0, 1]]


def test_the_ignore_value_is_none_of_the_classes():
    for ignore in (0, 1, 2):
        with pytest.raises(AssertionError, match=f"ignore value {ignore} is one of the classes"):
            ConfusionMatrix(3, ignore)
    matrix = count_pairs([([[0, 1, 2]], [[0, 3, 2]])], num_classes=3, ignore=3)
    assert matrix.counts.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_a_single_class_with_ignored_pixels():
    assert count_pairs([([[0, 0]], [[0, 255]])], num_classes=1).counts.tolist() == [[1]]


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        ([[0, 1]], [[0], [1]], r"differ in shape: \(1, 2\) and \(2, 1\)"),
        ([[0, 19]], [[0, 1]], r"prediction has values from 0 to 19; allowed: 0\.\.18$"),
        ([[0, 255]], [[0, 255]], r"prediction has values from 0 to 255"),
        ([[-1, 3]], [[0, 1]], r"prediction has values from -1 to 3"),
        ([[0, 1]], [[0, 19]], r"label has values .* to 19; allowed: 0\.\.18 or 255 \(ignored\)"),
        ([[0, 1]], [[-1, 255]], r"label has values from -1"),
        ([[0.0, 1.0]], [[0, 1]], r"prediction must have an integer type, not torch.float32"),
        ([[0, 1]], [[0.0, 1.0]], r"label must have an integer type"),
        ([[True, False]], [[0, 1]], r"prediction must have an integer type, not torch.bool"),
    ],
)
def test_invalid_values_are_an_error(prediction, label, message):
    matrix = count_pairs([random_pair(1)])
    before = matrix.counts.clone()
    with pytest.raises(ValueError, match=message):
        matrix.update(torch.tensor(prediction), torch.tensor(label))
    assert torch.equal(matrix.counts, before)


def test_all_reduce_in_one_process_is_a_copy():
    matrix = count_pairs([random_pair(2)])
    total = matrix.all_reduce()
    assert torch.equal(total.counts, matrix.counts)
    total.counts += 1
    assert not torch.equal(total.counts, matrix.counts)


def test_the_reduced_matrix_counts_further_images_alike():
    total = count_pairs([([[0, 1]], [[0, 7]])], num_classes=2, ignore=7).all_reduce()
    total.update(torch.tensor([[1, 1]]), torch.tensor([[1, 7]]))
    assert total.counts.tolist() == [[1, 0], [0, 1]]
