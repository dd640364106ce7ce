"""Datasets registered in Detectron2's catalogs, used by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from dataset_files import random_image, save, write
from PIL import Image
from tiny_model import tiny_config

import clouds
from clouds.config import ConfigError, load_config
from clouds.d2 import DatasetCatalog, MetadataCatalog
from clouds.data.dataset_report import UNKNOWN_IDS, check_dataset
from clouds.data.datasets import (
    Datasets,
    check_names_are_free,
    forget_listings,
    get_dataset,
    register_all,
)
from clouds.data.label_space import CITYSCAPES_19, distinct_colors

CLASSES = ["road", "water", "sky", "goat", "boat"]
SIZE = (48, 64)


def write_pairs(folder: Path, count: int, ids=(0, 1, 2, 3, 4, 200)) -> list[dict[str, str]]:
    """Random images with square regions of the ids; the samples in Detectron2's form."""
    samples = []
    for i in range(count):
        cells = np.random.default_rng(i).choice(np.array(ids, np.uint8), (6, 8))
        image = save(folder / f"{i}.png", random_image(i, SIZE))
        label = save(folder / f"{i}_label.png", cells.repeat(8, 0).repeat(8, 1))
        samples.append({"file_name": str(image), "sem_seg_file_name": str(label), "image_id": i})
    return samples


@pytest.fixture
def register():
    """Registers samples under a name, with metadata; forgotten after the test."""
    names = []
    forget_listings()

    def add(name, samples, **metadata):
        DatasetCatalog.register(name, lambda: samples)
        names.append(name)
        MetadataCatalog.get(name).set(**metadata)
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_ids_classes_and_colors(tmp_path, register):
    samples = write_pairs(tmp_path, 2)
    colors = [[9, 8, 7], [1, 2, 3], [4, 5, 6], [7, 7, 7], [0, 0, 9]]
    metadata = {"stuff_classes": CLASSES, "stuff_colors": colors, "ignore_label": 200}
    dataset = get_dataset(register("mine", samples, **metadata))
    assert [str(r.image) for r in dataset.records()] == [s["file_name"] for s in samples]
    stored = np.array(Image.open(samples[1]["sem_seg_file_name"]))
    expected = np.where(stored == 200, 255, stored)
    np.testing.assert_array_equal(dataset.read_label(dataset.records()[1]), expected)
    space = Datasets(("mine", "sd_x")).label_space
    assert space.names == tuple(CLASSES) and space.colors[0] == (9, 8, 7)
    assert space.synonyms == tuple((name,) for name in CLASSES)
    assert dataset.classes_present == (0, 1, 2, 3, 4)
    report = check_dataset(dataset, None, 1)
    assert report.state == "ok" and report.num_opened == 2


def test_defaults_of_the_metadata(register):
    space = get_dataset(register("mine", [], stuff_classes=CLASSES)).label_space
    assert len({*space.colors, (0, 0, 0)}) == 6 and space.ignore == 255
    assert len(set(distinct_colors(255))) == 255
    city = get_dataset(register("town", [], stuff_classes=list(CITYSCAPES_19.names))).label_space
    assert city == CITYSCAPES_19  # words of the text classifier, too
    assert Datasets(("gta5", "town")).label_space == CITYSCAPES_19


def test_the_registered_function_is_called_once(tmp_path, register):
    calls = []

    def samples():
        calls.append(1)
        return write_pairs(tmp_path, 1)

    register("mine", [], stuff_classes=CLASSES, ignore_label=200)
    DatasetCatalog.remove("mine")
    DatasetCatalog.register("mine", samples)
    assert len(get_dataset("mine").records()) == len(get_dataset("mine").records()) == 1
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, r"no stuff_classes\. Set them.*MetadataCatalog\.get\('mine'\)\.set\(stuff_classes="),
        ({"stuff_classes": ["a", "a"]}, "2 names, 1 of them different"),
        ({"stuff_classes": [str(i) for i in range(256)]}, "256 names.* up to 255"),
        ({"stuff_classes": CLASSES, "ignore_label": 4}, "ignore_label is 4.* from 5.* to 255"),
        ({"stuff_classes": CLASSES, "ignore_label": 65535}, "ignore_label is 65535"),
        ({"stuff_classes": CLASSES, "stuff_colors": [[0, 0, 0]]}, "one RGB color .* 5 in all"),
        ({"stuff_classes": ["a"], "stuff_colors": [[0, 0, 256]]}, "from 0 to 255"),
    ],
)
def test_metadata_that_is_missing_or_not_allowed(register, metadata, words):
    register("mine", [], **metadata)
    with pytest.raises(ValueError, match=words):
        get_dataset("mine")
    with pytest.raises(ConfigError, match=words):
        load_config(None, ["DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()"])


