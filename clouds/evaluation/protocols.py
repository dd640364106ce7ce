"""Evaluation protocols: sizes of the model's input and of the scored prediction.

native   The image is resized to a given short side, the prediction to the size of the label.
clouds   The same input. The labels of BDD100K, Mapillary and ACDC are resized with the image and
         predictions are scored at that size, as in the published CLOUDS results.
slide    Overlapping windows whose scores are averaged, as in the published results of Rein.

Where an image is resized to a short side, TEST.LONG_SIDE_MAX limits its long side.

Scores under different protocols are not comparable. The method `prepare` of a protocol runs in the
worker processes of the data loader, on arrays; `predict` runs in the main process, on one sample.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from typing import Protocol as Interface

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clouds.d2 import CfgNode
from clouds.data.augmentation import resize_label, short_side_size
from clouds.modeling.postprocessing import ClassMapBuilder

logger = logging.getLogger(__name__)

UInt8Array = npt.NDArray[np.uint8]

RESIZED_LABELS = ("acdc", "bdd", "mapillary")
"""First words of the names of datasets whose labels the 'clouds' protocol resizes."""


class Segmenter(Interface):
    """The methods of a model that protocols call."""

    def __call__(self, batch: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Per sample {"sem_seg": (C, H, W) scores} at its "height" and "width"."""

    def segment(self, batch: list[dict[str, Any]]) -> list[Tensor]:
        """Per sample the (H, W) uint8 class map at its "height" and "width"."""


class Protocol(ABC):
    """An evaluation protocol. Instances are pickled to the worker processes of the loader."""

    @abstractmethod
    def prepare(
        self, image: UInt8Array, label: UInt8Array | None, dataset: str
    ) -> tuple[UInt8Array, UInt8Array | None]:
        """Convert an image and its label to the model's input and the label to score on.

        Args:
            image: (H, W, 3) RGB.
            label: (H, W) train ids; None: there is no label.
            dataset: name of the dataset.

        Returns:
            The input image, (h, w, 3) RGB, and the label (H', W'). The prediction has the size of
            this label.
        """

    @abstractmethod
    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the model's input for an image of `height` x `width` pixels."""

    @abstractmethod
    def warn_if_limited(self, height: int, width: int) -> None:
        """Log, the first time in a process, that the long side of an input was limited.

        Args:
            height, width: of the input, pixels.
        """

    @abstractmethod
    def predict(self, model: Segmenter, sample: dict[str, Any]) -> Tensor:
        """Class map of one sample.

        Args:
            model: in evaluation mode.
            sample: "image" (3, h, w) from `prepare`, "height" and "width" of the label.

        Returns:
            (height, width) uint8 on the model's device.
        """


@dataclass(frozen=True)
class Native(Protocol):
    """Whole image; the prediction is resized to the size of the label.

    Attributes:
        short_side: short side of the input, pixels; 0: the image is not resized.
        long_side_max: limit of the long side of a resized image, pixels; 0: none.
    """

    short_side: int
    long_side_max: int

    def prepare(
        self, image: UInt8Array, label: UInt8Array | None, dataset: str
    ) -> tuple[UInt8Array, UInt8Array | None]:
        height, width = self.input_size(image.shape[0], image.shape[1])
        return resize_image(image, height, width), label

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        return short_side_size(height, width, self.short_side, self.long_side_max)

    def predict(self, model: Segmenter, sample: dict[str, Any]) -> Tensor:
        self.warn_if_limited(sample["image"].shape[-2], sample["image"].shape[-1])
        return model.segment([sample])[0]

    def warn_if_limited(self, height: int, width: int) -> None:
        if min(height, width) < self.short_side:
            _warn_of_limit(self.short_side, self.long_side_max)


@dataclass(frozen=True)
class Clouds(Native):
    """As `Native`; the labels of some datasets are resized with the image (nearest neighbor)."""

    def prepare(
        self, image: UInt8Array, label: UInt8Array | None, dataset: str
    ) -> tuple[UInt8Array, UInt8Array | None]:
        image, label = super().prepare(image, label, dataset)
        if label is not None and dataset.split("_")[0] in RESIZED_LABELS:
            label = resize_label(label, (image.shape[0], image.shape[1]))
        return image, label


