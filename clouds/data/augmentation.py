"""Random augmentations of an image and its label, as in Detectron2's `data.transforms`.

An `Augmentation` draws its random numbers, only from the generator that is passed in, and returns a
deterministic transform with fvcore's interface.

Images are (H, W, 3) uint8 RGB, label maps (H, W) uint8 train ids. To add an augmentation, subclass
`Augmentation` and put it into the list of a dataset role: see `build_source_augmentations` and its
neighbors in `dataset_mapper`. The augmentations of a list share one generator, so one at the end
of the list leaves the draws of all others as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from fvcore.transforms.transform import HFlipTransform, NoOpTransform, Transform, TransformList

from clouds.data.label_space import IGNORE

UInt8Array = npt.NDArray[np.uint8]
Size = tuple[int, int]
"""Height, width, pixels."""

CropPosition = Literal["uniform", "diagonal"]

CROP_ATTEMPTS = 10
"""Crops of which one class has too large a share before the next one is taken as it is."""

NUM_HUES = 180
"""OpenCV stores hue in units of two degrees."""

_MAX_SHIFT = 1 / 600
"""Largest displacement of a resized window against the whole image resized, in source pixels. On
both axes at once, between a black and a white pixel, it changes a value by 255 * 2 / 600: less than
one gray level."""


class Augmentation(ABC):
    """A random change of an image and its label. A new transform is drawn for each sample.

    fvcore's default for labels is `apply_image`, so photometric transforms have to override
    `apply_segmentation`, as `ColorJitterTransform` does.
    """

    @abstractmethod
    def get_transform(self, image: UInt8Array, rng: np.random.Generator) -> Transform:
        """Draw the transform of one sample, to be applied to `image`, from its own generator."""


class LabelAugmentation(Augmentation):
    """An augmentation whose random change depends on the label, too."""

    @abstractmethod
    def get_transform_with_label(
        self, image: UInt8Array, label: UInt8Array, rng: np.random.Generator
    ) -> Transform:
        """As `get_transform`, for an image with its label, both as earlier augmentations left them.

        `get_transform` is called where there is no label.
        """


@dataclass(frozen=True)
class AugmentationList:
    """Augmentations, in the order in which they draw and are applied."""

    augmentations: tuple[Augmentation, ...]

    def __call__(
        self, image: UInt8Array, rng: np.random.Generator, label: UInt8Array | None = None
    ) -> tuple[UInt8Array, TransformList]:
        """The augmented image, and the transforms to apply to its label.

        `image` and `label` are not changed; `label` is for augmentations that depend on it.
        """
        transforms: list[Transform] = []
        for augmentation in self.augmentations:
            if label is not None and isinstance(augmentation, LabelAugmentation):
                present = TransformList(transforms).apply_segmentation(label)
                transform = augmentation.get_transform_with_label(image, present, rng)
            else:
                transform = augmentation.get_transform(image, rng)
            image = transform.apply_image(image)
            transforms.append(transform)
        return image, TransformList(transforms)


# ---------------------------------------------------------------- resize


def resize_image(image: UInt8Array, size: Size) -> UInt8Array:
    """Resize (H, W, 3) to `size`: bilinear to enlarge, the mean over the area to shrink."""
    if image.shape[:2] == size:
        return image
    resized = cv2.resize(image, size[::-1], interpolation=_interpolation(image, size))
    return np.asarray(resized, np.uint8)


def resize_window(
    image: UInt8Array, size: Size, rows: slice, columns: slice, antialias: bool = True
) -> UInt8Array:
    """`resize_image(image, size)[rows, columns]`, reading only the pixels near that window.

    The window must not be empty. No value differs by more than one gray level. Without `antialias`
    shrinking is bilinear, too: from the four nearest pixels.
    """
    if image.shape[:2] == size:
        return image[rows, columns]
    (source_rows, top), (source_columns, left) = (
        resize_range(source, target, window.start, window.stop)
        for source, target, window in zip(image.shape, size, (rows, columns), strict=False)
    )
    resized = cv2.resize(
        image[source_rows, source_columns],
        None,
        # OpenCV takes the sampling distance from these factors, not from the sizes of the window
        fy=size[0] / image.shape[0],
        fx=size[1] / image.shape[1],
        interpolation=_interpolation(image, size) if antialias else cv2.INTER_LINEAR,
    )
    window = resized[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return np.asarray(window, np.uint8)


def _interpolation(image: UInt8Array, size: Size) -> int:
    shrinks = size[0] * size[1] < image.shape[0] * image.shape[1]
    return cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR


def short_side_size(
    height: int, width: int, short_side: int, long_side_max: int = 0
) -> tuple[int, int]:
    """Height and width, at least 1, of an image resized to a short side of `short_side` pixels.

    The ratio is kept. If the long side would exceed `long_side_max` (0: no limit), it gets that
    length. With `short_side` 0 the size does not change.
    """
    if short_side == 0:
        return height, width
    scale = short_side / min(height, width)
    if 0 < long_side_max < max(height, width) * scale - 0.5:
        scale = long_side_max / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_range(source: int, target: int, start: int, stop: int) -> tuple[slice, int]:
    """The shortest range of an axis that yields the values of the whole axis resized.

    For that, a border between source pixels and one between target pixels must coincide (up to
    `_MAX_SHIFT`) at its beginning.

    Args:
        source: length of the axis, pixels.
        target: length of the axis when resized.
        start, stop: range of target pixels that it must contain.

    Returns:
        The range of source pixels, and the target pixel that begins where it does.
    """
    # number of pixels at either end of the range whose interpolation lacks a neighbor
    margin = ceil(target / source)
    starts = np.arange(max(0, start - margin) + 1, dtype=np.int64)
    remainder = starts * source % target
    # in units of 1 / target of a source pixel; 0 at the beginning of the axis
    shift = np.minimum(remainder, target - remainder)
    first = int(starts[shift <= _MAX_SHIFT * target][-1])
    begin = round(first * source / target)
    length = ceil((stop + margin - first) * source / target) + 1
    return slice(begin, min(source, begin + length)), first


def resize_label(label: UInt8Array, size: Size) -> UInt8Array:
    """Resize (H, W) to `size`; each pixel takes the id at its center."""
    if label.shape == size:
        return label
    resized = cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(resized, np.uint8)


def _nearest_indices(source: int, target: int) -> npt.NDArray[np.int32]:
    """(target,): the source pixel of an axis that `resize_label` takes for each target pixel."""
    pixels = np.arange(source, dtype=np.int32)[None]
    resized = cv2.resize(pixels, (target, 1), interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(resized[0], np.int32)


# ---------------------------------------------------------------- geometry


@dataclass(frozen=True)
class ResizeCropFlipTransform(Transform):  # type: ignore[misc]
    """Resize, crop, pad and flip in one step, which resizes no more than the crop shows.

    Attributes:
        source_size: size of the image that it is applied to.
        resized_size: size of the whole image before the crop.
        top, left: corner of the crop in the resized image.
        crop_size: size of the result. Where the image is smaller, it is padded at the bottom and
            on the right.
        flip: exchange left and right, after padding.
        antialias: see `resize_window`.
    """

    source_size: Size
    resized_size: Size
    top: int
    left: int
    crop_size: Size
    flip: bool
    antialias: bool = True

    def apply_image(self, image: UInt8Array) -> UInt8Array:
        """(H, W, 3) -> (crop_size, 3); padded with 0."""
        window = resize_window(image, self.resized_size, *self._window(), self.antialias)
        return self._flip_and_pad(window, 0)

    def apply_segmentation(self, segmentation: UInt8Array) -> UInt8Array:
        """(H, W) -> crop_size; padded with `IGNORE`."""
        rows, columns = (
            _nearest_indices(source, target)[window]
            for source, target, window in zip(
                segmentation.shape, self.resized_size, self._window(), strict=True
            )
        )
        return self._flip_and_pad(segmentation[rows][:, columns], IGNORE)

    def apply_coords(self, coords: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Points (N, 2), x and y in pixels of the source image, to those of the result."""
        source, resized = (np.array(size[::-1]) for size in (self.source_size, self.resized_size))
        moved: npt.NDArray[Any] = coords * (resized / source) - np.array([self.left, self.top])
        if self.flip:
            moved[:, 0] = self.crop_size[1] - moved[:, 0]
        return moved

    def _window(self) -> tuple[slice, slice]:
        """Rows and columns of the resized image that the crop shows."""
        corner = (self.top, self.left)
        rows, columns = (
            slice(start, min(start + length, end))
            for start, length, end in zip(corner, self.crop_size, self.resized_size, strict=True)
        )
        return rows, columns

    def _flip_and_pad(self, window: UInt8Array, fill: int) -> UInt8Array:
        pad_bottom = self.crop_size[0] - window.shape[0]
        pad_right = self.crop_size[1] - window.shape[1]
        if self.flip:
            window = np.asarray(cv2.flip(window, 1), np.uint8)
        if pad_bottom or pad_right:
            # the padding is on the right before the flip, so on the left after it
            left, right = (pad_right, 0) if self.flip else (0, pad_right)
            color = 3 * (float(fill),)
            border = cv2.BORDER_CONSTANT
            padded = cv2.copyMakeBorder(window, 0, pad_bottom, left, right, border, value=color)
            window = np.asarray(padded, np.uint8)
        return np.ascontiguousarray(window)


