"""Evaluation protocols: sizes of the model's input and of the scored prediction.

native   The image is resized to a given short side, the prediction to the size of the label.
clouds   The same input. The labels of BDD100K, Mapillary and ACDC are resized with the image and
         predictions are scored at that size, as in the published CLOUDS results.
slide    Overlapping windows whose scores are averaged, as in the published results of Rein.
rein512, rein1024, soma512, soma1024, tqdm, vltseg
         Windows of these papers' code, with a size of the image for each dataset
         (`clouds.data.input_sizes`), to which it is resized without antialiasing.

Where an image is resized to a short side, TEST.LONG_SIDE_MAX limits its long side. TEST.INPUT_SIZES
has sizes of other datasets, for every protocol; TEST.AUG adds test-time augmentation to each.

Scores under different protocols are not comparable. The method `prepare` of a protocol runs in the
worker processes of the data loader, on arrays; `predict` runs in the main process, on one sample.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from typing import Protocol as Interface

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clouds.d2 import CfgNode
from clouds.data.augmentation import resize_label, short_side_size
from clouds.data.input_sizes import PUBLISHED, InputSizes, WindowProtocol, fitted_size, parse_sizes
from clouds.modeling.postprocessing import ClassMapBuilder, SemanticMap, resize_scores

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

    def semantic_maps(self, batch: list[dict[str, Any]]) -> Iterator[SemanticMap]:
        """Per sample its prediction; called where the confidence is wanted."""


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
    def input_size(self, height: int, width: int, dataset: str = "") -> tuple[int, int]:
        """Height and width of the model's input for an image of `height` x `width` pixels.

        Args:
            height, width: of the image.
            dataset: its name; empty: of none.

        Raises:
            ValueError: see `check_dataset`.
        """

    @abstractmethod
    def check_dataset(self, dataset: str) -> None:
        """Raise ValueError if the protocol is not defined for a dataset."""

    @abstractmethod
    def resize(self, image: UInt8Array, height: int, width: int) -> UInt8Array:
        """Resize an image (H, W, 3) for the model's input."""

    @abstractmethod
    def warn_if_limited(self, height: int, width: int) -> None:
        """Log, the first time in a process, that the long side of an input was limited.

        Args:
            height, width: of the input, pixels.
        """

    def predict(self, model: Segmenter, sample: dict[str, Any]) -> Tensor:
        """`classify` without the confidence: uint8 (height, width)."""
        return self.classify(model, sample, with_confidence=False)[0]

    @abstractmethod
    def classify(
        self, model: Segmenter, sample: dict[str, Any], *, with_confidence: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Class map of one sample, and its confidence if that is wanted.

        Args:
            model: in evaluation mode.
            sample: "image" (3, h, w) from `prepare`, "height" and "width" of the label.
            with_confidence: compute the confidence, too.

        Returns:
            uint8 (height, width) on the model's device; and float32 (height, width) in [0, 1], the
            largest score's share in the sum of all scores, or that score where the sum is below 1.
        """


@dataclass(frozen=True)
class Native(Protocol):
    """Whole image; the prediction is resized to the size of the label.

    Attributes:
        short_side: short side of the input, pixels; 0: the image is not resized.
        long_side_max: limit of the long side of a resized image, pixels; 0: none.
        sizes: sizes into which images of some datasets are fitted instead.
        sizes_required: there is no input for datasets without one of `sizes`.
        antialias: resize with antialiasing where the image becomes smaller.
    """

    short_side: int
    long_side_max: int
    sizes: InputSizes = field(default_factory=InputSizes, kw_only=True)
    sizes_required: bool = field(default=False, kw_only=True)
    antialias: bool = field(default=True, kw_only=True)

    def prepare(
        self, image: UInt8Array, label: UInt8Array | None, dataset: str
    ) -> tuple[UInt8Array, UInt8Array | None]:
        if self.sizes.is_halved(dataset):
            image = _halve(image, Image.Resampling.BICUBIC)
            label = None if label is None else _halve(label, Image.Resampling.NEAREST)
        height, width = self.input_size(image.shape[0], image.shape[1], dataset)
        return self.resize(image, height, width), label

    def input_size(self, height: int, width: int, dataset: str = "") -> tuple[int, int]:
        self.check_dataset(dataset)
        size = self.sizes.of(dataset)
        if size is not None:
            return fitted_size(height, width, size)
        return short_side_size(height, width, self.short_side, self.long_side_max)

    def check_dataset(self, dataset: str) -> None:
        if self.sizes_required and self.sizes.of(dataset) is None:
            patterns = ", ".join(pattern for pattern, _ in self.sizes.sizes)
            raise ValueError(
                f"this TEST.PROTOCOL has no input size for the dataset {dataset!r}, only for "
                f"{patterns}. Choose another protocol, or give the size: TEST.INPUT_SIZES "
                f"\"('{dataset}: 2048x1024',)\""
            )

    def resize(self, image: UInt8Array, height: int, width: int) -> UInt8Array:
        if self.antialias or image.shape[:2] == (height, width):
            return resize_image(image, height, width)
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        return np.asarray(resized, np.uint8)

    def scores(self, model: Segmenter, sample: dict[str, Any]) -> Tensor:
        """Scores (C, h, w) of a sample at the size of its image (3, h, w)."""
        height, width = sample["image"].shape[-2:]
        return model([{**sample, "height": height, "width": width}])[0]["sem_seg"].float()

    def classify(
        self, model: Segmenter, sample: dict[str, Any], *, with_confidence: bool
    ) -> tuple[Tensor, Tensor | None]:
        self.warn_if_limited(sample["image"].shape[-2], sample["image"].shape[-1])
        if not with_confidence:
            return model.segment([sample])[0], None
        (semantic_map,) = model.semantic_maps([sample])
        return semantic_map.classes_and_confidence((int(sample["height"]), int(sample["width"])))

    def warn_if_limited(self, height: int, width: int) -> None:
        limited = max(height, width) == self.long_side_max > 0
        if limited and min(height, width) < self.short_side:
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

    def classify(
        self, model: Segmenter, sample: dict[str, Any], *, with_confidence: bool
    ) -> tuple[Tensor, Tensor | None]:
        self.warn_if_limited(sample["image"].shape[-2], sample["image"].shape[-1])
        return _classify(self.mean_scores(model, sample), sample, with_confidence)

    def scores(self, model: Segmenter, sample: dict[str, Any]) -> Tensor:
        return torch.cat(list(self.mean_scores(model, sample)), dim=1)

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


@dataclass(frozen=True)
class WithTTA(Protocol):
    """Another protocol on scaled and flipped copies of its input, whose scores are averaged.

    Attributes:
        protocol: the other protocol; with windows, those of each copy.
        scales: of the input.
        flip: also flip each copy horizontally.
    """

    protocol: Native
    scales: tuple[float, ...]
    flip: bool

    def prepare(
        self, image: UInt8Array, label: UInt8Array | None, dataset: str
    ) -> tuple[UInt8Array, UInt8Array | None]:
        return self.protocol.prepare(image, label, dataset)

    def input_size(self, height: int, width: int, dataset: str = "") -> tuple[int, int]:
        return self.protocol.input_size(height, width, dataset)

    def check_dataset(self, dataset: str) -> None:
        self.protocol.check_dataset(dataset)

    def resize(self, image: UInt8Array, height: int, width: int) -> UInt8Array:
        return self.protocol.resize(image, height, width)

    def warn_if_limited(self, height: int, width: int) -> None:
        self.protocol.warn_if_limited(height, width)

    def classify(
        self, model: Segmenter, sample: dict[str, Any], *, with_confidence: bool
    ) -> tuple[Tensor, Tensor | None]:
        self.warn_if_limited(sample["image"].shape[-2], sample["image"].shape[-1])
        return _classify(self.mean_scores(model, sample), sample, with_confidence)

    def mean_scores(self, model: Segmenter, sample: dict[str, Any]) -> Iterator[Tensor]:
        """Mean scores (C, h, w) at the size of the input (3, h, w), all rows at once."""
        height, width = (int(n) for n in sample["image"].shape[-2:])
        total: Tensor | None = None
        for scale in self.scales:
            size = max(1, round(height * scale)), max(1, round(width * scale))
            scaled = _resize_tensor(sample["image"], size)
            for flipped in (False, True) if self.flip else (False,):
                copy = scaled.flip(-1) if flipped else scaled
                scores = self.protocol.scores(model, {**sample, "image": copy})
                scores = resize_scores(scores.flip(-1) if flipped else scores, (height, width))
                total = scores if total is None else total + scores
        assert total is not None, "there is at least one scale"
        yield total / (len(self.scales) * (2 if self.flip else 1))


def _classify(
    parts: Iterator[Tensor], sample: dict[str, Any], with_confidence: bool
) -> tuple[Tensor, Tensor | None]:
    """Classes, and their confidence, of scores (C, n, w) of the next n rows, from top to bottom."""
    size = (int(sample["height"]), int(sample["width"]))
    builder: ClassMapBuilder | None = None
    confidence: Tensor | None = None
    for scores in parts:
        if builder is None:
            confidence = scores.new_empty(size) if with_confidence else None
            source = (int(sample["image"].shape[-2]), int(sample["image"].shape[-1]))
            builder = ClassMapBuilder(source, size, scores.device, confidence)
        builder.add(scores)
    assert builder is not None, "an image has at least one window"
    return builder.result, confidence


def _resize_tensor(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a uint8 image (3, h, w) bilinearly, with antialiasing, rounded to uint8."""
    if tuple(image.shape[-2:]) == size:
        return image
    resized = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)