@dataclass(frozen=True)
class Slide(Native):
    """Overlapping windows; scores are averaged where they overlap.

    Attributes:
        crop_size: side of a window, pixels; a smaller image is one window.
        stride: step between windows as a fraction of their side, in (0, 1].
    """

    crop_size: int
    stride: float

    def predict(self, model: Segmenter, sample: dict[str, Any]) -> Tensor:
        source = (int(sample["image"].shape[-2]), int(sample["image"].shape[-1]))
        self.warn_if_limited(*source)
        size = (int(sample["height"]), int(sample["width"]))
        builder: ClassMapBuilder | None = None
        for scores in self.mean_scores(model, sample):
            builder = builder or ClassMapBuilder(source, size, scores.device)
            builder.add(scores)
        assert builder is not None, "an image has at least one window"
        return builder.result

    def mean_scores(self, model: Segmenter, sample: dict[str, Any]) -> Iterator[Tensor]:
        """Mean scores (C, n, width) of the next n rows of the input, from top to bottom.

        In memory are at most the rows of a window.
        """
        image: Tensor = sample["image"]
        height, width = image.shape[-2:]
        top = 0
        sums = counts = None  # of the rows from `top` to `top` + height of a window
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
                sums, counts = _shift_up(sums, done), _shift_up(counts, done)
                top = rows.start
            sums[:, :, columns] += scores
            counts[:, columns] += 1
        assert sums is not None and counts is not None, "an image has at least one window"
        yield sums / counts


def _shift_up(values: Tensor, rows: int) -> Tensor:
    """`values` (..., n, w) without the first `rows` rows, padded by zeros at the bottom."""
    return F.pad(values[..., rows:, :], (0, 0, 0, rows))


def windows(height: int, width: int, crop: int, stride: float) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the windows that cover an image, in row-major order.

    They start at multiples of the stride (rounded to pixels). The last window of a row or column
    ends at the border of the image, so that all windows have the same size. If the image is
    smaller than a window, the window has the size of the image.

    Args:
        height, width: of the image, pixels.
        crop: side of a window, pixels.
        stride: step as a fraction of the side, in (0, 1].
    """
    for rows in _spans(height, crop, round(crop * stride)):
        for columns in _spans(width, crop, round(crop * stride)):
            yield rows, columns


def _spans(length: int, crop: int, step: int) -> Iterator[slice]:
    crop = min(crop, length)
    num_steps = -(-(length - crop) // step)
    for i in range(num_steps + 1):
        start = min(i * step, length - crop)
        yield slice(start, start + crop)


@cache
def _warn_of_limit(short_side: int, long_side_max: int) -> None:
    """Log the warning, the first time that a process has it."""
    logger.warning(
        "there are images so long that a short side of %d pixels would need a long side above "
        "TEST.LONG_SIDE_MAX, %d. Their input has this long side, and a shorter short side; "
        "TEST.LONG_SIDE_MAX 0 removes the limit. (This is logged once.)",
        short_side,
        long_side_max,
    )


def resize_image(image: UInt8Array, height: int, width: int) -> UInt8Array:
    """Resize an image (H, W, 3) for the model's input, as `Protocol.prepare` does."""
    if image.shape[:2] == (height, width):
        return image
    # Pillow as in Detectron2: its bilinear filter antialiases when downscaling, OpenCV's does not
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


PROTOCOLS: dict[str, Callable[[CfgNode], Protocol]] = {
    "native": lambda cfg: Native(cfg.TEST.SHORT_SIDE, cfg.TEST.LONG_SIDE_MAX),
    "clouds": lambda cfg: Clouds(cfg.TEST.SHORT_SIDE, cfg.TEST.LONG_SIDE_MAX),
    "slide": lambda cfg: Slide(
        cfg.TEST.SLIDE.SHORT_SIDE,
        cfg.TEST.LONG_SIDE_MAX,
        cfg.TEST.SLIDE.CROP_SIZE,
        cfg.TEST.SLIDE.STRIDE,
    ),
}


def build_protocol(cfg: CfgNode) -> Protocol:
    """The protocol with the name TEST.PROTOCOL.

    Raises:
        ValueError: there is no such protocol.
    """
    if cfg.TEST.PROTOCOL not in PROTOCOLS:
        raise ValueError(
            f"TEST.PROTOCOL is {cfg.TEST.PROTOCOL!r}; known: {', '.join(sorted(PROTOCOLS))}"
        )
    return PROTOCOLS[cfg.TEST.PROTOCOL](cfg)
