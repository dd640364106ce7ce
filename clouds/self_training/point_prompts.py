"""Points to ask a promptable model with: some pixels of each connected component."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from clouds.d2 import CfgNode
from clouds.self_training.components import Components

CENTER_RADIUS = 10.0
"""Points at the center of a component lie nearer than this to its center of mass, in pixels."""

Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.intp]


@dataclass(frozen=True)
class PointOptions:
    """Which points.

    Attributes:
        count: points per component, P.
        mode: 'random' in the component, 'center' (random within 10 pixels of the center of mass
            of its largest part), or 'largest_component' (random in its largest part).
        erosion: side in pixels of the square that components are eroded with first, which may
            part them; 0: no erosion.
    """

    count: int = 5
    mode: str = "random"
    erosion: int = 0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> PointOptions:
        """From MODEL.CLOUDS.SAM."""
        node = cfg.MODEL.CLOUDS.SAM
        return cls(
            count=node.NUM_POINTS,
            mode=node.SELECTION_MODE,
            erosion=node.EROSION_SIZE if node.EROSION else 0,
        )


def choose_points(
    components: Components, options: PointOptions, generator: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Points for each component, drawn from `generator` in the components' order.

    Every component gets its points, so that the order of points is the order of components: one
    that erosion leaves nothing of is taken uneroded, and one with fewer pixels than points gives
    some of them twice.

    Returns:
        (M, P, 2), (x, y) of pixels, each within its component.
    """
    points = np.empty((len(components), options.count, 2), np.float32)
    for index in range(len(components)):
        pixels = candidates(components.crop(index), options)
        twice = len(pixels) < options.count
        drawn = pixels[generator.choice(len(pixels), options.count, replace=twice)]
        top, left = components.boxes[index, :2]
        points[index] = drawn[:, ::-1] + (left, top)
    return points


def candidates(mask: Mask, options: PointOptions) -> Pixels:
    """Pixels that a component's points are drawn from.

    Args:
        mask: (h, w), the component within its box; not empty.
        options: see there.

    Returns:
        (n, 2), (row, column) in the box, n >= 1, in scan order; only where fewer than
        `options.count` pixels are at the center, the nearest ones instead, by distance.
    """
    assert mask.any(), "a component has pixels"
    if options.erosion:
        mask = _eroded(mask, options.erosion)
    if options.mode == "random":
        return np.argwhere(mask)
    largest = np.argwhere(_largest_part(mask))
    if options.mode == "largest_component":
        return largest
    if options.mode == "center":
        return _central(largest, options.count)
    raise ValueError(
        f"selection mode {options.mode!r} is unknown; there are random, center, largest_component"
    )


def _eroded(mask: Mask, size: int) -> Mask:
    """The pixels whose whole `size` x `size` neighbourhood is in the mask, if there are any."""
    # What lies outside of the box, or of the image, is not in the component.
    kernel = np.ones((size, size), np.uint8)
    eroded = cv2.erode(mask.view(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return eroded.view(np.bool_) if eroded.any() else mask


def _largest_part(mask: Mask) -> Mask:
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
    # The mean of a bent region may lie far from all its pixels.
    nearest: Pixels = pixels[distances.argsort(kind="stable")[:count]]
    return near if len(near) >= count else nearest
