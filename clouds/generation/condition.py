"""Labels that images are generated for: those of a labelled dataset, at the size of the images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from clouds.data.datasets import DatasetSpec
from clouds.data.label_space import LabelSpace

UInt8Array = npt.NDArray[np.uint8]

MAX_NAMED_CLASSES = 12
"""Classes that a prompt names at most, those with the most pixels: CLIP reads 77 tokens."""
MIN_NAMED_SHARE = 0.002
"""Share of the pixels from which a class is named in the prompt."""


@dataclass(frozen=True)
class Window:
    """A part of an image, pixels, and the size (height, width) that it is resized to."""

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]

    def apply(self, pixels: UInt8Array, interpolation: int = cv2.INTER_NEAREST) -> UInt8Array:
        """The part of (H, W) or (H, W, 3) pixels, resized."""
        part = pixels[self.top : self.top + self.height, self.left : self.left + self.width]
        resized = cv2.resize(part, self.size[::-1], interpolation=interpolation)
        return np.asarray(resized, np.uint8)


@dataclass(frozen=True)
class Condition:
    """A label that an image is generated for.

    Attributes:
        label: (H, W) uint8 train ids of the dataset's label space, 255 where no class is given.
        file: its file.
        image: the image that it is the label of.
        window: the part of both files that `label` is of.
    """

    label: UInt8Array
    file: Path
    image: Path
    window: Window

    def prompt(self, scene: str, label_space: LabelSpace) -> str:
        """The prompt: a scene, and the classes that the label has, by their first words."""
        pixels = np.bincount(self.label.ravel(), minlength=256)[: label_space.num_classes]
        order = np.argsort(-pixels, kind="stable")[:MAX_NAMED_CLASSES]
        present = [i for i in order if pixels[i] >= MIN_NAMED_SHARE * self.label.size]
        words = [label_space.synonyms[i][0] for i in present or order[:1]]
        return f"{scene}, with {', '.join(words)}"


class LabelConditions:
    """The labels of a dataset in random order, one per image, repeated as often as needed.

    Args:
        dataset: with the train ids of its own label space.
        size: (height, width) of the images, pixels.
        seed: of the order and of the windows.

    Raises:
        ValueError: no image of the dataset has a label.
    """

    def __init__(self, dataset: DatasetSpec, size: tuple[int, int], seed: int = 0) -> None:
        self.dataset, self.size, self.seed = dataset, size, seed
        self._records = [record for record in dataset.records() if record.label is not None]
        if not self._records:
            raise ValueError(
                f"--condition is {dataset.name}, whose images have no labels; name a labelled "
                "dataset, such as gta5"
            )

    @property
    def label_space(self) -> LabelSpace:
        return self.dataset.label_space

    @property
    def settings(self) -> dict[str, object]:
        """What the labels are a function of, besides size and seed, as JSON values."""
        return {"condition": self.dataset.name, "condition_labels": len(self._records)}

    def __getitem__(self, number: int) -> Condition:
        """The label of an image, a function of the dataset, the size, the seed and the number.

        Raises:
            FileNotFoundError: its file does not exist.
            ValueError: the file is broken, or no pixel has a class.
        """
        repetition, position = divmod(number, len(self._records))
        order = np.random.default_rng((self.seed, repetition)).permutation(len(self._records))
        record = self._records[order[position]]
        assert record.label is not None
        label = self.dataset.read_label(record)
        window = _draw_window(np.random.default_rng((self.seed, number, 1)), label.shape, self.size)
        part = window.apply(label)
        if (part == self.label_space.ignore).all():
            raise ValueError(
                f"{record.label}: no pixel has a class in the part that image {number} is to be "
                "generated for. Remove this label and its image from the dataset, or name another "
                "dataset with --condition."
            )
        return Condition(part, record.label, record.image, window)


def _draw_window(rng: np.random.Generator, shape: tuple[int, ...], size: tuple[int, int]) -> Window:
    """The largest window of the shape of `size` in a label of `shape`, at a random position."""
    scale = min(shape[0] / size[0], shape[1] / size[1])
    height, width = (max(1, min(shape[i], round(scale * size[i]))) for i in (0, 1))
    top = int(rng.integers(shape[0] - height + 1))
    left = int(rng.integers(shape[1] - width + 1))
    return Window(top, left, height, width, size)
