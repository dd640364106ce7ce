"""Color jitter on the model's device: `ColorJitterTransform.apply_image` up to rounding.

Parameters are those that the loader drew from the sample's generator. They are numbers of the host,
so that no operation waits for the device. torchvision has no such transform: its contrast and its
saturation are mixtures with a gray image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clouds.data.augmentation import NUM_HUES, ColorJitterTransform
from clouds.data.structures import Sample

_SEXTANT = NUM_HUES // 6


def jittered(sample: Sample, device: torch.device) -> Tensor:
    """The image of a sample, uint8 (3, H, W) RGB; `color_jitter`, if any, applied on `device`."""
    image: Tensor = sample["image"]
    if "color_jitter" not in sample:
        return image
    jitter: ColorJitterTransform = sample["color_jitter"]
    return jitter_colors(image.to(device, non_blocking=True), jitter)


def jitter_colors(image: Tensor, jitter: ColorJitterTransform) -> Tensor:
    """Apply a jitter to an image, uint8 (3, H, W) RGB; every change is rounded and clipped."""
    values = _rounded(image.float() + jitter.brightness)
    if jitter.contrast_first:
        values = _rounded(values * jitter.contrast)
    if jitter.saturation != 1.0 or jitter.hue != 0:
        values = _jitter_hsv(values, jitter.saturation, jitter.hue)
    if not jitter.contrast_first:
        values = _rounded(values * jitter.contrast)
    return values.to(torch.uint8)


def _rounded(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255)


def _jitter_hsv(image: Tensor, saturation: float, hue: int) -> Tensor:
    """Multiply the saturation and add to the hue, in units of two degrees, of (3, H, W) RGB.

    As in OpenCV the hue is a whole number of these units, and the saturation one of 0..255.
    """
    red, green, blue = image
    value = image.amax(0)
    chroma = value - image.amin(0)
    divisor = chroma.clamp(min=1)  # the values are whole numbers: 0 for gray only
    sextants = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    turned = ((sextants * _SEXTANT).round() + hue) / _SEXTANT
    share = _rounded((255 * chroma / value.clamp(min=1)).round() * saturation) / 255
    channels = []
    for offset in (5, 3, 1):  # red, green, blue: distances on the color circle
        distance = (turned + offset) % 6
        less = torch.minimum(distance, 4 - distance).clamp(0, 1)
        channels.append(value * (1 - share * less))
    return _rounded(torch.stack(channels))
