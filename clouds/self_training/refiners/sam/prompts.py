"""Point prompts for SAM: connected components of a label map, and points in each of them."""

from __future__ import annotations

from dataclasses import dataclass

import cc3d
import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from clouds.d2 import CfgNode

NO_COMPONENT = -1
"""In `Components.ids`: the pixel is in no component."""


@dataclass(frozen=True)
class Components:
    """Connected components of M regions, ordered by class, then by first pixel in scan order.

    Attributes:
        ids: int32 (H, W), the component of each pixel, 0..M-1; -1 where there is none.
        classes: int64 (M,), train ids, ascending.
        areas: int64 (M,), pixels.
        boxes: int64 (M, 4), top, left, bottom, right in pixels; bottom and right are exclusive.
    """

    ids: npt.NDArray[np.int32]
    classes: npt.NDArray[np.int64]
    areas: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.classes)

    def crop(self, index: int) -> npt.NDArray[np.bool_]:
        """bool (bottom - top, right - left): component `index` within its box."""
        top, left, bottom, right = self.boxes[index]
        return np.asarray(self.ids[top:bottom, left:right] == index)


def find_components(
    classes: npt.NDArray[np.uint8] | npt.NDArray[np.int32],
    size_threshold: int = 0,
    ignore: int = 255,
) -> Components:
    """Regions of one class whose pixels touch along an edge (4-connectivity).

    Args:
        classes: uint8 (H, W), train ids; or int32 (H, W), numbers from 0 of other regions, which
            are split into connected ones.
        size_threshold: components of at most so many pixels are left out.
        ignore: the value that is no class.
    """
    assert classes.dtype in (np.uint8, np.int32), f"expected uint8 or int32, got {classes.dtype}"
    assert classes.ndim == 2, f"expected (H, W), got {classes.shape}"
    # The library takes 0 as background: shift so that `ignore` becomes 0. uint8 wraps around, and
    # signed numbers may be negative.
    shifted = np.ascontiguousarray(classes - classes.dtype.type(ignore))
    regions = cc3d.connected_components(shifted, connectivity=4).ravel()
    # From here on runs along rows are processed, not pixels: there are far fewer of them.
    starts = _run_starts(regions, classes.shape[1])
    lengths = np.diff(starts, append=regions.size)
    owners = regions[starts]
    areas = np.bincount(owners, weights=lengths).astype(np.int64)
    areas[0] = 0
    large = np.flatnonzero(areas > size_threshold)
    numbers = np.full(len(areas), NO_COMPONENT, np.int32)
    numbers[large] = np.arange(len(large))
    runs = numbers[owners]
    kept = runs != NO_COMPONENT
    first, boxes = _extents(runs[kept], starts[kept], lengths[kept], len(large), classes.shape[1])
    kinds = classes.ravel()[first].astype(np.int64)
    order = np.lexsort((first, kinds))
    # The last entry is read by index NO_COMPONENT.
    ranks = np.full(len(large) + 1, NO_COMPONENT, np.int32)
    ranks[order] = np.arange(len(large))
    ids = np.repeat(ranks[runs], lengths).reshape(classes.shape)
    return Components(ids, kinds[order], areas[large[order]], boxes[order])


def _run_starts(regions: npt.NDArray[np.integer], width: int) -> npt.NDArray[np.intp]:
    """Flat indices of pixels whose left neighbour is of another region or none."""
    starts = np.ones(regions.size, np.bool_)
    np.not_equal(regions[1:], regions[:-1], out=starts[1:])
    starts[::width] = True
    return np.flatnonzero(starts)


