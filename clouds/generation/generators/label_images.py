"""Labels as images that a ControlNet takes: one-hot, or in the colors of a palette."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from clouds.data.datasets.builtin import CLASSES_NAME
from clouds.data.label_space import LabelSpace, read_classes
from clouds.data.yaml_section import parse, read_text
from clouds.generation.ade20k import ade20k_colors

logger = logging.getLogger(__name__)

COLORS = ("ade20k", "dataset")


def one_hot(labels: Sequence[npt.NDArray[np.uint8]], num_classes: int) -> torch.Tensor:
    """float32 (N, num_classes + 1, H, W) of labels (H, W); the last channel is that of no class."""
    ids = torch.from_numpy(np.stack(labels)).long()
    ids[ids >= num_classes] = num_classes
    channels = torch.nn.functional.one_hot(ids, num_classes + 1)
    return channels.permute(0, 3, 1, 2).float().contiguous()


def trained_classes(folder: Path) -> tuple[str, ...]:
    """Classes of a ControlNet of tools/train_controlnet.py, from its file CLASSES_NAME.

    Empty without such a file.

    Raises:
        DescriptionError: the file is not valid.
    """
    path = folder / CLASSES_NAME
    if not path.is_file():
        return ()
    return read_classes(parse(read_text(path), str(path)), str(path)).label_space.names


class LabelImages:
    """Makes the input of one ControlNet from labels.

    Args:
        controlnet: with `conditioning_channels` other than 3 it takes one-hot labels, else colors.
        colors: of `COLORS`: ADE20K's color map, or the colors of the label space.
        classes: names of the classes that it was trained on, see `trained_classes`; empty: unknown.

    Raises:
        ValueError: other colors.
    """

    def __init__(
        self, controlnet: Any, colors: str = "ade20k", classes: Sequence[str] = ()
    ) -> None:
        if colors not in COLORS:
            raise ValueError(f"--control-colors is {colors!r}; allowed are {', '.join(COLORS)}")
        config = controlnet.config
        channels = int(config.get("conditioning_channels") or 3)
        self.colors = colors
        self.num_channels = channels
        self.classes = tuple(classes)

    @property
    def name(self) -> str:
        """'one-hot', or the colors."""
        return self.colors if self.num_channels == 3 else "one-hot"

    def check(self, label_space: LabelSpace) -> None:
        """Raise ValueError if the ControlNet was trained on other classes; log missing colors."""
        if self.num_channels != 3:
            if self.num_channels != label_space.num_classes + 1:
                raise ValueError(
                    f"--controlnet takes one-hot labels of {self.num_channels - 1} classes, and "
                    f"the label space {label_space.name} of --condition has "
                    f"{label_space.num_classes}; use a ControlNet that was trained on it "
                    "(tools/train_controlnet.py), or one that takes colors"
                )
            if self.classes and self.classes != label_space.names:
                raise ValueError(
                    f"--controlnet was trained on the classes {', '.join(self.classes)}, and those "
                    f"of --condition are {', '.join(label_space.names)}"
                )
        elif self.colors == "ade20k" and (missing := ade20k_colors(label_space)[1]):
            logger.warning("no class of ADE20K is like %s; they are black", ", ".join(missing))

    def __call__(
        self, labels: Sequence[npt.NDArray[np.uint8]], label_space: LabelSpace
    ) -> torch.Tensor | list[Image.Image]:
        """What a pipeline of diffusers takes, for labels, uint8 (H, W) train ids.

        One-hot labels (N, C, H, W), or images; as tensors, some pipelines would not normalize them.
        """
        if self.num_channels != 3:
            return one_hot(labels, label_space.num_classes)
        if self.colors == "ade20k":
            table = ade20k_colors(label_space)[0]
            return [Image.fromarray(table[label]) for label in labels]
        return [Image.fromarray(label_space.colorize(label)) for label in labels]
