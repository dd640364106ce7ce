"""Connected components of a label map, all classes in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import cc3d
import numpy as np
import numpy.typing as npt

NONE = -1
"""In `Components.ids`: no component here."""


@dataclass(frozen=True)
class Components:
    """Connected components of M regions, ordered by class, then by first pixel in scan order.

    Attributes:
        ids: int32 (H, W), the component of each pixel, 0..M-1; -1 where there is none.
        classes: int64 (M,), train ids, ascending.
        areas: int64 (M,), pixels.
        boxes: int64 (M, 4), top, left, bottom, right in pixels; bottom and right lie outside.
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
    classes: npt.NDArray[np.uint8], larger_than: int = 0, ignore: int = 255
) -> Components:
    """Regions of one class whose pixels touch side by side (4 neighbours; corners do not join).

    Args:
        classes: uint8 (H, W), train ids.
        larger_than: components of at most so many pixels are left out.
        ignore: the value that is no class.
    """
    assert classes.dtype == np.uint8, f"expected uint8, got {classes.dtype}"
    assert classes.ndim == 2, f"expected (H, W), got {classes.shape}"
    # The library takes 0 as background: shift by one, where `ignore` wraps around to 0.
    shifted = np.ascontiguousarray(classes - np.uint8(ignore))
    regions = cc3d.connected_components(shifted, connectivity=4).ravel()
    # From here on, runs along rows stand for their pixels: there are far fewer of them.
    starts = _run_starts(regions, classes.shape[1])
    lengths = np.diff(starts, append=regions.size)
    owners = regions[starts]
    areas = np.bincount(owners, weights=lengths).astype(np.int64)
    areas[0] = 0
    large = np.flatnonzero(areas > larger_than)
    numbers = np.full(len(areas), NONE, np.int32)
    numbers[large] = np.arange(len(large))
    runs = numbers[owners]
    kept = runs != NONE
    first, boxes = _extents(runs[kept], starts[kept], lengths[kept], len(large), classes.shape[1])
    kinds = classes.ravel()[first].astype(np.int64)
    order = np.lexsort((first, kinds))
    ranks = np.full(len(large) + 1, NONE, np.int32)  # the last one is where NONE points
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
