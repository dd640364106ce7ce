"""Writes small datasets in the layouts of the real ones.

Paths, ids and file formats are written down here from the documentation of the datasets, not taken
from the code under test.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from clouds.data.labels import LabelMapping

SIZE = (24, 32)

ANY_IDS = LabelMapping("any ids", {0: tuple(range(65535))}, (65535,))

# train id -> one raw id of each dataset; 255 -> a raw id that is ignored
CITYSCAPES = {0: 7, 1: 8, 2: 11, 8: 21, 10: 23, 11: 24, 13: 26, 16: 31, 18: 33, 255: 4}
SYNTHIA = {0: 3, 1: 4, 2: 2, 8: 6, 10: 1, 11: 10, 13: 8, 15: 19, 18: 11, 255: 22}
MAPILLARY = {0: 41, 1: 2, 2: 17, 8: 30, 10: 27, 11: 19, 13: 55, 16: 58, 18: 52, 255: 12}
IDD = {0: 0, 1: 3, 2: 29, 8: 32, 9: 5, 11: 6, 13: 12, 16: 17, 18: 10, 255: 11}
WILDDASH = {0: 74, 1: 80, 3: 56, 5: 46, 9: 78, 12: 48, 13: 35, 14: 34, 17: 58, 255: 66}
CAMVID = {0: 3, 1: 4, 2: 1, 8: 5, 10: 0, 11: 9, 13: 8, 255: 11}


def random_image(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def train_ids(seed: int, among, size: tuple[int, int] = SIZE) -> np.ndarray:
    rng = np.random.default_rng(1000 + seed)
    return rng.choice(np.array(sorted(among), np.uint8), size=size)


def to_raw_ids(ids: np.ndarray, table: dict[int, int]) -> np.ndarray:
    raw = np.zeros_like(ids)
    for train_id, raw_id in table.items():
        raw[ids == train_id] = raw_id
    return raw


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def save_palette(path: Path, ids: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids)
    # colors that are unrelated to the index
    image.putpalette(np.random.default_rng(7).integers(0, 256, 768, dtype=np.uint8).tobytes())
    assert image.mode == "P"
    image.save(path)
    return path


def save_synthia(path: Path, ids: np.ndarray) -> Path:
    """16 bits, three channels: class in R, instance number in G."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blue_green_red = np.zeros((*ids.shape, 3), np.uint16)
    blue_green_red[..., 2] = ids
    blue_green_red[..., 1] = np.arange(ids.size).reshape(ids.shape) * 77 % 60000
    assert cv2.imwrite(str(path), blue_green_red)
    return path


