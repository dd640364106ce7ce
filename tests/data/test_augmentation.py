"""Resizing, geometry and lists of augmentations."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fvcore.transforms.transform import Transform, VFlipTransform
from PIL import Image

from clouds.data.augmentation import (
    Augmentation,
    AugmentationList,
    RandomFlip,
    ResizeCropFlip,
    ResizeCropFlipTransform,
    SSDColorJitter,
    resize_image,
    resize_label,
    resize_range,
)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def blocks(height: int, width: int, seed: int = 0) -> np.ndarray:
    ids = np.random.default_rng(seed).integers(0, 19, (height // 8, width // 8), dtype=np.uint8)
    return ids.repeat(8, 0).repeat(8, 1)


def blank(size: tuple[int, int]) -> np.ndarray:
    """An image whose pixels do not matter, without memory for them."""
    return np.broadcast_to(np.uint8(0), (*size, 3))


def max_difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# ---------------------------------------------------------------- resize


@pytest.mark.parametrize("size", [(48, 64), (60, 91), (51, 70)])
def test_enlarging_is_bilinear_at_pixel_centers(size):
    image = noise(40, 50)
    as_float = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = F.interpolate(as_float, size=size, mode="bilinear", align_corners=False)
    assert (
        max_difference(resize_image(image, size), expected[0].permute(1, 2, 0).round().numpy()) <= 1
    )


@pytest.mark.parametrize("factor", [2, 4])
def test_shrinking_takes_the_mean_of_the_covered_pixels(factor):
    image = noise(40, 64)
    size = (40 // factor, 64 // factor)
    expected = image.reshape(size[0], factor, size[1], factor, 3).mean((1, 3))
    assert max_difference(resize_image(image, size), expected) <= 1


def test_shrinking_by_a_fractional_factor_agrees_with_pillow():
    # Pillow's box filter takes whole pixels only, so the results differ slightly
    y, x = np.mgrid[:80, :100]
    image = (128 + 100 * np.sin(x / 9)[..., None] * np.cos(y / 7)[..., None]).repeat(3, -1)
    image = image.astype(np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((73, 55), Image.Resampling.BOX))
    assert np.abs(resize_image(image, (55, 73)).astype(int) - expected).mean() < 2


@pytest.mark.parametrize("size", [(48, 64), (61, 91), (23, 31), (37, 47)])
def test_label_pixels_take_the_id_at_their_center(size):
    label = noise(40, 50)[..., 0]
    resized = resize_label(label, size)
    assert resized.shape == size
    # centers in units of 1 / (2 n) source pixels, so that this is exact
    rows, columns = ((2 * np.arange(n) + 1) * m for n, m in zip(size, (40, 50), strict=True))
    expected = label[rows // (2 * size[0])][:, columns // (2 * size[1])]
    # a center on the border of two pixels may take either
    clear = (rows % (2 * size[0]) != 0)[:, None] & (columns % (2 * size[1]) != 0)
    assert clear.any()
    assert np.array_equal(resized[clear], expected[clear])


def test_the_same_size_changes_nothing():
    image, label = noise(10, 12), blocks(16, 16)
    assert np.array_equal(resize_image(image, (10, 12)), image)
    assert np.array_equal(resize_label(label, (16, 16)), label)


# ---------------------------------------------------------------- resizing a window


def black_and_white(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An image in which a displacement changes values most."""
    return (noise(height, width, seed) > 127).astype(np.uint8) * 255


@pytest.mark.parametrize("scale", [(0.3, 0.99), (1.01, 2.0), (2.0, 5.0)])
def test_a_crop_differs_from_that_of_the_whole_image_by_one_gray_level_at_most(scale):
    rng = np.random.default_rng(5)
    changed = []
    for i in range(25):
        height, width = int(rng.integers(90, 400)), int(rng.integers(700, 1500))
        augmentation = ResizeCropFlip((0, 0), scale, (48, 80), "uniform", flip=False)
        image = black_and_white(height, width, i)
        transform = augmentation.get_transform(image, rng)
        top, left = transform.top, transform.left
        whole = resize_image(image, transform.resized_size)[top : top + 48, left : left + 80]
        crop = transform.apply_image(image)[: whole.shape[0], : whole.shape[1]]
        assert max_difference(crop, whole) <= 1, (height, width, transform)
        changed.append((crop != whole).mean())
    # some windows do not begin exactly at a pixel border
    assert 0 < np.mean(changed) < 0.2


