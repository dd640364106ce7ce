"""Examples of Street-SAM: regions, points in them, and what each index gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from street_models.sam_data import SamExamples, View, imprecise, random_window

from clouds.self_training.refiners.sam.frame import Frame

FRAME = Frame(64, True, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.fixture
def examples(scenes):
    return SamExamples(scenes, FRAME, seed=0)


def test_an_example_is_a_function_of_seed_and_index(scenes, examples):
    first, again = examples(3, 4, 5), SamExamples(scenes, FRAME, seed=0)(3, 4, 5)
    for name in ("pixels", "points", "boxes", "masks"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    other = SamExamples(scenes, FRAME, seed=1)(3, 4, 5)
    assert not torch.equal(first.pixels, other.pixels)


def test_shapes(examples):
    example = examples(0, 6, 3)
    count, height, width = example.masks.shape
    assert 1 <= count <= 6 and 2 * max(height, width) == 64
    assert example.pixels.shape == (3, 64, 64)
    assert example.points.shape == (count, 3, 2) and example.boxes.shape == (count, 4)
    assert example.masks.min() >= 0 and example.masks.max() == 1


def test_every_scene_once_before_any_again(examples):
    count = len(examples.scenes)
    numbers = [examples._scene_number(i) for i in range(2 * count)]
    assert sorted(numbers[:count]) == sorted(numbers[count:]) == list(range(count))
    assert numbers[:count] != numbers[count:]


def test_most_points_are_in_their_mask_and_boxes_around_it(examples):
    inside, overlaps = [], []
    for index in range(12):
        example = examples(index, 8, 5)
        for points, box, mask in zip(example.points, example.boxes, example.masks, strict=True):
            columns, rows = (points.long() // 2).T
            inside.append(float((mask[rows, columns] > 0).float().mean()))
            y, x = torch.nonzero(mask > 0, as_tuple=True)
            left, top, right, bottom = (box / 2).tolist()
            overlaps.append(
                float(((x >= left - 1) & (x <= right) & (y >= top - 1) & (y <= bottom)).sum())
                / len(x)
            )
    assert np.mean(np.array(inside) == 1) > 0.6  # those of precise masks, at least
    assert np.mean(inside) > 0.85
    assert np.mean(overlaps) > 0.8


def test_a_window_is_a_part_of_the_scene(scenes):
    rows, columns = scenes.labels[0].shape
    # every pixel tells where it is from
    y, x = np.mgrid[:rows, :columns].astype(np.uint8)
    whole = View(np.stack([y, x, x], -1), y, x)
    mirrored = set()
    for seed in range(8):
        window = random_window(np.random.default_rng(seed), whole)
        steps = np.diff(window.instances.astype(int), axis=1)
        assert np.unique(steps).tolist() in ([1], [-1])
        mirrored.add(int(steps[0, 0]))
        assert np.unique(np.diff(window.label.astype(int), axis=0)).tolist() == [1]
        assert (window.image[..., 0] == window.label).all()
        assert (window.image[..., 1] == window.instances).all()
    assert mirrored == {1, -1}


def test_an_imprecise_mask_is_near_the_mask():
    mask = np.zeros((64, 128), np.bool_)
    mask[10:40, 30:90] = True
    distance = ndimage.distance_transform_edt(~mask)
    changed = [imprecise(np.random.default_rng(seed), mask) for seed in range(20)]
    assert sum((other != mask).any() for other in changed) > 15
    for other in changed:
        assert (other & mask).sum() >= 0.5 * other.sum() > 0
        assert distance[other].max() < 20


def test_a_mask_too_small_to_be_imprecise_stays():
    mask = np.zeros((64, 128), np.bool_)
    mask[5, 7] = True
    for seed in range(5):
        assert (imprecise(np.random.default_rng(seed), mask) == mask).all()
