"""How an image is fed and at which size its prediction is scored: published numbers differ by it.

native   the image resized to a given short side; the prediction resized to the untouched label.
clouds   the same input; the labels of BDD100K, Mapillary and ACDC resized with the image, and
         scored there, as in the published CLOUDS results.
slide    windows that overlap, their scores averaged, as in the results of Rein and its relatives.

A protocol does two things. `prepare` runs in the loader's processes, on arrays; `predict` runs
beside the model, on one sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from typing import Protocol as Interface

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clouds.d2 import CfgNode
from clouds.data.augmentation import resize_label
from clouds.modeling.postprocessing import ClassMapBuilder

UInt8Array = npt.NDArray[np.uint8]

RESIZED_LABELS = ("acdc", "bdd", "mapillary")
"""Families (first word of a dataset's name) whose labels the 'clouds' protocol resizes."""


class Segmenter(Interface):
    """What a protocol needs of a model."""

    def __call__(self, batch: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Per sample {"sem_seg": (C, H, W) scores} at its "height" and "width"."""

    def segment(self, batch: list[dict[str, Any]]) -> list[Tensor]:
        """Per sample the (H, W) uint8 class map at its "height" and "width"."""


class Protocol(ABC):
    """One way to evaluate; its instances can be pickled to loader processes."""

    @abstractmethod
    def prepare(
        self, image: UInt8Array, label: UInt8Array | None, dataset: str
    ) -> tuple[UInt8Array, UInt8Array | None]:
        """From what is on disk to the model's input and the label to score on.

        Args:
            image: (H, W, 3) RGB.
            label: (H, W) train ids, or None where there is none.
            dataset: the dataset's name.

        Returns:
            The input image, (h, w, 3) RGB, and the label (H', W'), whose size the prediction
            must have.
        """

    @abstractmethod
    def predict(self, model: Segmenter, sample: dict[str, Any]) -> Tensor:
        """Class map of one sample.

        Args:
            model: in evaluation mode.
            sample: "image" (3, h, w) as prepared, "height" and "width" of the label to score on.

        Returns:
            (height, width) uint8 on the model's device.
        """


@dataclass(frozen=True)
class Native(Protocol):
    """Whole image; the prediction is resized to the untouched label.

    Attributes:
        short_side: of the input, pixels; 0: the image as it is.
    """

    short_side: int

    def prepare(
        self, image: UInt8Array, label: UInt8Array | None, dataset: str
    ) -> tuple[UInt8Array, UInt8Array | None]:
        height, width = short_side_size(image.shape[0], image.shape[1], self.short_side)
        return _resize_image(image, height, width), label

    def predict(self, model: Segmenter, sample: dict[str, Any]) -> Tensor:
        return model.segment([sample])[0]


@dataclass(frozen=True)
class Clouds(Native):
    """As `Native`, but some datasets' labels are resized with the image (nearest neighbor)."""

    def prepare(
        self, image: UInt8Array, label: UInt8Array | None, dataset: str
    ) -> tuple[UInt8Array, UInt8Array | None]:
        image, label = super().prepare(image, label, dataset)
        if label is not None and dataset.split("_")[0] in RESIZED_LABELS:
            height, width = image.shape[:2]
            label = resize_label(label, (height, width))
        return image, label


@dataclass(frozen=True)
class Slide(Native):
    """Overlapping windows, whose scores are averaged where they overlap.

    Attributes:
        crop_size: side of a window, pixels; a smaller image is one window.
        stride: step of the windows as a share of their side.
    """

    crop_size: int
    stride: float

    def predict(self, model: Segmenter, sample: dict[str, Any]) -> Tensor:
        source = (int(sample["image"].shape[-2]), int(sample["image"].shape[-1]))
        size = (int(sample["height"]), int(sample["width"]))
        builder: ClassMapBuilder | None = None
        for scores in self._mean_scores(model, sample):
            builder = builder or ClassMapBuilder(source, size, scores.device)
            builder.add(scores)
        assert builder is not None, "an image has at least one window"
        return builder.result

    def _mean_scores(self, model: Segmenter, sample: dict[str, Any]) -> Iterator[Tensor]:
        """Mean scores (C, n, width) from top to bottom, rows as soon as they are complete.

        Only as many rows are held as a window has.
        """
        image: Tensor = sample["image"]
        height, width = image.shape[-2:]
        top = 0
        sums = counts = None  # of rows `top` to `top` + a window's height
        for rows, columns in windows(height, width, self.crop_size, self.stride):
            part = image[:, rows, columns]
            window = {**sample, "image": part, "height": part.shape[1], "width": part.shape[2]}
            scores = model([window])[0]["sem_seg"].float()
            if sums is None or counts is None:
                sums = scores.new_zeros(scores.shape[0], part.shape[1], width)
                counts = scores.new_zeros(part.shape[1], width)
            done = rows.start - top
            if done:
                yield sums[:, :done] / counts[:done]
                sums, counts = _moved_up(sums, done), _moved_up(counts, done)
                top = rows.start
            sums[:, :, columns] += scores
            counts[:, columns] += 1
        assert sums is not None and counts is not None, "an image has at least one window"
        yield sums / counts


def _moved_up(values: Tensor, rows: int) -> Tensor:
    """`values` (..., n, w) without its first rows, and as many rows of zeros below."""
    return F.pad(values[..., rows:, :], (0, 0, 0, rows))


def windows(height: int, width: int, crop: int, stride: float) -> Iterator[tuple[slice, slice]]:
    """Windows that cover an image, row by row.

    They start at multiples of the stride (rounded to whole pixels); the last one of a row or
    column is moved back to end with the image, so that all have the same size, unless the image
    is smaller than a window.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        crop: side of a window, pixels.
        stride: step as a share of the side, in (0, 1].

    Yields:
        Rows and columns of a window.
    """
    for rows in _spans(height, crop, round(crop * stride)):
        for columns in _spans(width, crop, round(crop * stride)):
            yield rows, columns


def _spans(length: int, crop: int, step: int) -> Iterator[slice]:
    crop = min(crop, length)
    beyond_first = -(-(length - crop) // step)
    for i in range(beyond_first + 1):
        start = min(i * step, length - crop)
        yield slice(start, start + crop)


def short_side_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width of an image scaled so that its shorter side is `short_side` (0: as is)."""
    if short_side == 0:
        return height, width
    scale = short_side / min(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def _resize_image(image: UInt8Array, height: int, width: int) -> UInt8Array:
    if image.shape[:2] == (height, width):
        return image
    # Pillow, as in Detectron2: its bilinear filter averages when it shrinks, OpenCV's does not
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def _native(cfg: CfgNode) -> Protocol:
    return Native(short_side=cfg.TEST.SHORT_SIDE)


def _clouds(cfg: CfgNode) -> Protocol:
    return Clouds(short_side=cfg.TEST.SHORT_SIDE)


def _slide(cfg: CfgNode) -> Protocol:
    slide = cfg.TEST.SLIDE
    return Slide(short_side=slide.SHORT_SIDE, crop_size=slide.CROP_SIZE, stride=slide.STRIDE)


PROTOCOLS: dict[str, Callable[[CfgNode], Protocol]] = {
    "native": _native,
    "clouds": _clouds,
    "slide": _slide,
}


def build_protocol(cfg: CfgNode) -> Protocol:
    """The protocol that TEST.PROTOCOL names.

    Raises:
        ValueError: there is no such protocol.
    """
    if cfg.TEST.PROTOCOL not in PROTOCOLS:
        raise ValueError(
            f"TEST.PROTOCOL is {cfg.TEST.PROTOCOL!r}; known: {', '.join(sorted(PROTOCOLS))}"
        )
    return PROTOCOLS[cfg.TEST.PROTOCOL](cfg)
