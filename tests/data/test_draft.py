"""Drafts of descriptions, from files whose names, ids and shares are known."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from dataset_files import random_image, save

from clouds.data import draft as draft_module
from clouds.data.datasets import Datasets
from clouds.data.datasets.description_file import load_descriptions
from clouds.data.draft import Naming, description_text, draft_of
from clouds.data.yaml_section import DescriptionError

RAW = np.array([[0, 0, 0, 7], [0, 0, 255, 7]], np.uint8)


def write(root, image, label, raw=RAW):
    save(root / "images" / image, random_image(len(image), raw.shape[:2]))
    save(root / "labels" / label, raw)


def draft(root, sample=0):
    return draft_of(root / "images", root / "labels", sample)


NAMES = [
    ("a{}.png", "a{}.png", Naming("", ".png", "", ".png")),
    ("a{}.jpg", "a{}_mask.png", Naming("", ".jpg", "", "_mask.png")),
    (
        "town/x_{}_leftImg8bit.png",
        "town/x_{}_gtFine_labelIds.png",
        Naming("", "leftImg8bit.png", "", "gtFine_labelIds.png"),
    ),
    ("rgb_{}.png", "ss_{}.png", Naming("rgb", ".png", "ss", ".png")),
    ("{}.JPG", "{}.png", Naming("", ".JPG", "", ".png")),
]


@pytest.mark.parametrize(("image", "label", "naming"), NAMES)
def test_names_of_pairs(tmp_path, image, label, naming):
    for i in range(12):
        write(tmp_path, image.format(i), label.format(i))
    save(tmp_path / "images/alone.jpg", random_image(0))
    found = draft(tmp_path)
    assert found.namings == (naming,)
    expected = [
        (tmp_path / "images" / image.format(i), tmp_path / "labels" / label.format(i))
        for i in range(12)
    ]
    assert sorted(found.pairs) == sorted(expected)
    assert found.unpaired == (1, 0)


def test_images_of_two_kinds(tmp_path):
    for i in range(6):
        write(tmp_path, f"{i}.png" if i < 4 else f"{i}.jpg", f"{i}_m.png")
    found = draft(tmp_path)
    assert [naming.image_suffix for naming in found.namings] == [".png", ".jpg"]
    assert len(found.pairs) == 6 and found.unpaired == (0, 0)


def test_shares_and_the_best_file(tmp_path):
    write(tmp_path, "a.png", "a.png")
    write(tmp_path, "b.png", "b.png", np.full((2, 4), 7, np.uint8))
    found = draft(tmp_path)
    assert found.channel == "index" and found.num_pixels == 16
    assert {value: (c.pixels, c.images, c.best) for value, c in found.counts.items()} == {
        0: (5, 1, 0),
        7: (10, 2, 1),
        255: (1, 1, 0),
    }


def test_a_sample_is_spread_over_the_files(tmp_path):
    for i in range(10):
        write(tmp_path, f"{i}.png", f"{i}.png", np.full((2, 2), i, np.uint8))
    assert list(draft(tmp_path, sample=3).counts) == [0, 3, 6, 9]


def red(ids):
    return np.stack([ids, np.arange(ids.size, dtype=np.uint8).reshape(ids.shape), 0 * ids], -1)


COLORS = np.array([(128, 64, 128), (0, 0, 142), (70, 70, 70)], np.uint8)


@pytest.mark.parametrize(
    ("stored", "channel", "values"),
    [
        (RAW, "index", [0, 7, 255]),
        (np.repeat(RAW[..., None], 3, -1), "index", [0, 7, 255]),
        (red(np.array([[1, 2], [2, 22]], np.uint8)), "red", [1, 2, 22]),
        (COLORS[np.array([[0, 1], [1, 2]])], "color", [0x8E, 0x464646, 0x804080]),
        (np.array([[0, 300], [300, 1000]], np.uint16), "index", [0, 300, 1000]),
    ],
)
def test_how_ids_are_stored(tmp_path, stored, channel, values):
    for name in ("a.png", "b.png"):
        save(tmp_path / "images" / name, random_image(0, stored.shape[:2]))
        (tmp_path / "labels").mkdir(exist_ok=True)
        bgr = stored[..., ::-1] if stored.ndim == 3 else stored
        assert cv2.imwrite(str(tmp_path / "labels" / name), bgr)
    found = draft(tmp_path)
    assert found.channel == channel and list(found.counts) == values
    # the draft, with names, reads the same files
    text = description_text(found, "mine", tmp_path, "mine_ids.png", {})
    path = tmp_path / "mine.yaml"
    for i in range(len(values)):
        text = text.replace("name: ''", f"name: class {i}", 1)
    path.write_text(text)
    dataset = Datasets.of(("mine",), (str(path),)).get("mine")
    label = dataset.read_label(dataset.records()[0])
    codes = stored.astype(int)
    if channel == "red":
        codes = codes[..., 0]
    elif stored.ndim == 3:
        codes = codes @ (65536, 256, 1) if channel == "color" else codes[..., 0]
    order = {value: i for i, value in enumerate(v for v in values if v != 255)} | {255: 255}
    assert label.tolist() == [[order[value] for value in row] for row in codes.tolist()]


def test_the_text(tmp_path):
    for split in ("train", "val"):
        write(tmp_path, f"{split}/a b.png", f"{split}/a b.png")
    found = draft(tmp_path)
    text = description_text(found, "mine", tmp_path, "mine_ids.png", {})
    assert "  - {name: '', ids: [0]}  # 62.5 % of the pixels, in 100 % of images" in text
    assert "ids: [255]}" not in text and "ignore_ids: [255]" in text
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(DescriptionError, match=r"classes\[0\]: 'name' is ''; allowed is the name"):
        load_descriptions(str(path))
    path.write_text(text.replace("''", "x", 1).replace("''", "y", 1))
    train, val = load_descriptions(str(path))
    assert [train.name, val.name] == ["mine_train", "mine_val"]
    assert len(Datasets.of(("mine_train",), (str(path),)).get("mine_val").records()) == 1
    further = {"test": (Path("/x/i"), tmp_path / "l")}
    text = description_text(found, "mine", tmp_path, "mine_ids.png", further)
    assert "  test: {images: /x/i, labels: l}\n" in text


def test_train_ids_of_cityscapes_are_mentioned(tmp_path):
    write(tmp_path, "a.png", "a.png")
    assert "# label_space: cityscapes_19" in description_text(
        draft(tmp_path), "mine", tmp_path, "x.png", {}
    )
    write(tmp_path, "b.png", "b.png", np.array([[19]], np.uint8))
    assert "cityscapes" not in description_text(draft(tmp_path), "mine", tmp_path, "x.png", {})


def test_files_that_are_no_dataset(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*images"):
        draft(tmp_path)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    with pytest.raises(ValueError, match="the folder of images has no image file; endings are"):
        draft(tmp_path)
    save(tmp_path / "images/a.png", random_image(0))
    save(tmp_path / "labels/b.png", RAW)
    with pytest.raises(ValueError, match=r"no image has a label of a similar name.*a\.png.*b\.png"):
        draft(tmp_path)
    many = np.arange(300, dtype=np.uint16).reshape(1, -1)
    save(tmp_path / "labels/a.png", many)
    with pytest.raises(ValueError, match=r"a\.png: the labels have more than 255 different values"):
        draft(tmp_path)


def test_few_forms_of_names_are_tried_in_a_large_folder(monkeypatch):
    """Each is compared with all files, so their number must not grow with that of the files."""
    tried = []
    keys = draft_module._keys
    monkeypatch.setattr(draft_module, "_keys", lambda n, *files: tried.append(n) or keys(n, *files))
    names = [f"a{i * 7919 % 99991}" for i in range(1000)]
    images, labels = ([f"{name}{end}" for name in names] for end in (".jpg", "_mask.png"))
    assert draft_module._namings(images, labels) == (Naming("", ".jpg", "", "_mask.png"),)
    assert len(tried) <= 50
