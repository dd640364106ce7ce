"""What happens to a labelled image on its way into training: resize, crop, jitter, flip.

Random numbers are drawn first, into `Geometry` and `Jitter`, from the generator that is handed
in; applying them is plain arithmetic. Images are (H, W, 3) uint8 RGB, label maps (H, W) uint8.
"""

from __future__ import annotations

from dataclasses import dataclass
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


def resize_image(image: UInt8Array, size: Size) -> UInt8Array:
    """Resize (H, W, 3) to `size`: bilinear to enlarge, the mean over the area to shrink."""
    if image.shape[:2] == size:
        return image
    shrinks = size[0] * size[1] < image.shape[0] * image.shape[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, size[::-1], interpolation=how), np.uint8)


def resize_label(label: UInt8Array, size: Size) -> UInt8Array:
    """Resize (H, W) to `size`; each pixel takes the id at its centre."""
    if label.shape == size:
        return label
    resized = cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(resized, np.uint8)


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
        return self._place(resize_image(image, self.resized), 0)

    def apply_label(self, label: UInt8Array) -> UInt8Array:
        """(H, W) -> crop; `IGNORE` beyond the image."""
        return self._place(resize_label(label, self.resized), IGNORE)

    def _place(self, pixels: UInt8Array, fill: int) -> UInt8Array:
        height, width = self.crop
        window = pixels[self.top : self.top + height, self.left : self.left + width]
        if self.flip:
            window = window[:, ::-1]
        out = np.full((height, width, *pixels.shape[2:]), fill, np.uint8)
        rows, columns = window.shape[:2]
        # the padding is on the right before the flip, so on the left after it
        start = width - columns if self.flip else 0
        out[:rows, start : start + columns] = window
        return out


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
        """(H, W, 3) uint8 RGB -> the same; values are cut off at 0 and 255."""
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
