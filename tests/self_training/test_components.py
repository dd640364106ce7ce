"""Connected components of a label map: scipy and hand-drawn maps as oracles."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from clouds.self_training.refiners.sam.prompts import find_components


def drawn(*rows):
    return np.array([[255 if c == "." else int(c) for c in row] for row in rows], np.uint8)


def by_scipy(classes, larger_than, ignore=255):
    """[(class, mask)], class by class, in the order of scipy's labels."""
    found = []
    for kind in np.unique(classes[classes != ignore]):
        regions, count = ndimage.label(classes == kind)
        for region in range(1, count + 1):
            if (regions == region).sum() > larger_than:
                found.append((kind, regions == region))
    return found


def test_a_drawn_map():
    found = find_components(
        drawn(
            "1100.",
            "1.022",
            "..02.",
            "11122",
        )
    )
    assert found.classes.tolist() == [0, 1, 1, 2]
    assert found.ids.tolist() == [
        [1, 1, 0, 0, -1],
        [1, -1, 0, 3, 3],
        [-1, -1, 0, 3, -1],
        [2, 2, 2, 3, 3],
    ]
    assert found.areas.tolist() == [4, 3, 3, 5]
    assert found.boxes.tolist() == [[0, 2, 3, 4], [0, 0, 2, 2], [3, 0, 4, 3], [1, 3, 4, 5]]
    assert found.crop(1).tolist() == [[True, True], [True, False]]


def test_corners_do_not_join():
    found = find_components(drawn("10", "01"))
    assert found.classes.tolist() == [0, 0, 1, 1]
    assert found.ids.tolist() == [[2, 0], [1, 3]]


def test_a_row_does_not_run_on_into_the_next():
    found = find_components(drawn("..1", "1.."))
    assert found.areas.tolist() == [1, 1]


def test_a_component_must_be_larger_than_the_threshold():
    classes = drawn("111.22")
    assert find_components(classes, 1).areas.tolist() == [3, 2]
    assert find_components(classes, 2).areas.tolist() == [3]
    assert find_components(classes, 3).areas.tolist() == []


@pytest.mark.parametrize("smoothness", [0.0, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("larger_than", [0, 7, 60])
def test_equals_scipy_class_by_class(smoothness, larger_than):
    generator = np.random.default_rng(int(smoothness))
    for shape in ((61, 83), (64, 1), (1, 50)):
        fields = [
            ndimage.gaussian_filter(generator.normal(size=shape), smoothness) for _ in range(6)
        ]
        classes = np.array([0, 1, 7, 18, 254, 255], np.uint8)[np.argmax(fields, axis=0)]
        ours = find_components(classes, larger_than)
        theirs = by_scipy(classes, larger_than)
        assert len(ours) == len(theirs)
        expected = np.full(shape, -1)
        for index, (kind, mask) in enumerate(theirs):
            expected[mask] = index
            rows, columns = np.nonzero(mask)
            box = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
            assert ours.boxes[index].tolist() == box
            assert ours.classes[index] == kind
            assert ours.areas[index] == mask.sum()
            top, left, bottom, right = box
            assert (ours.crop(index) == mask[top:bottom, left:right]).all()
        assert (ours.ids == expected).all()
        assert ours.ids.dtype == np.int32


def test_another_value_may_be_ignored():
    classes = drawn("0011", "2211")
    assert find_components(classes, ignore=1).classes.tolist() == [0, 2]
    assert find_components(classes, ignore=0).classes.tolist() == [1, 2]


def test_nothing_there():
    found = find_components(np.full((5, 4), 255, np.uint8))
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)
    assert (found.ids == -1).all()


def test_the_map_is_left_alone_and_need_not_be_contiguous():
    classes = np.random.default_rng(0).integers(0, 3, (40, 60)).astype(np.uint8)
    view = classes[::2, ::3]
    before = classes.copy()
    assert (find_components(view).ids == find_components(view.copy()).ids).all()
    assert (classes == before).all()


@pytest.mark.parametrize("wrong", [np.zeros((4, 4), np.int64), np.zeros((1, 4, 4), np.uint8)])
def test_wrong_type_or_shape(wrong):
    with pytest.raises(AssertionError, match="expected"):
        find_components(wrong)
