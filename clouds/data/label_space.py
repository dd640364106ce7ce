"""The 19 Cityscapes classes, and the lookup from each dataset's own label ids to them.

Train ids are the indices 0..18 of `CITYSCAPES_19.names`; `IGNORE` (255) marks pixels that count
neither in training nor in scoring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
import numpy.typing as npt

IGNORE = 255

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class LabelSpace:
    """Classes in the order of their train ids.

    Attributes:
        names: one name per class.
        palette: one color per class, RGB, 0-255.
        synonyms: per class the words that the text classifier is asked for; the best of a
            class's words counts (CLOUDS, section 3.1).
    """

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    synonyms: tuple[tuple[str, ...], ...]

    @property
    def num_classes(self) -> int:
        """How many classes there are, void not counted."""
        return len(self.names)

    @cached_property
    def _colors(self) -> UInt8Array:
        """(256, 3): color of every uint8 id, black where it is no class."""
        table = np.zeros((256, 3), np.uint8)
        table[: self.num_classes] = self.palette
        return table

    def colorize(self, label: UInt8Array) -> UInt8Array:
        """Paint a label map.

        Args:
            label: (H, W) uint8 train ids.

        Returns:
            (H, W, 3) uint8 RGB; ids that are no class (255) are black.
        """
        return self._colors[label]


# name, RGB, words for the text classifier
_CLASSES: tuple[tuple[str, tuple[int, int, int], str], ...] = (
    ("road", (128, 64, 128), "road,railroad"),
    ("sidewalk", (244, 35, 232), "sidewalk,pavement"),
    ("building", (70, 70, 70), "building,buildings,edifice,edifices,house,ceiling"),
    ("wall", (102, 102, 156), "wall,walls,brick wall,stone wall,tile wall,wood wall"),
    ("fence", (190, 153, 153), "fence,fences"),
    ("pole", (153, 153, 153), "pole,poles"),
    ("traffic light", (250, 170, 30), "traffic light,traffic lights"),
    ("traffic sign", (220, 220, 0), "traffic sign,stop sign"),
    ("vegetation", (107, 142, 35), "vegetation,tree,trees,palm tree,bushes"),
    (
        "terrain",
        (152, 251, 152),
        "terrain,river,sand,sea,snow,water,mountain,grass,dirt,rock",
    ),
    ("sky", (70, 130, 180), "sky,clouds"),
    ("person", (220, 20, 60), "person"),
    ("rider", (255, 0, 0), "rider"),
    ("car", (0, 0, 142), "car,cars"),
    ("truck", (0, 0, 70), "truck,trucks"),
    ("bus", (0, 60, 100), "bus,buses"),
    ("train", (0, 80, 100), "train,trains,locomotive,locomotives,freight train"),
    ("motorcycle", (0, 0, 230), "motorcycle,motorcycles"),
    ("bicycle", (119, 11, 32), "bicycle,bicycles,bike,bikes"),
)

CITYSCAPES_19 = LabelSpace(
    names=tuple(name for name, _, _ in _CLASSES),
    palette=tuple(color for _, color, _ in _CLASSES),
    synonyms=tuple(tuple(words.split(",")) for _, _, words in _CLASSES),
)


@dataclass(frozen=True)
class LabelMapping:
    """Lookup from the ids in a dataset's label files ("raw" ids) to train ids.

    Attributes:
        name: what the ids are called in messages.
        raw_ids: train id -> the raw ids that become it, the most typical one first.
        void_ids: raw ids that are known and become `IGNORE`, the most typical one first.
    """

    name: str
    raw_ids: Mapping[int, tuple[int, ...]]
    void_ids: tuple[int, ...]

    @cached_property
    def _lut(self) -> UInt8Array:
        lut = np.full(256, IGNORE, np.uint8)
        for train_id, raws in self.raw_ids.items():
            lut[list(raws)] = train_id
        return lut

    @cached_property
    def _known(self) -> npt.NDArray[np.bool_]:
        known = np.zeros(256, np.bool_)
        for raws in (*self.raw_ids.values(), self.void_ids):
            known[list(raws)] = True
        return known

    @cached_property
    def _unknown(self) -> UInt8Array:
        return (~self._known).astype(np.uint8)

    @property
    def known_ids(self) -> tuple[int, ...]:
        """Every raw id that the dataset defines, ascending."""
        return tuple(int(i) for i in np.flatnonzero(self._known))

    @property
    def classes(self) -> tuple[int, ...]:
        """Train ids that some raw id becomes, ascending."""
        return tuple(sorted(self.raw_ids))

    def apply(self, raw: npt.NDArray[np.integer]) -> UInt8Array:
        """Turn raw ids into train ids.

        Args:
            raw: (H, W) of any integer type.

        Returns:
            (H, W) uint8; ids that are void or not known become `IGNORE`.
        """
        if (narrow := _narrow(raw)) is not None:
            return np.asarray(cv2.LUT(narrow, self._lut), np.uint8)
        inside = (raw >= 0) & (raw < 256)
        train_ids = self._lut[np.where(inside, raw, 0)]
        train_ids[~inside] = IGNORE
        return train_ids

    def unknown_ids(self, raw: npt.NDArray[np.integer]) -> tuple[int, ...]:
        """The ids in `raw` (H, W) that the dataset does not define, ascending."""
        if raw.size == 0:
            return ()
        narrow = _narrow(raw)
        # one look at each pixel; what they are is only sought where there are any
        if narrow is not None and not cv2.countNonZero(cv2.LUT(narrow, self._unknown)):
            return ()
        found = np.unique(raw)
        return tuple(int(i) for i in found if not (0 <= i < 256 and self._known[i]))

    def inverse(self) -> dict[int, int]:
        """One raw id for each train id that the dataset has, and one for `IGNORE`."""
        typical = {train_id: self.raw_ids[train_id][0] for train_id in self.classes}
        return typical | {IGNORE: self.void_ids[0]}


def _narrow(raw: npt.NDArray[np.integer]) -> UInt8Array | None:
    """Ids in one byte each, memory in order; None where one does not fit, or there are none."""
    if raw.dtype != np.uint8:
        if raw.size == 0 or raw.min() < 0 or raw.max() > 255:
            return None
        raw = raw.astype(np.uint8)
    return np.ascontiguousarray(raw, np.uint8)


def _mapping(
    name: str, raw_ids: Mapping[int, int | tuple[int, ...]], void_ids: tuple[int, ...]
) -> LabelMapping:
    as_tuples = {t: raw if isinstance(raw, tuple) else (raw,) for t, raw in raw_ids.items()}
    return LabelMapping(name, as_tuples, void_ids)


def _others(raw_ids: Mapping[int, int | tuple[int, ...]], last: int) -> tuple[int, ...]:
    """Ids 0..last that no class takes."""
    taken = {i for raw in raw_ids.values() for i in (raw if isinstance(raw, tuple) else (raw,))}
    return tuple(i for i in range(last + 1) if i not in taken)


# fmt: off
_CITYSCAPES: dict[int, int | tuple[int, ...]] = {
    0: 7, 1: 8, 2: 11, 3: 12, 4: 13, 5: 17, 6: 19, 7: 20, 8: 21, 9: 22, 10: 23, 11: 24, 12: 25,
    13: 26, 14: 27, 15: 28, 16: 31, 17: 32, 18: 33,
}
_SYNTHIA: dict[int, int | tuple[int, ...]] = {
    0: 3, 1: 4, 2: 2, 3: 21, 4: 5, 5: 7, 6: 15, 7: 9, 8: 6, 9: 16, 10: 1, 11: 10, 12: 17, 13: 8,
    14: 18, 15: 19, 16: 20, 17: 12, 18: 11,
}
_MAPILLARY: dict[int, int | tuple[int, ...]] = {
    0: (13, 24, 41), 1: (15, 2), 2: 17, 3: 6, 4: 3, 5: (45, 47), 6: 48, 7: 50, 8: 30, 9: 29,
    10: 27, 11: 19, 12: (20, 21, 22), 13: 55, 14: 61, 15: 54, 16: 58, 17: 57, 18: 52,
}
_CAMVID: dict[int, int | tuple[int, ...]] = {
    10: 0, 2: 1, 5: 2, 0: 3, 1: 4, 8: 5, 7: 6, 4: 7, 13: 8, 11: 9, 12: 10,
}
# fmt: on

CITYSCAPES_IDS = _mapping(
    "Cityscapes label ids (0-33; 255 stands for -1, license plate)",
    _CITYSCAPES,
    (*_others(_CITYSCAPES, 33), 255),
)
GTA_IDS = _mapping(
    "GTA5 label ids (Cityscapes' 0-33, and 34, license plate)",
    _CITYSCAPES,
    (*_others(_CITYSCAPES, 34), 255),
)
SYNTHIA_IDS = _mapping("SYNTHIA label ids (0-22)", _SYNTHIA, _others(_SYNTHIA, 22))
MAPILLARY_IDS = _mapping(
    "Mapillary Vistas v1.2 label ids (0-65)",
    _MAPILLARY,
    (65, *_others(_MAPILLARY, 64)),
)
CAMVID_11_IDS = _mapping("CamVid label ids of the SegNet layout (0-11)", _CAMVID, (11,))
TRAIN_IDS = _mapping("Cityscapes train ids (0-18 and 255)", {i: i for i in range(19)}, (IGNORE,))
