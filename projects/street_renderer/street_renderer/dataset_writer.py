"""Rendered scenes as files in the layouts of the real datasets: names, formats, sizes, label ids.

Folders, file name suffixes and label ids are those of `clouds.data.datasets`, which reads the
files. The rest of a file name only resembles that of the real dataset.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from clouds.data.datasets.builtin import get_description
from clouds.data.label_space import CITYSCAPES_19, IGNORE
from clouds.data.labels import LabelMapping
from clouds.files import atomic_write
from street_renderer.canvas import Bytes
from street_renderer.domains import STYLES
from street_renderer.layout import CLASSES, Contents, SceneLayout
from street_renderer.renderer import MIN_SIZE, RenderedScene, render_layout, sample_scene
from street_renderer.style import Look

_JPEG_QUALITY = 92
_PNG_OPTIONS = [
    cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY,
]  # fmt: skip
"""Images with noise: Huffman coding alone is faster and smaller than with match search."""

_WEATHERS = ("fog", "night", "rain", "snow")
FAMILIES: dict[str, tuple[str, ...]] = {
    "gta5": ("gta5",),
    "synthia": ("synthia",),
    "cityscapes": ("cityscapes_train", "cityscapes_val"),
    "bdd100k": ("bdd_val",),
    "mapillary_vistas": ("mapillary_val",),
    "acdc": tuple(f"acdc_{weather}_val" for weather in _WEATHERS),
}
"""Dataset name -> its splits that training and evaluation use."""


LabelEncoder = Callable[[Bytes, npt.NDArray[np.uint16], LabelMapping], bytes]
"""Raw ids (H, W), instances (H, W) and the mapping of the ids -> PNG file."""


@dataclass(frozen=True)
class _Format:
    """File format of one dataset, beyond the description in `clouds.data.datasets`.

    Attributes:
        style: name in `STYLES`.
        name: index of an image -> path without suffix, below the dataset's folder.
        encode_label: encodes a label file.
        varied_size: whether images differ in size.
    """

    style: str
    name: Callable[[int], str]
    encode_label: LabelEncoder
    varied_size: bool = False


@dataclass(frozen=True)
class Recipe:
    """Parameters of one rendered dataset.

    Attributes:
        name: dataset name in `clouds.data.datasets`, such as 'bdd_val'.
        seed: an image is a function of name, seed, size and its index.
        size: (height, width), pixels; the sizes of Mapillary images vary around it.
        ids: mapping from the ids in the dataset's label files to train ids.
        classes: train ids of the classes that the dataset labels.
        show_unlabelled: whether objects of other classes are visible; their pixels have the id of
            unlabelled ones.
    """

    name: str
    seed: int
    size: tuple[int, int]
    ids: LabelMapping
    classes: tuple[int, ...]
    show_unlabelled: bool = False

    @staticmethod
    def of(name: str, seed: int, size: tuple[int, int], show_unlabelled: bool = False) -> Recipe:
        """The parameters of a dataset."""
        row = get_description(name)
        ids, classes = row.label_formats[-1].ids, row.classes_present
        return Recipe(name, seed, size, ids, classes, show_unlabelled)

    def raw_ids(self) -> Bytes:
        """Table (256,) from train ids to raw ids; classes that the dataset lacks become ignored."""
        inverse = self.ids.inverse()
        table = np.full(256, inverse[IGNORE], np.uint8)
        for train_id in self.classes:
            table[train_id] = inverse[train_id]
        return table


@dataclass(frozen=True)
class RenderJob:
    """One image to render and its files; see `write_sample`."""

    recipe: Recipe
    index: int
    image: Path
    label: Path


def dataset_names() -> list[str]:
    """Names of the datasets that can be rendered."""
    splits = ("train", "val")
    acdc = [f"acdc_{weather}_{s}" for weather in _WEATHERS for s in splits]
    pairs = [f"{name}_{s}" for name in ("cityscapes", "bdd", "mapillary") for s in splits]
    return ["gta5", "synthia", *pairs, *acdc]


def folders(name: str) -> tuple[str, str]:
    """Folders of a dataset's images and labels, relative to the dataset root."""
    first = get_description(name).folders[0]
    return first.images, first.labels


def sample_paths(root: Path, name: str, index: int) -> tuple[Path, Path]:
    """Files of image `index` of a dataset and of its label."""
    row, stem = get_description(name), _format(name).name(index)
    images, labels = folders(name)
    image = root / images / (stem + row.image_suffixes[0])
    return image, root / labels / (stem + row.label_formats[-1].suffix)


def unlabelled_classes(name: str) -> tuple[str, ...]:
    """Names of the classes that a dataset does not label."""
    labelled = get_description(name).classes_present
    return tuple(other for c, other in enumerate(CLASSES) if c not in labelled)


def render_sample(recipe: Recipe, index: int) -> RenderedScene:
    """Render image `index` of a dataset, a function of the arguments alone."""
    layout, look, details = recorded_scene(recipe, index)
    return render_layout(details, layout, look)


