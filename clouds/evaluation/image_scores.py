"""Scores of single images, beside those of a whole dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch

from clouds.evaluation.confusion import ConfusionMatrix


@dataclass(frozen=True)
class ImageScore:
    """Scores of one image, in percent; nan if no pixel of it counts.

    Attributes:
        file: image file; in results relative to the folder that all images of the dataset share,
            so that runs on different machines name it alike.
        miou: mean IoU over the scored classes that are labeled in the image.
        pixel_accuracy: fraction of the counted pixels that is predicted correctly.
    """

    file: str
    miou: float
    pixel_accuracy: float

    @classmethod
    def from_confusion(
        cls, file: str, confusion: ConfusionMatrix, classes: Sequence[int]
    ) -> ImageScore:
        """Compute the scores from the counts of one image.

        Args:
            classes: train ids of the scored classes; those without a labeled pixel do not count.
        """
        counts = ConfusionMatrix(confusion.num_classes, confusion.ignore)
        counts.counts = confusion.counts.cpu()
        labeled = torch.nonzero(counts.counts.sum(1)).flatten().tolist()
        scored = [train_id for train_id in classes if train_id in labeled]
        return cls(file, 100 * counts.mean_iou(scored), 100 * counts.pixel_accuracy())


def relative_names(paths: Sequence[Path]) -> dict[str, str]:
    """Each path as text -> its name relative to the folder that all of them share, with '/'."""
    parts = {str(path): path.absolute().parts for path in paths}
    levels = zip(*(names[:-1] for names in parts.values()), strict=False)
    shared = len(list(takewhile(lambda names: len(set(names)) == 1, levels)))
    return {path: "/".join(names[shared:]) for path, names in parts.items()}


def in_order(
    names: Mapping[str, str], parts: Sequence[Sequence[ImageScore]]
) -> tuple[ImageScore, ...]:
    """The scores of all processes, renamed by `names` and in its order."""
    found = {score.file: score for part in parts for score in part}
    return tuple(
        ImageScore(name, found[path].miou, found[path].pixel_accuracy)
        for path, name in names.items()
    )
