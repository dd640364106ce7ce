#!/usr/bin/env python
"""Reading and augmenting training images, compared with a pipeline of Pillow and numpy.

    python benchmarks/data.py
    python benchmarks/data.py --crop 512 512 --camvid ~/data/camvid --demo demo_data

Every image is read in turns by a plain pipeline (Pillow decodes, converts colors and resizes, numpy
maps label ids, crops, pads and flips) and by the training mapper, with the same geometry and color
jitter, on one thread. Both read files from the operating system's cache. Processor time is
measured, so the numbers are images per second and core. Images with the sizes and file formats of
GTA5, SYNTHIA and BDD100K are written into a temporary folder; CamVid and the datasets of
`tools/make_demo_data.py` are read if they exist.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from in_turns import parser_of
from PIL import Image

from clouds.data import reading
from clouds.data.augmentation import (
    AugmentationList,
    ColorJitterTransform,
    ResizeCropFlip,
    ResizeCropFlipTransform,
    SSDColorJitter,
)
from clouds.data.dataset_mapper import SourceMapper, to_tensor
from clouds.data.datasets import get_dataset
from clouds.data.label_space import IGNORE
from clouds.data.labels import LabelMapping, read_train_ids
from clouds.data.reading import read_image, read_size
from clouds.data.structures import Domain, Record

Array = np.ndarray
Seconds = dict[str, float]
STAGES = ("image", "label", "resize, crop, flip", "jitter", "to tensor")
GEOMETRY, JITTER = 0, 1
"""Positions in the list of augmentations."""


@contextmanager
def timed(seconds: Seconds, stage: str) -> Iterator[None]:
    """Add the processor time of the block to that of its stage."""
    start = time.process_time()
    yield
    seconds[stage] += time.process_time() - start


# ---------------------------------------------------------------- Pillow and numpy


def plain_label(record: Record, mapping: LabelMapping, seconds: Seconds) -> Array:
    """Read ids and map them; OpenCV reads SYNTHIA's 16 bits, which Pillow cannot."""
    with timed(seconds, "label"):
        if record.dataset == "synthia":
            raw = cv2.imread(str(record.label), cv2.IMREAD_UNCHANGED)[..., 2]
        else:
            raw = np.asarray(Image.open(record.label))
        table = np.full(256, IGNORE, np.uint8)
        for train_id, ids in mapping.raw_ids.items():
            table[list(ids)] = train_id
        return table[raw]


def plain_window(pixels: Array, geometry: ResizeCropFlipTransform, fill: int) -> Array:
    """Crop, pad and flip a resized image or label."""
    height, width = geometry.crop_size
    top, left = geometry.top, geometry.left
    window = pixels[top : top + height, left : left + width]
    pad_bottom, pad_right = height - window.shape[0], width - window.shape[1]
    if pad_bottom or pad_right:
        margins = ((0, pad_bottom), (0, pad_right)) + ((0, 0),) * (pixels.ndim - 2)
        window = np.pad(window, margins, constant_values=fill)
    return window[:, ::-1] if geometry.flip else window


def plain_contrast(image: Array, factor: float) -> Array:
    """Multiply all channels."""
    if factor == 1.0:
        return image
    return np.clip(image * np.float32(factor), 0, 255).astype(np.uint8)


def plain_jitter(image: Array, jitter: ColorJitterTransform) -> Array:
    """Brightness, contrast, saturation, hue as in SSD; hue and saturation in Pillow's HSV."""
    if jitter.brightness:
        image = np.clip(image + np.float32(jitter.brightness), 0, 255).astype(np.uint8)
    if jitter.contrast_first:
        image = plain_contrast(image, jitter.contrast)
    if jitter.saturation != 1.0 or jitter.hue:
        hsv = np.array(Image.fromarray(image).convert("HSV"))
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + round(jitter.hue * 256 / 180)) % 256
        hsv[..., 1] = np.clip(hsv[..., 1] * np.float32(jitter.saturation), 0, 255)
        image = np.asarray(Image.fromarray(hsv, mode="HSV").convert("RGB"))
    return image if jitter.contrast_first else plain_contrast(image, jitter.contrast)


