"""A model with its config, called on images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, cast, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clouds.d2 import CfgNode
from clouds.data.label_space import LabelSpace
from clouds.device import autocast
from clouds.evaluation.protocols import Slide, WithTTA, build_protocol
from clouds.inference.images import ImageLike, to_rgb
from clouds.inference.segmentation import Float32Array, Segmentation, WindowScores
from clouds.inference.windows import Size, Window, windows
from clouds.modeling.meta_arch.clouds import CLOUDS
from clouds.modeling.postprocessing import ClassMapBuilder

UInt8Array = npt.NDArray[np.uint8]

Part = tuple[UInt8Array, Float32Array, Callable[[], Tensor] | None]
"""Labels and confidence of a window, (H, W), and what computes its scores."""

MAX_PIXELS = 1 << 22
"""Pixels of the model's input, of all images of a batch together; an image whose input has more is
divided into windows. 2048x2048, twice an image of Cityscapes at the published size."""


class Segmenter:
    """Predicts the classes of images of any size.

    Images are resized as the evaluation protocol of the config does (TEST), and the prediction has
    the size of the image; its labels are those that evaluation scores. An image whose input has
    more than `max_pixels` pixels is divided into overlapping windows: each pixel gets the
    prediction of the window where it is farthest from the border, so that memory is bounded.

    Args:
        model: in evaluation mode.
        cfg: its config; uses TEST and SOLVER.AMP.
        label_space: names and colors of the model's classes.
        max_pixels: see MAX_PIXELS.
    """

    def __init__(
        self, model: CLOUDS, cfg: CfgNode, label_space: LabelSpace, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.model = model
        self.cfg = cfg
        self.label_space = label_space
        self.max_pixels = max_pixels
        self.protocol = build_protocol(cfg)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # text is a sequence of text
        self, image: ImageLike, *, batch_size: int = ..., keep_scores: bool = ...
    ) -> Segmentation: ...

    @overload
    def __call__(
        self, image: Sequence[ImageLike], *, batch_size: int = ..., keep_scores: bool = ...
    ) -> list[Segmentation]: ...

    def __call__(
        self,
        image: ImageLike | Sequence[ImageLike],
        *,
        batch_size: int = 8,
        keep_scores: bool = True,
    ) -> Segmentation | list[Segmentation]:
        """Predict one image, or each image of a list.

        Args:
            image: a path, a Pillow image, a NumPy array (H, W, 3) or a torch tensor (3, H, W), RGB,
                uint8 or floating point in [0, 1]; or a list of these.
            batch_size: neighbors in the list with the same input size that are predicted together.
            keep_scores: keep what `Segmentation.scores` is computed from, in the host's memory:
                about a quarter of a byte per query and pixel of the input; under
                protocols with windows or TEST.AUG 4 bytes per class and pixel.

        Raises:
            FileNotFoundError, TypeError, ValueError: see `to_rgb`.
        """
        if isinstance(image, list | tuple):
            images = cast("Sequence[ImageLike]", image)
            return list(self.stream(images, batch_size=batch_size, keep_scores=keep_scores))
        single = [cast("ImageLike", image)]
        return next(self.stream(single, batch_size=1, keep_scores=keep_scores))

    def stream(
        self, images: Iterable[ImageLike], *, batch_size: int = 8, keep_scores: bool = False
    ) -> Iterator[Segmentation]:
        """Predictions of any number of images, in their order; a batch is in memory at a time."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        batch: list[UInt8Array] = []
        size: Size = (0, 0)
        for image in images:
            pixels = to_rgb(image)
            new_size = self.protocol.input_size(*pixels.shape[:2])
            self.protocol.warn_if_limited(*new_size)
            limit = min(batch_size, max(1, self.max_pixels // max(1, size[0] * size[1])))
            if batch and (new_size != size or len(batch) >= limit):
                yield from self._predict(batch, keep_scores)
                batch = []
            batch.append(pixels)
            size = new_size
        if batch:
            yield from self._predict(batch, keep_scores)

    def _predict(self, images: Sequence[UInt8Array], keep: bool) -> list[Segmentation]:
        """Predictions of images with the same input size."""
        height, width = self.protocol.input_size(*images[0].shape[:2])
        if height * width <= self.max_pixels:
            inputs = [self.protocol.prepare(image, None, "")[0] for image in images]
            sizes = [(image.shape[0], image.shape[1]) for image in images]
            parts = self._run(inputs, sizes, keep)
            return [self._whole(image, part) for image, part in zip(images, parts, strict=True)]
        return [self._by_windows(image, (height, width), keep) for image in images]

    def _whole(self, image: UInt8Array, part: Part) -> Segmentation:
        labels, confidence, compute = part
        rows, columns = slice(0, image.shape[0]), slice(0, image.shape[1])
        window = Window(rows, columns, rows, columns)
        scores = None if compute is None else [WindowScores(window, compute)]
        return Segmentation(image, labels, confidence, self.label_space, scores)

    def _by_windows(self, image: UInt8Array, input_size: Size, keep: bool) -> Segmentation:
        """The prediction of an image whose input would be of `input_size`, window by window."""
        size = (image.shape[0], image.shape[1])
        labels = np.empty(size, np.uint8)
        confidence = np.empty(size, np.float32)
        scores: list[WindowScores] = []
        for window in windows(size, input_size, self.max_pixels):
            scaled = (
                max(1, round(n * whole / source))
                for n, whole, source in zip(window.size, input_size, size, strict=True)
            )
            pixels = np.ascontiguousarray(image[window.rows, window.columns])
            ((found, certainty, compute),) = self._run(
                [self.protocol.resize(pixels, *scaled)], [window.size], keep
            )
            inside = window.kept_inside
            labels[window.kept_rows, window.kept_columns] = found[inside]
            confidence[window.kept_rows, window.kept_columns] = certainty[inside]
            if compute is not None:
                scores.append(WindowScores(window, compute))
        kept = scores if keep else None
        return Segmentation(image, labels, confidence, self.label_space, kept)

    def _run(self, inputs: Sequence[UInt8Array], sizes: Sequence[Size], keep: bool) -> list[Part]:
        """Predictions of inputs (h, w, 3) of the same size, at `sizes`."""
        device = self.model.device
        batch: list[dict[str, Any]] = [
            {"image": torch.tensor(pixels).permute(2, 0, 1), "height": size[0], "width": size[1]}
            for pixels, size in zip(inputs, sizes, strict=True)
        ]
        with torch.no_grad(), autocast(self.cfg, device):
            if isinstance(self.protocol, Slide | WithTTA):
                return [self._mean(self.protocol, sample, keep) for sample in batch]
            parts: list[Part] = []
            for semantic_map, size in zip(self.model.semantic_maps(batch), sizes, strict=True):
                labels, confidence = semantic_map.classes_and_confidence(size)
                compute = semantic_map.cpu().scores if keep else None
                parts.append((labels.cpu().numpy(), confidence.cpu().numpy(), compute))
            return parts

    def _mean(self, protocol: Slide | WithTTA, sample: dict[str, Any], keep: bool) -> Part:
        """Prediction of one input under a protocol that averages scores."""
        source: Size = (int(sample["image"].shape[-2]), int(sample["image"].shape[-1]))
        size: Size = (sample["height"], sample["width"])
        confidence = torch.empty(size, device=self.model.device)
        builder = ClassMapBuilder(source, size, self.model.device, confidence)
        kept = []
        for scores in protocol.mean_scores(self.model, sample):
            builder.add(scores)
            if keep:
                kept.append(scores.cpu())
        compute = partial(torch.cat, kept, 1) if keep else None
        return builder.result.cpu().numpy(), confidence.cpu().numpy(), compute
