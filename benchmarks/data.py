#!/usr/bin/env python
"""Reading and augmenting training images, against the same done with Pillow and numpy.

    python benchmarks/data.py
    python benchmarks/data.py --crop 512 512 --camvid ~/data/camvid --demo demo_data

Every picture is visited by turns by a pipeline written plainly (Pillow decodes, converts colors
and resizes, numpy looks labels up, crops, pads and flips) and by the training mapper, with the
same geometry and jitter, on one thread. Both get images from the operating system's cache. What
counts is processor time, so the numbers are images per second and core. Pictures of the sizes and
kinds of GTA5, SYNTHIA and BDD100K are made in a temporary folder; folders of real CamVid pictures
and of `tools/make_demo_data.py` are read where they exist.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from in_turns import parser_of
from PIL import Image

from clouds.data import reading
from clouds.data.augmentation import Geometry, GeometryRange, Jitter, JitterRange
from clouds.data.dataset_mapper import SourceMapper, to_tensor
from clouds.data.datasets import get_dataset
from clouds.data.label_space import IGNORE
from clouds.data.reading import LabelMapping, read_image
from clouds.data.structures import Domain, Record

Array = np.ndarray
Seconds = dict[str, float]
STAGES = ("image", "label", "resize, crop, flip", "jitter", "to tensor")


@contextmanager
def timed(seconds: Seconds, stage: str) -> Iterator[None]:
    """Add the processor time of the block to that of its stage."""
    start = time.process_time()
    yield
    seconds[stage] += time.process_time() - start


# ---------------------------------------------------------------- plainly


def plain_label(record: Record, mapping: LabelMapping, seconds: Seconds) -> Array:
    """Read ids and look them up; Pillow cannot read SYNTHIA's 16 bits, so OpenCV does."""
    with timed(seconds, "label"):
        if record.dataset == "synthia":
            raw = cv2.imread(str(record.label), cv2.IMREAD_UNCHANGED)[..., 2]
        else:
            raw = np.asarray(Image.open(record.label))
        table = np.full(256, IGNORE, np.uint8)
        for train_id, ids in mapping.raw_ids.items():
            table[list(ids)] = train_id
        return table[raw]


def plain_window(pixels: Array, geometry: Geometry, fill: int) -> Array:
    """Crop, pad and flip what has been resized."""
    height, width = geometry.crop
    top, left = geometry.top, geometry.left
    window = pixels[top : top + height, left : left + width]
    below, beside = height - window.shape[0], width - window.shape[1]
    if below or beside:
        margins = ((0, below), (0, beside)) + ((0, 0),) * (pixels.ndim - 2)
        window = np.pad(window, margins, constant_values=fill)
    return window[:, ::-1] if geometry.flip else window


def plain_contrast(image: Array, factor: float) -> Array:
    """Multiply all channels."""
    if factor == 1.0:
        return image
    return np.clip(image * np.float32(factor), 0, 255).astype(np.uint8)


def plain_jitter(image: Array, jitter: Jitter) -> Array:
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
    assert record.label is not None
    with timed(seconds, "image"):
        image = Image.open(record.image).convert("RGB")
    ids = get_dataset(record.dataset).row.label_file(record.label.name).ids
    label = plain_label(record, ids, seconds)
    rng = np.random.default_rng(seed)
    geometry = mapper.geometry.draw(label.shape, rng)
    with timed(seconds, "resize, crop, flip"):
        size = geometry.resized[::-1]
        resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        view = plain_window(resized, geometry, 0)
        nearest = Image.fromarray(label).resize(size, Image.Resampling.NEAREST)
        sem_seg = plain_window(np.asarray(nearest), geometry, IGNORE)
    if mapper.jitter is not None:
        with timed(seconds, "jitter"):
            view = plain_jitter(view, mapper.jitter.draw(rng))
    with timed(seconds, "to tensor"):
        tensor = torch.from_numpy(np.ascontiguousarray(view.transpose(2, 0, 1)))
        return {"image": tensor, "sem_seg": torch.from_numpy(np.ascontiguousarray(sem_seg))}


# ---------------------------------------------------------------- ours, stage by stage


