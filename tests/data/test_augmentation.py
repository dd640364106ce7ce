from __future__ import annotations

import colorsys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clouds.data.augmentation import (
    AxisPart,
    Geometry,
    GeometryRange,
    Jitter,
    JitterRange,
    resize_image,
    resize_label,
)
from clouds.data.structures import masks_from_label


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def blocks(height: int, width: int, seed: int = 0) -> np.ndarray:
    ids = np.random.default_rng(seed).integers(0, 19, (height // 8, width // 8), dtype=np.uint8)
    return ids.repeat(8, 0).repeat(8, 1)


def far(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# ---------------------------------------------------------------- resize


@pytest.mark.parametrize("size", [(48, 64), (60, 91), (51, 70)])
def test_enlarging_is_bilinear_at_pixel_centres(size):
    image = noise(40, 50)
    as_float = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = F.interpolate(as_float, size=size, mode="bilinear", align_corners=False)
    assert far(resize_image(image, size), expected[0].permute(1, 2, 0).round().numpy()) <= 1


@pytest.mark.parametrize("factor", [2, 4])
def test_shrinking_takes_the_mean_of_what_is_covered(factor):
    image = noise(40, 64)
    size = (40 // factor, 64 // factor)
    expected = image.reshape(size[0], factor, size[1], factor, 3).mean((1, 3))
    assert far(resize_image(image, size), expected) <= 1


def test_shrinking_by_no_whole_factor_agrees_with_pillow():
    # Pillow's box filter takes whole pixels only, so it agrees up to pixels cut in two
    y, x = np.mgrid[:80, :100]
    image = (128 + 100 * np.sin(x / 9)[..., None] * np.cos(y / 7)[..., None]).repeat(3, -1)
    image = image.astype(np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((73, 55), Image.Resampling.BOX))
    assert np.abs(resize_image(image, (55, 73)).astype(int) - expected).mean() < 2


@pytest.mark.parametrize("size", [(48, 64), (61, 91), (23, 31), (37, 47)])
def test_label_pixels_take_the_id_at_their_centre(size):
    label = noise(40, 50)[..., 0]
    resized = resize_label(label, size)
    assert resized.shape == size
    # centres in units of 1 / (2 n) source pixels, so that this is exact
    rows, columns = ((2 * np.arange(n) + 1) * m for n, m in zip(size, (40, 50), strict=True))
    expected = label[rows // (2 * size[0])][:, columns // (2 * size[1])]
    # a centre that falls on the border of two pixels may take either
    clear = (rows % (2 * size[0]) != 0)[:, None] & (columns % (2 * size[1]) != 0)
    assert clear.any()
    assert np.array_equal(resized[clear], expected[clear])


def test_same_size_is_left_alone():
    image, label = noise(10, 12), blocks(16, 16)
    assert np.array_equal(resize_image(image, (10, 12)), image)
    assert np.array_equal(resize_label(label, (16, 16)), label)


# ---------------------------------------------------------------- only what the crop shows


def black_and_white(height: int, width: int, seed: int = 0) -> np.ndarray:
    """The picture in which a displacement shows most."""
    return (noise(height, width, seed) > 127).astype(np.uint8) * 255


@pytest.mark.parametrize("scale", [(0.3, 0.99), (1.01, 2.0), (2.0, 5.0)])
def test_a_crop_is_the_crop_of_the_whole_to_a_grey_level(scale):
    rng = np.random.default_rng(5)
    changed = []
    for i in range(25):
        height, width = int(rng.integers(90, 400)), int(rng.integers(700, 1500))
        ranges = GeometryRange((0, 0), scale, (48, 80), "uniform", flip=False)
        geometry = ranges.draw((height, width), rng)
        top, left = geometry.top, geometry.left
        image = black_and_white(height, width, i)
        whole = resize_image(image, geometry.resized)[top : top + 48, left : left + 80]
        crop = geometry.apply_image(image)[: whole.shape[0], : whole.shape[1]]
        assert far(crop, whole) <= 1, (height, width, geometry)
        changed.append((crop != whole).mean())
    # where there is no exact part of the whole, not all of the axis is taken
    assert 0 < np.mean(changed) < 0.2


def test_the_label_of_a_crop_is_the_crop_of_the_whole_label():
    rng = np.random.default_rng(6)
    for i in range(200):
        height, width = (int(n) for n in rng.integers(20, 420, 2))
        ranges = GeometryRange((0, 0), (0.3, 4.0), (48, 80), "uniform", flip=bool(i % 2))
        geometry = ranges.draw((height, width), rng)
        top, left = geometry.top, geometry.left
        label = noise(height, width, i)[..., 0]
        whole = resize_label(label, geometry.resized)[top : top + 48, left : left + 80]
        if geometry.flip:
            whole = whole[:, ::-1]
        crop = geometry.apply_label(label)[: whole.shape[0]]
        crop = crop[:, -whole.shape[1] :] if geometry.flip else crop[:, : whole.shape[1]]
        assert np.array_equal(crop, whole)


def test_parts_begin_where_pixels_meet_and_hold_what_is_asked_for():
    rng = np.random.default_rng(7)
    lengths = []
    for _ in range(500):
        source = int(rng.integers(700, 2100))
        target = round(source * rng.uniform(0.5, 2.0))
        start = int(rng.integers(0, max(1, target - 768)))
        stop = min(start + 768, target)
        part = AxisPart.around(source, target, start, stop)
        per_pixel = Fraction(source, target)
        assert abs(part.first * per_pixel - part.begin) <= Fraction(1, 600)
        assert 0 <= part.begin <= start * per_pixel
        assert stop * per_pixel <= part.end <= source
        # a pixel of either neighbor, or the border of the image
        assert part.first == 0 or part.first < start
        assert part.end == source or part.end >= stop * per_pixel + 1
        lengths.append((part.end - part.begin) / float(min(source, 768 * per_pixel)))
    # what is read beyond the window
    assert np.mean(lengths) < 1.4


def test_a_crop_at_its_own_size_is_copied():
    image = noise(40, 50)
    geometry = Geometry((40, 50), top=3, left=4, crop=(20, 30), flip=False)
    crop = geometry.apply_image(image)
    assert np.array_equal(crop, image[3:23, 4:34])
    assert not np.shares_memory(crop, image)


# ---------------------------------------------------------------- crop, pad, flip


def test_crop_by_hand():
    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    geometry = Geometry(resized=(4, 5), top=1, left=2, crop=(2, 3), flip=False)
    assert np.array_equal(geometry.apply_image(image), image[1:3, 2:5])
    assert np.array_equal(geometry.apply_label(image[..., 0]), image[1:3, 2:5, 0])
    mirrored = replace(geometry, flip=True)
    assert np.array_equal(mirrored.apply_image(image), image[1:3, 4:1:-1])
    assert np.array_equal(mirrored.apply_label(image[..., 0]), image[1:3, 4:1:-1, 0])


def test_padding_by_hand():
    image = np.full((2, 2, 3), 9, np.uint8)
    label = np.array([[1, 2], [3, 4]], np.uint8)
    geometry = Geometry(resized=(2, 2), top=0, left=0, crop=(3, 4), flip=False)
    assert geometry.apply_label(label).tolist() == [
        [1, 2, 255, 255],
        [3, 4, 255, 255],
        [255, 255, 255, 255],
    ]
    assert geometry.apply_image(image)[..., 0].tolist() == [[9, 9, 0, 0], [9, 9, 0, 0], [0] * 4]
    mirrored = replace(geometry, flip=True)
    assert mirrored.apply_label(label).tolist() == [
        [255, 255, 2, 1],
        [255, 255, 4, 3],
        [255, 255, 255, 255],
    ]


def test_image_and_label_stay_together():
    label = blocks(96, 160)
    image = label[..., None].repeat(3, -1) * 10
    ranges = GeometryRange((0, 0), (0.5, 2.0), (64, 100), "uniform", flip=True)
    rng = np.random.default_rng(0)
    for _ in range(40):
        geometry = ranges.draw((96, 160), rng)
        view, ids = geometry.apply_image(image)[..., 0], geometry.apply_label(label)
        assert view.shape == ids.shape == (64, 100)
        inside = ids != 255
        # blocks of one value: only at their borders does bilinear differ from nearest
        assert (view[inside] == ids[inside] * 10).mean() > 0.6
        assert not view[~inside].any()


def test_a_crop_larger_than_any_image_pads():
    ranges = GeometryRange((0, 0), (0.5, 1.0), (300, 200), "uniform", flip=False)
    geometry = ranges.draw((40, 60), np.random.default_rng(0))
    label = geometry.apply_label(np.full((40, 60), 3, np.uint8))
    assert label.shape == (300, 200)
    height, width = geometry.resized
    assert (label[:height, :width] == 3).all()
    assert (label == 3).sum() == height * width


def draws(count: int, size=(100, 200), **changes) -> list[Geometry]:
    ranges = GeometryRange((0, 0), (1.0, 1.0), (40, 60), "uniform", flip=True)
    ranges = replace(ranges, **changes)
    rng = np.random.default_rng(0)
    return [ranges.draw(size, rng) for _ in range(count)]


def test_uniform_positions_fill_the_room_on_both_axes():
    top = np.array([g.top for g in draws(4000)])
    left = np.array([g.left for g in draws(4000)])
    for offsets, room in ((top, 60), (left, 140)):
        assert offsets.min() == 0
        assert offsets.max() == room
        assert abs(offsets.mean() - room / 2) < 0.03 * room
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.05


def test_diagonal_positions_come_from_one_number():
    drawn = draws(2000, position="diagonal")
    # the share of the room above equals that on the left, up to rounding
    assert all(abs(g.top / 60 - g.left / 140) <= 0.5 / 60 + 0.5 / 140 for g in drawn)
    assert {0, 30, 60} <= {g.top for g in drawn}


def test_half_are_flipped_and_none_when_off():
    assert abs(np.mean([g.flip for g in draws(4000)]) - 0.5) < 0.03
    assert not any(g.flip for g in draws(200, flip=False))


def test_scales_are_uniform_in_their_range_and_keep_the_aspect():
    drawn = draws(4000, scale=(0.5, 2.0))
    factors = np.array([g.resized[0] / 100 for g in drawn])
    assert 0.5 <= factors.min() < 0.52
    assert 1.98 < factors.max() <= 2.0
    assert abs(factors.mean() - 1.25) < 0.03
    assert all(abs(g.resized[1] - 2 * g.resized[0]) <= 1 for g in drawn)


@pytest.mark.parametrize(
    "size,fitted",
    [
        ((1052, 1914), (1052, 1914)),  # as it is
        ((1080, 1920), (1052, 1870)),  # height binds: 1920 * 1052 / 1080 = 1870.2
        ((526, 957), (1052, 1914)),  # enlarged
        ((500, 2000), (478, 1914)),  # width binds: 500 * 1914 / 2000 = 478.5, to even
    ],
)
def test_working_size(size, fitted):
    assert draws(1, size=size, working=(1052, 1914))[0].resized == fitted


def test_same_seed_same_geometry():
    assert draws(50, scale=(0.5, 2.0)) == draws(50, scale=(0.5, 2.0))


# ---------------------------------------------------------------- color jitter


def test_brightness_and_contrast_by_formula():
    image = noise(30, 40).astype(float)
    bright = Jitter(brightness=-31.5).apply(image.astype(np.uint8))
    assert far(bright, np.clip(image - 31.5, 0, 255)) <= 1
    for factor in (0.5, 1.3):
        changed = Jitter(contrast=factor).apply(image.astype(np.uint8))
        assert far(changed, np.clip(image * factor, 0, 255)) <= 1


def test_contrast_is_what_torchvision_calls_brightness():
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = noise(30, 40)
    expected = functional.adjust_brightness(torch.from_numpy(image).permute(2, 0, 1), 1.4)
    assert far(Jitter(contrast=1.4).apply(image), expected.permute(1, 2, 0).numpy()) <= 1


@pytest.mark.parametrize("shift", [-18, -5, 11, 18])
def test_hue_agrees_with_torchvision(shift):
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = noise(60, 80)
    as_float = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    expected = functional.adjust_hue(as_float, shift / 180).permute(1, 2, 0).numpy() * 255
    difference = np.abs(Jitter(hue=shift).apply(image) - expected)
    # 8 bits of hue and saturation cost a few levels where colors are strong
    assert difference.mean() < 1.5
    assert difference.max() < 10


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_saturation_agrees_with_the_standard_library(factor):
    image = noise(12, 15)
    changed = Jitter(saturation=factor).apply(image)
    for before, after in zip(image.reshape(-1, 3), changed.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255))
        expected = colorsys.hsv_to_rgb(hue, min(1.0, saturation * factor), value)
        assert np.abs(np.array(expected) * 255 - after).max() < 8


@pytest.mark.parametrize("first", [True, False])
def test_contrast_first_or_last(first):
    image = noise(30, 40)
    contrast, rest = Jitter(contrast=1.5), Jitter(saturation=0.6, hue=7)
    both = Jitter(contrast=1.5, saturation=0.6, hue=7, contrast_first=first)
    steps = (contrast, rest) if first else (rest, contrast)
    assert np.array_equal(both.apply(image), steps[1].apply(steps[0].apply(image)))
    assert not np.array_equal(steps[0].apply(steps[1].apply(image)), both.apply(image))


def test_no_jitter_changes_nothing():
    image = noise(30, 40)
    assert np.array_equal(Jitter().apply(image), image)


def test_drawn_jitters():
    rng = np.random.default_rng(0)
    drawn = [JitterRange().draw(rng) for _ in range(6000)]
    for values, low, high, off in (
        ([j.brightness for j in drawn], -32, 32, 0),
        ([j.contrast for j in drawn], 0.5, 1.5, 1),
        ([j.saturation for j in drawn], 0.5, 1.5, 1),
        ([j.hue for j in drawn], -18, 18, 0),
    ):
        values = np.array(values)
        used = values[values != off]
        # hue's own 37 values include "off"
        assert abs(len(used) / len(values) - 0.5) < 0.04
        assert low <= used.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < used.max() <= high
        assert abs(used.mean() - (low + high) / 2) < 0.02 * (high - low)
    assert abs(np.mean([j.contrast_first for j in drawn]) - 0.5) < 0.03


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_masks_of_a_label(dtype):
    label = torch.tensor([[3, 3, 255], [0, 18, 3]], dtype=dtype)
    targets = masks_from_label(label)
    assert targets.labels.tolist() == [0, 3, 18]
    assert targets.labels.dtype == torch.int64
    assert targets.masks.dtype == torch.bool
    assert targets.masks.int().tolist() == [
        [[0, 0, 0], [1, 0, 0]],
        [[1, 1, 0], [0, 0, 1]],
        [[0, 0, 0], [0, 1, 0]],
    ]


def test_masks_of_a_label_to_be_ignored():
    targets = masks_from_label(torch.full((5, 7), 255, dtype=torch.uint8))
    assert targets.labels.shape == (0,)
    assert targets.labels.dtype == torch.int64
    assert targets.masks.shape == (0, 5, 7)
    assert targets.masks.dtype == torch.bool


def test_another_ignore_value():
    assert masks_from_label(torch.tensor([[0, 1]]), ignore=0).labels.tolist() == [1]
