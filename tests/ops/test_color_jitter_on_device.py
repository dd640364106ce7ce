"""Color jitter on the device: by hand, against the loader's transform, and in the model's input."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from tiny_model import tiny_config

from clouds.config import load_config
from clouds.data.augmentation import AugmentationList, ColorJitterTransform, SSDColorJitter
from clouds.data.dataset_mapper import (
    GeneratedMapper,
    SourceMapper,
    build_generated_augmentations,
    build_source_augmentations,
    build_student_augmentations,
)
from clouds.data.datasets import get_dataset
from clouds.data.structures import Domain, Record
from clouds.modeling.build import build_seeded
from clouds.ops.color_jitter import jitter_colors


def jitter_pixel(rgb, **parameters):
    image = torch.tensor(rgb, dtype=torch.uint8).view(3, 1, 1)
    return jitter_colors(image, ColorJitterTransform(**parameters)).flatten().tolist()


@pytest.mark.parametrize(
    ("rgb", "parameters", "expected"),
    [
        ((200, 100, 50), {"brightness": 10.4}, (210, 110, 60)),
        ((250, 100, 5), {"brightness": -10.0}, (240, 90, 0)),
        ((250, 100, 50), {"brightness": 10.0, "contrast": 0.5}, (128, 55, 30)),  # 255 * 0.5
        # saturation 127.5 of 255, rounded to 128, times 0.5: 200 * (1 - 64 / 255) = 149.8
        ((200, 100, 100), {"saturation": 0.5}, (200, 150, 150)),
        ((200, 100, 100), {"saturation": 3.0}, (200, 0, 0)),
        ((255, 0, 0), {"hue": 60}, (0, 255, 0)),  # 120 degrees
        ((255, 0, 0), {"hue": -30}, (255, 0, 255)),
        ((0, 0, 200), {"hue": 90}, (200, 200, 0)),
        ((70, 70, 70), {"hue": 7, "saturation": 1.4}, (70, 70, 70)),
        # 255, 160, 160: saturation 95, times 0.5 and rounded 48: 255 * (1 - 48 / 255)
        ((160, 80, 80), {"contrast": 2.0, "saturation": 0.5}, (255, 207, 207)),
        # 160, 120, 120 by saturation 64, then doubled
        (
            (160, 80, 80),
            {"contrast": 2.0, "saturation": 0.5, "contrast_first": False},
            (255, 240, 240),
        ),
    ],
)
def test_pixels_by_hand(rgb, parameters, expected):
    assert jitter_pixel(rgb, **parameters) == list(expected)


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1)


@pytest.mark.parametrize("shift", [-18, 11])
def test_hue_agrees_with_the_standard_library(shift):
    image = noise(12, 15)
    changed = jitter_colors(as_tensor(image), ColorJitterTransform(hue=shift)).permute(1, 2, 0)
    differences = []
    for before, after in zip(image.reshape(-1, 3), changed.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255))
        expected = np.array(colorsys.hsv_to_rgb((hue + shift / 180) % 1, saturation, value)) * 255
        differences.append(np.abs(after.numpy() - expected))
    # The hue is rounded to units of two degrees: up to 255 / 60 levels, and half for rounding.
    assert np.max(differences) < 255 / 60 + 2
    assert np.mean(differences) < 1.5


def test_it_is_the_loaders_transform_up_to_rounding():
    """On random colors and parameters; OpenCV rounds a hue between two units to either."""
    image = noise(100, 120)
    close = []
    for seed in range(20):
        jitter = SSDColorJitter().get_transform(image, np.random.default_rng(seed))
        expected = as_tensor(jitter.apply_image(image)).int()
        difference = (jitter_colors(as_tensor(image), jitter).int() - expected).abs()
        assert difference.max() <= 1.5 * 255 / 30 + 1  # one unit of the hue, times the contrast
        close.append((difference <= 2).double().mean().item())  # one level, times the contrast
    assert min(close) > 0.99


def test_colors_without_hsv_are_those_of_the_loader():
    image = noise(64, 64)
    jitter = ColorJitterTransform(brightness=-20.3, contrast=1.3717)
    expected = as_tensor(jitter.apply_image(image))
    assert torch.equal(jitter_colors(as_tensor(image), jitter), expected)


@pytest.fixture
def records(tmp_path):
    import cv2

    rng = np.random.default_rng(1)
    image, label = tmp_path / "image.png", tmp_path / "label.png"
    cv2.imwrite(str(image), rng.integers(0, 256, (80, 120, 3), dtype=np.uint8))
    cv2.imwrite(str(label), rng.integers(7, 12, (80, 120), dtype=np.uint8))
    label_format = get_dataset("gta5").label_formats[-1]
    return (
        Record(image, label, Domain.SOURCE, "gta5", label_format),
        Record(image, None, Domain.GENERATED, "sd_x"),
    )


def mappers(on_device):
    cfg = tiny_config()
    cfg.INPUT.CROP.SIZE = (64, 96)
    cfg.INPUT.COLOR_AUG_SSD = True
    cfg.INPUT.COLOR_AUG_ON_DEVICE = on_device
    return (
        SourceMapper(build_source_augmentations(cfg)),
        GeneratedMapper(build_generated_augmentations(cfg), build_student_augmentations(cfg)),
    )


def test_samples_have_the_parameters_that_the_loader_would_apply(records):
    for record, loader, device in zip(records, mappers(False), mappers(True), strict=True):
        for seed in range(6):
            expected, sample = loader(record, seed), device(record, seed)
            jitter = sample.pop("color_jitter")
            assert "color_jitter" not in expected and expected.keys() == sample.keys()
            pixels = sample["image"].permute(1, 2, 0).numpy()
            plain = ColorJitterTransform(**{**vars(jitter), "on_device": False})
            assert torch.equal(as_tensor(plain.apply_image(pixels)), expected["image"])
            for name in ("sem_seg", "clean_image"):
                assert name not in expected or torch.equal(sample[name], expected[name])


def test_the_model_sees_the_jittered_image_and_the_teacher_the_clean_one(records):
    model = build_seeded(tiny_config()).train()
    (loader, joint), (device, joint_on_device) = mappers(False), mappers(True)
    expected = [loader(records[0], 3), joint(records[1], 4)]
    batch = [device(records[0], 3), joint_on_device(records[1], 4)]
    assert not torch.equal(batch[0]["image"], expected[0]["image"])
    difference = model._student_images(batch).tensor - model._student_images(expected).tensor
    levels = (difference * model.pixel_std).abs()
    assert (levels < 1.01).float().mean() > 0.98 and levels.max() < 15
    clean = model._clean_images(batch).tensor
    assert torch.equal(clean, model._clean_images(expected).tensor)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["INPUT.COLOR_AUG_SSD", False], "set INPUT.COLOR_AUG_SSD True"),
        (["INPUT.CLASS_MIXING", True], "set it False: INPUT.CLASS_MIXING"),
    ],
)
def test_settings_that_do_not_fit_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, ["INPUT.COLOR_AUG_ON_DEVICE", True, *words])


def test_the_list_of_augmentations_leaves_the_image_to_the_model():
    image = noise(8, 8)
    augmented, transforms = AugmentationList((SSDColorJitter(on_device=True),))(
        image, np.random.default_rng(0)
    )
    assert augmented is image and transforms.transforms[0].on_device
