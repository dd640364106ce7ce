"""Training examples of Street-SAM: rendered views, point prompts, and the masks they ask for.

Masks are regions of two kinds: connected components of the label map, as CLOUDS prompts them
(objects of a class that touch, or a part of the sky), and single objects. An example is a function
of seed and index, so a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from clouds.data.label_space import IGNORE
from clouds.self_training.refiners.sam.frame import Frame
from clouds.self_training.refiners.sam.prompts import Components, find_components
from street_models.scenes import Scenes

Mask = npt.NDArray[np.bool_]

MIN_AREA = 24
"""Regions with fewer pixels in the frame get no prompt."""
SMALL_AREA, SMALL_WEIGHT = 100, 0.5
"""Regions of fewer pixels are drawn with this weight, others with 1."""
OBJECT_SHARE = 0.15
"""Share of the prompts that are drawn from single objects."""
REGION_POINTS = 5
"""Random pixels of a region whose mean embedding stands for it."""
WINDOW_SHARE, SMALLEST_WINDOW = 0.4, 0.6
"""Share of the views that are smaller than the scene, and the smallest height, of the scene's."""
ASPECT_SHARE = 0.25
"""Share of the views with a random aspect ratio, 1 to 2, instead of 2."""
IMPRECISE_SHARE = 0.35
"""Share of the prompts whose points are drawn from an imprecise mask, as a teacher's are."""


@dataclass(frozen=True)
class View:
    """A scene or a part of it.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        label: (H, W) uint8 train ids, 255 for unlabeled.
        instances: (H, W) uint8, number of the object, 0 for stuff.
    """

    image: npt.NDArray[np.uint8]
    label: npt.NDArray[np.uint8]
    instances: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SamExample:
    """A view of a scene with K prompts, and all its M regions.

    Attributes:
        pixels: float32 (3, size, size), input of SAM's image encoder.
        points: float32 (K, P, 2), (x, y) in the frame.
        boxes: float32 (K, 4), left, top, right, bottom in the frame.
        masks: float32 (K, h, w) at half the frame's resolution, the share of each pixel that is in
            the mask; h, w of the view without padding, rounded up.
        regions: int64 (h, w), number of the pixel's region, -1 for none.
        classes: int64 (M,), class of each region; to tell apart those of different classes.
        samples: int64 (M, REGION_POINTS), flat indices of random pixels of each region.
    """

    pixels: Tensor
    points: Tensor
    boxes: Tensor
    masks: Tensor
    regions: Tensor
    classes: Tensor
    samples: Tensor