@dataclass(frozen=True)
class ResizeCropFlip(LabelAugmentation):
    """Random scale, random crop and random horizontal flip.

    Attributes:
        working_size: size into which an image is fitted, aspect ratio kept, before random scaling;
            0 in either place: the image's own size.
        scale_range: smallest and largest random scale relative to the fitted size.
        crop_size: size of the result.
        position: 'uniform': anywhere; 'diagonal': one random number for both axes, so that crops
            lie on the diagonal of the image, as in the published code.
        flip: exchange left and right with probability 0.5.
        short_sides: short sides of which one is drawn, instead of a scale, pixels; the image is
            then resized without antialiasing, as in mmsegmentation. Empty: `scale_range`.
        long_side_max: limit of the long side with `short_sides`, pixels; 0: none.
        cat_max_ratio: another crop is drawn while one class has this share of the labelled pixels
            or more, at most CROP_ATTEMPTS times; 1: never.
        pad: pad to `crop_size` where the image is smaller.
    """

    working_size: Size
    scale_range: tuple[float, float]
    crop_size: Size
    position: CropPosition
    flip: bool
    short_sides: tuple[int, ...] = ()
    long_side_max: int = 0
    cat_max_ratio: float = 1.0
    pad: bool = True

    def get_transform(self, image: UInt8Array, rng: np.random.Generator) -> ResizeCropFlipTransform:
        return self._draw(image, None, rng)

    def get_transform_with_label(
        self, image: UInt8Array, label: UInt8Array, rng: np.random.Generator
    ) -> ResizeCropFlipTransform:
        return self._draw(image, label if self.cat_max_ratio < 1 else None, rng)

    def _draw(
        self, image: UInt8Array, label: UInt8Array | None, rng: np.random.Generator
    ) -> ResizeCropFlipTransform:
        size = (image.shape[0], image.shape[1])
        resized = self._draw_size(size, rng)
        crop = self.crop_size
        if not self.pad:
            crop = (min(crop[0], resized[0]), min(crop[1], resized[1]))
        antialias = not self.short_sides

        def crop_at(corner: tuple[int, int], flip: bool) -> ResizeCropFlipTransform:
            return ResizeCropFlipTransform(size, resized, *corner, crop, flip, antialias)

        corner = self._draw_corner(resized, rng)
        if label is not None:
            for _ in range(CROP_ATTEMPTS):
                cropped = crop_at(corner, False).apply_segmentation(label)
                if has_mixed_classes(cropped, self.cat_max_ratio):
                    break
                corner = self._draw_corner(resized, rng)
        return crop_at(corner, self.flip and bool(rng.integers(2)))

    def _draw_size(self, size: Size, rng: np.random.Generator) -> Size:
        """The size to which an image of `size` is resized."""
        height, width = size
        if self.short_sides:
            short_side = int(self.short_sides[rng.integers(len(self.short_sides))])
            return short_side_size(height, width, short_side, self.long_side_max)
        factor = 1.0
        if self.working_size[0] and self.working_size[1]:
            factor = min(self.working_size[0] / height, self.working_size[1] / width)
        factor = factor * rng.uniform(*self.scale_range)
        return max(1, round(height * factor)), max(1, round(width * factor))

    def _draw_corner(self, resized: Size, rng: np.random.Generator) -> tuple[int, int]:
        """Top and left of the crop in the resized image."""
        room = (max(0, resized[0] - self.crop_size[0]), max(0, resized[1] - self.crop_size[1]))
        if self.position == "diagonal":
            share = rng.random()
            return round(room[0] * share), round(room[1] * share)
        top, left = (int(rng.integers(0, r, endpoint=True)) for r in room)
        return top, left


