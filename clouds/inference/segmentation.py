"""The prediction for one image, and its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clouds.data.label_space import LabelSpace
from clouds.files import atomic_write, expand_user
from clouds.inference.windows import Window
from clouds.visualizer import legend_of, overlay, present_ids, with_legend

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]

KINDS = ("color", "overlay", "labels", "confidence")
"""Images of a prediction; the end of the names of their files."""

BRAVO_KINDS = {"pred": "labels", "conf": "confidence"}
"""Names of two of `KINDS` in submissions to the BRAVO challenge."""

CONFIDENCE_SCALE = 65535
"""Gray value of confidence 1 in 16-bit images."""


@dataclass(frozen=True)
class WindowScores:
    """Scores of a window; `compute` gives them, float32 (C, h, w), at the model's input size."""

    window: Window
    compute: Callable[[], Tensor]


class Segmentation:
    """The prediction for one image of H x W pixels.

    Attributes:
        image: uint8 (H, W, 3) RGB.
        labels: uint8 (H, W), train ids: the class of the largest score of each pixel.
        confidence: float32 (H, W) in [0, 1], the largest score's share in the sum of all scores,
            or that score itself where the sum is below 1.
        label_space: names and colors of the train ids.
    """

    def __init__(
        self,
        image: UInt8Array,
        labels: UInt8Array,
        confidence: Float32Array,
        label_space: LabelSpace,
        window_scores: Sequence[WindowScores] | None,
    ) -> None:
        self.image = image
        self.labels = labels
        self.confidence = confidence
        self.label_space = label_space
        self._window_scores = window_scores

    def __repr__(self) -> str:
        height, width = self.labels.shape
        names = [entry.name for entry in legend_of(self.label_space, present_ids([self.labels]))]
        return f"Segmentation({height}x{width} pixels: {', '.join(names)})"

    @property
    def scores(self) -> Float32Array:
        """Scores of all classes, float32 (C, H, W), C * H * W * 4 bytes.

        Computed at each access, from the queries' masks at a quarter of the input's resolution and
        their classes, which take less memory. `labels` is their argmax up to rounding.

        Raises:
            ValueError: they were not kept.
        """
        if self._window_scores is None:
            raise ValueError(
                "the scores were not kept: the segmenter was called with keep_scores=False"
            )
        shape = (self.label_space.num_classes, *self.labels.shape)
        scores = torch.empty(shape, dtype=torch.float32)
        for part in self._window_scores:
            window = part.window
            found = part.compute()[None].float().cpu()
            if found.shape[-2:] != window.size:
                found = F.interpolate(found, window.size, mode="bilinear", align_corners=False)
            rows, columns = window.kept_inside
            scores[:, window.kept_rows, window.kept_columns] = found[0][:, rows, columns]
        return np.asarray(scores.numpy(), np.float32)

    def color_map(self) -> Image.Image:
        """The labels in the colors of the label space, H x W pixels, RGB."""
        return Image.fromarray(self.label_space.colorize(self.labels))

    def overlay(self, alpha: float = 0.5, legend: Sequence[int] | None = None) -> Image.Image:
        """The image blended with the color map, above a legend.

        Args:
            alpha: weight of the colors, in [0, 1].
            legend: train ids to list; None: those in the prediction; (): no legend.

        Returns:
            RGB. The upper left H x W pixels are the image; one narrower than the legend needs is
            padded with white.

        Raises:
            ValueError: `alpha` is not in [0, 1].
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}; allowed is 0 (image alone) to 1 (colors alone).")
        blended = overlay(self.image, self.labels, self.label_space, alpha)
        ids = present_ids([self.labels]) if legend is None else legend
        return Image.fromarray(with_legend(blended, legend_of(self.label_space, ids)))

    def to_image(self, kind: str) -> Image.Image:
        """An image of one of KINDS, or BRAVO_KINDS.

        Labels are gray values, the train ids; confidence is 16-bit gray, 65535 for 1.

        Raises:
            ValueError: another kind.
        """
        kind = BRAVO_KINDS.get(kind, kind)
        if kind == "color":
            return self.color_map()
        if kind == "overlay":
            return self.overlay()
        if kind == "labels":
            return Image.fromarray(self.labels)
        if kind == "confidence":
            scaled = np.rint(self.confidence * np.float32(CONFIDENCE_SCALE))
            return Image.fromarray(scaled.astype(np.uint16))
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(KINDS)}.")

    def save(self, path: str | Path, kind: str | None = None) -> None:
        """Write an image; a file with that name is replaced. Its folder is created.

        Args:
            path: a .png file; an overlay also as .jpg.
            kind: one of KINDS or BRAVO_KINDS; None: the one of KINDS that the name ends with before
                its suffix, as in `street_labels.png`, otherwise the overlay.

        Raises:
            ValueError: another kind, or another suffix.
        """
        path = expand_user(path)
        if kind is None:
            kind = path.stem.rpartition("_")[2]
            kind = kind if kind in KINDS else "overlay"
        formats = {".png": "PNG"} | ({".jpg": "JPEG", ".jpeg": "JPEG"} if kind == "overlay" else {})
        format_ = formats.get(path.suffix.lower())
        if format_ is None:
            raise ValueError(
                f"{path}: '{path.suffix}' is no suffix for the {kind} image; allowed are "
                f"{', '.join(formats)} (JPEG would change labels and colors)."
            )
        output = self.to_image(kind)
        options = {"quality": 92} if format_ == "JPEG" else {"compress_level": 3}
        with atomic_write(path, fsync=False) as file:
            output.save(file, format_, **options)