class SamExamples:
    """Examples by index.

    Args:
        scenes: rendered scenes.
        frame: of the SAM.
        seed: of windows and prompts.
    """

    def __init__(self, scenes: Scenes, frame: Frame, seed: int) -> None:
        self.scenes = scenes
        self.frame = frame
        self.seed = seed

    def __call__(self, index: int, num_prompts: int, num_points: int) -> SamExample:
        """Example `index` with at most `num_prompts` prompts of `num_points` points each."""
        rng = np.random.default_rng((self.seed, index))
        number = self._scene_number(index)
        arrays = (self.scenes.images, self.scenes.labels, self.scenes.instances)
        whole = View(*(np.array(array[number]) for array in arrays))
        while True:
            view = self._resized(random_window(rng, whole))
            components = find_components(view.label, MIN_AREA - 1)
            masks = self._masks(rng, view, components, num_prompts)
            if len(masks):
                break
        return self._example(rng, view, components, masks, num_points)

    def _scene_number(self, index: int) -> int:
        """Every scene once, in random order, then in another one."""
        epoch, position = divmod(index, len(self.scenes))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.scenes))
        return int(order[position])

    def _resized(self, view: View) -> View:
        """A view with label and instances at the frame's resolution."""
        size = self.frame.resized((view.label.shape[0], view.label.shape[1]))
        label, instances = (
            cv2.resize(each, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
            for each in (view.label, view.instances)
        )
        return View(view.image, label, instances)

    def _masks(
        self, rng: np.random.Generator, view: View, components: Components, count: int
    ) -> list[Mask]:
        """Up to `count` masks of a resized view."""
        parts = [np.asarray(components.ids == i) for i in range(len(components))]
        numbers, areas = np.unique(view.instances, return_counts=True)
        objects = [
            np.asarray((view.instances == number) & (view.label != IGNORE))
            for number, area in zip(numbers, areas, strict=True)
            if number and area >= MIN_AREA
        ]
        objects = [mask for mask in objects if mask.sum() >= MIN_AREA]
        from_objects = min(len(objects), int(rng.binomial(count, OBJECT_SHARE)))
        chosen = _choose(rng, objects, from_objects)
        return chosen + _choose(rng, parts, count - len(chosen))

    def _example(
        self,
        rng: np.random.Generator,
        view: View,
        components: Components,
        masks: list[Mask],
        count: int,
    ) -> SamExample:
        image = torch.from_numpy(view.image).permute(2, 0, 1)
        pixels = self.frame.pixel_values(image, "cpu")[0]
        points = np.stack([_points(rng, mask, count) for mask in masks])
        boxes = np.stack([_box(rng, mask) for mask in masks])
        stacked = torch.from_numpy(np.stack(masks)).float()
        height, width = stacked.shape[1:]
        stacked = torch.nn.functional.pad(stacked, (0, width % 2, 0, height % 2))
        halved = torch.nn.functional.avg_pool2d(stacked[:, None], 2)[:, 0]
        regions, classes, samples = _all_regions(rng, components)
        return SamExample(
            pixels, torch.from_numpy(points), torch.from_numpy(boxes), halved, regions, classes,
            samples,
        )  # fmt: skip


def _all_regions(rng: np.random.Generator, components: Components) -> tuple[Tensor, ...]:
    """`regions`, `classes` and `samples` of a `SamExample`."""
    ids = components.ids[::2, ::2]
    regions = np.full(ids.shape, -1, np.int64)
    classes: list[int] = []
    samples: list[npt.NDArray[np.intp]] = []
    for index, class_id in enumerate(components.classes):
        pixels = np.flatnonzero(ids == index)
        if len(pixels):
            regions.flat[pixels] = len(samples)
            classes.append(int(class_id))
            samples.append(pixels[rng.integers(len(pixels), size=REGION_POINTS)])
    stacked = np.stack(samples) if samples else np.zeros((0, REGION_POINTS), np.int64)
    return torch.from_numpy(regions), torch.tensor(classes), torch.from_numpy(stacked)


def random_window(rng: np.random.Generator, scene: View) -> View:
    """A window of a scene, of random size and aspect ratio, half of the time mirrored."""
    rows, columns = scene.label.shape
    scale = float(rng.uniform(SMALLEST_WINDOW, 1.0)) if rng.random() < WINDOW_SHARE else 1.0
    height = round(rows * scale)
    aspect = float(rng.uniform(1.0, 2.0)) if rng.random() < ASPECT_SHARE else 2.0
    width = min(columns, round(height * aspect))
    top = int(rng.integers(rows - height + 1))
    left = int(rng.integers(columns - width + 1))
    step = -1 if rng.random() < 0.5 else 1
    image, label, instances = (
        np.ascontiguousarray(each[top : top + height, left : left + width][:, ::step])
        for each in (scene.image, scene.label, scene.instances)
    )
    return View(image, label, instances)


def _choose(rng: np.random.Generator, masks: list[Mask], count: int) -> list[Mask]:
    """At most `count` different masks, small ones less often."""
    if not masks or count <= 0:
        return []
    weights = np.array([SMALL_WEIGHT if m.sum() < SMALL_AREA else 1.0 for m in masks])
    chosen = rng.choice(len(masks), min(count, len(masks)), False, weights / weights.sum())
    return [masks[i] for i in chosen]


def _points(rng: np.random.Generator, mask: Mask, count: int) -> npt.NDArray[np.float32]:
    """(count, 2), (x, y) of random pixels of the mask, or of an imprecise version of it."""
    if rng.random() < IMPRECISE_SHARE:
        mask = imprecise(rng, mask)
    pixels = np.argwhere(mask)
    drawn = pixels[rng.choice(len(pixels), count, replace=len(pixels) < count)]
    return drawn[:, ::-1].astype(np.float32)


def imprecise(rng: np.random.Generator, mask: Mask) -> Mask:
    """A mask as a segmenter predicts it: shifted, grown or shrunk, with a smoothed outline.

    At least half of its pixels are in the mask; otherwise the mask itself is returned.
    """
    height, width = mask.shape
    sigma = float(rng.uniform(1.0, 5.0))
    field = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), sigma)
    noise = cv2.resize(
        rng.standard_normal((max(2, height // 12), max(2, width // 12))).astype(np.float32),
        (width, height),
    )
    changed = np.asarray(field + 0.25 * noise * (field > 0.02) > rng.uniform(0.3, 0.6))
    shift = rng.integers(-3, 4, 2).tolist()
    changed = np.asarray(ndimage.shift(changed.view(np.uint8), shift, order=0)).view(np.bool_)
    area = changed.sum()
    if area == 0 or (changed & mask).sum() < 0.5 * area:
        return mask
    return changed


def _box(rng: np.random.Generator, mask: Mask) -> npt.NDArray[np.float32]:
    """left, top, right, bottom of a mask, each changed by up to a tenth of the side."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)
    sides = np.tile(box[2:] - box[:2] + 1, 2)
    noisy = box + 0.1 * sides * rng.uniform(-1, 1, 4)
    limits = np.tile([mask.shape[1] - 1, mask.shape[0] - 1], 2)
    return np.clip(noisy, 0, limits).astype(np.float32)
