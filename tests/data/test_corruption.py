"""Images that are corrupted when they are read: names, seeds, and the package that does it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import random_image, save, write

from clouds.config import ConfigError, load_config
from clouds.d2 import DatasetCatalog
from clouds.data.build import build_test_loader, check_training_data
from clouds.data.corruption import CORRUPTIONS, SEVERITIES, Corruption
from clouds.data.dataset_mapper import read_image_and_label
from clouds.data.datasets import (
    UnknownDatasetError,
    check_names_are_free,
    dataset_names,
    forget_listings,
    get_dataset,
)
from clouds.data.reading import read_image
from clouds.evaluation.protocols import Native

SIZE = (32, 48)
NAME = "cityscapes_c_fog_3"

# the table of Hendrycks and Dietterich, and their four corruptions for validation
NAMES = """
    gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost
    fog brightness contrast elastic_transform pixelate jpeg_compression
    speckle_noise gaussian_blur spatter saturate
""".split()


@pytest.fixture(autouse=True)
def fresh():
    forget_listings()


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """A package that adds noise of the generator that each corruption has; its calls."""
    made = []

    def corrupt(image, severity=1, corruption_name=None, **seed):
        made.append({"name": corruption_name, "severity": severity, **seed})
        noise = np.random.randint(0, 256, image.shape)
        return (image + noise).astype(np.uint8)

    package = types.ModuleType("imagecorruptions")
    package.corrupt = corrupt
    monkeypatch.setitem(sys.modules, "imagecorruptions", package)
    return made


def without_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)  # import raises ImportError


def test_names_of_the_corruptions():
    assert sorted(CORRUPTIONS) == sorted(NAMES)
    assert SEVERITIES == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("corruption", NAMES)
def test_every_corruption_is_a_dataset_of_the_images_of_cityscapes_val(tmp_path, calls, corruption):
    image, ids = write(tmp_path, "cityscapes_val", 0, SIZE)
    dataset = get_dataset(f"cityscapes_c_{corruption}_4", tmp_path)
    (record,) = dataset.records()
    assert (record.image, record.dataset) == (image, f"cityscapes_c_{corruption}_4")
    assert dataset.domain.value == "target"
    pixels, label = read_image_and_label(record)
    (call,) = calls
    assert (call["name"], call["severity"]) == (corruption, 4)
    assert np.array_equal(label, ids)
    assert not np.array_equal(pixels, read_image(image))
    # these two do not draw from numpy's global generator
    assert ("seed" in call) is (corruption in ("glass_blur", "impulse_noise"))


def test_cityscapes_val_itself_is_not_corrupted(tmp_path, calls):
    image, _ = write(tmp_path, "cityscapes_val", 0, SIZE)
    get_dataset(NAME, tmp_path).records()
    (record,) = get_dataset("cityscapes_val", tmp_path).records()
    assert np.array_equal(read_image_and_label(record)[0], read_image(image))
    assert calls == []


def test_pixels_depend_on_the_file_and_not_on_order_root_or_processes(tmp_path, calls):
    for i in range(4):
        image, _ = write(tmp_path / "a", "cityscapes_val", i, SIZE)
        save(image, random_image(7, SIZE))  # all of the same pixels
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = (get_dataset(NAME, tmp_path / root).records() for root in "ab")
    expected = [read_image_and_label(record)[0] for record in first]
    again = [read_image_and_label(record)[0] for record in reversed(second)][::-1]
    assert all(np.array_equal(x, y) for x, y in zip(expected, again, strict=True))
    assert len({pixels.tobytes() for pixels in expected}) == 4
    for workers, rank, world_size in ((0, 0, 1), (2, 0, 1), (1, 1, 2)):
        loader = build_test_loader(
            get_dataset(NAME, tmp_path / "a"), Native(0, 0).prepare, workers, rank, world_size
        )
        loaded = [sample["image"].permute(1, 2, 0).numpy() for sample in loader]
        share = expected[rank::world_size]
        assert all(np.array_equal(x, y) for x, y in zip(share, loaded, strict=True))


def test_the_seed_is_that_of_the_path(calls):
    # the first four bytes of what `sha256sum` prints for the text a/b.png
    corruption = Corruption("glass_blur", 1).of_file("a/b.png")
    corruption(np.zeros((32, 32, 3), np.uint8))
    assert calls[0]["seed"] == int.from_bytes(bytes.fromhex("88f7ec79"), "little")


def test_numpys_global_generator_is_left_as_it_was(calls):
    np.random.seed(3)
    expected = np.random.random(5)
    np.random.seed(3)
    first = Corruption("fog", 1, seed=1)(np.zeros((32, 32, 3), np.uint8))
    assert np.array_equal(np.random.random(5), expected)
    np.random.random(9)
    assert np.array_equal(first, Corruption("fog", 1, seed=1)(np.zeros((32, 32, 3), np.uint8)))


def test_numpys_global_generator_is_restored_after_an_error(calls, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError

    monkeypatch.setattr(sys.modules["imagecorruptions"], "corrupt", fail)
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    with pytest.raises(RuntimeError):
        Corruption("fog", 1, seed=1)(np.zeros((32, 32, 3), np.uint8))
    assert np.random.random() == expected


@pytest.mark.parametrize("size", [(31, 64), (64, 31)])
def test_an_image_that_is_too_small_is_named(tmp_path, calls, size):
    image, _ = write(tmp_path, "cityscapes_val", 0, size)
    (record,) = get_dataset(NAME, tmp_path).records()
    with pytest.raises(
        ValueError, match=rf"{size[1]}x{size[0]} pixels, .* at least 32x32"
    ) as error:
        read_image_and_label(record)
    assert str(error.value).startswith(str(image))


@pytest.mark.parametrize(
    "name",
    ["fogg_3", "fog_0", "fog_6", "fog_03", "fog", "fog_", "_3", "", "Fog_3", "fog_3_4", "fog_³"],
)
def test_unknown_corruptions_and_severities(name):
    with pytest.raises(UnknownDatasetError) as error:
        get_dataset(f"cityscapes_c_{name}")
    assert f"'cityscapes_c_{name}'" in str(error.value)
    assert "severity 1 to 5" in str(error.value)
    for known in NAMES:
        assert known in str(error.value)


@pytest.mark.parametrize(("name", "severity"), [("fogg", 3), ("fog", 0), ("fog", 6)])
def test_a_corruption_that_does_not_exist(name, severity):
    with pytest.raises(ValueError, match="severities 1 to 5"):
        Corruption(name, severity)


def test_a_missing_package_is_reported_before_the_evaluation(tmp_path, monkeypatch):
    without_package(monkeypatch)
    write(tmp_path, "cityscapes_val", 0, SIZE)
    with pytest.raises(ImportError, match="need the package imagecorruptions-imaug") as error:
        get_dataset(NAME, tmp_path).records()
    assert 'pip install "clouds-dgss[corruptions]"' in str(error.value)
    get_dataset("cityscapes_val", tmp_path).records()
    with pytest.raises(ImportError, match=r"clouds-dgss\[corruptions\]"):
        Corruption("fog", 1)(np.zeros((32, 32, 3), np.uint8))


def test_training_on_them_is_refused(tmp_path, calls, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write(tmp_path, "cityscapes_val", 0, SIZE)
    cfg = load_config(None, ["DATASETS.TRAIN", f"('{NAME}',)", "DATASETS.TEST", f"('{NAME}',)"])
    with pytest.raises(ValueError, match=f"contains {NAME}, a target dataset"):
        check_training_data(cfg)


def test_their_names_are_taken_and_not_listed(tmp_path):
    assert not [name for name in dataset_names(tmp_path) if name.startswith("cityscapes_c_")]
    name = "cityscapes_c_mine"
    DatasetCatalog.register(name, list)
    try:
        with pytest.raises(ValueError, match=f"'{name}' is registered"):
            check_names_are_free((name,))
    finally:
        DatasetCatalog.remove(name)
    path = tmp_path / "own.yaml"
    classes = json.dumps([{"name": "road", "ids": [0]}])
    path.write_text(f"name: {NAME}\nimages: a\nlabels: b\nclasses: {classes}\n")
    with pytest.raises(ConfigError, match=f"'{NAME}', which is the name of a dataset of CLOUDS"):
        load_config(None, ["DATASETS.DESCRIPTIONS", f"('{path}',)"])


# ---------------------------------------------------------------- the real package


@pytest.fixture
def package():
    return pytest.importorskip("imagecorruptions")


def smooth_image(seed: int, size: tuple[int, int] = (64, 96)) -> np.ndarray:
    grid = np.random.default_rng(seed).integers(30, 220, (1, 3, 4, 6)).astype(np.float32)
    image = torch.nn.functional.interpolate(torch.from_numpy(grid), size, mode="bilinear")
    return image[0].permute(1, 2, 0).numpy().astype(np.uint8)


def test_our_names_are_those_of_the_package(package):
    assert list(CORRUPTIONS) == package.get_corruption_names("all")


@pytest.mark.parametrize(
    "name",
    [
        # numba compiles it, which takes seconds
        pytest.param(n, marks=pytest.mark.slow if n == "glass_blur" else ())
        for n in CORRUPTIONS
    ],
)
def test_the_same_file_has_the_same_pixels(package, name):
    image = smooth_image(1)
    before = image.copy()
    state = np.random.get_state()[1].copy()
    corruption = Corruption(name, 3)
    first, second = (corruption.of_file("a.png")(image) for _ in range(2))
    other = corruption.of_file("b.png")(image)
    assert first.shape == image.shape and first.dtype == np.uint8
    assert np.array_equal(first, second)
    random = "noise" in name or name in {
        *("glass_blur", "motion_blur", "snow", "frost", "fog", "elastic_transform", "spatter")
    }
    assert np.array_equal(first, other) is not random
    assert not np.array_equal(first, image)
    assert np.array_equal(image, before)
    assert np.array_equal(np.random.get_state()[1], state)


def test_noise_grows_with_the_severity(package):
    image = smooth_image(2)
    differences = [
        np.abs(Corruption("gaussian_noise", s, seed=4)(image) - image.astype(int)).mean()
        for s in SEVERITIES
    ]
    # mean absolute value of a normal distribution: scale * sqrt(2 / pi), less where it is clipped
    assert differences[0] == pytest.approx(0.08 * 255 * np.sqrt(2 / np.pi), rel=0.05)
    assert differences == sorted(differences) and len(set(differences)) == 5


PROGRAM = """
import hashlib, sys
import numpy as np
from clouds.data.corruption import Corruption
image = np.load(sys.argv[1])
for name in sys.argv[2:]:
    print(hashlib.sha256(Corruption(name, 2).of_file("ulm/x.png")(image).tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_another_process_sees_the_same_pixels(package, tmp_path):
    np.save(tmp_path / "image.npy", smooth_image(3))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "image.npy"), *CORRUPTIONS]
    root = Path(__file__).resolve().parents[2]
    runs = [
        subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1] and len(runs[0].split()) == len(CORRUPTIONS)
