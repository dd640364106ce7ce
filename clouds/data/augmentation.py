"""What happens to a labelled image on its way into training: resize, crop, jitter, flip.

Random numbers are drawn first, into `Geometry` and `Jitter`, from the generator that is handed
in; applying them is plain arithmetic. Images are (H, W, 3) uint8 RGB, label maps (H, W) uint8.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from clouds.data.label_space import IGNORE

UInt8Array = npt.NDArray[np.uint8]
Size = tuple[int, int]
"""Height, width, pixels."""

CropPosition = Literal["uniform", "diagonal"]

_HUES = 180  # OpenCV keeps hue in half degrees
_OFF_GRID = 1 / 600
"""By how much of a source pixel a part may be displaced. On both axes at once, between a black and
a white pixel, that makes 255 * 2 / 600 of a grey level: less than one, as is then any change."""


def resize_image(image: UInt8Array, size: Size) -> UInt8Array:
    """Resize (H, W, 3) to `size`: bilinear to enlarge, the mean over the area to shrink."""
    if image.shape[:2] == size:
        return image
    how = _interpolation(image, size)
    return np.asarray(cv2.resize(image, size[::-1], interpolation=how), np.uint8)


def resize_window(image: UInt8Array, size: Size, rows: slice, columns: slice) -> UInt8Array:
    """`resize_image(image, size)[rows, columns]`, at the cost of what is near that window.

    Args:
        image: (H, W, 3).
        size: of the whole image when resized.
        rows, columns: of the resized image, not empty, within it.

    Returns:
        The window; no value is more than one grey level from that of the whole image resized.
    """
    if image.shape[:2] == size:
        return image[rows, columns]
    parts = [
        AxisPart.around(source, target, window.start, window.stop)
        for source, target, window in zip(image.shape, size, (rows, columns), strict=False)
    ]
    down, across = parts
    resized = cv2.resize(
        image[down.begin : down.end, across.begin : across.end],
        None,
        # OpenCV takes the distance of samples from these, not from the part's size
        fy=size[0] / image.shape[0],
        fx=size[1] / image.shape[1],
        interpolation=_interpolation(image, size),
    )
    return np.asarray(
        resized[
            rows.start - down.first : rows.stop - down.first,
            columns.start - across.first : columns.stop - across.first,
        ],
        np.uint8,
    )


def _interpolation(image: UInt8Array, size: Size) -> int:
    shrinks = size[0] * size[1] < image.shape[0] * image.shape[1]
    return cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR


@dataclass(frozen=True)
class AxisPart:
    """A part of an axis that is resized alone and comes out as in the whole.

    For that a border of source pixels and one of target pixels must meet where the part begins.

    Attributes:
        begin, end: source pixels.
        first: the target pixel that begins where the part does.
    """

    begin: int
    end: int
    first: int

    @classmethod
    def around(cls, source: int, target: int, start: int, stop: int) -> AxisPart:
        """The shortest part of `source` pixels, resized to `target`, that has `start`..`stop`."""
        # so many pixels at either end of the part lack a neighbor
        margin = ceil(target / source)
        starts = np.arange(max(0, start - margin) + 1, dtype=np.int64)
        beyond = starts * source % target
        # in units of 1 / target of a source pixel; the first of all is always exact
        displaced = np.minimum(beyond, target - beyond)
        first = int(starts[displaced <= _OFF_GRID * target][-1])
        begin = round(first * source / target)
        length = ceil((stop + margin - first) * source / target) + 1
        return cls(begin, min(source, begin + length), first)


def resize_label(label: UInt8Array, size: Size) -> UInt8Array:
    """Resize (H, W) to `size`; each pixel takes the id at its centre."""
    if label.shape == size:
        return label
    resized = cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(resized, np.uint8)


def _nearest(source: int, target: int) -> npt.NDArray[np.int32]:
    """(target,): which pixel of an axis each pixel takes when `resize_label` resizes it."""
    pixels = np.arange(source, dtype=np.int32)[None]
    resized = cv2.resize(pixels, (target, 1), interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(resized[0], np.int32)


@dataclass(frozen=True)
class Geometry:
    """Where the pixels of one image go; the same for its label.

    Attributes:
        resized: size of the whole image before the crop.
        top, left: corner of the crop in the resized image.
        crop: size that comes out. What lies beyond the image is below and to the right of it.
        flip: left and right are exchanged, last.
    """

    resized: Size
    top: int
    left: int
    crop: Size
    flip: bool

    def apply_image(self, image: UInt8Array) -> UInt8Array:
        """(H, W, 3) -> (crop, 3); black beyond the image."""
        return self._place(resize_window(image, self.resized, *self._window()), 0)

    def apply_label(self, label: UInt8Array) -> UInt8Array:
        """(H, W) -> crop; `IGNORE` beyond the image."""
        rows, columns = (
            _nearest(source, target)[window]
            for source, target, window in zip(
                label.shape, self.resized, self._window(), strict=True
            )
        )
        return self._place(label[rows][:, columns], IGNORE)

    def _window(self) -> tuple[slice, slice]:
        """Rows and columns of the resized image that the crop shows."""
        corner = (self.top, self.left)
        rows, columns = (
            slice(start, min(start + length, end))
            for start, length, end in zip(corner, self.crop, self.resized, strict=True)
        )
        return rows, columns

    def _place(self, window: UInt8Array, fill: int) -> UInt8Array:
        """Flip the window and pad it to the crop."""
        below, beside = self.crop[0] - window.shape[0], self.crop[1] - window.shape[1]
        if self.flip:
            window = np.asarray(cv2.flip(window, 1), np.uint8)
        if below or beside:
            # the padding is on the right before the flip, so on the left after it
            left, right = (beside, 0) if self.flip else (0, beside)
            color = 3 * (float(fill),)
            how = cv2.BORDER_CONSTANT
            padded = cv2.copyMakeBorder(window, 0, below, left, right, how, value=color)
            window = np.asarray(padded, np.uint8)
        return np.ascontiguousarray(window)


@dataclass(frozen=True)
class GeometryRange:
    """What geometries are drawn.

    Attributes:
        working: size into which an image is fitted, aspect kept, before random scaling; 0 in
            either place: the image's own size.
        scale: random scale relative to that, from, to.
        crop: size that comes out.
        position: 'uniform': anywhere; 'diagonal': one number for both axes, so that crops lie on
            the diagonal, as in the published code.
        flip: exchange left and right in half of the cases.
    """

    working: Size
    scale: tuple[float, float]
    crop: Size
    position: CropPosition
    flip: bool

    def draw(self, size: Size, rng: np.random.Generator) -> Geometry:
        """A geometry for an image of this size."""
        fit = 1.0
        if self.working[0] and self.working[1]:
            fit = min(self.working[0] / size[0], self.working[1] / size[1])
        factor = fit * rng.uniform(*self.scale)
        resized = (max(1, round(size[0] * factor)), max(1, round(size[1] * factor)))
        room = (max(0, resized[0] - self.crop[0]), max(0, resized[1] - self.crop[1]))
        if self.position == "diagonal":
            share = rng.random()
            top, left = round(room[0] * share), round(room[1] * share)
        else:
            top, left = (int(rng.integers(0, r, endpoint=True)) for r in room)
        flip = self.flip and bool(rng.integers(2))
        return Geometry(resized, top, left, self.crop, flip)


@dataclass(frozen=True)
class Jitter:
    """One distortion of colors, as in SSD (Liu et al., 2016, its data augmentation).

    Attributes:
        brightness: added to every channel, on the 0-255 scale.
        contrast: factor of every channel.
        saturation: factor of the saturation in HSV.
        hue: added to the hue, in OpenCV's units of two degrees.
        contrast_first: contrast before saturation and hue, rather than after.
    """

    brightness: float = 0.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: int = 0
    contrast_first: bool = True

    def apply(self, image: UInt8Array) -> UInt8Array:
        """(H, W, 3) uint8 RGB -> the same; values are cut off at 0 and 255.

        Where nothing is distorted, what comes out is the image that was handed in.
        """
        bright = _linear(1.0, self.brightness)
        contrast = _linear(self.contrast, 0.0)
        before, after = (contrast[bright], None) if self.contrast_first else (bright, contrast)
        image = _look_up(image, before)
        if self.saturation != 1.0 or self.hue != 0:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            hsv = cv2.LUT(hsv, self._hsv_table())
            image = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)
        return image if after is None else _look_up(image, after)

    def _hsv_table(self) -> UInt8Array:
        """(256, 1, 3): what becomes of each hue, saturation and value."""
        hue = (np.arange(256) + self.hue) % _HUES
        value = np.arange(256)
        table = np.stack([hue, _linear(self.saturation, 0.0), value], axis=-1)
        return table.astype(np.uint8)[:, None]


def _linear(factor: float, offset: float) -> UInt8Array:
    """(256,): what becomes of each value under `factor * value + offset`."""
    values: npt.NDArray[np.float64] = np.clip(np.arange(256) * factor + offset, 0, 255)
    return np.rint(values).astype(np.uint8)


def _look_up(image: UInt8Array, table: UInt8Array) -> UInt8Array:
    if np.array_equal(table, np.arange(256)):
        return image
    return np.asarray(cv2.LUT(image, table), np.uint8)


@dataclass(frozen=True)
class JitterRange:
    """What distortions are drawn; each of the four is left out in half of the cases.

    Attributes:
        brightness: largest offset, either way, on the 0-255 scale.
        contrast: factor, from, to.
        saturation: factor, from, to.
        hue: largest shift, either way, in OpenCV's units of two degrees.
    """

    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18

    def draw(self, rng: np.random.Generator) -> Jitter:
        """One distortion."""
        brightness, contrast, saturation, hue, contrast_first = rng.integers(2, size=5).astype(bool)
        return Jitter(
            brightness=rng.uniform(-self.brightness, self.brightness) if brightness else 0.0,
            contrast=rng.uniform(*self.contrast) if contrast else 1.0,
            saturation=rng.uniform(*self.saturation) if saturation else 1.0,
            hue=int(rng.integers(-self.hue, self.hue, endpoint=True)) if hue else 0,
            contrast_first=bool(contrast_first),
        )