def staged(record: Record, seed: int, mapper: SourceMapper, seconds: Seconds) -> None:
    """What the training mapper does, with the time of its stages."""
    with timed(seconds, "image"):
        image = read_image(record.image)
    with timed(seconds, "label"):
        label = get_dataset(record.dataset).read_label(record)
    rng = np.random.default_rng(seed)
    geometry = mapper.geometry.draw(label.shape, rng)
    with timed(seconds, "resize, crop, flip"):
        view, sem_seg = geometry.apply_image(image), geometry.apply_label(label)
    if mapper.jitter is not None:
        with timed(seconds, "jitter"):
            view = mapper.jitter.draw(rng).apply(view)
    with timed(seconds, "to tensor"):
        to_tensor(view), to_tensor(sem_seg)


# ---------------------------------------------------------------- pictures


def octaves(size: tuple[int, int], rng: np.random.Generator) -> Array:
    """(H, W) float32 around 0: as much contrast at each scale, like photographs."""
    total = np.zeros(size, np.float32)
    for cells in (3, 6, 12, 24, 48, 96, 192, 384):
        grid = rng.standard_normal((cells, 2 * cells)).astype(np.float32)
        total += cv2.resize(grid, size[::-1], interpolation=cv2.INTER_CUBIC) / cells**0.6
    return total


def made_picture(size: tuple[int, int], rng: np.random.Generator) -> Array:
    """(H, W, 3) uint8: the channels mostly alike, and a little noise, as from a camera."""
    grey = octaves(size, rng)
    colors = [grey + 0.3 * octaves(size, rng) for _ in range(3)]
    noise = rng.normal(0, 1.0, (*size, 3)).astype(np.float32)
    return np.clip(120 + 60 * np.stack(colors, -1) + noise, 0, 255).astype(np.uint8)


def made_ids(size: tuple[int, int], known: tuple[int, ...], rng: np.random.Generator) -> Array:
    """(H, W) uint8: areas of a dataset's own ids."""
    areas = np.stack([octaves(size, rng) for _ in range(8)]).argmax(0)
    return np.array(rng.choice(known, 8), np.uint8)[areas]


def save_label(path: Path, ids: Array, kind: str) -> None:
    """Palette PNG for GTA5, 16 bits and three channels for SYNTHIA, grey for others."""
    if kind == "synthia":
        channels = np.zeros((*ids.shape, 3), np.uint16)
        channels[..., 2] = ids
        cv2.imwrite(str(path), channels)
        return
    image = Image.fromarray(ids)
    if kind == "gta5":
        image.putpalette(bytes(range(256)) * 3)
    image.save(path)


def make(folder: Path, dataset: str, size: tuple[int, int], suffix: str, n: int) -> list[Record]:
    """Write pictures with labels of a dataset's size and kind."""
    records = []
    known = get_dataset(dataset).row.label_files[-1].ids.known_ids
    for i in range(n):
        rng = np.random.default_rng(i)
        image, label = folder / f"{dataset}_{i}{suffix}", folder / f"{dataset}_{i}_label.png"
        options = {"quality": 90} if suffix == ".jpg" else {}
        Image.fromarray(made_picture(size, rng)).save(image, **options)
        save_label(label, made_ids(size, known, rng), dataset)
        records.append(Record(image, label, Domain.SOURCE, dataset))
    return records


def found(dataset: str, images: Path, labels: Path, n: int) -> list[Record]:
    """Pictures that are there, whose labels have the same names."""
    paths = sorted(images.glob("*.png"))[:n] if labels.is_dir() else []
    return [Record(path, labels / path.name, Domain.SOURCE, dataset) for path in paths]


def kinds(folder: Path, args: argparse.Namespace) -> dict[str, list[Record]]:
    """Pictures to measure with, by kind."""
    camvid, demo, n = args.camvid, args.demo / "gta5", args.files
    every = {
        "made like GTA5, PNG": make(folder, "gta5", (1052, 1914), ".png", n),
        "made like SYNTHIA, PNG": make(folder, "synthia", (760, 1280), ".png", n),
        "made like BDD100K, JPEG": make(folder, "bdd_train", (720, 1280), ".jpg", n),
        "CamVid, PNG": found("camvid_train", camvid / "train", camvid / "trainannot", n),
        "demo, PNG": found("gta5", demo / "images", demo / "labels", n),
    }
    return {kind: records for kind, records in every.items() if records}