def plain(record: Record, seed: int, mapper: SourceMapper, seconds: Seconds) -> dict[str, Any]:
    """One sample by Pillow and numpy."""
    assert record.label_format is not None
    with timed(seconds, "image"):
        image = Image.open(record.image).convert("RGB")
    label = plain_label(record, record.label_format.ids, seconds)
    rng = np.random.default_rng(seed)
    augmentations = mapper.augmentations.augmentations
    blank = np.broadcast_to(np.uint8(0), (*label.shape, 3))  # only its size matters
    geometry = augmentations[GEOMETRY].get_transform(blank, rng)
    with timed(seconds, "resize, crop, flip"):
        size = geometry.resized_size[::-1]
        resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        view = plain_window(resized, geometry, 0)
        nearest = Image.fromarray(label).resize(size, Image.Resampling.NEAREST)
        sem_seg = plain_window(np.asarray(nearest), geometry, IGNORE)
    with timed(seconds, "jitter"):
        view = plain_jitter(view, augmentations[JITTER].get_transform(view, rng))
    with timed(seconds, "to tensor"):
        tensor = torch.from_numpy(np.ascontiguousarray(view.transpose(2, 0, 1)))
        return {"image": tensor, "sem_seg": torch.from_numpy(np.ascontiguousarray(sem_seg))}


# ---------------------------------------------------------------- training mapper, by stage


def staged(record: Record, seed: int, mapper: SourceMapper, seconds: Seconds) -> None:
    """The steps of the training mapper, with the time of each."""
    assert record.label is not None
    assert record.label_format is not None
    with timed(seconds, "image"):
        image = read_image(record.image)
    with timed(seconds, "label"):
        label = read_train_ids(record.label, record.label_format, record.dataset)
    rng = np.random.default_rng(seed)
    augmentations = mapper.augmentations.augmentations
    with timed(seconds, "resize, crop, flip"):
        geometry = augmentations[GEOMETRY].get_transform(image, rng)
        view, sem_seg = geometry.apply_image(image), geometry.apply_segmentation(label)
    with timed(seconds, "jitter"):
        view = augmentations[JITTER].get_transform(view, rng).apply_image(view)
    with timed(seconds, "to tensor"):
        to_tensor(view), to_tensor(sem_seg)


# ---------------------------------------------------------------- images


def octaves(size: tuple[int, int], rng: np.random.Generator) -> Array:
    """(H, W) float32 around 0: noise with contrast at all scales, as in photographs."""
    total = np.zeros(size, np.float32)
    for cells in (3, 6, 12, 24, 48, 96, 192, 384):
        grid = rng.standard_normal((cells, 2 * cells)).astype(np.float32)
        total += cv2.resize(grid, size[::-1], interpolation=cv2.INTER_CUBIC) / cells**0.6
    return total


def random_photo(size: tuple[int, int], rng: np.random.Generator) -> Array:
    """(H, W, 3) uint8: similar channels and a little noise, as from a camera."""
    gray = octaves(size, rng)
    colors = [gray + 0.3 * octaves(size, rng) for _ in range(3)]
    noise = rng.normal(0, 1.0, (*size, 3)).astype(np.float32)
    return np.clip(120 + 60 * np.stack(colors, -1) + noise, 0, 255).astype(np.uint8)


def random_ids(size: tuple[int, int], known: tuple[int, ...], rng: np.random.Generator) -> Array:
    """(H, W) uint8: areas of some of the known raw ids of a dataset."""
    areas = np.stack([octaves(size, rng) for _ in range(8)]).argmax(0)
    return np.array(rng.choice(known, 8), np.uint8)[areas]


def save_label(path: Path, ids: Array, dataset: str) -> None:
    """Palette PNG for GTA5, 16 bits and three channels for SYNTHIA, gray for others."""
    if dataset == "synthia":
        channels = np.zeros((*ids.shape, 3), np.uint16)
        channels[..., 2] = ids
        cv2.imwrite(str(path), channels)
        return
    image = Image.fromarray(ids)
    if dataset == "gta5":
        image.putpalette(bytes(range(256)) * 3)
    image.save(path)


def write(folder: Path, dataset: str, size: tuple[int, int], suffix: str, n: int) -> list[Record]:
    """Write images and labels with the size and file format of a dataset."""
    records = []
    label_format = get_dataset(dataset).label_formats[-1]
    known_ids = sorted({*chain(*label_format.ids.raw_ids.values()), *label_format.ids.ignore_ids})
    for i in range(n):
        rng = np.random.default_rng(i)
        image, label = folder / f"{dataset}_{i}{suffix}", folder / f"{dataset}_{i}_label.png"
        options = {"quality": 90} if suffix == ".jpg" else {}
        Image.fromarray(random_photo(size, rng)).save(image, **options)
        save_label(label, random_ids(size, known_ids, rng), dataset)
        records.append(Record(image, label, Domain.SOURCE, dataset, label_format))
    return records


def existing(dataset: str, images: Path, labels: Path, n: int) -> list[Record]:
    """The first images of a folder; labels have the same file names."""
    label_format = get_dataset(dataset).label_formats[-1]
    paths = sorted(images.glob("*.png"))[:n] if labels.is_dir() else []
    return [Record(p, labels / p.name, Domain.SOURCE, dataset, label_format) for p in paths]


