"""Reading an image together with its label."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from clouds.data.datasets import get_dataset
from clouds.data.reading import read_image
from clouds.data.sample import Record

UInt8Array = npt.NDArray[np.uint8]


def read_pair(record: Record) -> tuple[UInt8Array, UInt8Array | None]:
    """A record's image (H, W, 3) RGB and its label (H, W) as train ids, None if it has none.

    Raises:
        FileNotFoundError: a file is gone.
        ValueError: a file is broken, or the label is not as large as the image.
    """
    image = read_image(record.image)
    if record.label is None:
        return image, None
    label = get_dataset(record.dataset).read_label(record)
    if label.shape != image.shape[:2]:
        raise ValueError(
            f"{record.label}: the label is {label.shape[1]}x{label.shape[0]} pixels, but its "
            f"image {record.image} is {image.shape[1]}x{image.shape[0]}. One of them is not the "
            "dataset's own; `python tools/check_datasets.py --full` lists every such pair."
        )
    return image, label


def to_tensor(pixels: UInt8Array) -> torch.Tensor:
    """(H, W, 3) -> (3, H, W); (H, W) as it is. uint8, memory in order."""
    if pixels.ndim == 3:
        pixels = pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels))
