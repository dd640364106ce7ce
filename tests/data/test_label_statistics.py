"""Labels without a class, labels in other ids than their name says, and what they cost."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from dataset_files import CITYSCAPES, random_image, save, save_palette, to_raw_ids, train_ids, write
from tiny_model import tiny_config

from clouds.config import get_cfg
from clouds.data import label_statistics
from clouds.data.build import check_training_data
from clouds.data.datasets import forget_listings, get_dataset
from clouds.data.label_statistics import check_labels
from clouds.evaluation import check_test_data

IGNORED = 3  # out of roi, in Cityscapes' label ids


@pytest.fixture
def root(tmp_path, monkeypatch):
    forget_listings()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


def write_labels(root, labels):
    """GTA5 pairs with these labels (H, W)."""
    for i, label in enumerate(labels):
        save(root / f"gta5/images/{i:05}.png", random_image(i, label.shape))
        save_palette(root / f"gta5/labels/{i:05}.png", label.astype(np.uint8))


def full(value):
    return np.full((8, 8), value)


@pytest.fixture
def opened(monkeypatch):
    """Names of the labels that were read."""
    names = []
    read = label_statistics.read_label
    monkeypatch.setattr(
        label_statistics, "read_label", lambda path, *a: names.append(path.name) or read(path, *a)
    )
    return names


def config():
    return tiny_config(DATASETS__TRAIN=("gta5",))


def test_sound_labels_say_nothing_and_are_read_once(root, caplog, opened):
    for i in range(120):
        write(root, "gta5", i)
    with caplog.at_level(logging.INFO, "clouds.data.label_statistics"):
        check_training_data(config())
        check_training_data(config())
    assert not [r for r in caplog.records if r.name == "clouds.data.label_statistics"]
    # 50 numbers from 0 to 119 in even steps
    assert sorted(opened) == [f"{i * 119 // 49:05}.png" for i in range(50)]


def test_training_without_any_class_is_an_error(root, opened):
    write_labels(root, [full(IGNORED)] * 60)
    with pytest.raises(ValueError, match="gta5: all 60 labels have ignored pixels only") as error:
        check_training_data(config())
    assert f"{root}/gta5/labels/00000.png" in str(error.value)
    assert len(opened) == len(set(opened)) == 60  # no label is read twice


def test_one_label_with_a_class_outside_of_the_sample_is_enough(root, caplog):
    labels = [full(IGNORED)] * 60
    labels[5] = full(7)
    assert 5 not in [i * 59 // 49 for i in range(50)]
    write_labels(root, labels)
    check_training_data(config())
    assert "labels have ignored pixels only" in caplog.text


def test_some_labels_without_a_class_are_told(root, caplog):
    write_labels(root, [full(7), full(IGNORED), full(23), full(0)])
    check_training_data(config())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "gta5: 2 of 4 opened labels have ignored pixels only" in record.message
    for number in ("00001", "00003"):
        assert f"{root}/gta5/labels/{number}.png" in record.message


def test_labels_of_generated_images_are_not_asked_for(root, opened):
    write(root, "gta5", 0)
    save(root / "stable_diffusion/x/images/a.png", random_image(0))
    save(root / "stable_diffusion/x/labels/a.png", np.full((24, 32), 255, np.uint8))
    check_training_data(tiny_config(DATASETS__TRAIN=("gta5", "sd_x")))
    assert opened == ["00000.png"]


def test_evaluation_without_any_class_is_told(root, caplog):
    write(root, "bdd_val", 0)
    save(root / "bdd100k/labels/sem_seg/masks/val/0000-abc.png", np.full((24, 32), 255, np.uint8))
    check_test_data(get_cfg(), ("bdd_val",))
    assert "bdd_val: 1 of 1 opened labels have ignored pixels only" in caplog.text


@pytest.mark.parametrize("broken", [b"", b"no image"])
def test_broken_labels_are_left_to_training(root, caplog, broken):
    for i in range(3):
        write(root, "gta5", i)
    (root / "gta5/labels/00001.png").write_bytes(broken)
    raw = to_raw_ids(train_ids(2, CITYSCAPES), CITYSCAPES)
    raw[0, 0] = 99
    save_palette(root / "gta5/labels/00002.png", raw)
    (root / "gta5/images/00001.png").unlink()  # so that the sizes are not compared
    save(root / "gta5/images/00001.png", random_image(1))
    check_labels(get_dataset("gta5"), need_class=True)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


# --------------------------------------------------------------------- train ids in other files


@pytest.mark.parametrize("name", ["cityscapes_train", "gta5", "mapillary_train", "acdc_fog_train"])
def test_train_ids_in_files_of_label_ids_are_an_error(root, name):
    for i in range(4):
        write(root, name, i)
    endings = ("*_labelIds.png", "gta5/labels/*.png", "mapillary_vistas/training/labels/*.png")
    for ending in endings:
        for seed, path in enumerate(sorted(root.rglob(ending))):
            ignored = [255] * (name != "mapillary_train")  # Mapillary has no id 255
            save(path, train_ids(seed, [*range(19), *ignored]))
    for path in root.rglob("*_labelTrainIds.png"):
        path.rename(path.with_name(path.name.replace("TrainIds", "Ids")))
    with pytest.raises(ValueError, match="contain train ids: no id is above 18") as error:
        if name.startswith("acdc"):
            check_test_data(get_cfg(), (name,))
        else:
            check_training_data(tiny_config(DATASETS__TRAIN=(name,)))
    assert f"dataset {name}: " in str(error.value)
    assert "must be named *_labelTrainIds.png" in str(error.value)


@pytest.mark.parametrize("name", ["cityscapes_train", "bdd_train", "synthia", "camvid_train"])
def test_sound_datasets_are_not_suspected(root, name, caplog):
    for i in range(3):
        write(root, name, i)
    check_training_data(tiny_config(DATASETS__TRAIN=(name,)))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_files_of_train_ids_are_not_suspected(root, caplog):
    for i in range(3):
        save(root / f"gta5/images/{i}.png", random_image(i))
        save(root / f"gta5/labels/{i}_labelTrainIds.png", train_ids(i, range(19)))
    check_training_data(config())
    assert caplog.text == ""


def test_few_low_ids_are_a_warning(root, caplog):
    """Road and sidewalk alone: a sound dataset, but train ids would look the same."""
    write_labels(root, [np.arange(64).reshape(8, 8) % 2 + 7] * 3)
    check_training_data(config())
    (record,) = caplog.records
    assert "labels *.png may contain train ids: no id is above 8" in record.message
    assert "otherwise ignore this" in record.message


def test_one_high_id_in_the_sample_clears_the_suspicion(root, caplog):
    labels = [train_ids(i, range(19), (8, 8)) for i in range(4)]
    labels[2][0, 0] = 26
    write_labels(root, labels)
    check_training_data(config())
    assert "train ids" not in caplog.text
