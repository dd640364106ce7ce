"""Rare-class sampling: probabilities, images, crops, and the cached counts of pixels."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import CITYSCAPES, random_image, save, save_palette, to_raw_ids, write_generated

from clouds.config import get_cfg
from clouds.data.build import build_train_loader
from clouds.data.datasets import forget_listings, get_dataset
from clouds.data.rare_class_sampling import (
    MAX_CROPS,
    RareClasses,
    RareClassSampling,
    class_probabilities,
    count_pixels,
)
from clouds.data.structures import Domain, Record

RECORDS = [Record(Path(f"{i}.png"), None, Domain.SOURCE, "gta5") for i in range(4)]
# pixels of 3 classes in 4 images; class 1 is in no image large enough
COUNTS = np.array([[90, 0, 10], [95, 5, 0], [60, 0, 40], [100, 0, 0]])


def test_probabilities_by_hand():
    """f = 0.5, 0.3, 0.2 and T = 0.1: weights e^5, e^7, e^8."""
    found = class_probabilities(np.array([50, 30, 20]), 0.1)
    weights = np.exp([5.0, 7.0, 8.0])
    assert found == pytest.approx(weights / weights.sum())
    even = class_probabilities(np.array([10**9, 1]), 0.0001)  # e^10000 overflows
    assert even == pytest.approx([0, 1])


def test_images_have_enough_pixels_of_the_drawn_class():
    rare = RareClasses.from_counts(RECORDS, COUNTS, temperature=1.0, min_pixels=10)
    assert rare.classes == (0, 2)
    assert [images.tolist() for images in rare.images] == [[0, 1, 2, 3], [0, 2]]
    # shares of the two classes: 345 and 50 of 395 pixels
    assert rare.probabilities == pytest.approx(class_probabilities(np.array([345, 50]), 1.0))
    with pytest.raises(ValueError, match=r"no image of gta5 has 101 pixels.*most are 100.*lower"):
        RareClasses.from_counts(RECORDS, COUNTS, 1.0, 101)


def test_draws_have_the_probabilities_and_agree_with_the_class():
    rare = RareClasses.from_counts(RECORDS, COUNTS, temperature=1.0, min_pixels=10)
    sampling = RareClassSampling({"gta5": rare}, 5)
    drawn = [(sampling.draw_class("gta5", s), sampling.draw(RECORDS[0], s)) for s in range(2000)]
    share = np.mean([c == 2 for c, _ in drawn])
    assert share == pytest.approx(rare.probabilities[1], abs=4 * 0.5 / 2000**0.5)
    assert {record for c, record in drawn if c == 2} == {RECORDS[0], RECORDS[2]}
    assert {record for c, record in drawn if c == 0} == set(RECORDS)
    other = Record(Path("g.png"), None, Domain.GENERATED, "sd_x")
    assert sampling.draw(other, 3) is other


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Six images of class 0, two of them with a small square of class 11 in a corner."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for i in range(6):
        ids = np.zeros((48, 64), np.uint8)
        ids[40:48, 56:64] = 11 if i in (1, 4) else 255
        save(tmp_path / f"gta5/images/{i:05}.png", random_image(i, (48, 64)))
        save_palette(tmp_path / f"gta5/labels/{i:05}.png", to_raw_ids(ids, CITYSCAPES))
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.INPUT.CROP.SIZE, cfg.INPUT.SCALE_RANGE = ("gta5",), (32, 32), (1, 1)
    cfg.DATASETS.RARE_CLASS_SAMPLING.ENABLED = True
    cfg.DATASETS.RARE_CLASS_SAMPLING.MIN_PIXELS = 60
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 4, 0
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return cfg


def samples(loader, num_batches):
    return [s for batch, _ in zip(loader, range(num_batches), strict=False) for s in batch]


def test_rare_images_and_crops_with_the_class_are_drawn(config):
    """At T = 0.01, class 11 with 128 of 18,176 pixels is all that is drawn."""
    # of a crop at (top, left) the square covers top - 8 rows and left - 24 columns
    corners = [(top - 8) * (left - 24) >= 30 for top in range(8, 17) for left in range(24, 33)]
    once = sum(corners) / (17 * 33)
    for ratio, expected in ((0.5, 1 - (1 - once) ** 10), (0.0, once)):
        config.DATASETS.RARE_CLASS_SAMPLING.MIN_CROP_RATIO = ratio
        found = samples(build_train_loader(config), 75)
        assert {Path(s["file_name"]).name for s in found} == {"00001.png", "00004.png"}
        share = np.mean([(s["sem_seg"] == 11).sum().item() >= 30 for s in found])
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 300) ** 0.5)


def test_the_first_crop_is_that_of_the_seed(config):
    """Without a wish of pixels, the sample is what the mapper makes of the drawn record."""
    config.DATASETS.RARE_CLASS_SAMPLING.MIN_CROP_RATIO = 0.0
    loader = build_train_loader(config)
    sample = samples(loader, 1)[0]
    record = next(r for r in get_dataset("gta5").records() if str(r.image) == sample["file_name"])
    config.DATASETS.RARE_CLASS_SAMPLING.ENABLED = False
    mapper = build_train_loader(config).dataset.mappers[Domain.SOURCE]
    assert torch.equal(mapper(record, sample["seed"])["image"], sample["image"])
    assert MAX_CROPS == 10


def test_batches_do_not_depend_on_ranks_workers_or_the_start(config):
    whole = samples(build_train_loader(config), 4)
    parts = [samples(build_train_loader(config, 2, rank, 2), 2) for rank in range(2)]
    config.DATALOADER.NUM_WORKERS = 2
    for one, other in zip(whole, samples(build_train_loader(config), 4), strict=True):
        assert torch.equal(one["image"], other["image"])
    resumed = [*parts[0][:2], *parts[1][:2], *parts[0][2:], *parts[1][2:]]
    for one, other in zip(whole[8:], resumed, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["sem_seg"], other["sem_seg"])


def test_generated_images_are_drawn_as_before(config, tmp_path):
    for i in range(3):
        write_generated(tmp_path, f"{i}.png")
    config.DATASETS.TRAIN = ("gta5", "sd_x")
    with_rare = samples(build_train_loader(config), 4)
    config.DATASETS.RARE_CLASS_SAMPLING.ENABLED = False
    without = samples(build_train_loader(config), 4)
    files = [[s["file_name"] for s in each if "clean_image" in s] for each in (with_rare, without)]
    assert files[0] == files[1] and len(files[0]) > 0


def test_counts_are_kept_in_a_file_until_the_labels_change(config, tmp_path, caplog):
    records, file = get_dataset("gta5").records(), tmp_path / "counts.json"
    expected = np.zeros((6, 19), np.int64)
    expected[:, 0] = 48 * 64 - 64
    expected[[1, 4], 11] = 64
    assert (count_pixels(records, 19, file) == expected).all()
    with caplog.at_level(logging.INFO):
        assert (count_pixels(records, 19, file) == expected).all()
    assert caplog.records == []  # not counted again
    ids = np.full((48, 64), 11, np.uint8)
    save_palette(tmp_path / "gta5/labels/00000.png", to_raw_ids(ids, CITYSCAPES))
    forget_listings()
    expected[0] = 0
    expected[0, 11] = 48 * 64
    assert (count_pixels(get_dataset("gta5").records(), 19, file) == expected).all()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"labels": "x"}', '{"pixels": [["a"]]}'])
def test_a_damaged_file_of_counts_is_replaced(config, tmp_path, caplog, content):
    records, file = get_dataset("gta5").records(), tmp_path / "counts.json"
    file.write_text(content)
    with caplog.at_level(logging.WARNING):
        counts = count_pixels(records, 19, file)
    assert counts.sum() == 4 * (48 * 64 - 64) + 2 * 48 * 64
    assert "counts.json is damaged" in caplog.text
    assert np.array_equal(json.loads(file.read_text())["pixels"], counts)


def test_a_label_that_cannot_be_read_has_no_pixels(config, tmp_path):
    (tmp_path / "gta5/labels/00002.png").write_bytes(b"nothing")
    counts = count_pixels(get_dataset("gta5").records(), 19, tmp_path / "counts.json")
    assert counts[2].sum() == 0 and counts[1].sum() == 48 * 64