def test_the_label_crop_equals_that_of_the_whole_label():
    rng = np.random.default_rng(6)
    for i in range(200):
        height, width = (int(n) for n in rng.integers(20, 420, 2))
        augmentation = ResizeCropFlip((0, 0), (0.3, 4.0), (48, 80), "uniform", flip=bool(i % 2))
        transform = augmentation.get_transform(blank((height, width)), rng)
        top, left = transform.top, transform.left
        label = noise(height, width, i)[..., 0]
        whole = resize_label(label, transform.resized_size)[top : top + 48, left : left + 80]
        if transform.flip:
            whole = whole[:, ::-1]
        crop = transform.apply_segmentation(label)[: whole.shape[0]]
        crop = crop[:, -whole.shape[1] :] if transform.flip else crop[:, : whole.shape[1]]
        assert np.array_equal(crop, whole)


def test_windows_begin_at_pixel_borders_and_contain_the_requested_range():
    rng = np.random.default_rng(7)
    lengths = []
    for _ in range(500):
        source = int(rng.integers(700, 2100))
        target = round(source * rng.uniform(0.5, 2.0))
        start = int(rng.integers(0, max(1, target - 768)))
        stop = min(start + 768, target)
        window, target_begin = resize_range(source, target, start, stop)
        begin, end = window.start, window.stop
        per_pixel = Fraction(source, target)
        assert abs(target_begin * per_pixel - begin) <= Fraction(1, 600)
        assert 0 <= begin <= start * per_pixel
        assert stop * per_pixel <= end <= source
        # a neighboring pixel at either end, or the border of the image
        assert target_begin == 0 or target_begin < start
        assert end == source or end >= stop * per_pixel + 1
        lengths.append((end - begin) / float(min(source, 768 * per_pixel)))
    # few pixels are read beyond the window
    assert np.mean(lengths) < 1.4


def test_a_crop_without_resizing_is_a_copy():
    image = noise(40, 50)
    crop = fixed((40, 50), top=3, left=4, crop_size=(20, 30)).apply_image(image)
    assert np.array_equal(crop, image[3:23, 4:34])
    assert not np.shares_memory(crop, image)


# ---------------------------------------------------------------- crop, pad, flip


def fixed(size: tuple[int, int], **changes) -> ResizeCropFlipTransform:
    """A transform without resizing."""
    values = {"source_size": size, "resized_size": size, "top": 0, "left": 0, "flip": False}
    return ResizeCropFlipTransform(**{**values, **changes})


def test_crop_by_hand():
    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    transform = fixed((4, 5), top=1, left=2, crop_size=(2, 3))
    assert np.array_equal(transform.apply_image(image), image[1:3, 2:5])
    assert np.array_equal(transform.apply_segmentation(image[..., 0]), image[1:3, 2:5, 0])
    mirrored = replace(transform, flip=True)
    assert np.array_equal(mirrored.apply_image(image), image[1:3, 4:1:-1])
    assert np.array_equal(mirrored.apply_segmentation(image[..., 0]), image[1:3, 4:1:-1, 0])


def test_padding_by_hand():
    image = np.full((2, 2, 3), 9, np.uint8)
    label = np.array([[1, 2], [3, 4]], np.uint8)
    transform = fixed((2, 2), crop_size=(3, 4))
    assert transform.apply_segmentation(label).tolist() == [
        [1, 2, 255, 255],
        [3, 4, 255, 255],
        [255, 255, 255, 255],
    ]
    assert transform.apply_image(image)[..., 0].tolist() == [[9, 9, 0, 0], [9, 9, 0, 0], [0] * 4]
    mirrored = replace(transform, flip=True)
    assert mirrored.apply_segmentation(label).tolist() == [
        [255, 255, 2, 1],
        [255, 255, 4, 3],
        [255, 255, 255, 255],
    ]