def _extents(
    owners: npt.NDArray[np.int32],
    starts: npt.NDArray[np.intp],
    lengths: npt.NDArray[np.intp],
    count: int,
    width: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Flat index of each region's first pixel (count,), and its box (count, 4), from its runs."""
    rows, columns = np.divmod(starts, width)
    first = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(first, owners, starts)
    boxes = np.zeros((count, 4), np.int64)
    boxes[:, 0] = first // width
    boxes[:, 1] = width
    np.minimum.at(boxes[:, 1], owners, columns)
    np.maximum.at(boxes[:, 2], owners, rows + 1)
    np.maximum.at(boxes[:, 3], owners, columns + lengths)
    return first, boxes


CENTER_RADIUS = 10.0
"""Distance from the center of mass, in pixels, within which 'center' samples points."""

Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.intp]


@dataclass(frozen=True)
class PointOptions:
    """Which point prompts a component gets.

    Attributes:
        num_points: points per component, P.
        mode: 'random' in the component, 'center' (random within 10 pixels of the center of mass
            of its largest part), or 'largest_component' (random in its largest part).
        erosion: side in pixels of the square that components are eroded with before, which may
            split them; 0: no erosion.
    """

    num_points: int = 5
    mode: str = "random"
    erosion: int = 0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> PointOptions:
        """From MODEL.CLOUDS.SAM."""
        node = cfg.MODEL.CLOUDS.SAM
        return cls(
            num_points=node.NUM_POINTS,
            mode=node.SELECTION_MODE,
            erosion=node.EROSION_SIZE if node.EROSION else 0,
        )


def sample_points(
    components: Components, options: PointOptions, generator: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Points for each component, drawn from `generator` in the components' order.

    Every component gets points, so points and components have the same order: a component without
    a pixel after erosion is used without erosion, and from one with fewer pixels than points some
    pixels are drawn twice.

    Returns:
        (M, P, 2), (x, y) of pixels, each within its component.
    """
    points = np.empty((len(components), options.num_points, 2), np.float32)
    for index in range(len(components)):
        pixels = candidate_pixels(components.crop(index), options)
        replacement = len(pixels) < options.num_points
        drawn = pixels[generator.choice(len(pixels), options.num_points, replace=replacement)]
        top, left = components.boxes[index, :2]
        points[index] = drawn[:, ::-1] + (left, top)
    return points


def candidate_pixels(mask: Mask, options: PointOptions) -> Pixels:
    """Pixels that a component's points are drawn from.

    Args:
        mask: (h, w), the component within its box; not empty.
        options: see there.

    Returns:
        (n, 2), (row, column) in the box, n >= 1, in scan order; only where fewer than
        `options.num_points` pixels are at the center, the nearest ones instead, by distance.
    """
    assert mask.any(), "a component has pixels"
    if options.erosion:
        mask = _eroded(mask, options.erosion)
    if options.mode == "random":
        return np.argwhere(mask)
    largest = np.argwhere(_largest_connected_part(mask))
    if options.mode == "largest_component":
        return largest
    if options.mode == "center":
        return _central(largest, options.num_points)
    raise ValueError(
        f"selection mode {options.mode!r} is unknown; there are random, center, largest_component"
    )


def _eroded(mask: Mask, size: int) -> Mask:
    """Pixels whose whole `size` x `size` neighborhood is in the mask; if none, the mask."""
    # What lies outside of the box, or of the image, is not in the component.
    kernel = np.ones((size, size), np.uint8)
    eroded = cv2.erode(mask.view(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return eroded.view(np.bool_) if eroded.any() else mask


def _largest_connected_part(mask: Mask) -> Mask:
    """Its largest connected part; the first in scan order among equals."""
    parts, count = ndimage.label(mask)
    if count == 1:
        return mask
    areas = np.bincount(parts.ravel())
    return np.asarray(parts == areas[1:].argmax() + 1)


def _central(pixels: Pixels, count: int) -> Pixels:
    """Those within CENTER_RADIUS of their mean; the `count` nearest where that is too few."""
    distances = np.linalg.norm(pixels - pixels.mean(axis=0), axis=1)
    near: Pixels = pixels[distances < CENTER_RADIUS]
    # The mean of a non-convex region may be far from all its pixels.
    nearest: Pixels = pixels[distances.argsort(kind="stable")[:count]]
    return near if len(near) >= count else nearest
