"""Painted scenes as files of the real datasets: their names, file kinds, sizes and label ids.

Folders, file name endings and label ids come from the table of datasets, so what is written here is
what that table reads. The rest of a file's name only has to look like the real one's.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from clouds.data.label_space import CITYSCAPES_19, IGNORE
from clouds.data.reading import LabelMapping
from clouds.files import written_whole
from clouds.scenes.canvas import Bytes
from clouds.scenes.domains import STYLES
from clouds.scenes.layout import CLASSES, Contents
from clouds.scenes.painter import SMALLEST, Painting, paint_scene

if TYPE_CHECKING:
    from clouds.data.datasets.description import Row

_JPEG_QUALITY = 92
_PNG_OPTIONS = [
    cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY,
]  # fmt: skip
"""Noise does not repeat: coding single values is faster, and smaller, than looking for matches."""

_WEATHERS = ("fog", "night", "rain", "snow")
FAMILIES: dict[str, tuple[str, ...]] = {
    "gta5": ("gta5",),
    "synthia": ("synthia",),
    "cityscapes": ("cityscapes_train", "cityscapes_val"),
    "bdd100k": ("bdd_val",),
    "mapillary_vistas": ("mapillary_val",),
    "acdc": tuple(f"acdc_{weather}_val" for weather in _WEATHERS),
}
"""What a dataset's name stands for: the splits that training and evaluation use."""


LabelEncoder = Callable[[Bytes, npt.NDArray[np.uint16], LabelMapping], bytes]
"""Raw ids (H, W), instances (H, W) and what the ids mean -> PNG file."""


@dataclass(frozen=True)
class _Format:
    """How the pictures of one dataset are stored, as far as the table of datasets leaves it open.

    Attributes:
        style: name in `STYLES`.
        name: number of a picture -> its path without suffix, below the dataset's folder.
        encode_label: makes the label file.
        varied: whether pictures differ in size.
    """

    style: str
    name: Callable[[int], str]
    encode_label: LabelEncoder
    varied: bool = False


@dataclass(frozen=True)
class Recipe:
    """All that is needed to paint and store pictures of one dataset.

    Attributes:
        name: a row of the table of datasets.
        seed: pictures are a function of name, seed, size and their own number.
        size: (rows, columns); the pictures of Mapillary vary around it.
        ids: lookup from the ids in the dataset's own label files to train ids.
        classes: train ids in its label set.
    """

    name: str
    seed: int
    size: tuple[int, int]
    ids: LabelMapping
    classes: tuple[int, ...]

    @staticmethod
    def of(name: str, seed: int, size: tuple[int, int]) -> Recipe:
        """The recipe of a row of the table of datasets."""
        row = _row(name)
        return Recipe(name, seed, size, row.label_files[-1].ids, row.classes_present)

    def raw_ids(self) -> Bytes:
        """Table (256,) from train ids to raw ids; classes that the dataset lacks become void."""
        inverse = self.ids.inverse()
        table = np.full(256, inverse[IGNORE], np.uint8)
        for train_id in self.classes:
            table[train_id] = inverse[train_id]
        return table


def row_names() -> list[str]:
    """Rows of the table of datasets that can be painted."""
    splits = ("train", "val")
    acdc = [f"acdc_{weather}_{s}" for weather in _WEATHERS for s in splits]
    pairs = [f"{name}_{s}" for name in ("cityscapes", "bdd", "mapillary") for s in splits]
    return ["gta5", "synthia", *pairs, *acdc]


def folders(name: str) -> tuple[str, str]:
    """Folders of a dataset's images and labels, relative to the dataset root."""
    first = _row(name).folders[0]
    return first.images, first.labels


def picture_paths(root: Path, name: str, index: int) -> tuple[Path, Path]:
    """Where picture `index` of a dataset and its label lie under a dataset root."""
    row, stem = _row(name), _format(name).name(index)
    images, labels = folders(name)
    image = root / images / (stem + row.image_suffixes[0])
    return image, root / labels / (stem + row.label_files[-1].suffix)


