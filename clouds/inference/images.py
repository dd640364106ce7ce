"""Images as users have them, checked and converted to (H, W, 3) uint8 RGB arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from clouds.data.reading import read_image
from clouds.files import check_regular, expand_user

UInt8Array = npt.NDArray[np.uint8]

ImageLike = str | Path | Image.Image | npt.NDArray[np.generic] | torch.Tensor
"""An image file; a Pillow image; a NumPy array (H, W, 3) or a torch tensor (3, H, W), RGB, uint8 or
floating point in [0, 1]."""

NUMPY_TYPES = (torch.uint8, torch.float16, torch.float32, torch.float64)
"""Types of image tensors that NumPy has; it has none such as bfloat16."""

PIL_MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")
"""Modes of 8 bits per channel or less, which Pillow converts to RGB without loss of range."""


def to_rgb(image: ImageLike) -> UInt8Array:
    """Check an image and convert it.

    Files and Pillow images are turned upright by their EXIF tag; gray becomes RGB, alpha is
    dropped. Arrays and tensors must be RGB.

    Args:
        image: see `ImageLike`.

    Returns:
        (H, W, 3) uint8 RGB, contiguous.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the object is of another type, or its values are.
        ValueError: the file cannot be read, or is a FIFO or a device; another shape or range of
            values.
    """
    if isinstance(image, str | Path):
        path = expand_user(image)
        check_regular(path)
        return read_image(path)
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    if isinstance(image, torch.Tensor):
        return _from_tensor(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise TypeError(
        f"an image is a {type(image).__name__}; allowed are a path, a Pillow image, a NumPy array "
        "(H, W, 3), a torch tensor (3, H, W), or a list of these."
    )


def _from_pillow(image: Image.Image) -> UInt8Array:
    if image.mode not in PIL_MODES:
        raise ValueError(
            f"a Pillow image has the mode {image.mode!r}; allowed are {', '.join(PIL_MODES)}. "
            "Scale its values to 0..255 and convert it to 'RGB'."
        )
    if 0 in image.size:
        raise ValueError(f"a Pillow image of {image.width}x{image.height} pixels is empty.")
    return np.array(ImageOps.exif_transpose(image).convert("RGB"), np.uint8)


def _from_tensor(image: torch.Tensor) -> UInt8Array:
    shape = tuple(image.shape)
    if len(shape) == 4:
        hint = "Call the segmenter with list(batch)."
    elif len(shape) == 3 and shape[0] != 3 and shape[-1] == 3:
        hint = "This one seems to be (H, W, 3): use image.permute(2, 0, 1)."
    else:
        hint = _channels_hint(shape, channel_axis=0)
    if len(shape) != 3 or shape[0] != 3 or 0 in shape:
        raise ValueError(
            f"a torch image has the shape {shape}; allowed is (3, H, W), RGB, not empty. {hint}"
        )
    dtype = str(image.dtype)
    if not (image.dtype == torch.uint8 or image.dtype.is_floating_point):
        raise _other_type(dtype)
    if image.dtype not in NUMPY_TYPES:
        image = image.float()
    array = image.detach().cpu().permute(1, 2, 0).numpy()
    return _to_uint8(array, dtype)


def _from_array(image: npt.NDArray[np.generic]) -> UInt8Array:
    shape = image.shape
    if len(shape) == 4:
        hint = "Call the segmenter with list(batch)."
    elif len(shape) == 3 and shape[0] == 3 and shape[-1] != 3:
        hint = "This one seems to be (3, H, W): use image.transpose(1, 2, 0)."
    else:
        hint = _channels_hint(shape, channel_axis=-1)
    if len(shape) != 3 or shape[-1] != 3 or 0 in shape:
        raise ValueError(
            f"a NumPy image has the shape {shape}; allowed is (H, W, 3), RGB, not empty. {hint}"
        )
    return _to_uint8(image, str(image.dtype))


def _channels_hint(shape: tuple[int, ...], channel_axis: int) -> str:
    """What to do with an image that has another number of channels than 3."""
    if 0 in shape:
        return "It has no pixel."
    if len(shape) == 2 or (len(shape) == 3 and shape[channel_axis] == 1):
        return "For a gray image repeat the channel 3 times."
    if len(shape) == 3 and shape[channel_axis] == 4:
        return "For RGBA drop the last channel."
    return "Select three channels: red, green, blue."


def _to_uint8(image: npt.NDArray[np.generic], dtype: str) -> UInt8Array:
    """(H, W, 3) of uint8, or of floating point in [0, 1], as contiguous uint8."""
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image, np.uint8)
    if not np.issubdtype(image.dtype, np.floating):
        raise _other_type(dtype)
    low, high = float(image.min()), float(image.max())  # nan if one value is nan
    if not 0 <= low <= high <= 1:
        hint = "Remove nan and inf first."
        if np.isfinite([low, high]).all():
            hint = "If they are 0..255, convert the image to uint8. Undo a normalization."
        raise ValueError(
            f"a floating-point image has values from {low:.6g} to {high:.6g}; allowed are finite "
            f"values in [0, 1]. {hint}"
        )
    return np.ascontiguousarray(np.rint(image.astype(np.float32) * 255), np.uint8)


def _other_type(dtype: str) -> TypeError:
    return TypeError(
        f"an image has the type {dtype}; allowed are uint8 (0..255) and floating point (0..1). "
        "If its values are 0..255, convert it to uint8."
    )
