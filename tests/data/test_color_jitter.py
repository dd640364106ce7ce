"""Color jitter against formulas, torchvision and the standard library."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch

from clouds.data.augmentation import ColorJitterTransform, SSDColorJitter


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def max_difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_brightness_and_contrast_by_formula():
    image = noise(30, 40).astype(float)
    bright = ColorJitterTransform(brightness=-31.5).apply_image(image.astype(np.uint8))
    assert max_difference(bright, np.clip(image - 31.5, 0, 255)) <= 1
    for factor in (0.5, 1.3):
        changed = ColorJitterTransform(contrast=factor).apply_image(image.astype(np.uint8))
        assert max_difference(changed, np.clip(image * factor, 0, 255)) <= 1


def test_contrast_agrees_with_brightness_of_torchvision():
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = noise(30, 40)
    expected = functional.adjust_brightness(torch.from_numpy(image).permute(2, 0, 1), 1.4)
    assert (
        max_difference(
            ColorJitterTransform(contrast=1.4).apply_image(image), expected.permute(1, 2, 0).numpy()
        )
        <= 1
    )


@pytest.mark.parametrize("shift", [-18, -5, 11, 18])
def test_hue_agrees_with_torchvision(shift):
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = noise(60, 80)
    as_float = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    expected = functional.adjust_hue(as_float, shift / 180).permute(1, 2, 0).numpy() * 255
    difference = np.abs(ColorJitterTransform(hue=shift).apply_image(image) - expected)
    # rounding hue and saturation to 8 bits costs a few levels for saturated colors
    assert difference.mean() < 1.5
    assert difference.max() < 10


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_saturation_agrees_with_the_standard_library(factor):
    image = noise(12, 15)
    changed = ColorJitterTransform(saturation=factor).apply_image(image)
    for before, after in zip(image.reshape(-1, 3), changed.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255))
        expected = colorsys.hsv_to_rgb(hue, min(1.0, saturation * factor), value)
        assert np.abs(np.array(expected) * 255 - after).max() < 8


def test_gray_has_no_hue_and_no_saturation_to_change():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1)
    changed = ColorJitterTransform(saturation=1.5, hue=7).apply_image(gray)
    assert np.array_equal(changed, gray)


@pytest.mark.parametrize("first", [True, False])
def test_contrast_first_or_last(first):
    image = noise(30, 40)
    contrast = ColorJitterTransform(contrast=1.5).apply_image
    rest = ColorJitterTransform(saturation=0.6, hue=7).apply_image
    both = ColorJitterTransform(contrast=1.5, saturation=0.6, hue=7, contrast_first=first)
    expected, other = rest(contrast(image)), contrast(rest(image))
    if not first:
        expected, other = other, expected
    assert np.array_equal(both.apply_image(image), expected)
    assert not np.array_equal(both.apply_image(image), other)


def test_color_jitter_with_default_parameters_changes_nothing():
    image = noise(30, 40)
    assert ColorJitterTransform().apply_image(image) is image  # as documented, not a copy


def test_color_jitter_leaves_labels_and_coordinates_alone():
    transform = ColorJitterTransform(brightness=20.0, hue=5)
    label, coords = noise(16, 16)[..., 0], np.array([[3.0, 4.0]])
    assert np.array_equal(transform.apply_segmentation(label), label)
    assert np.array_equal(transform.apply_coords(coords), coords)


def test_distribution_of_the_color_jitter():
    rng = np.random.default_rng(0)
    augmentation = SSDColorJitter()
    drawn = [augmentation.get_transform(noise(1, 1), rng) for _ in range(6000)]
    for values, low, high, off in (
        ([j.brightness for j in drawn], -32, 32, 0),
        ([j.contrast for j in drawn], 0.5, 1.5, 1),
        ([j.saturation for j in drawn], 0.5, 1.5, 1),
        ([j.hue for j in drawn], -18, 18, 0),
    ):
        values = np.array(values)
        used = values[values != off]
        # the 37 values of the hue include 0
        assert abs(len(used) / len(values) - 0.5) < 0.04
        assert low <= used.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < used.max() <= high
        assert abs(used.mean() - (low + high) / 2) < 0.02 * (high - low)
    assert abs(np.mean([j.contrast_first for j in drawn]) - 0.5) < 0.03