def write(root: Path, name: str, i: int, size: tuple[int, int] = SIZE) -> tuple[Path, np.ndarray]:
    """Write pair number `i` of a dataset; returns its image file and its train ids."""
    family, _, rest = name.partition("_")
    pixels = random_image(i, size)
    if family == "gta5":
        ids = train_ids(i, CITYSCAPES, size)
        image = save(root / f"gta5/images/{i:05}.png", pixels)
        save_palette(root / f"gta5/labels/{i:05}.png", to_raw_ids(ids, CITYSCAPES))
    elif family == "synthia":
        ids = train_ids(i, SYNTHIA, size)
        image = save(root / f"synthia/RGB/{i:07}.png", pixels)
        save_synthia(root / f"synthia/GT/LABELS/{i:07}.png", to_raw_ids(ids, SYNTHIA))
    elif family == "cityscapes":
        city = ("aachen", "ulm")[i % 2]
        ids = train_ids(i, CITYSCAPES, size)
        stem = f"{city}/{city}_{i:06}_000019"
        image = save(root / f"cityscapes/leftImg8bit/{rest}/{stem}_leftImg8bit.png", pixels)
        labels = root / f"cityscapes/gtFine/{rest}"
        save(labels / f"{stem}_gtFine_labelIds.png", to_raw_ids(ids, CITYSCAPES))
        save(labels / f"{stem}_gtFine_color.png", pixels)
        save(labels / f"{stem}_gtFine_instanceIds.png", ids.astype(np.uint16) * 1000)
        (labels / f"{stem}_gtFine_polygons.json").write_text("{}")
    elif family == "acdc":
        weather, split = rest.split("_")
        ids = train_ids(i, CITYSCAPES, size)
        stem = f"{split}/GOPR{i % 2:04}/GOPR{i % 2:04}_frame_{i:06}"
        image = save(root / f"acdc/rgb_anon/{weather}/{stem}_rgb_anon.png", pixels)
        labels = root / f"acdc/gt/{weather}"
        if i % 2:
            save(labels / f"{stem}_gt_labelTrainIds.png", ids)
        else:
            save(labels / f"{stem}_gt_labelIds.png", to_raw_ids(ids, CITYSCAPES))
        save(labels / f"{stem}_gt_labelColor.png", pixels)
    elif family == "bdd":
        ids = train_ids(i, [*range(19), 255], size)
        image = save(root / f"bdd100k/images/10k/{rest}/{i:04}-abc.jpg", pixels)
        save(root / f"bdd100k/labels/sem_seg/masks/{rest}/{i:04}-abc.png", ids)
    elif family == "mapillary":
        ids = train_ids(i, MAPILLARY, size)
        top = root / "mapillary_vistas" / {"train": "training", "val": "validation"}[rest]
        image = save(top / f"images/_{i}Xy-Z.jpg", pixels)
        save_palette(top / f"labels/_{i}Xy-Z.png", to_raw_ids(ids, MAPILLARY))
    elif family == "camvid":
        ids = train_ids(i, CAMVID, size)
        image = save(root / f"camvid/{rest}/0001TP_{i:06}.png", pixels)
        save(root / f"camvid/{rest}annot/0001TP_{i:06}.png", to_raw_ids(ids, CAMVID))
    else:
        image, ids = write_further(root, name, i, pixels)
    return image, ids