def test_files_that_are_missing_or_wrong(tmp_path, register):
    good = write_pairs(tmp_path, 2)
    no_image = good[1] | {"file_name": "none.png"}
    cases = {
        "returns no sample": [],
        "sample 1 has no 'file_name'": [good[0], {}],
        "1 images have no label": [good[0], {"file_name": good[1]["file_name"]}],
        "1 files do not exist: none.png": [good[0], no_image],
        "1 files do not exist: no.png": [good[0] | {"sem_seg_file_name": "no.png"}],
        "1 images occur more than once": [good[0], good[0]],
    }
    for number, (words, samples) in enumerate(cases.items()):
        dataset = get_dataset(register(f"mine{number}", samples, stuff_classes=CLASSES))
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)):
            dataset.records()
        if "exist" in words:
            report = check_dataset(dataset, None, 1)
            assert report.state == "broken" and words in "".join(report.problems())


def test_other_ids_name_the_file(tmp_path, register):
    samples = write_pairs(tmp_path, 1, ids=(0, 5, 200))
    register("mine", samples, stuff_classes=CLASSES, ignore_label=200)
    dataset = get_dataset("mine")
    with pytest.raises(ValueError, match=r"0_label\.png: contains the ids 5, .*\(0-4\).*\(200\)"):
        dataset.read_label(dataset.records()[0])
    report = check_dataset(dataset, None, 1)
    assert report.state == "broken" and len(report.defects[UNKNOWN_IDS]) == 1


def test_the_config_follows_and_compares_the_classes(register):
    register("mine", [], stuff_classes=CLASSES)
    register("other", [], stuff_classes=CLASSES[::-1])
    train = ["DATASETS.TRAIN", "('mine',)"]
    cfg = load_config(None, [*train, "DATASETS.TEST", "('mine',)"])
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 5
    load_config(None, [*train, "DATASETS.TEST", "('other', 'bdd_val')"])
    dataset = Datasets(("mine",)).get("other")
    assert dataset.label_space.names == tuple(CLASSES)
    assert dataset.label_formats[0].ids.raw_ids == {4 - i: (i,) for i in range(5)}
    register("far", [], stuff_classes=["x", "y"])
    with pytest.raises(
        ConfigError, match=r"dataset far: none of its classes \(x, y\) is in .*mine"
    ):
        load_config(None, [*train, "DATASETS.TEST", "('far',)"])
    with pytest.raises(ConfigError, match="different label spaces"):
        load_config(None, ["DATASETS.TRAIN", "('mine', 'gta5')", "DATASETS.TEST", "()"])


def test_the_same_dataset_in_two_label_spaces(register, tmp_path):
    """A listing in one label space is not used in another."""
    label = save(tmp_path / "a_label.png", np.array([[0, 1, 255]], np.uint8))
    image = save(tmp_path / "a.png", random_image(0, (1, 3)))
    register("mine", [{"file_name": image, "sem_seg_file_name": label}], stuff_classes=["x", "y"])
    register("other", [], stuff_classes=["y", "x"])
    for train, expected in (("mine", [[0, 1, 255]]), ("other", [[1, 0, 255]])):
        dataset = Datasets((train,)).get("mine")
        assert dataset.read_label(dataset.records()[0]).tolist() == expected


def test_a_name_of_this_project_cannot_be_registered(register):
    register_all()
    check_names_are_free(("gta5", "sd_x", "mine"))
    register("sd_x", [])
    with pytest.raises(ValueError, match=r"'sd_x' is registered.*another name"):
        check_names_are_free(("gta5", "sd_x"))
    with pytest.raises(ConfigError, match="another name"):
        load_config(None, ["DATASETS.TRAIN", "('gta5', 'sd_x')"])


SCRIPT = """
import sys
from clouds.config import load_config
from clouds.d2 import DatasetCatalog, MetadataCatalog
from clouds.engine import Trainer

def samples(folder):
    names = range(4)
    return [{"file_name": f"{folder}/{i}.png", "sem_seg_file_name": f"{folder}/{i}_label.png"}
            for i in names]

for name in ("mine_train", "mine_val"):
    DatasetCatalog.register(name, lambda name=name: samples(name))
    MetadataCatalog.get(name).set(
        stuff_classes=["road", "water", "sky", "goat", "boat"], ignore_label=200)

if __name__ == "__main__":
    cfg = load_config("tiny.yaml", sys.argv[1:])
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    print(trainer.train().mean_miou)
"""


