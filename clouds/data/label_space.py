"""Label spaces: the classes that a model is trained on and scored on.

Train ids are indices into it; `IGNORE` marks pixels that count neither in training nor in scoring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import cv2
import numpy as np
import numpy.typing as npt

IGNORE = 255
"""Train id of pixels that do not count, in every label space: label maps are uint8."""

UInt8Array = npt.NDArray[np.uint8]
Color = tuple[int, int, int]

_LEVELS = tuple(range(0, 256, 17))
"""Values per channel among which distinct colors are chosen: 16^3 colors."""


@dataclass(frozen=True)
class LabelSpace:
    """Classes in the order of their train ids. Name and colors are not part of comparisons.

    Attributes:
        name: of the label space, for messages and reports.
        names: one name per class.
        colors: one color per class, RGB, 0-255.
        synonyms: per class the words of the text classifier; the class's score is the maximum
            over them (paper section 3.1).
        ignore: train id of pixels that do not count; no class.
    """

    name: str = field(compare=False)
    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...] = field(compare=False)
    synonyms: tuple[tuple[str, ...], ...]
    ignore: int = IGNORE

    @property
    def num_classes(self) -> int:
        """Number of classes, without the no-object class."""
        return len(self.names)

    @cached_property
    def _color_table(self) -> UInt8Array:
        """(256, 3): color of every uint8 id, black where it is no class."""
        table = np.zeros((256, 3), np.uint8)
        table[: self.num_classes] = self.colors
        return table

    def colorize(self, label: UInt8Array) -> UInt8Array:
        """Color a label map.

        Args:
            label: (H, W) uint8 train ids.

        Returns:
            (H, W, 3) uint8 RGB; ids that are no class are black.
        """
        return self._color_table[label]


# name, RGB, words for the text classifier
_CITYSCAPES_CLASSES: tuple[tuple[str, tuple[int, int, int], str], ...] = (
    ("road", (128, 64, 128), "road,railroad"),
    ("sidewalk", (244, 35, 232), "sidewalk,pavement"),
    ("building", (70, 70, 70), "building,buildings,edifice,edifices,house,ceiling"),
    ("wall", (102, 102, 156), "wall,walls,brick wall,stone wall,tile wall,wood wall"),
    ("fence", (190, 153, 153), "fence,fences"),
    ("pole", (153, 153, 153), "pole,poles"),
    ("traffic light", (250, 170, 30), "traffic light,traffic lights"),
    ("traffic sign", (220, 220, 0), "traffic sign,stop sign"),
    ("vegetation", (107, 142, 35), "vegetation,tree,trees,palm tree,bushes"),
    ("terrain", (152, 251, 152), "terrain,river,sand,sea,snow,water,mountain,grass,dirt,rock"),
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
    name="Cityscapes-19",
    names=tuple(name for name, _, _ in _CITYSCAPES_CLASSES),
    colors=tuple(color for _, color, _ in _CITYSCAPES_CLASSES),
    synonyms=tuple(tuple(words.split(",")) for _, _, words in _CITYSCAPES_CLASSES),
)


def words_of(names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Words of the text classifier per class: those of a label space with these names, else these.

    Args:
        names: one per class, in the order of the train ids.
    """
    if tuple(names) == CITYSCAPES_19.names:
        return CITYSCAPES_19.synonyms
    return tuple((name,) for name in names)


def distinct_colors(count: int, besides: Sequence[Color] = ()) -> list[Color]:
    """`count` RGB colors, each as far as possible from all before it, in CIE Lab.

    Args:
        besides: colors that they must differ from, in addition to black and white.
    """
    grid = np.stack(np.meshgrid(_LEVELS, _LEVELS, _LEVELS, indexing="ij"), -1).reshape(-1, 3)
    candidates = _lab(grid)
    distances = np.full(len(grid), np.inf)
    for color in _lab(np.array([(0, 0, 0), (255, 255, 255), *besides])):
        distances = np.minimum(distances, np.linalg.norm(candidates - color, axis=1))
    colors: list[Color] = []
    for _ in range(count):
        best = int(distances.argmax())
        red, green, blue = (int(value) for value in grid[best])
        colors.append((red, green, blue))
        to_best = np.linalg.norm(candidates - candidates[best], axis=1)
        distances = np.minimum(distances, to_best)
    return colors


def _lab(colors: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """CIE Lab (N, 3) of RGB colors (N, 3), 0..255."""
    rgb = np.asarray(colors, np.float32)[None] / 255
    lab: npt.NDArray[np.float32] = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)[0]
    return lab