def test_image_and_label_stay_together():
    label = blocks(96, 160)
    image = label[..., None].repeat(3, -1) * 10
    augmentation = ResizeCropFlip((0, 0), (0.5, 2.0), (64, 100), "uniform", flip=True)
    rng = np.random.default_rng(0)
    for _ in range(40):
        transform = augmentation.get_transform(image, rng)
        view, ids = transform.apply_image(image)[..., 0], transform.apply_segmentation(label)
        assert view.shape == ids.shape == (64, 100)
        inside = ids != 255
        # inside of the blocks, bilinear and nearest interpolation agree
        assert (view[inside] == ids[inside] * 10).mean() > 0.6
        assert not view[~inside].any()


def test_a_crop_larger_than_any_image_pads():
    augmentation = ResizeCropFlip((0, 0), (0.5, 1.0), (300, 200), "uniform", flip=False)
    transform = augmentation.get_transform(blank((40, 60)), np.random.default_rng(0))
    label = transform.apply_segmentation(np.full((40, 60), 3, np.uint8))
    assert label.shape == (300, 200)
    height, width = transform.resized_size
    assert (label[:height, :width] == 3).all()
    assert (label == 3).sum() == height * width


@pytest.mark.parametrize("flip", [False, True])
def test_coordinates_follow_the_pixels(flip):
    # a bright square of 8x8 pixels, by its corners; enlarged by 2 and 1.5, cropped by (10, 6)
    image = np.zeros((40, 60, 3), np.uint8)
    image[16:24, 20:28] = 255
    transform = ResizeCropFlipTransform((40, 60), (80, 90), 10, 6, (60, 70), flip)
    (left, top), (right, bottom) = transform.apply_coords(np.array([[20.0, 16.0], [28.0, 24.0]]))
    assert (top, bottom) == (22, 38)
    assert (left, right) == ((46, 34) if flip else (24, 36))
    rows, columns = np.nonzero(transform.apply_image(image)[..., 0] > 127)
    assert (rows.min(), rows.max() + 1) == (top, bottom)
    assert (columns.min(), columns.max() + 1) == (min(left, right), max(left, right))


def draws(count: int, size=(100, 200), **changes) -> list[ResizeCropFlipTransform]:
    augmentation = ResizeCropFlip((0, 0), (1.0, 1.0), (40, 60), "uniform", flip=True)
    augmentation = replace(augmentation, **changes)
    rng = np.random.default_rng(0)
    return [augmentation.get_transform(blank(size), rng) for _ in range(count)]


def test_uniform_positions_cover_both_axes_independently():
    top = np.array([g.top for g in draws(4000)])
    left = np.array([g.left for g in draws(4000)])
    for offsets, room in ((top, 60), (left, 140)):
        assert offsets.min() == 0
        assert offsets.max() == room
        assert abs(offsets.mean() - room / 2) < 0.03 * room
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.05


def test_diagonal_positions_share_one_random_number():
    drawn = draws(2000, position="diagonal")
    # the share of the room above equals that on the left, up to rounding
    assert all(abs(g.top / 60 - g.left / 140) <= 0.5 / 60 + 0.5 / 140 for g in drawn)
    assert {0, 30, 60} <= {g.top for g in drawn}


def test_half_are_flipped_and_none_without_flip():
    assert abs(np.mean([g.flip for g in draws(4000)]) - 0.5) < 0.03
    assert not any(g.flip for g in draws(200, flip=False))


def test_scales_are_uniform_in_their_range_and_keep_the_aspect():
    drawn = draws(4000, scale_range=(0.5, 2.0))
    factors = np.array([g.resized_size[0] / 100 for g in drawn])
    assert 0.5 <= factors.min() < 0.52
    assert 1.98 < factors.max() <= 2.0
    assert abs(factors.mean() - 1.25) < 0.03
    assert all(abs(g.resized_size[1] - 2 * g.resized_size[0]) <= 1 for g in drawn)


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
    assert draws(1, size=size, working_size=(1052, 1914))[0].resized_size == fitted