def benchmark_sets(folder: Path, args: argparse.Namespace) -> dict[str, list[Record]]:
    """Sets of images to measure with, by title."""
    camvid, demo, n = args.camvid, args.demo / "gta5", args.files
    sets = {
        "like GTA5, PNG": write(folder, "gta5", (1052, 1914), ".png", n),
        "like SYNTHIA, PNG": write(folder, "synthia", (760, 1280), ".png", n),
        "like BDD100K, JPEG": write(folder, "bdd_train", (720, 1280), ".jpg", n),
        "CamVid, PNG": existing("camvid_train", camvid / "train", camvid / "trainannot", n),
        "demo, PNG": existing("gta5", demo / "images", demo / "labels", n),
    }
    return {title: records for title, records in sets.items() if records}


# ---------------------------------------------------------------- measuring


def seconds_of(function: Callable[..., object], *args: object) -> float:
    start = time.process_time()
    function(*args)
    return time.process_time() - start


def measure(records: list[Record], mapper: SourceMapper, repeats: int) -> tuple[Seconds, ...]:
    """Processor seconds of all samples: in total, and by stage of either pipeline."""
    total: Seconds = defaultdict(float)
    stages: tuple[Seconds, Seconds] = (defaultdict(float), defaultdict(float))
    for record in records:  # the first reading fills the caches
        mapper(record, 0)
        plain(record, 0, mapper, defaultdict(float))
    for repeat in range(repeats):
        for i, record in enumerate(records):
            seed = repeat * len(records) + i
            total["plain"] += seconds_of(plain, record, seed, mapper, stages[0])
            total["ours"] += seconds_of(mapper, record, seed)
            staged(record, seed, mapper, stages[1])
    return total, *stages


def compare(records: list[Record], mapper: SourceMapper) -> str:
    """Difference between the samples of the two pipelines, whose filters and rounding differ."""
    levels, same = [], []
    for seed, record in enumerate(records):
        theirs, ours = plain(record, seed, mapper, defaultdict(float)), mapper(record, seed)
        levels.append((theirs["image"].float() - ours["image"].float()).abs().mean().item())
        same.append((theirs["sem_seg"] == ours["sem_seg"]).float().mean().item())
    return (
        f"images differ by {np.mean(levels):.1f} gray levels, {np.mean(same):.2%} of labels equal"
    )


def report(title: str, records: list[Record], mapper: SourceMapper, repeats: int) -> None:
    """Measure one set of images and print the result."""
    total, theirs, ours = measure(records, mapper, repeats)
    samples = repeats * len(records)
    height, width = read_size(records[0].image)
    kib = sum(record.image.stat().st_size for record in records) / len(records) / 1024
    print(f"\n{title}, {width}x{height}, {kib:.0f} KiB: {compare(records, mapper)}")
    print(f"{'':26}{'Pillow + numpy':>15}{'ours':>9}{'ratio':>8}")
    rates = [samples / total[name] for name in ("plain", "ours")]
    print(f"{'images/s per core':26}{rates[0]:15.1f}{rates[1]:9.1f}{rates[1] / rates[0]:8.2f}")
    for stage in STAGES:
        times = [1e3 * seconds[stage] / samples for seconds in (theirs, ours)]
        ratio = times[0] / times[1] if times[1] else float("nan")
        print(f"{'  ' + stage + ', ms':26}{times[0]:15.2f}{times[1]:9.2f}{ratio:8.2f}")


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--crop", type=int, nargs=2, default=(768, 768), help="height, width")
    parser.add_argument("--files", type=int, default=4, help="images per set")
    parser.add_argument("--repeats", type=int, default=10, help="samples per image")
    parser.add_argument("--without-kornia", action="store_true", help="do not use kornia_rs")
    parser.add_argument("--camvid", type=Path, default=Path("datasets/camvid"))
    parser.add_argument("--demo", type=Path, default=Path("demo_data"))
    return parser.parse_args()


def main() -> None:
    args = parse()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    geometry = ResizeCropFlip((0, 0), (0.5, 2.0), tuple(args.crop), "uniform", flip=True)
    mapper = SourceMapper(AugmentationList((geometry, SSDColorJitter())))
    if args.without_kornia:
        reading.decode_image_png_u8 = None
    fast = "without" if reading.decode_image_png_u8 is None else "with"
    print(f"OpenCV {cv2.__version__}, Pillow {Image.__version__}, {fast} kornia_rs, one thread")
    print(f"crop {args.crop[0]}x{args.crop[1]}, scale 0.5-2.0, {args.repeats} samples per image")
    with tempfile.TemporaryDirectory() as folder:
        for title, records in benchmark_sets(Path(folder), args).items():
            report(title, records, mapper, args.repeats)


if __name__ == "__main__":
    main()
