"""Augmentations of mmsegmentation's recipes: short sides, class shares, distortion, padding."""

from __future__ import annotations

import colorsys
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clouds.config import ConfigError, get_cfg, load_config
from clouds.data.augmentation import (
    AugmentationList,
    RandomFlip,
    ResizeCropFlip,
    ResizeCropFlipTransform,
    has_mixed_classes,
    short_side_size,
)
from clouds.data.dataset_mapper import build_source_augmentations, build_student_augmentations
from clouds.data.photometric import PhotoMetricDistortion, PhotoMetricDistortionTransform
from clouds.data.structures import pad_to

SHORT_SIDES = tuple(512 * k // 10 for k in range(5, 21))


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def recipe(**changes):
    options = {
        "working_size": (0, 0),
        "scale_range": (1.0, 1.0),
        "crop_size": (32, 48),
        "position": "uniform",
        "flip": True,
    }
    return ResizeCropFlip(**(options | changes))


def drawn(augmentation, image, label=None, count=300):
    for seed in range(count):
        rng = np.random.default_rng(seed)
        if label is None:
            yield augmentation.get_transform(image, rng)
        else:
            yield augmentation.get_transform_with_label(image, label, rng)


# ---------------------------------------------------------------- short sides


@pytest.mark.parametrize(
    ("size", "short_side", "limit", "expected"),
    [
        ((1052, 1914), 256, 2048, (256, 466)),  # 1914 * 256 / 1052 = 465.76
        ((1052, 1914), 972, 2048, (972, 1768)),  # 1768.45
        ((1024, 2048), 1024, 2048, (1024, 2048)),
        ((760, 1280), 819, 2048, (819, 1379)),  # 1379.37
        ((100, 1000), 512, 2048, (205, 2048)),  # limited: 100 * 2048 / 1000 = 204.8
        ((1000, 100), 512, 0, (5120, 512)),
    ],
)
def test_size_by_short_side(size, short_side, limit, expected):
    assert short_side_size(*size, short_side, limit) == expected


def test_each_short_side_is_drawn_equally_often():
    image = np.broadcast_to(np.uint8(0), (1052, 1914, 3))
    augmentation = recipe(short_sides=SHORT_SIDES, long_side_max=2048, crop_size=(512, 512))
    sizes = Counter(t.resized_size for t in drawn(augmentation, image, count=1600))
    assert {size[0] for size in sizes} == set(SHORT_SIDES)
    assert SHORT_SIDES[:3] == (256, 307, 358) and SHORT_SIDES[-1] == 1024
    assert all(70 <= count <= 135 for count in sizes.values())  # 100 expected, 10 deviation


@pytest.mark.parametrize("size", [(20, 36), (33, 61), (90, 160), (120, 217)])
def test_the_crop_is_that_of_the_whole_image_resized_without_antialiasing(size):
    image = noise(90, 160)
    as_float = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    whole = F.interpolate(as_float, size=size, mode="bilinear", align_corners=False)
    whole = whole[0].permute(1, 2, 0).round().numpy().astype(int)
    for top, left in ((0, 0), (3, 11), (size[0] - 16, size[1] - 20)):
        transform = ResizeCropFlipTransform((90, 160), size, top, left, (16, 20), False, False)
        expected = whole[top : top + 16, left : left + 20]
        assert np.abs(transform.apply_image(image).astype(int) - expected).max() <= 2


def test_shrinking_with_antialiasing_differs():
    image = noise(90, 160)
    plain, smooth = (
        ResizeCropFlipTransform((90, 160), (20, 36), 0, 0, (20, 36), False, antialias)
        for antialias in (False, True)
    )
    assert plain.apply_image(image).std() > 1.5 * smooth.apply_image(image).std()


# ---------------------------------------------------------------- share of a class


@pytest.mark.parametrize(
    ("counts", "ratio", "mixed"),
    [
        ({0: 74, 1: 26}, 0.75, True),
        ({0: 75, 1: 25}, 0.75, False),  # not below
        ({0: 37, 1: 13, 255: 950}, 0.75, True),  # ignored pixels do not count
        ({0: 10, 1: 2, 255: 88}, 0.75, False),
        ({3: 100}, 0.99, False),
        ({255: 100}, 0.75, False),
    ],
)
def test_share_of_a_class_by_hand(counts, ratio, mixed):
    label = np.repeat(np.array(list(counts), np.uint8), list(counts.values()))
    assert has_mixed_classes(label.reshape(1, -1), ratio) is mixed


def test_crops_of_one_class_are_drawn_again():
    """Only crops near the border of two halves show both; the last of 11 is taken as it is."""
    label = np.zeros((32, 480), np.uint8)
    label[:, 240:] = 1
    image = noise(32, 480)
    plain = recipe(flip=False)
    careful = recipe(flip=False, cat_max_ratio=0.75)
    lefts = {
        name: np.array([t.left for t in drawn(augmentation, image, label, 600)])
        for name, augmentation in (("plain", plain), ("careful", careful))
    }
    # of 433 positions those with a share below 3/4: 240 - 36 < left < 240 - 12
    chance = 23 / 433
    shares = {name: np.mean((x > 204) & (x < 228)) for name, x in lefts.items()}
    assert shares["plain"] == pytest.approx(chance, abs=0.03)
    assert shares["careful"] == pytest.approx(1 - (1 - chance) ** 11, abs=0.06)  # 0.45


def test_draws_are_those_without_the_check_where_the_first_crop_is_mixed():
    label = np.random.default_rng(1).integers(0, 19, (90, 160), dtype=np.uint8)
    image = noise(90, 160)
    plain, careful = recipe(), recipe(cat_max_ratio=0.75)
    assert list(drawn(plain, image, label, 30)) == list(drawn(careful, image, label, 30))
    assert list(drawn(plain, image, None, 30)) == list(drawn(careful, image, None, 30))


def test_the_label_in_a_list_is_that_of_the_augmentations_before():
    """After a flip the class on the left is on the right."""
    label = np.zeros((32, 480), np.uint8)
    label[:, 470:] = 1  # at the right edge only
    augmentations = AugmentationList((RandomFlip(), recipe(flip=False, cat_max_ratio=0.9)))
    image = label[..., None].repeat(3, 2)
    mixed = 0
    for seed in range(100):
        out, transforms = augmentations(image, np.random.default_rng(seed), label)
        cropped = transforms.apply_segmentation(label)
        np.testing.assert_array_equal(out[..., 0], cropped)
        mixed += has_mixed_classes(cropped, 0.9)
    # 5 to 10 columns of class 1: 6 of 433 positions; at the other edge after a flip
    assert mixed / 100 == pytest.approx(1 - (1 - 6 / 433) ** 11, abs=0.12)


# ---------------------------------------------------------------- photometric distortion


def test_values_are_truncated_by_hand():
    image = np.array([[[10, 100, 200]]], np.uint8)
    apply = PhotoMetricDistortionTransform.apply_image
    cases = [
        ({"brightness": -10.6}, [0, 89, 189]),
        ({"brightness": 31.9}, [41, 131, 231]),
        ({"contrast": 1.29}, [12, 129, 255]),  # 12.9, 129, 258
        ({"brightness": 0.9, "contrast": 0.5}, [5, 50, 100]),  # 10, 100, 200 first
    ]
    for options, expected in cases:
        assert apply(PhotoMetricDistortionTransform(**options), image).ravel().tolist() == expected


@pytest.mark.parametrize("contrast_first", [True, False])
def test_distortion_against_opencv_step_by_step(contrast_first):
    image = noise(40, 30, 3)
    transform = PhotoMetricDistortionTransform(12.3, 1.37, 0.71, -13, contrast_first)

    def scaled(pixels, alpha, beta=0.0):
        return np.clip(pixels.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    expected = scaled(image, 1, 12.3)[..., ::-1].copy()  # BGR, as OpenCV's files
    if contrast_first:
        expected = scaled(expected, 1.37)
    hsv = cv2.cvtColor(expected, cv2.COLOR_BGR2HSV)
    hsv[..., 1] = scaled(hsv[..., 1], 0.71)
    expected = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    hsv = cv2.cvtColor(expected, cv2.COLOR_BGR2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) - 13) % 180
    expected = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if not contrast_first:
        expected = scaled(expected, 1.37)
    np.testing.assert_array_equal(transform.apply_image(image), expected[..., ::-1])


def test_hue_by_the_standard_library():
    """A rotation by 30 degrees, 15 of OpenCV's units."""
    image = np.array([[[200, 60, 20], [20, 120, 240], [90, 200, 40]]], np.uint8)
    found = PhotoMetricDistortionTransform(hue=15).apply_image(image)[0]
    for pixel, ours in zip(image[0], found, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
        expected = 255 * np.array(colorsys.hsv_to_rgb((h + 30 / 360) % 1, s, v))
        assert np.abs(ours - expected).max() <= 4  # hues in steps of two degrees


def test_distribution_of_the_distortion():
    image = noise(2, 2)
    transforms = [
        PhotoMetricDistortion().get_transform(image, np.random.default_rng(seed))
        for seed in range(3000)
    ]
    neutral = {"brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0}
    ranges = {"brightness": (-32, 32), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5)}
    for name, value in neutral.items():
        values = np.array([getattr(t, name) for t in transforms])
        share = 0.5 + (0.5 / 36 if name == "hue" else 0)
        assert np.mean(values == value) == pytest.approx(share, abs=0.03)
        if name in ranges:
            low, high = ranges[name]
            changed = values[values != value]
            assert low <= changed.min() < low + (high - low) / 50
            assert high >= changed.max() > high - (high - low) / 50
            assert changed.mean() == pytest.approx((low + high) / 2, abs=(high - low) / 40)
    assert {t.hue for t in transforms} == set(range(-18, 18))
    assert np.mean([t.contrast_first for t in transforms]) == pytest.approx(0.5, abs=0.03)


def test_labels_do_not_change():
    label = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert PhotoMetricDistortionTransform(9.0, 1.2, 0.8, 7).apply_segmentation(label) is label


# ---------------------------------------------------------------- padding, config


def test_without_padding_a_small_image_keeps_its_size():
    image, label = noise(20, 100), np.full((20, 100), 7, np.uint8)
    for transform in drawn(recipe(pad=False), image, count=20):
        assert transform.apply_image(image).shape == (20, 48, 3)
        assert transform.apply_segmentation(label).tolist() == [[7] * 48] * 20


def test_pad_to_by_hand():
    image = torch.ones(1, 2, 3)
    assert pad_to(image, (3, 4)).tolist() == [[[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]]
    assert pad_to(image, (1, 5)).tolist() == [[[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]]
    assert pad_to(image, (2, 3)) is image


RECIPE = [
    *("INPUT.SHORT_SIDES", SHORT_SIDES, "INPUT.LONG_SIDE_MAX", 2048),
    *("INPUT.CROP.SIZE", (512, 512), "INPUT.CROP.CAT_MAX_RATIO", 0.75),
    *("INPUT.CROP.PADDING", "mean", "INPUT.COLOR_AUG_SSD", False),
    *("INPUT.PHOTOMETRIC_DISTORTION", True),
]


def test_the_list_of_a_recipe():
    cfg = load_config(None, RECIPE)
    crop, color = build_source_augmentations(cfg).augmentations
    assert crop == recipe(
        crop_size=(512, 512),
        scale_range=(0.5, 2.0),
        short_sides=SHORT_SIDES,
        long_side_max=2048,
        cat_max_ratio=0.75,
        pad=False,
    )
    assert isinstance(color, PhotoMetricDistortion)
    (student,) = build_student_augmentations(cfg).augmentations
    assert isinstance(student, PhotoMetricDistortion)


def test_the_published_list_has_none_of_it():
    crop, _ = build_source_augmentations(get_cfg()).augmentations
    options = (crop.short_sides, crop.long_side_max, crop.cat_max_ratio, crop.pad)
    assert options == ((), 0, 1.0, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["INPUT.PHOTOMETRIC_DISTORTION", True], "set INPUT.COLOR_AUG_SSD False"),
        (
            ["INPUT.SHORT_SIDES", (256, 512), "INPUT.LONG_SIDE_MAX", 300],
            "must be 0, or at least 512",
        ),
        (
            ["INPUT.SHORT_SIDES", (256,), "INPUT.INITIAL_HEIGHT", 9, "INPUT.INITIAL_WIDTH", 9],
            "replaces INPUT.INITIAL_HEIGHT",
        ),
        (["INPUT.SHORT_SIDES", (0,)], "greater than 0"),
        (["INPUT.CROP.CAT_MAX_RATIO", 0], "between 0.01 and 1"),
        (["INPUT.CROP.PADDING", "white"], "one of 'black', 'mean'"),
    ],
)
def test_bad_values_are_refused(words, message):
    with pytest.raises(ConfigError) as error:
        load_config(None, words)
    assert message in str(error.value)
