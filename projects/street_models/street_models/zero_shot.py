"""Zero-shot classification of object crops, as the text classifier of CLOUDS names the classes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clouds.data.label_space import CITYSCAPES_19
from clouds.modeling.backbone.open_clip_models import PIXEL_MEAN, PIXEL_STD
from clouds.modeling.crop_classifier import CropClassifier
from street_models.crops import MIN_PIXELS, object_window, resized
from street_models.scenes import UInt8Array

MODEL_NAME = "street_clip"
"""open_clip's name of the model."""


@dataclass(frozen=True)
class ObjectCrops:
    """Crops around single objects.

    Attributes:
        images: (N, SIZE, SIZE, 3) uint8 RGB.
        classes: (N,) train ids.
    """

    images: UInt8Array
    classes: npt.NDArray[np.intp]

    @staticmethod
    def of(scenes: Iterable[tuple[UInt8Array, UInt8Array, UInt8Array]], seed: int) -> ObjectCrops:
        """One crop per scene and class, of images, labels and instances of scenes.

        Classes whose largest object or region has less than `MIN_PIXELS` pixels are left out.
        """
        images, classes = [], []
        for number, (image, label, instances) in enumerate(scenes):
            for class_id in range(CITYSCAPES_19.num_classes):
                sizes = np.bincount(instances[label == class_id], minlength=1)
                if sizes.max() < MIN_PIXELS:
                    continue
                rng = np.random.default_rng((seed, number, class_id))
                window = object_window(rng, label, instances, class_id, jitter=0.0)
                images.append(resized(window.of(image)))
                classes.append(class_id)
        return ObjectCrops(np.stack(images), np.array(classes))


def normalized(images: UInt8Array) -> Tensor:
    """Images (N, H, W, 3) uint8 as CLIP's input (N, 3, H, W), channels last in memory."""
    x = torch.from_numpy(images).float()
    x = (x - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    return x.permute(0, 3, 1, 2)


def classify(clip_model: nn.Module, images: UInt8Array) -> npt.NDArray[np.intp]:
    """The most similar of the 19 classes for each crop (N, SIZE, SIZE, 3).

    Prompt templates and words of the classes are those of `clouds.modeling.text_classifier`; the
    score of a class is the maximum over its words.
    """
    model = copy.deepcopy(clip_model).to(memory_format=torch.channels_last)
    classifier = CropClassifier(model, MODEL_NAME, CITYSCAPES_19.synonyms)
    predictions: npt.NDArray[np.intp] = classifier.classify(normalized(images)).argmax(-1).numpy()
    return predictions


def confusion(classes: npt.NDArray[np.intp], predictions: npt.NDArray[np.intp]) -> Tensor:
    """(19, 19) counts: row true class, column predicted class."""
    count = CITYSCAPES_19.num_classes
    table = np.bincount(count * classes + predictions, minlength=count * count)
    return torch.from_numpy(table.reshape(count, count))


def mean_accuracy(table: Tensor) -> float:
    """Mean over the classes that occur of the share of their crops that is right, percent."""
    totals = table.sum(1)
    present = totals > 0
    return float(100 * (table.diagonal()[present] / totals[present]).mean())