def has_mixed_classes(label: UInt8Array, max_ratio: float) -> bool:
    """Whether a label has several classes, each with less than a share of the labelled pixels."""
    counts = np.bincount(label.ravel(), minlength=IGNORE + 1)
    counts[IGNORE] = 0
    several = np.count_nonzero(counts) > 1
    return bool(several and counts.max() / counts.sum() < max_ratio)


class RandomFlip(Augmentation):
    """Exchange left and right with probability 0.5."""

    def get_transform(self, image: UInt8Array, rng: np.random.Generator) -> Transform:
        return HFlipTransform(image.shape[1]) if rng.integers(2) else NoOpTransform()


# ---------------------------------------------------------------- color


@dataclass(frozen=True)
class ColorJitterTransform(Transform):  # type: ignore[misc]
    """Brightness, contrast, saturation and hue, as in SSD (Liu et al., 2016, data augmentation).

    Attributes:
        brightness: added to every channel, on the 0-255 scale.
        contrast: factor of every channel.
        saturation: factor of the saturation in HSV.
        hue: added to the hue, in OpenCV's units of two degrees.
        contrast_first: apply contrast before saturation and hue, rather than after.
        on_device: the model applies it (`clouds.ops.color_jitter`), `apply_image` nothing.
    """

    brightness: float = 0.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: int = 0
    contrast_first: bool = True
    on_device: bool = False

    def apply_image(self, image: UInt8Array) -> UInt8Array:
        """(H, W, 3) uint8 RGB -> the same; values are clipped to 0..255.

        With the default parameters it returns the array that was passed in.
        """
        if self.on_device:
            return image
        brightness = _linear_table(1.0, self.brightness)
        contrast = _linear_table(self.contrast, 0.0)
        before, after = (
            (contrast[brightness], None) if self.contrast_first else (brightness, contrast)
        )
        image = _apply_table(image, before)
        if self.saturation != 1.0 or self.hue != 0:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            hsv = cv2.LUT(hsv, self._hsv_table())
            image = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)
        return image if after is None else _apply_table(image, after)

    def apply_segmentation(self, segmentation: UInt8Array) -> UInt8Array:
        return segmentation

    def apply_coords(self, coords: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return coords

    def _hsv_table(self) -> UInt8Array:
        """(256, 1, 3): new value of each hue, saturation and value."""
        hue = (np.arange(256) + self.hue) % NUM_HUES
        value = np.arange(256)
        table = np.stack([hue, _linear_table(self.saturation, 0.0), value], axis=-1)
        return table.astype(np.uint8)[:, None]


def _linear_table(factor: float, offset: float) -> UInt8Array:
    """(256,): `factor * value + offset` of each value, rounded and clipped."""
    values: npt.NDArray[np.float64] = np.clip(np.arange(256) * factor + offset, 0, 255)
    return np.rint(values).astype(np.uint8)


def _apply_table(image: UInt8Array, table: UInt8Array) -> UInt8Array:
    if np.array_equal(table, np.arange(256)):
        return image
    return np.asarray(cv2.LUT(image, table), np.uint8)


@dataclass(frozen=True)
class SSDColorJitter(Augmentation):
    """Random color jitter; each of the four changes is left out with probability 0.5.

    Attributes:
        on_device: see `ColorJitterTransform`.
    """

    on_device: bool = False

    def get_transform(self, image: UInt8Array, rng: np.random.Generator) -> ColorJitterTransform:
        brightness, contrast, saturation, hue, contrast_first = rng.integers(2, size=5).astype(bool)
        return ColorJitterTransform(
            brightness=rng.uniform(-32.0, 32.0) if brightness else 0.0,
            contrast=rng.uniform(0.5, 1.5) if contrast else 1.0,
            saturation=rng.uniform(0.5, 1.5) if saturation else 1.0,
            hue=int(rng.integers(-18, 18, endpoint=True)) if hue else 0,
            contrast_first=bool(contrast_first),
            on_device=self.on_device,
        )
