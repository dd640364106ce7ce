"""A model with known predictions: for each pixel, the class whose color is nearest to the pixel's.

The prediction for `to_image(class_map)` is therefore `class_map`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

# train id -> Cityscapes label id, from the table in cityscapesscripts
LABEL_IDS = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33])

# far apart in RGB, so that only interpolated pixels between two classes are predicted wrongly
COLORS = np.array(
    [[80 * (i // 9) + 20, 90 * (i // 3 % 3) + 20, 90 * (i % 3) + 20] for i in range(19)], np.uint8
)


class ColorModel(nn.Module):
    """Classes 0..num_classes - 1; `inputs` has the samples of all calls."""

    def __init__(self, num_classes=19):
        super().__init__()
        self.colors = nn.Parameter(torch.from_numpy(COLORS[:num_classes].astype(np.float32)))
        self.dropout = nn.Dropout()
        self.inputs = []

    def scores(self, image):
        return -(image.float()[None] - self.colors[:, :, None, None]).abs().sum(1)

    def forward(self, batch):
        assert not self.training and not self.dropout.training
        self.inputs += batch
        return [
            {
                "sem_seg": F.interpolate(
                    self.scores(sample["image"])[None],
                    (sample["height"], sample["width"]),
                    mode="bilinear",
                    align_corners=False,
                )[0]
            }
            for sample in batch
        ]

    def segment(self, batch):
        return [out["sem_seg"].argmax(0).to(torch.uint8) for out in self(batch)]

    def semantic_maps(self, batch):
        return iter([SemanticMap(self, sample) for sample in batch])


class SemanticMap:
    """The prediction of a ColorModel for a sample: confidence is the softmax of scores / 50."""

    def __init__(self, model, sample):
        self.model, self.sample = model, sample

    def classes_and_confidence(self, size):
        sample = {**self.sample, "height": size[0], "width": size[1]}
        best = (self.model([sample])[0]["sem_seg"] / 50).softmax(0).max(0)
        return best.indices.to(torch.uint8), best.values


def confidence_of_classes(num_classes=19):
    """The confidence of pixels that have the color of a class, rounded to 16 bits, (C,)."""
    colors = COLORS[:num_classes].astype(np.float64)
    weights = np.exp(-np.abs(colors[:, None] - colors[None]).sum(-1) / 50)
    return np.rint(65535 * weights.max(1) / weights.sum(1)) / 65535


def blocks(seed, size=(24, 32), cell=4, classes=range(19)):
    """A class map (H, W) of square cells with random classes."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice(np.array(list(classes), np.uint8), (size[0] // cell, size[1] // cell))
    return coarse.repeat(cell, 0).repeat(cell, 1)


def to_image(class_map):
    """(H, W) train ids -> (H, W, 3) RGB, the image that is predicted as this class map."""
    return COLORS[class_map]


def write_cityscapes(root: Path, pairs, split="val"):
    """Write (prediction, label) pairs of train-id maps as a Cityscapes split.

    The image is the one that is predicted as `prediction`. 255 in a label becomes an ignored id.
    """
    for i, (prediction, label) in enumerate(pairs):
        stem = f"{split}/ulm/ulm_{i:06}_000019"
        raw = np.where(label == 255, 4, LABEL_IDS[np.minimum(label, 18)]).astype(np.uint8)
        image = root / f"cityscapes/leftImg8bit/{stem}_leftImg8bit.png"
        ids = root / f"cityscapes/gtFine/{stem}_gtFine_labelIds.png"
        for path, array in ((image, to_image(prediction)), (ids, raw)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)


def random_pairs(count, size=(24, 32)):
    """(prediction, label) pairs; about half of the pixels agree, four rows are ignored."""
    pairs = []
    for i in range(count):
        label = blocks(100 + i, size)
        prediction = np.where(blocks(200 + i, size) < 9, label, blocks(300 + i, size))
        label[:4] = 255
        pairs.append((prediction, label))
    return pairs