def write_further(root: Path, name: str, i: int, pixels: np.ndarray) -> tuple[Path, np.ndarray]:
    """As `write`, of datasets that the method's paper does not use."""
    size = pixels.shape[:2]
    family, _, rest = name.rpartition("_")
    if name == "urbansyn":
        ids = train_ids(i, [*range(19), 255], size)
        stored = np.where(ids == 255, 19, ids).astype(np.uint8)
        image = save(root / f"urbansyn/rgb/rgb_{i:04}.png", pixels)
        rgba = np.stack([stored, 0 * stored, 0 * stored, 0 * stored + 255], -1)
        save(root / f"urbansyn/ss/ss_{i:04}.png", rgba)
    elif name == "synscapes":
        ids = train_ids(i, CITYSCAPES, size)
        image = save(root / f"synscapes/img/rgb-2k/{i}.png", pixels)
        save(root / f"synscapes/img/class/{i}.png", to_raw_ids(ids, CITYSCAPES))
    elif family == "idd":
        ids = train_ids(i, IDD, size)
        image = save(root / f"idd/leftImg8bit/{rest}/{i % 2}/{i:06}_leftImg8bit.png", pixels)
        labels = root / f"idd/gtFine/{rest}/{i % 2}"
        if i % 2:
            save(labels / f"{i:06}_gtFine_labelcsTrainIds.png", ids)
        else:
            save(labels / f"{i:06}_gtFine_labelids.png", to_raw_ids(ids, IDD))
        save(labels / f"{i:06}_gtFine_labellevel3Ids.png", ids // 3)
    elif name == "dark_zurich_val":
        ids = train_ids(i, [*range(19), 255], size)
        image = save(root / f"dark_zurich/rgb_anon/val/night/G/G_{i:06}_rgb_anon.png", pixels)
        save(root / f"dark_zurich/gt/val/night/G/G_{i:06}_gt_labelTrainIds.png", ids)
        save(root / f"dark_zurich/gt/val/night/G/G_{i:06}_gt_labelColor.png", pixels)
    elif name == "wilddash2":
        ids = train_ids(i, WILDDASH, size)
        image = save(root / f"wilddash2/images/at{i:04}_100000.jpg", pixels)
        save(root / f"wilddash2/labels/at{i:04}_100000.png", to_raw_ids(ids, WILDDASH))
    elif family == "muses":
        ids = train_ids(i, [*range(19), 255], size)
        stem = f"{rest}/{('fog', 'rain')[i % 2]}/night/REC{i:04}_frame_000001"
        image = save(root / f"muses/frame_camera/{stem}_frame_camera.png", pixels)
        save(root / f"muses/gt_semantic/{stem}_gt_labelTrainIds.png", ids)
        save(root / f"muses/gt_semantic/{stem}_gt_labelColor.png", pixels)
    elif name == "foggy_zurich":
        ids = train_ids(i, CITYSCAPES, size)
        image = save(root / f"foggy_zurich/RGB/GOPR0475/frame_{i:06}.png", pixels)
        save(
            root / f"foggy_zurich/gt_labelIds/GOPR0475/frame_{i:06}.png",
            to_raw_ids(ids, CITYSCAPES),
        )
    elif name == "foggy_driving":
        ids = train_ids(i, CITYSCAPES, size)
        image = save(root / f"foggy_driving/RGB/web/{i:03}_leftImg8bit.png", pixels)
        ending = ("gtFine", "gtCoarse")[i % 2]
        label = root / f"foggy_driving/gt_labelIds/web/{i:03}_{ending}_labelIds.png"
        save(label, to_raw_ids(ids, CITYSCAPES))
    else:
        raise AssertionError(name)
    return image, ids


def write_generated(root: Path, name: str, size: tuple[int, int] = SIZE, folder: str = "x") -> Path:
    """Write a generated image and its line in the manifest.

    Args:
        root: the dataset root.
        name: file name; the number in it is the seed of `random_image`.
        size: height and width.
        folder: the dataset is `sd_<folder>`.
    """
    top = root / "stable_diffusion" / folder
    image = save(top / "images" / name, random_image(int(Path(name).stem), size))
    line = {
        "file": name,
        "prompt": "a street",
        "seed": 0,
        "generator": "procedural",
        "model": "",
        "height": size[0],
        "width": size[1],
        "sha256": hashlib.sha256(image.read_bytes()).hexdigest(),
    }
    with (top / "manifest.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return image


DATASET_NAMES = (
    *("gta5", "synthia", "cityscapes_train", "cityscapes_val", "bdd_train", "bdd_val"),
    *("mapillary_train", "mapillary_val", "camvid_train", "camvid_val", "camvid_test"),
    *(
        f"acdc_{weather}_{split}"
        for weather in ("fog", "night", "rain", "snow")
        for split in ("train", "val")
    ),
    *("urbansyn", "synscapes", "idd_train", "idd_val", "dark_zurich_val", "wilddash2"),
    *("muses_train", "muses_val", "foggy_zurich", "foggy_driving"),
)
"""The builtin datasets with the 19 classes of Cityscapes."""

OWN_CLASSES = (
    *("camvid11_train", "camvid11_val", "camvid11_test"),
    *("mapillary65_train", "mapillary65_val"),
)
"""The builtin datasets with classes of their own; their files are those of camvid, mapillary."""


def real_camvid() -> Path:
    """Folder of the real CamVid dataset; skips the test when there is none."""
    beside = Path(__file__).resolve().parents[2] / "shared/data/camvid"
    folder = Path(os.environ.get("CLOUDS_TEST_CAMVID", beside))
    if not (folder / "val").is_dir():
        pytest.skip(f"no CamVid in {folder}; set CLOUDS_TEST_CAMVID to its folder")
    return folder