def recorded_scene(recipe: Recipe, index: int) -> tuple[SceneLayout, Look, np.random.Generator]:
    """Layout, look and generator of details of image `index` of a dataset."""
    file_format = _format(recipe.name)
    rng = np.random.default_rng((recipe.seed, zlib.crc32(recipe.name.encode()), index))
    size = _varied_size(rng, recipe.size) if file_format.varied_size else recipe.size
    others = () if recipe.show_unlabelled else unlabelled_classes(recipe.name)
    return sample_scene(rng, STYLES[file_format.style], Contents(unwanted=others), size)


def write_sample(recipe: Recipe, index: int, image_path: Path, label_path: Path) -> None:
    """Render image `index` and write it and its label, each file atomically."""
    scene = render_sample(recipe, index)
    raw = cv2.LUT(scene.label, recipe.raw_ids())
    encode_label = _format(recipe.name).encode_label
    with atomic_write(label_path) as file:
        file.write(encode_label(raw, scene.instances, recipe.ids))
    with atomic_write(image_path) as file:
        file.write(_encode_image(scene.image, image_path.suffix))


def run(jobs: Sequence[RenderJob], workers: int) -> Iterator[RenderJob]:
    """Run jobs in this process or in several worker processes; yields each finished job."""
    if workers <= 1 or len(jobs) < 2:
        for job in jobs:
            yield _run_job(job)
        return
    # 'spawn': a forked process would inherit locks of other threads, such as those of OpenCV.
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=get_context("spawn"), initializer=cv2.setNumThreads,
        initargs=(1,),
    )  # fmt: skip
    try:
        yield from pool.map(_run_job, jobs, chunksize=4)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_job(job: RenderJob) -> RenderJob:
    write_sample(job.recipe, job.index, job.image, job.label)
    return job


# ---------------------------------------------------------------------- names and sizes
_CITIES = ("altstadt", "neuhausen", "seefeld")


def _city_name(index: int) -> str:
    city = _CITIES[index % len(_CITIES)]
    return f"{city}/{city}_{index // len(_CITIES):06d}_000019"


def _sequence_name(weather: str, index: int) -> str:
    sequence = f"GOPR{zlib.crc32(weather.encode()) % 900 + index // 20:04d}"
    return f"{sequence}/{sequence}_frame_{index % 20 * 40 + 1:06d}"


def _hash_name(index: int) -> str:
    digest = hashlib.sha256(f"bdd {index}".encode()).hexdigest()
    return f"{digest[:8]}-{digest[8:16]}"


def _key_name(index: int) -> str:
    return hashlib.sha256(f"vistas {index}".encode()).hexdigest()[:22]


_SHAPES = ((1.0, 1.0), (0.84, 1.12), (1.16, 0.87), (1.0, 0.89), (1.28, 1.28), (0.94, 0.94))
"""Heights and widths of Mapillary images, relative to the requested size."""


def _varied_size(rng: np.random.Generator, size: tuple[int, int]) -> tuple[int, int]:
    height, width = _SHAPES[int(rng.integers(len(_SHAPES)))]
    rows, columns = (max(MIN_SIZE, 2 * round(v / 2)) for v in (size[0] * height, size[1] * width))
    return rows, columns


# ---------------------------------------------------------------------- file formats
def _encode_image(image: Bytes, suffix: str) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY] if suffix == ".jpg" else _PNG_OPTIONS
    return _encode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)


def _encode(suffix: str, image: npt.NDArray[np.generic], options: list[int]) -> bytes:
    encoded, data = cv2.imencode(suffix, image, options)
    assert encoded, f"OpenCV cannot encode {suffix}"
    return bytes(data)


def _gray_label(raw: Bytes, instances: npt.NDArray[np.uint16], ids: LabelMapping) -> bytes:
    return _encode(".png", raw, [])


def _palette_label(raw: Bytes, instances: npt.NDArray[np.uint16], ids: LabelMapping) -> bytes:
    """8-bit PNG with a palette of class colors."""
    train_ids = ids.apply(np.arange(256, dtype=np.uint8))
    palette = CITYSCAPES_19.colorize(train_ids)
    image = Image.fromarray(raw)
    image.putpalette(palette.tobytes())
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _synthia_label(raw: Bytes, instances: npt.NDArray[np.uint16], ids: LabelMapping) -> bytes:
    """16-bit PNG: class in the red channel, instance in the green one (OpenCV's order is BGR)."""
    channels = np.zeros((*raw.shape, 3), np.uint16)
    channels[..., 2] = raw
    channels[..., 1] = instances
    return _encode(".png", channels, [])


_FORMATS: Mapping[str, _Format] = {
    "gta5": _Format("gta5", lambda index: f"{index + 1:05d}", _palette_label),
    "synthia": _Format("synthia", lambda index: f"{index:07d}", _synthia_label),
    "cityscapes": _Format("cityscapes", _city_name, _gray_label),
    "bdd": _Format("bdd100k", _hash_name, _gray_label),
    "mapillary": _Format("mapillary_vistas", _key_name, _palette_label, varied_size=True),
    **{
        f"acdc_{weather}": _Format(f"acdc_{weather}", partial(_sequence_name, weather), _gray_label)
        for weather in _WEATHERS
    },
}


def _format(name: str) -> _Format:
    return _FORMATS[name.removesuffix("_train").removesuffix("_val")]
