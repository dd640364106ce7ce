"""Crops: windows around objects computed by hand, classes equally often, captions that match."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from street_models.crops import SIZE, CropSampler, Window, object_window

from clouds.data.label_space import CITYSCAPES_19

CAR, ROAD, POLE = (CITYSCAPES_19.names.index(name) for name in ("car", "road", "pole"))


def empty(rows=160, columns=320):
    return np.full((rows, columns), ROAD, np.uint8), np.zeros((rows, columns), np.uint8)


def window_of(label, instances, class_id, jitter=0.0, seed=0):
    return object_window(np.random.default_rng(seed), label, instances, class_id, jitter)


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        (50, 60, Window(40, 50, 20)), (0, 0, Window(0, 0, 20)), (99, 199, Window(80, 180, 20)),
        (50, 195, Window(40, 180, 20)),
    ],
)  # fmt: skip
def test_a_window_stays_in_the_image(row, column, expected):
    assert Window.around(row, column, 20, (100, 200)) == expected


def test_a_window_is_no_larger_than_the_image():
    assert Window.around(10, 10, 500, (100, 200)) == Window(0, 0, 100)


def test_an_object_is_in_the_middle():
    label, instances = empty()
    label[60:100, 200:240] = CAR
    instances[60:100, 200:240] = 7
    # 1.2 * 40 = 48 pixels around (79.5, 219.5)
    assert window_of(label, instances, CAR) == Window(round(55.5), round(195.5), 48)


def test_each_large_object_is_chosen_at_times_and_a_small_one_never():
    label, instances = empty()
    for number, column in enumerate((10, 110, 210), start=1):
        size = 20 if number < 3 else 7
        label[50 : 50 + size, column : column + size] = CAR
        instances[50 : 50 + size, column : column + size] = number
    lefts = {window_of(label, instances, CAR, seed=seed).left for seed in range(30)}
    assert len(lefts) == 2 and max(lefts) < 150


def test_a_pole_is_cut():
    label, instances = empty()
    label[20:140, 100:104] = POLE
    instances[20:140, 100:104] = 3
    for seed in range(10):
        window = window_of(label, instances, POLE, seed=seed)
        assert window.side == 26  # 1.2 * sqrt(120 * 4)
        assert (window.of(label) == POLE).any()


def test_stuff_fills_half_of_its_window_if_it_can():
    label, instances = empty()
    label[:80] = 10
    for seed in range(20):
        assert (window_of(label, instances, 10, seed=seed).of(label) == 10).mean() >= 0.5


def test_a_crop_is_a_square_with_a_caption(scenes):
    sampler = CropSampler(scenes)
    crops = [sampler.draw(np.random.default_rng(i)) for i in range(60)]
    for crop in crops:
        assert crop.image.shape == (SIZE, SIZE, 3) and crop.image.dtype == np.uint8
        assert crop.caption
    named = [crop for crop in crops if crop.class_id is not None]
    assert 8 <= len(named) <= 30  # 30 % of 60
    for crop in named:
        assert any(word in crop.caption for word in CITYSCAPES_19.synonyms[crop.class_id])


def test_classes_are_equally_frequent(scenes):
    sampler = CropSampler(scenes)
    rng = np.random.default_rng(0)
    drawn = (sampler.draw(rng).class_id for _ in range(2000))
    counts = Counter(c for c in drawn if c is not None)
    assert len(counts) >= 16  # 24 scenes do not have all
    assert max(counts.values()) < 2.5 * min(counts.values())


def test_a_crop_is_a_function_of_its_random_numbers(scenes):
    first, again = (CropSampler(scenes).draw(np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(first.image, again.image) and first.caption == again.caption


def test_positions_are_those_in_the_mirrored_crop(scenes, monkeypatch):
    """Half of the captions are made of the mirrored label of the same window."""
    seen = []

    def caption(rng, image, label, instances, facts, whole):
        seen.append((image.copy(), label.copy()))
        return "a street"

    monkeypatch.setattr("street_models.crops.crop_caption", caption)
    sampler = CropSampler(scenes)
    for seed in range(60):
        sampler.draw(np.random.default_rng(seed))
    found = Counter()
    for image, label in seen:
        for mirrored, step in ((False, 1), (True, -1)):
            pair = image[:, ::step], label[:, ::step]
            found[mirrored] += any(is_part_of(pair, scenes, n) for n in range(len(scenes)))
    assert found[False] + found[True] == len(seen)
    assert min(found.values()) > len(seen) / 4


def is_part_of(pair, scenes, number):
    """Whether a crop and its label are at one place of a scene."""
    image, label = pair
    side = len(label)
    views = np.lib.stride_tricks.sliding_window_view(scenes.labels[number], (side, side))
    first = scenes.images[number][: views.shape[0], : views.shape[1]]
    corners = np.argwhere((first == image[0, 0]).all(-1) & (views[..., 0, 0] == label[0, 0]))
    return any(
        np.array_equal(scenes.images[number][r : r + side, c : c + side], image)
        and np.array_equal(scenes.labels[number][r : r + side, c : c + side], label)
        for r, c in corners
    )