def _halve(pixels: UInt8Array, resampling: Image.Resampling) -> UInt8Array:
    """Image or label of half the size, rounded down, at least 1."""
    height, width = pixels.shape[:2]
    size = (max(1, width // 2), max(1, height // 2))
    return np.asarray(Image.fromarray(pixels).resize(size, resampling))


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


def _configured_sizes(cfg: CfgNode) -> InputSizes:
    return InputSizes(parse_sizes(cfg.TEST.INPUT_SIZES))


def _published(cfg: CfgNode, protocol: WindowProtocol) -> Slide:
    """A protocol of `PUBLISHED`; sizes of the config come first."""
    return Slide(
        0,
        0,
        protocol.window,
        protocol.step / protocol.window,
        sizes=protocol.sizes.preceded_by(parse_sizes(cfg.TEST.INPUT_SIZES)),
        sizes_required=True,
        antialias=False,
    )


PROTOCOLS: dict[str, Callable[[CfgNode], Native]] = {
    "native": lambda cfg: Native(
        cfg.TEST.SHORT_SIDE, cfg.TEST.LONG_SIDE_MAX, sizes=_configured_sizes(cfg)
    ),
    "clouds": lambda cfg: Clouds(
        cfg.TEST.SHORT_SIDE, cfg.TEST.LONG_SIDE_MAX, sizes=_configured_sizes(cfg)
    ),
    "slide": lambda cfg: Slide(
        cfg.TEST.SLIDE.SHORT_SIDE,
        cfg.TEST.LONG_SIDE_MAX,
        cfg.TEST.SLIDE.CROP_SIZE,
        cfg.TEST.SLIDE.STRIDE,
        sizes=_configured_sizes(cfg),
    ),
    **{name: partial(_published, protocol=protocol) for name, protocol in PUBLISHED.items()},
}


def build_protocol(cfg: CfgNode) -> Protocol:
    """The protocol with the name TEST.PROTOCOL, with the options of TEST.

    Raises:
        ValueError: there is no such protocol, or TEST.INPUT_SIZES has an entry of another form.
    """
    if cfg.TEST.PROTOCOL not in PROTOCOLS:
        raise ValueError(
            f"TEST.PROTOCOL is {cfg.TEST.PROTOCOL!r}; known: {', '.join(sorted(PROTOCOLS))}"
        )
    protocol = PROTOCOLS[cfg.TEST.PROTOCOL](cfg)
    if not cfg.TEST.AUG.ENABLED:
        return protocol
    return WithTTA(protocol, tuple(cfg.TEST.AUG.SCALES), cfg.TEST.AUG.FLIP)


def protocol_name(cfg: CfgNode) -> str:
    """The name of the protocol in results: TEST.PROTOCOL, with `+tta` if TEST.AUG is enabled."""
    return str(cfg.TEST.PROTOCOL) + ("+tta" if cfg.TEST.AUG.ENABLED else "")
