"""Windows of an image that is too large for one prediction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

Size = tuple[int, int]
"""Height and width, pixels."""

OVERLAP = 256
"""Overlap of two neighboring windows, pixels of the model's input; at most half a window."""


@dataclass(frozen=True)
class Window:
    """A rectangle of an image that was predicted by itself, and the part of it that is kept.

    Attributes:
        rows, columns: of the image, all pixels that the model was given.
        kept_rows, kept_columns: of the image, those whose prediction is used.
    """

    rows: slice
    columns: slice
    kept_rows: slice
    kept_columns: slice

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, pixels of the image."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def kept_inside(self) -> tuple[slice, slice]:
        """The kept rows and columns, counted from the corner of the window."""
        top, left = self.rows.start, self.columns.start
        return (
            slice(self.kept_rows.start - top, self.kept_rows.stop - top),
            slice(self.kept_columns.start - left, self.kept_columns.stop - left),
        )


def windows(size: Size, input_size: Size, max_pixels: int) -> Iterator[Window]:
    """Windows that cover an image, in row-major order; their kept parts cover each pixel once.

    All windows have the same size. They are as square as the image allows, evenly spaced, and two
    neighbors are divided in the middle of their overlap.

    Args:
        size: of the image.
        input_size: of the model's input for the whole image, which may be larger or smaller.
        max_pixels: pixels of the model's input for a window.
    """
    height = min(input_size[0], math.isqrt(max_pixels))
    width = min(input_size[1], max_pixels // height)
    height = min(input_size[0], max_pixels // width)
    all_rows = list(_spans(size[0], size[0] / input_size[0], height))
    all_columns = list(_spans(size[1], size[1] / input_size[1], width))
    for rows, kept_rows in all_rows:
        for columns, kept_columns in all_columns:
            yield Window(rows, columns, kept_rows, kept_columns)


def _spans(length: int, scale: float, side: int) -> Iterator[tuple[slice, slice]]:
    """All and kept pixels of each window along one axis.

    Args:
        length: of the image.
        scale: pixels of the image per pixel of the input.
        side: of a window, pixels of the input.
    """
    window = min(length, max(1, int(side * scale)))
    overlap = min(math.ceil(OVERLAP * scale), window // 2)
    count = max(1, math.ceil((length - overlap) / (window - overlap)))
    starts = [round(i * (length - window) / max(1, count - 1)) for i in range(count)]
    middles = [(first + window + second) // 2 for first, second in itertools.pairwise(starts)]
    for start, kept, end in zip(starts, [0, *middles], [*middles, length], strict=True):
        yield slice(start, start + window), slice(kept, end)