@pytest.mark.parametrize("working_size", [(0, 1914), (1052, 0)])
def test_a_working_size_of_0_in_either_place_is_that_of_the_image(working_size):
    assert draws(1, size=(70, 90), working_size=working_size)[0].resized_size == (70, 90)


def test_drawn_transforms_move_coordinates_by_their_scale_and_corner():
    for drawn in draws(20, scale_range=(2.0, 2.0)):
        ((x, y),) = drawn.apply_coords(np.array([[70.0, 40.0]]))
        assert y == 80 - drawn.top
        assert x == (60 - (140 - drawn.left) if drawn.flip else 140 - drawn.left)


def test_the_same_seed_gives_the_same_transforms():
    assert draws(50, scale_range=(0.5, 2.0)) == draws(50, scale_range=(0.5, 2.0))


# ---------------------------------------------------------------- lists of augmentations


class RandomVerticalFlip(Augmentation):
    """fvcore's transform in an augmentation of a user."""

    def get_transform(self, image, rng):
        rng.random()  # draws of its own
        return VFlipTransform(image.shape[0])


class GammaTransform(Transform):
    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def apply_image(self, img):
        return (255 * (img / 255) ** self.gamma).round().astype(np.uint8)

    def apply_segmentation(self, segmentation):
        return segmentation

    def apply_coords(self, coords):
        return coords


class RandomGamma(Augmentation):
    def get_transform(self, image, rng):
        assert image.shape[:2] == (64, 100)  # the image after the augmentations before it
        return GammaTransform(rng.uniform(0.5, 2.0))


RECIPE = (
    ResizeCropFlip((0, 0), (0.5, 2.0), (64, 100), "uniform", flip=True),
    SSDColorJitter(),
)


def augment(augmentations, seed: int) -> tuple[np.ndarray, np.ndarray]:
    image, label = noise(96, 160), blocks(96, 160)
    augmented, transforms = AugmentationList(augmentations)(image, np.random.default_rng(seed))
    assert np.array_equal(image, noise(96, 160))
    return augmented, transforms.apply_segmentation(label)


def test_a_list_applies_its_augmentations_in_order():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        image = noise(96, 160)
        geometry = RECIPE[0].get_transform(image, rng)
        expected = RECIPE[1].get_transform(image, rng).apply_image(geometry.apply_image(image))
        augmented, label = augment(RECIPE, seed)
        assert np.array_equal(augmented, expected)
        assert np.array_equal(label, geometry.apply_segmentation(blocks(96, 160)))


def test_an_appended_flip_changes_image_and_label_and_no_other_draws():
    for seed in range(20):
        image, label = augment(RECIPE, seed)
        flipped_image, flipped_label = augment((*RECIPE, RandomVerticalFlip()), seed)
        assert np.array_equal(flipped_image, image[::-1])
        assert np.array_equal(flipped_label, label[::-1])


def test_an_appended_gamma_changes_the_image_alone():
    for seed in range(20):
        image, label = augment(RECIPE, seed)
        changed, same_label = augment((*RECIPE, RandomGamma()), seed)
        assert np.array_equal(same_label, label)
        table = {tuple(pair) for pair in np.stack([image, changed], -1).reshape(-1, 2).tolist()}
        assert len(table) == len({value for value, _ in table})  # a function of the value
        assert not np.array_equal(changed, image)


def test_an_empty_list_changes_nothing():
    image, label = augment((), 0)
    assert np.array_equal(image, noise(96, 160))
    assert np.array_equal(label, blocks(96, 160))


def test_random_flip():
    image, rng = noise(6, 8), np.random.default_rng(0)
    results = [RandomFlip().get_transform(image, rng).apply_image(image) for _ in range(400)]
    flips = [np.array_equal(result, image[:, ::-1]) for result in results]
    assert 160 <= sum(flips) <= 240  # four standard deviations
    assert all(f or np.array_equal(r, image) for f, r in zip(flips, results, strict=True))
