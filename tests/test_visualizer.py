from __future__ import annotations

import numpy as np
import pytest

from clouds.data.label_space import CITYSCAPES_19, LabelSpace
from clouds.visualizer import LegendEntry, Tile, compare, draw_points, legend_of, side_by_side

ROAD, SKY, CAR, BUS = (128, 64, 128), (70, 130, 180), (0, 0, 142), (0, 60, 100)


def scene(height=50, width=100):
    """Image, label and prediction: sky above road, a car predicted as bus, an ignored bottom."""
    image = np.full((height, width, 3), (10, 200, 30), np.uint8)
    label = np.full((height, width), 10, np.uint8)
    label[height // 2 :] = 0
    label[-height // 10 :] = 255
    label[height // 2 : height * 7 // 10, width // 4 : width // 2] = 13
    prediction = np.where(label == 13, 15, np.where(label == 255, 0, label)).astype(np.uint8)
    return image, label, prediction


def compare_cityscapes(image, label, prediction, **options):
    return compare(image, label, prediction, CITYSCAPES_19, **options)


def has(panel, color):
    return bool((panel == np.array(color, np.uint8)).all(-1).any())


def count(panel, color):
    return int((panel == np.array(color, np.uint8)).all(-1).sum())


def tiles_of(panel, number, width, height):
    """The images of a panel, from the documented layout: margins of 12 pixels between them."""
    assert panel.shape[1] == number * (width + 12) + 12
    column = panel[:, 12 + width // 2]
    top = np.flatnonzero((column == (10, 200, 30)).all(-1))[0]
    return [panel[top : top + height, 12 + i * (width + 12) :][:, :width] for i in range(number)]


def test_image_label_and_prediction_are_side_by_side():
    panel = compare_cityscapes(*scene(), tile_width=100)
    assert panel.dtype == np.uint8
    image, label, prediction = tiles_of(panel, 3, 100, 50)
    assert (image == (10, 200, 30)).all()
    for tile in (label, prediction):
        assert tuple(tile[5, 50]) == SKY and tuple(tile[40, 80]) == ROAD
    assert tuple(label[30, 30]) == CAR and tuple(prediction[30, 30]) == BUS
    assert tuple(label[48, 50]) == (0, 0, 0) and tuple(prediction[48, 50]) == ROAD


@pytest.mark.parametrize("size", [(500, 1000), (20, 40)])
def test_label_maps_are_scaled_without_new_colors(size):
    panel = compare_cityscapes(*scene(*size), tile_width=200)
    _, label, prediction = tiles_of(panel, 3, 200, 100)
    for tile, colors in ((label, (ROAD, SKY, CAR, (0, 0, 0))), (prediction, (ROAD, SKY, BUS))):
        assert {tuple(c) for c in tile.reshape(-1, 3).tolist()} == set(colors)
    assert count(label, CAR) == pytest.approx(200 * 100 * 0.25 * 0.2, rel=0.02)


def test_the_legend_shows_the_classes_in_the_maps_and_no_others():
    panel = compare_cityscapes(*scene(), tile_width=200)
    legend = panel[np.flatnonzero((panel[:, 112] == (10, 200, 30)).all(-1))[-1] + 1 :]
    for color in (ROAD, SKY, CAR, BUS, (0, 0, 0)):
        assert count(legend, color) >= 14 * 14 - 20
    assert not has(legend, (220, 20, 60)) and not has(legend, (107, 142, 35))  # person, vegetation
    image, label, _ = scene()
    all_labeled = np.where(label == 255, 0, label).astype(np.uint8)
    panel = compare_cityscapes(image, all_labeled, all_labeled, tile_width=200)
    assert not has(panel, (0, 0, 0)) and not has(panel, BUS)


def test_without_a_label():
    image, _, prediction = scene()
    tiles = tiles_of(compare_cityscapes(image, None, prediction, tile_width=100), 2, 100, 50)
    assert tuple(tiles[1][30, 30]) == BUS


def test_a_prediction_of_another_size_than_the_image():
    image, label, prediction = scene(100, 200)
    panel = compare_cityscapes(image, label[::2, ::2], prediction[::2, ::2], tile_width=200)
    assert panel.shape == compare_cityscapes(image, label, prediction, tile_width=200).shape


def test_panels_are_deterministic_and_do_not_change_their_input():
    image, label, prediction = scene()
    before = image.copy(), label.copy(), prediction.copy()
    first = compare_cityscapes(image, label, prediction, title="a")
    assert np.array_equal(first, compare_cityscapes(image, label, prediction, title="a"))
    for now, then in zip((image, label, prediction), before, strict=True):
        assert np.array_equal(now, then)


def test_titles_and_captions_are_drawn_within_the_panel():
    plain = Tile("", np.full((20, 60, 3), 77, np.uint8))
    blank = side_by_side([plain], tile_width=60)
    assert set(np.unique(blank)) == {77, 255}
    captioned = side_by_side([Tile("image", plain.image)], tile_width=60)
    assert captioned.shape == blank.shape and not np.array_equal(captioned, blank)
    long = "a_very_long_file_name_" * 20
    titled = side_by_side([Tile(long, plain.image)], title=long, tile_width=60)
    assert titled.shape[0] > blank.shape[0] and titled.shape[1] == blank.shape[1]
    # margins stay white, and no text covers the image
    assert (titled[:, :12] == 255).all() and (titled[:, -12:] == 255).all()
    assert count(titled, (77, 77, 77)) == 20 * 60


def test_a_legend_wraps():
    tile = Tile("", np.zeros((10, 10, 3), np.uint8))
    legend = legend_of(CITYSCAPES_19, range(19))
    wide = side_by_side([tile], legend=legend, tile_width=1500)
    narrow = side_by_side([tile], legend=legend, tile_width=300)
    assert narrow.shape[0] - 300 > wide.shape[0] - 1500
    assert has(narrow, (119, 11, 32))  # bicycle, the last
    assert (narrow[:, -12:] == 255).all()


def test_names_and_colors_are_those_of_the_label_space():
    colors = ((10, 20, 30), (40, 50, 60), (70, 80, 90))
    names = ("water", "field", "roof")
    space = LabelSpace("aerial", names, colors, (("water",), ("field",), ("roof",)), ignore=9)
    assert legend_of(space, [2, 9]) == [
        LegendEntry("roof", (70, 80, 90)),
        LegendEntry("ignored", (0, 0, 0)),
    ]
    label = np.repeat(np.array([[0, 1, 9]], np.uint8), 20, 1).repeat(30, 0)
    prediction = np.where(label == 9, 2, label).astype(np.uint8)
    panel = compare(np.full((30, 60, 3), 200, np.uint8), label, prediction, space, tile_width=60)
    rows = np.flatnonzero((panel[:, 40] == 200).all(-1))
    tiles, legend = panel[rows[0] : rows[-1] + 1], panel[rows[-1] + 1 :]
    assert count(tiles[:, 84:144], (10, 20, 30)) == 20 * 30  # the first third of the label
    assert count(tiles[:, 156:216], (70, 80, 90)) == 20 * 30  # the last third of the prediction
    assert all(has(legend, color) for color in (*colors, (0, 0, 0)))
    assert not has(panel, CITYSCAPES_19.colors[1])


def test_points_are_drawn_into_a_copy():
    image = np.full((20, 30, 3), 77, np.uint8)
    drawn = draw_points(image, np.array([[8.2, 5.0]], np.float32))
    assert (image == 77).all()
    assert tuple(drawn[5, 8]) == (255, 214, 0)  # row y, column x
    rows, columns = np.nonzero((drawn != 77).any(-1))
    assert rows.min() >= 1 and rows.max() <= 9 and columns.min() >= 4 and columns.max() <= 12


def test_tiles_of_several_shapes():
    tall, wide = (np.full(shape, 90, np.uint8) for shape in ((80, 40, 3), (20, 80, 3)))
    panel = side_by_side([Tile("tall", tall), Tile("wide", wide)], tile_width=40)
    assert panel.shape[1] == 2 * 52 + 12
    assert count(panel[:, :52], (90, 90, 90)) == 80 * 40
    assert count(panel[:, 52:], (90, 90, 90)) == 10 * 40
