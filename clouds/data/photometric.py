"""Color augmentation as in mmsegmentation's PhotoMetricDistortion.

It is that of SSD, as `SSDColorJitter`, with other rounding and ranges: values are truncated, image
and HSV are converted once for the saturation and once for the hue, and the largest change of hue is
17 upwards and 18 downwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from clouds.data.augmentation import NUM_HUES, Augmentation, ColorJitterTransform

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PhotoMetricDistortionTransform(ColorJitterTransform):
    """Brightness, contrast, saturation and hue, each followed by truncation to uint8."""

    def apply_image(self, image: UInt8Array) -> UInt8Array:
        """(H, W, 3) uint8 RGB -> the same; values are clipped to 0..255 and truncated."""
        contrast = _truncated(self.contrast, 0.0)
        image = _lookup(image, _truncated(1.0, self.brightness))
        if self.contrast_first:
            image = _lookup(image, contrast)
        values = np.arange(256, dtype=np.uint8)
        if self.saturation != 1.0:
            image = _lookup_hsv(image, values, _truncated(self.saturation, 0.0))
        if self.hue != 0:
            hues = ((np.arange(256) + self.hue) % NUM_HUES).astype(np.uint8)
            image = _lookup_hsv(image, hues, values)
        return image if self.contrast_first else _lookup(image, contrast)


def _truncated(factor: float, offset: float) -> UInt8Array:
    """(256,): `factor * value + offset` of each value in float32, clipped and truncated."""
    values = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(offset)
    clipped: npt.NDArray[np.float32] = np.clip(values, 0, 255)
    return clipped.astype(np.uint8)


def _lookup(image: UInt8Array, table: UInt8Array) -> UInt8Array:
    return np.asarray(cv2.LUT(image, table), np.uint8)


def _lookup_hsv(image: UInt8Array, hues: UInt8Array, saturations: UInt8Array) -> UInt8Array:
    """Replace hue and saturation by their entries in tables (256,)."""
    table = np.stack([hues, saturations, np.arange(256, dtype=np.uint8)], axis=-1)
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table[:, None])
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)


class PhotoMetricDistortion(Augmentation):
    """Random distortion; each of the four changes is left out with probability 0.5."""

    def get_transform(
        self, image: UInt8Array, rng: np.random.Generator
    ) -> PhotoMetricDistortionTransform:
        brightness, contrast_first, contrast, saturation, hue = rng.integers(2, size=5).astype(bool)
        return PhotoMetricDistortionTransform(
            brightness=rng.uniform(-32.0, 32.0) if brightness else 0.0,
            contrast=rng.uniform(0.5, 1.5) if contrast else 1.0,
            saturation=rng.uniform(0.5, 1.5) if saturation else 1.0,
            hue=int(rng.integers(-18, 18)) if hue else 0,
            contrast_first=bool(contrast_first),
        )
