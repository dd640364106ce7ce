"""Random crops of rendered scenes: image, caption, and the class of crops of one object."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from clouds.data.label_space import CITYSCAPES_19
from street_models.captions import crop_caption, object_caption
from street_models.scenes import Scenes, UInt8Array

SIZE = 64
"""Height and width of a crop after resizing, pixels."""
SIDES = (36, 98)
"""Range of the sides of crops before resizing, pixels of a scene with 160 rows."""
OBJECT_SIDES = (24, 98)
MIN_PIXELS = 60
"""Smallest object that a crop is made around, pixels."""
MIN_STUFF_SHARE = 0.5
"""Share of its class that a crop of stuff has, if it is found within `_ATTEMPTS`."""
OBJECT_SHARE, WHOLE_SHARE = 0.30, 0.15
"""Shares of the crops around one object with a caption of one noun, and of whole scenes."""

_ATTEMPTS = 8
_ELONGATED = 2.0


@dataclass(frozen=True)
class Window:
    """A square of an image; parts outside of it are shifted back in."""

    top: int
    left: int
    side: int

    @staticmethod
    def around(row: float, column: float, side: int, shape: tuple[int, ...]) -> Window:
        """The square of a side around a pixel, within an image of `shape` (H, W)."""
        side = min(side, *shape[:2])
        top = min(max(round(row - side / 2), 0), shape[0] - side)
        left = min(max(round(column - side / 2), 0), shape[1] - side)
        return Window(top, left, side)

    def of(self, array: UInt8Array) -> UInt8Array:
        """The part of an array (H, W, ...)."""
        return array[self.top : self.top + self.side, self.left : self.left + self.side]


@dataclass(frozen=True)
class Crop:
    """A crop of a scene.

    Attributes:
        image: (SIZE, SIZE, 3) uint8 RGB.
        caption: what it shows.
        class_id: train id, where the caption names one class alone; else None.
    """

    image: UInt8Array
    caption: str
    class_id: int | None


class CropSampler:
    """Draws crops of all classes equally often.

    Args:
        scenes: where they are cut out.
    """

    def __init__(self, scenes: Scenes) -> None:
        self._scenes = scenes
        self._with_class = _scenes_with_class(scenes)
        self._classes = [c for c, found in enumerate(self._with_class) if len(found)]

    def draw(self, rng: np.random.Generator) -> Crop:
        """Draw one crop with its caption, mirrored in half of the cases."""
        kind = rng.random()
        if kind < OBJECT_SHARE:
            return self.draw_object(rng, self._classes[int(rng.integers(len(self._classes)))])
        whole = kind < OBJECT_SHARE + WHOLE_SHARE
        if whole:
            number = int(rng.integers(len(self._scenes)))
            shape = self._scenes.labels.shape[1:]
            side = round(float(rng.uniform(0.8, 1.0)) * shape[0])
            window = Window.around(rng.uniform(0, shape[0]), rng.uniform(0, shape[1]), side, shape)
        else:
            class_id = self._classes[int(rng.integers(len(self._classes)))]
            number = self._draw_scene(rng, class_id)
            label = self._scenes.labels[number]
            row, column = _random_pixel(rng, label == class_id)
            side = int(rng.integers(SIDES[0], SIDES[1] + 1))
            jitter = rng.uniform(-0.35, 0.35, 2) * side
            window = Window.around(row + jitter[0], column + jitter[1], side, label.shape)
        return self._captioned(rng, number, window, whole)

    def draw_object(self, rng: np.random.Generator, class_id: int) -> Crop:
        """Draw a crop around one object, or in one region, of a class."""
        number = self._draw_scene(rng, class_id)
        label, instances = self._scenes.labels[number], self._scenes.instances[number]
        window = object_window(rng, label, instances, class_id)
        image = resized(window.of(self._scenes.images[number]))
        if rng.random() < 0.5:
            image = image[:, ::-1]
        return Crop(image, object_caption(rng, class_id), class_id)

    def _draw_scene(self, rng: np.random.Generator, class_id: int) -> int:
        found = self._with_class[class_id]
        return int(found[int(rng.integers(len(found)))])

    def _captioned(
        self, rng: np.random.Generator, number: int, window: Window, whole: bool
    ) -> Crop:
        scenes = self._scenes
        step = 1 if rng.random() >= 0.5 else -1
        image, label, instances = (
            window.of(array[number])[:, ::step]
            for array in (scenes.images, scenes.labels, scenes.instances)
        )
        caption = crop_caption(rng, image, label, instances, scenes.facts[number], whole)
        return Crop(resized(image), caption, None)


def object_window(
    rng: np.random.Generator, label: UInt8Array, instances: UInt8Array, class_id: int,
    jitter: float = 0.1,
) -> Window:  # fmt: skip
    """A square around a random object of a class, or in a region of it where it is stuff.

    The side is 1.2 times the geometric mean of the sides of the object's box, so a pole is cut.
    Stuff is shown by a random square with a share of `MIN_STUFF_SHARE` of it, or by the one of
    `_ATTEMPTS` with the largest.

    Args:
        label, instances: (H, W) uint8; the class has pixels in it.
        jitter: largest shift of the center, share of the side.
    """
    mask = label == class_id
    sizes = np.bincount(instances[mask], minlength=256)
    sizes[0] = 0
    found = np.flatnonzero(sizes >= min(MIN_PIXELS, max(int(sizes.max()), 1)))
    if len(found) == 0:
        return _stuff_window(rng, mask)
    mask &= instances == found[int(rng.integers(len(found)))]
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    height, width = rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]
    side = int(np.clip(round(1.2 * (height * width) ** 0.5), *OBJECT_SIDES))
    row, column = (rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2
    if max(height, width) > _ELONGATED * min(height, width):
        row, column = _random_pixel(rng, mask)
    shift = rng.uniform(-jitter, jitter, 2) * side
    return Window.around(row + shift[0], column + shift[1], side, label.shape)


def resized(image: UInt8Array) -> UInt8Array:
    """A crop (h, w, 3) at (SIZE, SIZE, 3)."""
    mode = cv2.INTER_AREA if image.shape[0] > SIZE else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(np.ascontiguousarray(image), (SIZE, SIZE), interpolation=mode))


def _stuff_window(rng: np.random.Generator, mask: npt.NDArray[np.bool_]) -> Window:
    best, best_share = None, -1.0
    for _ in range(_ATTEMPTS):
        side = int(rng.integers(SIDES[0], SIDES[1] + 1))
        window = Window.around(*_random_pixel(rng, mask), side, mask.shape)
        share = float(mask[window.top :, window.left :][: window.side, : window.side].mean())
        if share > best_share:
            best, best_share = window, share
        if share >= MIN_STUFF_SHARE:
            break
    assert best is not None
    return best


def _random_pixel(rng: np.random.Generator, mask: npt.NDArray[np.bool_]) -> tuple[int, int]:
    found = np.flatnonzero(mask)
    row, column = divmod(int(found[int(rng.integers(len(found)))]), mask.shape[1])
    return row, column


def _scenes_with_class(scenes: Scenes) -> list[npt.NDArray[np.intp]]:
    """Per class the numbers of the scenes with at least `MIN_PIXELS` pixels of it."""
    counts = np.stack([np.bincount(label.ravel(), minlength=256) for label in scenes.labels])
    return [np.flatnonzero(counts[:, c] >= MIN_PIXELS) for c in range(CITYSCAPES_19.num_classes)]