def paint_picture(recipe: Recipe, index: int) -> Painting:
    """Picture `index` of a dataset: a function of its arguments alone."""
    kind = _format(recipe.name)
    rng = np.random.default_rng((recipe.seed, zlib.crc32(recipe.name.encode()), index))
    size = _varied(rng, recipe.size) if kind.varied else recipe.size
    absent = tuple(name for c, name in enumerate(CLASSES) if c not in recipe.classes)
    return paint_scene(rng, STYLES[kind.style], Contents(unwanted=absent), size)


def write_picture(recipe: Recipe, index: int, image_path: Path, label_path: Path) -> None:
    """Paint picture `index` and write it and its label; each file appears whole or not at all."""
    painting = paint_picture(recipe, index)
    raw = cv2.LUT(painting.label, recipe.raw_ids())
    encode_label = _format(recipe.name).encode_label
    with written_whole(label_path) as file:
        file.write(encode_label(raw, painting.instances, recipe.ids))
    with written_whole(image_path) as file:
        file.write(_encode_image(painting.image, image_path.suffix))


def _row(name: str) -> Row:
    # Imported here: the processes that paint get a `Recipe` and need no table, nor what the
    # package of datasets imports beside it.
    from clouds.data.datasets.builtin import get_row

    return get_row(name)


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
"""Rows and columns of Mapillary's pictures relative to the size asked for."""


def _varied(rng: np.random.Generator, size: tuple[int, int]) -> tuple[int, int]:
    tall, wide = _SHAPES[int(rng.integers(len(_SHAPES)))]
    rows, columns = (max(SMALLEST, 2 * round(v / 2)) for v in (size[0] * tall, size[1] * wide))
    return rows, columns


# ---------------------------------------------------------------------- file kinds
def _encode_image(image: Bytes, suffix: str) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY] if suffix == ".jpg" else _PNG_OPTIONS
    return _encoded(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)


def _encoded(suffix: str, picture: npt.NDArray[np.generic], options: list[int]) -> bytes:
    done, data = cv2.imencode(suffix, picture, options)
    assert done, f"OpenCV cannot encode {suffix}"
    return bytes(data)


def _grey_label(raw: Bytes, instances: npt.NDArray[np.uint16], ids: LabelMapping) -> bytes:
    return _encoded(".png", raw, [])


def _palette_label(raw: Bytes, instances: npt.NDArray[np.uint16], ids: LabelMapping) -> bytes:
    """Ids as indices into a palette of class colors."""
    train_ids = ids.apply(np.arange(256, dtype=np.uint8))
    palette = CITYSCAPES_19.colorize(train_ids)
    picture = Image.fromarray(raw)
    picture.putpalette(palette.tobytes())
    stream = BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def _deep_label(raw: Bytes, instances: npt.NDArray[np.uint16], ids: LabelMapping) -> bytes:
    """16 bits, three channels: class in red, instance in green; OpenCV's order is reversed."""
    channels = np.zeros((*raw.shape, 3), np.uint16)
    channels[..., 2] = raw
    channels[..., 1] = instances
    return _encoded(".png", channels, [])


_FORMATS: Mapping[str, _Format] = {
    "gta5": _Format("gta5", lambda index: f"{index + 1:05d}", _palette_label),
    "synthia": _Format("synthia", lambda index: f"{index:07d}", _deep_label),
    "cityscapes": _Format("cityscapes", _city_name, _grey_label),
    "bdd": _Format("bdd100k", _hash_name, _grey_label),
    "mapillary": _Format("mapillary_vistas", _key_name, _palette_label, varied=True),
    **{
        f"acdc_{weather}": _Format(f"acdc_{weather}", partial(_sequence_name, weather), _grey_label)
        for weather in _WEATHERS
    },
}


def _format(name: str) -> _Format:
    return _FORMATS[name.removesuffix("_train").removesuffix("_val")]
