"""Layouts, listing and label ids of the builtin datasets."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from dataset_files import (
    CITYSCAPES,
    DATASET_NAMES,
    OWN_CLASSES,
    SIZE,
    random_image,
    real_camvid,
    save,
    save_palette,
    to_raw_ids,
    train_ids,
    write,
)

from clouds.d2 import DatasetCatalog, MetadataCatalog
from clouds.data.datasets import (
    dataset_names,
    dataset_root,
    forget_listings,
    generated,
    get_dataset,
    is_generated,
    listing,
    register_all,
)
from clouds.data.label_space import CITYSCAPES_19
from clouds.data.reading import read_image
from clouds.data.structures import Domain

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh():
    forget_listings()


def test_names_of_the_builtin_datasets():
    assert sorted(name for name in dataset_names() if not name.startswith("sd_")) == sorted(
        [*DATASET_NAMES, *OWN_CLASSES]
    )


@pytest.mark.parametrize("name", DATASET_NAMES)
def test_layouts_ids_and_file_formats(tmp_path, name):
    written = [write(tmp_path, name, i) for i in (3, 0, 2, 1)]
    dataset = get_dataset(name, tmp_path)
    records = dataset.records()
    assert [record.image for record in records] == sorted(image for image, _ in written)
    assert records == dataset.records()
    expected = dict(written)
    for record in records:
        assert record.dataset == name
        label = dataset.read_label(record)
        assert label.dtype == np.uint8
        assert np.array_equal(label, expected[record.image])
        assert read_image(record.image).shape == (*SIZE, 3)


def test_names_of_generated_datasets():
    names = ("gta5", "sd_a", "sd_", "synthia", "sd_b_c", "anything", "")
    assert generated(names) == ["sd_a", "sd_b_c"]
    assert [is_generated(name) for name in names] == [False, True, False, False, True, False, False]


def test_dataset_names_do_not_need_torch():
    code = (
        "import sys; from clouds.data.datasets import generated, is_generated;"
        "assert generated(['sd_a']); assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_domains():
    assert get_dataset("gta5").domain is Domain.SOURCE
    assert get_dataset("cityscapes_train").domain is Domain.SOURCE
    assert get_dataset("cityscapes_val").domain is Domain.TARGET
    assert get_dataset("acdc_night_val").domain is Domain.TARGET
    assert get_dataset("sd_day1").domain is Domain.GENERATED


def test_label_spaces_of_the_builtin_datasets():
    assert {get_dataset(name).label_space for name in DATASET_NAMES} == {CITYSCAPES_19}


def test_classes_present():
    synthia = get_dataset("synthia").classes_present
    assert len(synthia) == 16
    assert set(range(19)) - set(synthia) == {9, 14, 16}  # terrain, truck, train
    camvid = get_dataset("camvid_val").classes_present
    assert camvid == (0, 1, 2, 4, 5, 7, 8, 10, 11, 12, 13)
    for name in DATASET_NAMES:
        if not name.startswith(("synthia", "camvid")):
            assert get_dataset(name).classes_present == tuple(range(19)), name


def test_label_spaces_of_their_own(tmp_path):
    names = ("camvid11_val", "mapillary65_train")
    camvid, mapillary = (get_dataset(name, tmp_path) for name in names)
    assert camvid.label_space.num_classes == 11 and camvid.label_space.names[4] == "pavement"
    assert mapillary.label_space.num_classes == 65 and mapillary.label_space.names[24] == (
        "lane marking - general"
    )
    # the files have the ids of these classes, and one of pixels that do not count
    raw = np.arange(12, dtype=np.uint8)[None]
    image = random_image(0, (1, 12))
    save(tmp_path / "camvid/val/a.png", image)
    save(tmp_path / "camvid/valannot/a.png", raw)
    (record,) = camvid.records()
    assert camvid.read_label(record).tolist() == [[*range(11), 255]]
    raw = np.arange(66, dtype=np.uint8)[None]
    save(tmp_path / "mapillary_vistas/training/images/a.jpg", random_image(0, (1, 66)))
    save(tmp_path / "mapillary_vistas/training/v1.2/labels/a.png", raw)
    (record,) = mapillary.records()
    assert mapillary.read_label(record).tolist() == [[*range(65), 255]]


def test_images_without_label_are_left_out_where_the_dataset_says_so(tmp_path):
    for i in (0, 1):
        write(tmp_path, "foggy_zurich", i)
        save(tmp_path / f"foggy_zurich/RGB/GOPR0475/unlabelled_{i}.png", random_image(i))
    dataset = get_dataset("foggy_zurich", tmp_path)
    assert [r.image.name for r in dataset.records()] == ["frame_000000.png", "frame_000001.png"]
    assert len(dataset.listing().images_without_label) == 2


def test_the_root_is_that_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert str(dataset_root()) == "datasets"
    write(tmp_path, "gta5", 0)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert len(get_dataset("gta5").records()) == 1


# ---------------------------------------------------------------- other layouts


def test_bdd_in_its_other_folder(tmp_path):
    image, ids = write(tmp_path, "bdd_val", 0)
    (tmp_path / "bdd100k").rename(tmp_path / "bdd10k")
    dataset = get_dataset("bdd_val", tmp_path)
    (record,) = dataset.records()
    assert record.image == tmp_path / "bdd10k" / image.relative_to(tmp_path / "bdd100k")
    assert np.array_equal(dataset.read_label(record), ids)


def test_mapillary_of_version_two_with_its_folder_of_old_labels(tmp_path):
    _, ids = write(tmp_path, "mapillary_val", 0)
    top = tmp_path / "mapillary_vistas/validation"
    (top / "v1.2").mkdir()
    (top / "labels").rename(top / "v1.2/labels")
    dataset = get_dataset("mapillary_val", tmp_path)
    (record,) = dataset.records()
    assert np.array_equal(dataset.read_label(record), ids)


@pytest.mark.parametrize("name", ["gta5", "synthia", "cityscapes_val"])
def test_converted_labels_are_used_as_they_are(tmp_path, name):
    image, ids = write(tmp_path, name, 0)
    write(tmp_path, name, 2)
    converted = np.roll(ids, 1)  # differs from the original, to show which of them is read
    labels, stem = {
        "gta5": ("gta5/labels", "00000"),
        "synthia": ("synthia/GT/LABELS", "0000000"),
        "cityscapes_val": ("cityscapes/gtFine/val", "aachen/aachen_000000_000019_gtFine"),
    }[name]
    save(tmp_path / labels / f"{stem}_labelTrainIds.png", converted)
    dataset = get_dataset(name, tmp_path)
    records = dataset.records()
    assert len(records) == 2
    first = next(record for record in records if record.image == image)
    assert np.array_equal(dataset.read_label(first), converted)


def test_a_folder_with_converted_labels_only(tmp_path):
    save(tmp_path / "gta5/images/00001.png", random_image(0))
    ids = train_ids(0, CITYSCAPES)
    save(tmp_path / "gta5/labels/00001_labelTrainIds.png", ids)
    dataset = get_dataset("gta5", tmp_path)
    (record,) = dataset.records()
    assert np.array_equal(dataset.read_label(record), ids)


def test_hidden_files_and_other_files_are_skipped(tmp_path):
    write(tmp_path, "gta5", 0)
    (tmp_path / "gta5/images/._00000.png").write_bytes(b"metadata of another system")
    (tmp_path / "gta5/images/Thumbs.db").touch()
    (tmp_path / "gta5/labels/.DS_Store").touch()
    assert len(get_dataset("gta5", tmp_path).records()) == 1


def test_folders_may_be_links(tmp_path):
    write(tmp_path / "elsewhere", "cityscapes_val", 0)
    write(tmp_path / "elsewhere", "cityscapes_val", 1)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/cityscapes").symlink_to(tmp_path / "elsewhere/cityscapes")
    assert len(get_dataset("cityscapes_val", tmp_path / "root").records()) == 2


def test_generated_images(tmp_path):
    folder = tmp_path / "stable_diffusion/first"
    save(folder / "images/a.png", random_image(0))
    save(folder / "images/b.jpg", random_image(1))
    save(folder / "labels/a.png", train_ids(0, range(19)))
    (folder / "manifest.jsonl").write_text("{}\n")
    records = get_dataset("sd_first", tmp_path).records()
    assert [record.image.name for record in records] == ["a.png", "b.jpg"]
    assert [record.label and record.label.name for record in records] == ["a.png", None]
    assert {record.domain for record in records} == {Domain.GENERATED}
    assert "sd_first" in dataset_names(tmp_path)
    shutil.rmtree(folder / "labels")
    assert len(get_dataset("sd_first", tmp_path).records()) == 2


# ---------------------------------------------------------------- missing or wrong files


@pytest.mark.parametrize("name", ["", "gta", "sd_", "Cityscapes_val"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError) as error:
        get_dataset(name)
    for known in DATASET_NAMES:
        assert known in str(error.value)
    assert "sd_<folder>" in str(error.value)


@pytest.mark.parametrize(
    "folder",
    [
        "..",
        "../x",
        "../../x",
        "/etc",
        "a/../../b",
        "a//b",
        ".",
        "a/",
        "..\\x",
        "C:\\x",
        "C:x",
        "a\0b",
    ],
)
def test_generated_datasets_stay_in_their_root(tmp_path, folder):
    (tmp_path / "stable_diffusion").mkdir()
    save(tmp_path / "x/images/0.png", random_image(0))
    with pytest.raises(ValueError, match=r"would be outside of stable_diffusion\. Allowed"):
        get_dataset(f"sd_{folder}", tmp_path)


def test_a_generated_dataset_may_be_a_link_and_have_dots_in_its_name(tmp_path):
    save(tmp_path / "elsewhere/images/0.png", random_image(0))
    (tmp_path / "stable_diffusion").mkdir()
    for name in ("link", "v1..2", "...", ".hidden"):
        (tmp_path / "stable_diffusion" / name).symlink_to(tmp_path / "elsewhere")
        assert len(get_dataset(f"sd_{name}", tmp_path).records()) == 1


def test_missing_root(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*DETECTRON2_DATASETS"):
        get_dataset("gta5", tmp_path / "nowhere").records()


def test_missing_dataset(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        get_dataset("gta5", tmp_path).records()
    for part in (str(tmp_path / "gta5/images"), str(tmp_path / "gta5/labels"), "To get it"):
        assert part in str(error.value)


@pytest.mark.parametrize("half", ["images", "labels"])
def test_missing_images_or_labels(tmp_path, half):
    write(tmp_path, "gta5", 0)
    shutil.rmtree(tmp_path / "gta5" / half)
    with pytest.raises(FileNotFoundError) as error:
        get_dataset("gta5", tmp_path).records()
    other = {"images": "labels", "labels": "images"}[half]
    assert f"no folder {tmp_path / 'gta5' / half}." in str(error.value)
    assert f"no folder {tmp_path / 'gta5' / other}" not in str(error.value)


def test_folders_without_files(tmp_path):
    (tmp_path / "gta5/images").mkdir(parents=True)
    (tmp_path / "gta5/labels").mkdir()
    with pytest.raises(ValueError, match=r"(?s)gta5: no usable image \*\.png in .*Expected under"):
        get_dataset("gta5", tmp_path).records()
    (tmp_path / "stable_diffusion/x/images").mkdir(parents=True)
    with pytest.raises(ValueError, match="sd_x: no usable image"):
        get_dataset("sd_x", tmp_path).records()


def test_images_without_label(tmp_path):
    for i in range(9):
        write(tmp_path, "gta5", i)
    for i in range(1, 9):
        (tmp_path / f"gta5/labels/{i:05}.png").unlink()
    with pytest.raises(ValueError) as error:
        get_dataset("gta5", tmp_path).records()
    assert "gta5: 8 images have no label: " in str(error.value)
    assert str(tmp_path / "gta5/images/00001.png") in str(error.value)
    assert "and 3 more" in str(error.value)
    assert "Expected under" in str(error.value)


def test_labels_without_image(tmp_path):
    write(tmp_path, "cityscapes_val", 0)
    image, _ = write(tmp_path, "cityscapes_val", 1)
    image.unlink()
    with pytest.raises(ValueError, match=r"1 labels have no image.*ulm_000001_000019_gtFine_label"):
        get_dataset("cityscapes_val", tmp_path).records()


def test_the_same_file_name_in_another_city_is_no_partner(tmp_path):
    image, _ = write(tmp_path, "cityscapes_val", 0)
    other = image.parents[1] / "ulm" / image.name
    other.parent.mkdir()
    image.rename(other)
    with pytest.raises(ValueError, match="no label"):
        get_dataset("cityscapes_val", tmp_path).records()


def test_undefined_ids(tmp_path):
    _, ids = write(tmp_path, "gta5", 0)
    raw = to_raw_ids(ids, CITYSCAPES)
    raw[3, 4], raw[5, 6] = 77, 200
    save_palette(tmp_path / "gta5/labels/00000.png", raw)
    dataset = get_dataset("gta5", tmp_path)
    (record,) = dataset.records()
    with pytest.raises(ValueError, match=r"labels/00000\.png: contains the ids 77, 200.*gta5"):
        dataset.read_label(record)


def test_record_without_label(tmp_path):
    save(tmp_path / "stable_diffusion/x/images/a.png", random_image(0))
    dataset = get_dataset("sd_x", tmp_path)
    with pytest.raises(ValueError, match=r"a\.png has no label"):
        dataset.read_label(dataset.records()[0])


def test_gta_pairs_of_different_size_are_skipped_and_counted(tmp_path, caplog):
    for i in range(4):
        write(tmp_path, "gta5", i)
    save_palette(tmp_path / "gta5/labels/00001.png", np.full((SIZE[0], SIZE[1] + 1), 7, np.uint8))
    dataset = get_dataset("gta5", tmp_path)
    with caplog.at_level(logging.INFO, logger="clouds"):
        records = dataset.records()
    assert [record.image.name for record in records] == ["00000.png", "00002.png", "00003.png"]
    assert [path.name for path in dataset.listing().skipped] == ["00001.png"]
    assert "skipped 1 of 4 pairs" in caplog.text
    assert "00001.png" in caplog.text


def test_a_gta_pair_with_a_broken_file_is_not_skipped(tmp_path):
    image, _ = write(tmp_path, "gta5", 0)
    image.write_bytes(b"")
    (record,) = get_dataset("gta5", tmp_path).records()
    with pytest.raises(ValueError, match="empty"):
        read_image(record.image)


# ---------------------------------------------------------------- caching


@pytest.fixture
def scans(monkeypatch):
    """One element per scanned folder."""
    count = []
    scan = listing.scan_files
    monkeypatch.setattr(listing, "scan_files", lambda *args: count.append(1) or scan(*args))
    return count


def test_a_listing_is_cached_until_a_folder_changes(tmp_path, scans):
    for i in range(4):
        write(tmp_path, "cityscapes_val", i)
    dataset = get_dataset("cityscapes_val", tmp_path)
    assert not scans  # nothing is listed before the first access
    assert len(dataset.records()) == 4
    once = len(scans)
    assert len(get_dataset("cityscapes_val", tmp_path).records()) == 4
    assert len(scans) == once

    time.sleep(0.02)  # the clock of a file system may be that coarse
    write(tmp_path, "cityscapes_val", 4)  # in a folder that exists already
    assert len(dataset.records()) == 5
    time.sleep(0.02)
    shutil.rmtree(tmp_path / "cityscapes/leftImg8bit/val/ulm")
    with pytest.raises(ValueError, match="2 labels have no image"):
        dataset.records()


def test_a_dataset_that_is_added_later_is_listed(tmp_path):
    dataset = get_dataset("bdd_val", tmp_path)
    with pytest.raises(FileNotFoundError):
        dataset.records()
    write(tmp_path, "bdd_val", 0)
    assert len(dataset.records()) == 1


def test_a_relative_root_follows_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "a/datasets", "gta5", 0)
    write(tmp_path / "b/datasets", "gta5", 0)
    write(tmp_path / "b/datasets", "gta5", 1)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path / "a")
    (record,) = get_dataset("gta5").records()
    monkeypatch.chdir(tmp_path / "b")
    assert len(get_dataset("gta5").records()) == 2
    assert record.image.is_file()  # also from another working directory


# ---------------------------------------------------------------- catalogs


def test_catalogs(tmp_path, monkeypatch, scans):
    register_all()
    register_all()
    assert not scans
    assert set(DATASET_NAMES) <= set(DatasetCatalog.list())
    image, _ = write(tmp_path, "gta5", 0)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert DatasetCatalog.get("gta5") == [
        {
            "file_name": str(image),
            "sem_seg_file_name": str(tmp_path / "gta5/labels/00000.png"),
            "domain": Domain.SOURCE,
            "dataset": "gta5",
        }
    ]
    metadata = MetadataCatalog.get("gta5")
    assert metadata.ignore_label == 255
    assert metadata.stuff_classes[13] == "car"
    assert metadata.stuff_colors[13] == [0, 0, 142]


# ---------------------------------------------------------------- real images


def test_real_camvid():
    folder = real_camvid()
    dataset = get_dataset("camvid_val", folder.parent)
    records = dataset.records()
    assert len(records) == 101
    assert [record.image.name for record in records] == sorted(
        path.name for path in (folder / "val").iterdir()
    )
    label = dataset.read_label(records[0])
    assert read_image(records[0].image).shape == (360, 480, 3)
    assert label.shape == (360, 480)
    # a street view: road at the bottom, none in the upper quarter
    road, sky = label == 0, label == 10
    assert road[-90:].mean() > 0.3
    assert road[:90].mean() < 0.01
    assert sky[-90:].mean() < 0.01
    assert set(np.unique(label)) <= {*dataset.classes_present, 255}