# ---------------------------------------------------------------- measuring


def seconds_of(function: Callable[..., object], *args: object) -> float:
    start = time.process_time()
    function(*args)
    return time.process_time() - start


def measure(records: list[Record], mapper: SourceMapper, repeats: int) -> tuple[Seconds, ...]:
    """Processor seconds of all visits: in all, and by stage of either pipeline."""
    total: Seconds = defaultdict(float)
    stages: tuple[Seconds, Seconds] = (defaultdict(float), defaultdict(float))
    for record in records:  # the first visit fills the caches
        mapper(record, 0)
        plain(record, 0, mapper, defaultdict(float))
    for visit in range(repeats):
        for i, record in enumerate(records):
            seed = visit * len(records) + i
            total["plain"] += seconds_of(plain, record, seed, mapper, stages[0])
            total["ours"] += seconds_of(mapper, record, seed)
            staged(record, seed, mapper, stages[1])
    return total, *stages


def compare(records: list[Record], mapper: SourceMapper) -> str:
    """How far the two pipelines' samples are apart; their filters and rounding differ."""
    levels, same = [], []
    for seed, record in enumerate(records):
        theirs, ours = plain(record, seed, mapper, defaultdict(float)), mapper(record, seed)
        levels.append((theirs["image"].float() - ours["image"].float()).abs().mean().item())
        same.append((theirs["sem_seg"] == ours["sem_seg"]).float().mean().item())
    return f"images {np.mean(levels):.1f} grey levels apart, labels {np.mean(same):.2%} the same"


def report(kind: str, records: list[Record], mapper: SourceMapper, repeats: int) -> None:
    """Measure one kind and print it."""
    total, theirs, ours = measure(records, mapper, repeats)
    visits = repeats * len(records)
    width, height = Image.open(records[0].image).size
    kib = sum(record.image.stat().st_size for record in records) / len(records) / 1024
    print(f"\n{kind}, {width}x{height}, {kib:.0f} KiB: {compare(records, mapper)}")
    print(f"{'':26}{'Pillow + numpy':>15}{'ours':>9}{'ratio':>8}")
    rates = [visits / total[name] for name in ("plain", "ours")]
    print(f"{'images/s per core':26}{rates[0]:15.1f}{rates[1]:9.1f}{rates[1] / rates[0]:8.2f}")
    for stage in STAGES:
        times = [1e3 * seconds[stage] / visits for seconds in (theirs, ours)]
        ratio = times[0] / times[1] if times[1] else float("nan")
        print(f"{'  ' + stage + ', ms':26}{times[0]:15.2f}{times[1]:9.2f}{ratio:8.2f}")


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--crop", type=int, nargs=2, default=(768, 768), help="height, width")
    parser.add_argument("--files", type=int, default=4, help="pictures of each kind")
    parser.add_argument("--repeats", type=int, default=10, help="visits to each picture")
    parser.add_argument("--without-kornia", action="store_true", help="as if not installed")
    parser.add_argument("--camvid", type=Path, default=Path("datasets/camvid"))
    parser.add_argument("--demo", type=Path, default=Path("demo_data"))
    return parser.parse_args()


def main() -> None:
    args = parse()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    geometry = GeometryRange((0, 0), (0.5, 2.0), tuple(args.crop), "uniform", flip=True)
    mapper = SourceMapper(geometry, JitterRange())
    if args.without_kornia:
        reading.decode_image_png_u8 = None
    fast = "without" if reading.decode_image_png_u8 is None else "with"
    print(f"OpenCV {cv2.__version__}, Pillow {Image.__version__}, {fast} kornia_rs, one thread")
    print(f"crop {args.crop[0]}x{args.crop[1]}, scale 0.5-2.0, {args.repeats} visits")
    with tempfile.TemporaryDirectory() as folder:
        for kind, records in kinds(Path(folder), args).items():
            report(kind, records, mapper, args.repeats)


if __name__ == "__main__":
    main()
