"""Label spaces: the classes that a model is trained on and scored on.

Train ids are indices into it; `IGNORE` marks pixels that count neither in training nor in scoring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from clouds.data.yaml_section import Color, DescriptionError, Section, parse
from clouds.messages import repeated

IGNORE = 255
"""Train id of pixels that do not count, in every label space: label maps are uint8."""

UInt8Array = npt.NDArray[np.uint8]
RESERVED = "=,"
"""Characters that no name of a class has, because lists of classes in configs have them."""

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


@dataclass(frozen=True)
class LabelSpaceFile:
    """A label space, and how its classes are stored in label files.

    Attributes:
        label_space: the classes.
        ids: per class its ids in label files; empty where none are given.
        label_colors: per class its RGB colors in label files of colors.
        ignore_ids, ignore_colors: of pixels that do not count.
        palette: pairs of an id and its published color, which palette files of its datasets have.
    """

    label_space: LabelSpace
    ids: tuple[tuple[int, ...], ...]
    label_colors: tuple[tuple[Color, ...], ...]
    ignore_ids: tuple[int, ...]
    ignore_colors: tuple[Color, ...]
    palette: tuple[tuple[int, Color], ...] = ()


def read_classes(section: Section, name: str) -> LabelSpaceFile:
    """Read `classes`, `ignore_ids` and `ignore_colors` of a description or of a label space's file.

    Args:
        section: has these entries; others are not looked at.
        name: of the label space.

    Raises:
        DescriptionError: an entry is missing, has another type, or a class occurs twice.
    """
    classes = section.sections("classes")
    if len(classes) > IGNORE:
        raise DescriptionError(
            f"{section.origin}: {len(classes)} classes; at most {IGNORE} allowed"
        )
    names = [entry.text("name", allowed="the name of a class") for entry in classes]
    for entry, class_name in zip(classes, names, strict=True):
        if set(class_name) & set(RESERVED):
            raise entry.error("name", f"a name without any of {' '.join(RESERVED)}")
    _check_different(section.origin, names)
    given = [entry.color("color") for entry in classes]
    colors = _with_distinct_colors(given)
    file = LabelSpaceFile(
        label_space=LabelSpace(
            name=name,
            names=tuple(names),
            colors=tuple(colors),
            synonyms=tuple(
                entry.texts("words", [class_name])
                for entry, class_name in zip(classes, names, strict=True)
            ),
        ),
        ids=tuple(entry.ids("ids") for entry in classes),
        label_colors=tuple(
            entry.colors("label_colors") or (() if color is None else (color,))
            for entry, color in zip(classes, given, strict=True)
        ),
        ignore_ids=section.ids("ignore_ids", [IGNORE]),
        ignore_colors=section.colors("ignore_colors"),
    )
    for entry in classes:
        entry.done()
    return file


def _check_different(origin: str, names: Sequence[str]) -> None:
    if twice := repeated(name.lower() for name in names):
        raise DescriptionError(
            f"{origin}: more than one class is named {', '.join(map(repr, twice))} (upper and "
            "lower case are the same); give one class all their ids"
        )


def _with_distinct_colors(given: Sequence[Color | None]) -> list[Color]:
    """The colors, with distinct ones in place of None."""
    known = [color for color in given if color is not None]
    new = iter(distinct_colors(len(given) - len(known), known))
    return [next(new) if color is None else color for color in given]


BUILTIN_LABEL_SPACES = ("cityscapes_19", "camvid_11", "mapillary_65")
"""Label spaces that come with the package, `label_spaces/<name>.yaml`."""


@cache
def builtin_label_space(name: str) -> LabelSpaceFile:
    """One of BUILTIN_LABEL_SPACES."""
    path = Path(__file__).parent / "label_spaces" / f"{name}.yaml"
    section = parse(path.read_text(encoding="utf-8"), str(path))
    file = read_classes(section, name)
    palette = section.colors("palette")
    section.done()
    return replace(file, palette=tuple(enumerate(palette)))


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


CITYSCAPES_19 = builtin_label_space("cityscapes_19").label_space
"""The 19 classes that Cityscapes and the other datasets of street scenes are scored on."""
