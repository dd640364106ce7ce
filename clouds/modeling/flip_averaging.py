"""Predictions averaged over an image and its mirror image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from clouds.d2 import ImageList
from clouds.modeling.postprocessing import SemanticMap
from clouds.self_training.refiners.base import TeacherPrediction


def mirror_images(images: ImageList, size_divisibility: int) -> ImageList:
    """Each image with left and right exchanged, padded at the bottom and on the right again."""
    mirrored = [images[i].flip(-1) for i in range(len(images))]
    return ImageList.from_tensors(mirrored, size_divisibility)


def flip_averaged(
    maps: Iterable[SemanticMap], mirrored: Iterable[SemanticMap]
) -> Iterator[TeacherPrediction]:
    """Means of the predictions of images and of their mirror images, flipped back."""
    for one, other in zip(maps, mirrored, strict=True):
        yield TeacherPrediction(
            (one.scores() + other.scores().flip(-1)) / 2,
            (one.query_confidence() + other.query_confidence()) / 2,
        )
