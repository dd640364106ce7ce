"""From the teacher's and the refined label to targets: values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from clouds.config import get_cfg
from clouds.self_training.pseudo_labeler import PseudoLabelOptions, pseudo_targets
from clouds.self_training.refiners.base import PseudoLabel, RefinedLabel

#            teacher    confidence        refined              agreement
# row 0      0  0  1    .9  .8  .3       0   0   -            .5  .5  0
# row 1      1  2  2    .6  .5  .2       4   4   -            .1  .1  0
CLASSES = torch.tensor([[0, 0, 1], [1, 2, 2]], dtype=torch.uint8)
CONFIDENCE = torch.tensor([[0.9, 0.8, 0.3], [0.6, 0.5, 0.2]])
AGREEMENT = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.1, 0.0]])
MASKS = torch.tensor([[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [1, 1, 0]]], dtype=torch.bool)


@pytest.fixture
def teacher():
    return PseudoLabel(CLASSES, CONFIDENCE)


@pytest.fixture
def refined():
    return RefinedLabel(torch.tensor([0, 4]), MASKS, AGREEMENT)


def maps(result):
    """Each class's mask as text, a row a word."""
    return {
        label: " ".join("".join(str(int(v)) for v in row) for row in mask)
        for label, mask in zip(result.labels.tolist(), result.masks, strict=True)
    }


def test_published_every_pixel_counts(teacher, refined):
    result = pseudo_targets(teacher, refined)
    assert maps(result) == {0: "110 000", 4: "000 110"}
    assert result.weights is None
    assert result.masks.dtype == torch.bool
    assert PseudoLabelOptions.from_config(get_cfg()) == PseudoLabelOptions()


def test_uncovered_ignored(teacher, refined):
    result = pseudo_targets(teacher, refined, PseudoLabelOptions(uncovered="ignore"))
    assert maps(result) == {0: "110 000", 4: "000 110"}
    assert result.weights.tolist() == [[1, 1, 0], [1, 1, 0]]


def test_uncovered_left_to_the_teacher(teacher, refined):
    result = pseudo_targets(teacher, refined, PseudoLabelOptions(uncovered="teacher"))
    assert maps(result) == {0: "110 000", 1: "001 000", 2: "000 001", 4: "000 110"}
    assert result.weights is None


def test_the_teacher_adds_to_a_class_that_is_there(refined):
    classes = torch.tensor([[9, 9, 4], [9, 9, 255]], dtype=torch.uint8)
    result = pseudo_targets(
        PseudoLabel(classes, CONFIDENCE), refined, PseudoLabelOptions(uncovered="teacher")
    )
    assert maps(result) == {0: "110 000", 4: "001 110"}


def test_the_refined_masks_are_not_written_to(teacher, refined):
    before = refined.masks.clone()
    pseudo_targets(teacher, refined, PseudoLabelOptions("teacher", 0.5, 0.3, "both"))
    assert (refined.masks == before).all()


def test_pixels_of_little_confidence_do_not_count(teacher, refined):
    result = pseudo_targets(teacher, refined, PseudoLabelOptions(min_confidence=0.6))
    assert result.weights.tolist() == [[1, 1, 0], [1, 0, 0]]
    assert result.labels.tolist() == [0, 4]


def test_a_class_without_a_pixel_that_counts_is_no_target(teacher, refined):
    result = pseudo_targets(teacher, refined, PseudoLabelOptions(min_confidence=0.7))
    assert result.weights.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert maps(result) == {0: "110 000"}


def test_little_agreement_drops_covered_pixels_only(teacher, refined):
    result = pseudo_targets(teacher, refined, PseudoLabelOptions(min_agreement=0.3))
    assert result.weights.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert maps(result) == {0: "110 000"}


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ("confidence", [[0.9, 0.8, 0.3], [0.6, 0.5, 0.2]]),
        ("agreement", [[0.5, 0.5, 1.0], [0.1, 0.1, 1.0]]),
        ("both", [[0.45, 0.4, 0.3], [0.06, 0.05, 0.2]]),
    ],
)
def test_weights(teacher, refined, weight, expected):
    result = pseudo_targets(teacher, refined, PseudoLabelOptions(weight=weight))
    torch.testing.assert_close(result.weights, torch.tensor(expected))
    assert result.weights.dtype == torch.float32
    assert result.labels.tolist() == [0, 4]


def test_options_together(teacher, refined):
    options = PseudoLabelOptions("ignore", min_confidence=0.55, weight="confidence")
    result = pseudo_targets(teacher, refined, options)
    torch.testing.assert_close(result.weights, torch.tensor([[0.9, 0.8, 0], [0.6, 0, 0]]))


@pytest.mark.parametrize("uncovered", ["negative", "ignore", "teacher"])
@pytest.mark.parametrize("weight", ["none", "confidence", "agreement", "both"])
def test_a_label_with_no_class_at_all(uncovered, weight):
    nothing = torch.full((2, 3), 255, dtype=torch.uint8)
    refined = RefinedLabel(
        torch.empty(0, dtype=torch.int64), torch.empty(0, 2, 3, dtype=torch.bool), torch.zeros(2, 3)
    )
    assert (refined.class_map() == 255).all()
    result = pseudo_targets(
        PseudoLabel(nothing, torch.zeros(2, 3)),
        refined,
        PseudoLabelOptions(uncovered, 0, 0, weight),
    )
    assert result.labels.shape == (0,) and result.labels.dtype == torch.int64
    assert result.masks.shape == (0, 2, 3) and result.masks.dtype == torch.bool
    assert result.weights is None or torch.isfinite(result.weights).all()


def test_an_emptied_class_stays_where_every_pixel_counts(teacher):
    refined = RefinedLabel(
        torch.tensor([0, 4]),
        torch.stack([MASKS[0], torch.zeros(2, 3, dtype=torch.bool)]),
        AGREEMENT,
    )
    assert pseudo_targets(teacher, refined).labels.tolist() == [0, 4]
    ignoring = pseudo_targets(teacher, refined, PseudoLabelOptions(uncovered="ignore"))
    assert ignoring.labels.tolist() == [0]


def test_the_class_map_of_a_refined_label(refined):
    assert refined.class_map().tolist() == [[0, 0, 255], [4, 4, 255]]
    assert refined.covered.tolist() == [[True, True, False], [True, True, False]]
    overlapping = RefinedLabel(torch.tensor([0, 4]), MASKS | MASKS[0], AGREEMENT)
    assert overlapping.class_map().tolist() == [[4, 4, 255], [4, 4, 255]]


def test_options_come_from_the_config():
    cfg = get_cfg()
    cfg.MODEL.CLOUDS.UNCOVERED = "teacher"
    cfg.MODEL.CLOUDS.PSEUDO_LABEL.MIN_CONFIDENCE = 0.25
    cfg.MODEL.CLOUDS.PSEUDO_LABEL.MIN_AGREEMENT = 0.5
    cfg.MODEL.CLOUDS.PSEUDO_LABEL.WEIGHT = "both"
    assert PseudoLabelOptions.from_config(cfg) == PseudoLabelOptions("teacher", 0.25, 0.5, "both")
