"""Points in components: hand-drawn regions, scipy's erosion and labels as oracles."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from clouds.config import get_cfg
from clouds.self_training.refiners.sam.prompts import (
    CENTER_RADIUS,
    PointOptions,
    candidate_pixels,
    find_components,
    sample_points,
)

MODES = ("random", "center", "largest_component")


def blobs(seed=0, shape=(90, 120), smoothness=5.0):
    generator = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(generator.normal(size=shape), smoothness) for _ in range(4)]
    return np.argmax(fields, axis=0).astype(np.uint8)


def dumbbell():
    """Two blocks, 4x4 and 6x7, joined by a line of one pixel."""
    mask = np.zeros((6, 20), bool)
    mask[1:5, :4] = True
    mask[3, 4:13] = True
    mask[:6, 13:20] = True
    return mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("erosion", [0, 3])
def test_every_component_has_its_points_inside(mode, erosion):
    components = find_components(blobs(), size_threshold=0)
    options = PointOptions(num_points=5, mode=mode, erosion=erosion)
    points = sample_points(components, options, np.random.default_rng(1))
    assert points.shape == (len(components), 5, 2)
    assert points.dtype == np.float32
    columns, rows = points.astype(int).transpose(2, 0, 1)
    assert (components.ids[rows, columns] == np.arange(len(components))[:, None]).all()
    large = components.areas >= 5
    assert large.any() and not large.all()  # also components with fewer pixels than points
    for some in points[large if not erosion else components.areas > 400]:
        assert len({tuple(point) for point in some}) == 5


@pytest.mark.parametrize("mode", MODES)
def test_one_seed_one_set_of_points(mode):
    components = find_components(blobs(), size_threshold=100)
    options = PointOptions(num_points=4, mode=mode)
    first, again, other = (
        sample_points(components, options, np.random.default_rng(seed)) for seed in (7, 7, 8)
    )
    assert (first == again).all()
    assert (first != other).any()


def test_random_points_reach_every_pixel_equally_often():
    components = find_components(np.array([[0, 0, 255], [255, 0, 0]], np.uint8))
    generator = np.random.default_rng(0)
    options = PointOptions(num_points=1)
    drawn = [tuple(sample_points(components, options, generator)[0, 0]) for _ in range(4000)]
    counts = {pixel: drawn.count(pixel) for pixel in set(drawn)}
    assert set(counts) == {(0, 0), (1, 0), (1, 1), (2, 1)}
    assert min(counts.values()) > 850  # 1000 expected, standard deviation 27


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_erosion_is_scipys(size):
    for seed in range(4):
        mask = blobs(seed) == 0  # touches the border of the image, where it is eroded too
        eroded = ndimage.binary_erosion(mask, np.ones((size, size)))
        assert eroded.any()
        ours = candidate_pixels(mask, PointOptions(erosion=size))
        assert (ours == np.argwhere(eroded)).all()


def test_a_component_that_erosion_empties_is_taken_uneroded():
    classes = np.full((9, 12), 255, np.uint8)
    classes[1:8, 1:8] = 0  # 7x7
    classes[0, :] = 1  # one pixel thin
    classes[:, 10] = 2  # likewise
    components = find_components(classes)
    points = sample_points(
        components, PointOptions(num_points=3, erosion=3), np.random.default_rng(0)
    ).astype(int)
    assert components.classes.tolist() == [0, 1, 1, 2]
    assert ((points[0] >= 2) & (points[0] <= 6)).all()
    for index, kind in enumerate(components.classes):
        columns, rows = points[index].T
        assert (classes[rows, columns] == kind).all()


def test_the_largest_part_of_an_eroded_component():
    mask = dumbbell()
    pixels = candidate_pixels(mask, PointOptions(mode="largest_component", erosion=3))
    # Of 4x4 and 6x7 there are left 2x2 and 4x5; the line between them is gone.
    assert len(pixels) == 4 * 5
    assert (pixels.min(0).tolist(), pixels.max(0).tolist()) == ([1, 14], [4, 18])
    mirrored = candidate_pixels(mask[:, ::-1], PointOptions(mode="largest_component", erosion=3))
    assert len(mirrored) == 4 * 5  # whether it is labelled first or last
    assert len(candidate_pixels(mask, PointOptions(mode="random", erosion=3))) == 4 * 5 + 2 * 2
    whole = candidate_pixels(mask, PointOptions(mode="largest_component"))
    assert len(whole) == mask.sum()


def test_points_at_the_center():
    mask = np.zeros((60, 80), bool)
    mask[5:46, 10:61] = True  # center of mass at row 25, column 35
    pixels = candidate_pixels(mask, PointOptions(mode="center"))
    rows, columns = np.nonzero(mask)
    near = (rows - 25) ** 2 + (columns - 35) ** 2 < CENTER_RADIUS**2
    assert (pixels == np.stack([rows[near], columns[near]], 1)).all()


def test_a_center_outside_of_its_component_gives_the_nearest_pixels():
    ring = np.ones((101, 101), bool)
    ring[2:99, 2:99] = False
    pixels = candidate_pixels(ring, PointOptions(mode="center", num_points=4))
    # Of the inner side of the ring, the middles lie nearest to (50, 50).
    assert {tuple(p) for p in pixels} == {(1, 50), (50, 1), (50, 99), (99, 50)}


def test_options_come_from_the_config():
    cfg = get_cfg()
    assert PointOptions.from_config(cfg) == PointOptions(num_points=5, mode="random", erosion=0)
    cfg.MODEL.CLOUDS.SAM.EROSION = True
    cfg.MODEL.CLOUDS.SAM.NUM_POINTS = 2
    cfg.MODEL.CLOUDS.SAM.SELECTION_MODE = "center"
    assert PointOptions.from_config(cfg) == PointOptions(num_points=2, mode="center", erosion=3)


def test_no_components_no_points():
    nothing = find_components(np.full((4, 4), 255, np.uint8))
    assert sample_points(nothing, PointOptions(), np.random.default_rng(0)).shape == (0, 5, 2)


def test_an_unknown_mode():
    with pytest.raises(ValueError, match="'middle' is unknown; there are random, center"):
        candidate_pixels(np.ones((3, 3), bool), PointOptions(mode="middle"))