@pytest.mark.parametrize(("workers", "head"), [(0, "linear"), (2, "text")])
def test_training_and_evaluation_from_a_script(tmp_path, register, workers, head):
    """As a user writes it: register, load the config, train; the score is counted again by hand."""
    for name in ("mine_train", "mine_val"):
        samples = write_pairs(tmp_path / name, 4)
    settings = {
        "INPUT__CROP__SIZE": (64, 64),
        "DATALOADER__NUM_WORKERS": workers,
        "MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME": head,
        "SOLVER__IMS_PER_BATCH": 2,
        "SOLVER__MAX_ITER": 2,
        "TEST__SHORT_SIDE": 48,
        "TEST__VISUALIZED_IMAGES": 2,
        "LOG_PERIOD": 1,
        "OUTPUT_DIR": "out",
    }
    content = yaml.safe_load(tiny_config(**settings).dump())
    content["DATASETS"] |= {"TRAIN": ["mine_train"], "TEST": ["mine_val"]}
    content["MODEL"]["SEM_SEG_HEAD"]["NUM_CLASSES"] = 0
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "mine.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "mine.py"],
        cwd=tmp_path,
        env=os.environ | {"DETECTRON2_DATASETS": "nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    out = tmp_path / "out"
    metrics = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert {m["iteration"] for m in metrics} == {0, 1}
    assert len(list(out.rglob("*mine_val*/*.png")) + list(out.rglob("mine_val*.png"))) == 2
    result = json.loads((out / "results.json").read_text())["datasets"]["mine_val"]
    assert list(result["IoU"]) == CLASSES

    for name in ("mine_train", "mine_val"):
        register(name, [], stuff_classes=CLASSES, ignore_label=200)
    model = clouds.build(tmp_path / "tiny.yaml", (), out / "model_final.pth")
    counts = np.zeros((5, 5))
    for sample in samples:
        pixels = np.array(Image.open(sample["file_name"]))
        label = np.array(Image.open(sample["sem_seg_file_name"]))
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        with torch.no_grad():
            (output,) = model([{"image": image, "height": 48, "width": 64}])
        predicted = output["sem_seg"].argmax(0).numpy()
        np.add.at(counts, (label[label < 5], predicted[label < 5]), 1)
    correct = counts.diagonal()
    iou = 100 * correct / (counts.sum(0) + counts.sum(1) - correct)
    assert list(result["IoU"].values()) == pytest.approx(iou, abs=0.05)


def test_builtin_names_win_without_a_registration(tmp_path, monkeypatch):
    write(tmp_path, "gta5", 0)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert get_dataset("gta5").records()[0].image == tmp_path / "gta5/images/00000.png"


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({"stuff_classes": "road"}, ["stuff_classes", "'road'", "list of names"]),
        ({"stuff_classes": 3}, ["stuff_classes", "3", "list of names"]),
        ({"stuff_classes": CLASSES, "stuff_colors": 3}, ["stuff_colors are 3", "5 in all"]),
        ({"stuff_classes": CLASSES, "stuff_colors": ["x"] * 5}, ["stuff_colors", "'x'"]),
        ({"stuff_classes": CLASSES, "stuff_colors": [1] * 5}, ["stuff_colors", "[1, 1"]),
        (
            {"stuff_classes": CLASSES, "stuff_colors": [(0, 0, float("inf"))] * 5},
            ["stuff_colors", "inf"],
        ),
    ],
)
def test_metadata_of_other_types_is_refused(register, metadata, words):
    with pytest.raises(ValueError) as error:
        get_dataset(register("mine", [], **metadata))
    assert all(word in str(error.value) for word in ["'mine'", *words])


def test_metadata_may_be_arrays(register):
    colors = np.arange(15, dtype=np.uint8).reshape(5, 3)
    name = register("mine", [], stuff_classes=np.array(CLASSES), stuff_colors=colors)
    space = get_dataset(name).label_space
    assert space.names == tuple(CLASSES)
    assert space.colors == ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11), (12, 13, 14))


@pytest.mark.parametrize(
    "samples, words",
    [
        (None, ["returns None", "list of dictionaries"]),
        ([{"file_name": ["a.png"]}], ["sample 0", "['a.png']", "path"]),
        ([{"file_name": "a.png", "sem_seg_file_name": 3}], ["sample 0", "3", "path"]),
    ],
)
def test_samples_of_other_types_are_refused(register, samples, words):
    name = register("mine", samples, stuff_classes=CLASSES)
    with pytest.raises(ValueError) as error:
        get_dataset(name).records()
    assert all(word in str(error.value) for word in ["'mine'", *words])
