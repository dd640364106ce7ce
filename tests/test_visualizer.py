from __future__ import annotations

import numpy as np
import pytest

from clouds.visualizer import Tile, compare, side_by_side

ROAD, SKY, CAR, BUS = (128, 64, 128), (70, 130, 180), (0, 0, 142), (0, 60, 100)


def scene(height=50, width=100):
    """Image, label and prediction: sky over road; a car that is taken for a bus; void below."""
    image = np.full((height, width, 3), (10, 200, 30), np.uint8)
    label = np.full((height, width), 10, np.uint8)
    label[height // 2 :] = 0
    label[-height // 10 :] = 255
    label[height // 2 : height * 7 // 10, width // 4 : width // 2] = 13
    prediction = np.where(label == 13, 15, np.where(label == 255, 0, label)).astype(np.uint8)
    return image, label, prediction


def has(panel, color):
    return bool((panel == np.array(color, np.uint8)).all(-1).any())


def count(panel, color):
    return int((panel == np.array(color, np.uint8)).all(-1).sum())


def tiles_of(panel, number, width, height):
    """The pictures of a panel, found from its documented width: margins of 12 between them."""
    assert panel.shape[1] == number * (width + 12) + 12
    column = panel[:, 12 + width // 2]
    found = np.flatnonzero((column == (10, 200, 30)).all(-1))
    top = found[0]
    return [panel[top : top + height, 12 + i * (width + 12) :][:, :width] for i in range(number)]


def test_image_label_and_prediction_stand_side_by_side():
    panel = compare(*scene(), tile_width=100)
    assert panel.dtype == np.uint8
    image, label, prediction = tiles_of(panel, 3, 100, 50)
    assert (image == (10, 200, 30)).all()
    for tile in (label, prediction):
        assert tuple(tile[5, 50]) == SKY and tuple(tile[40, 80]) == ROAD
    assert tuple(label[30, 30]) == CAR and tuple(prediction[30, 30]) == BUS
    assert tuple(label[48, 50]) == (0, 0, 0) and tuple(prediction[48, 50]) == ROAD


@pytest.mark.parametrize("size", [(500, 1000), (20, 40)])
def test_label_maps_are_scaled_without_new_colors(size):
    panel = compare(*scene(*size), tile_width=200)
    _, label, prediction = tiles_of(panel, 3, 200, 100)
    for tile, colors in ((label, (ROAD, SKY, CAR, (0, 0, 0))), (prediction, (ROAD, SKY, BUS))):
        assert {tuple(c) for c in tile.reshape(-1, 3).tolist()} == set(colors)
    assert count(label, CAR) == pytest.approx(200 * 100 * 0.25 * 0.2, rel=0.02)


def test_the_legend_shows_the_classes_in_the_maps_and_no_others():
    panel = compare(*scene(), tile_width=200)
    below = panel[np.flatnonzero((panel[:, 112] == (10, 200, 30)).all(-1))[-1] + 1 :]
    for color in (ROAD, SKY, CAR, BUS, (0, 0, 0)):
        assert count(below, color) >= 14 * 14 - 20
    assert not has(below, (220, 20, 60)) and not has(below, (107, 142, 35))  # person, vegetation
    image, label, _ = scene()
    no_void = np.where(label == 255, 0, label).astype(np.uint8)
    panel = compare(image, no_void, no_void, tile_width=200)
    assert not has(panel, (0, 0, 0)) and not has(panel, BUS)


def test_without_a_label():
    image, _, prediction = scene()
    tiles = tiles_of(compare(image, None, prediction, tile_width=100), 2, 100, 50)
    assert tuple(tiles[1][30, 30]) == BUS


def test_a_prediction_of_another_size_than_the_image():
    image, label, prediction = scene(100, 200)
    panel = compare(image, label[::2, ::2], prediction[::2, ::2], tile_width=200)
    assert panel.shape == compare(image, label, prediction, tile_width=200).shape


def test_panels_repeat_and_leave_their_input_alone():
    image, label, prediction = scene()
    before = image.copy(), label.copy(), prediction.copy()
    first = compare(image, label, prediction, title="a")
    assert np.array_equal(first, compare(image, label, prediction, title="a"))
    for now, then in zip((image, label, prediction), before, strict=True):
        assert np.array_equal(now, then)


def test_titles_and_captions_are_drawn_and_kept_inside():
    plain = Tile("", np.full((20, 60, 3), 77, np.uint8))
    blank = side_by_side([plain], tile_width=60)
    assert set(np.unique(blank)) == {77, 255}
    captioned = side_by_side([Tile("image", plain.picture)], tile_width=60)
    assert captioned.shape == blank.shape and not np.array_equal(captioned, blank)
    long = "a_very_long_file_name_" * 20
    titled = side_by_side([Tile(long, plain.picture)], title=long, tile_width=60)
    assert titled.shape[0] > blank.shape[0] and titled.shape[1] == blank.shape[1]
    # margins stay white, and nothing runs into the picture
    assert (titled[:, :12] == 255).all() and (titled[:, -12:] == 255).all()
    assert count(titled, (77, 77, 77)) == 20 * 60


def test_a_legend_wraps():
    wide = side_by_side(
        [Tile("", np.zeros((10, 10, 3), np.uint8))], legend=range(19), tile_width=1500
    )
    narrow = side_by_side(
        [Tile("", np.zeros((10, 10, 3), np.uint8))], legend=range(19), tile_width=300
    )
    assert narrow.shape[0] - 300 > wide.shape[0] - 1500
    assert has(narrow, (119, 11, 32))  # bicycle, the last
    assert (narrow[:, -12:] == 255).all()


def test_tiles_of_several_shapes():
    tall, wide = (np.full(shape, 90, np.uint8) for shape in ((80, 40, 3), (20, 80, 3)))
    panel = side_by_side([Tile("tall", tall), Tile("wide", wide)], tile_width=40)
    assert panel.shape[1] == 2 * 52 + 12
    assert count(panel[:, :52], (90, 90, 90)) == 80 * 40
    assert count(panel[:, 52:], (90, 90, 90)) == 10 * 40
