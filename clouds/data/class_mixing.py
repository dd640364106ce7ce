"""Class mixing: classes of a labelled image pasted onto a generated one, image and label.

Tranheden et al., DACS: Domain Adaptation via Cross-domain Mixed Sampling, WACV 2021; Olsson et al.,
ClassMix: Segmentation-Based Data Augmentation for Semi-Supervised Learning, WACV 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch

from clouds.data.label_space import IGNORE
from clouds.data.structures import (
    Draw,
    GeneratedSample,
    MixedSample,
    Record,
    SourceSample,
    Targets,
    sample_rng,
)


def draw_source(sources: Sequence[Record], seed: int) -> tuple[Record, int]:
    """The labelled image that is mixed into the generated sample with this seed, and its seed."""
    rng = sample_rng(seed, Draw.CLASS_MIXING)
    return sources[int(rng.integers(len(sources)))], int(rng.integers(2**63))


def mix_classes(sample: GeneratedSample, source: SourceSample) -> MixedSample:
    """The generated sample with half of the source's classes, rounded up, in the student's view.

    Where the augmented source is smaller than the generated image it is laid on a random place of
    it; where it is larger its right and lower part is left out. Ignored pixels are not pasted.
    Classes and place are drawn from the generated sample's seed.
    """
    sizes = zip(sample["image"].shape[1:], source["sem_seg"].shape, strict=True)
    height, width = (min(pair) for pair in sizes)
    label = source["sem_seg"][:height, :width]
    classes = torch.bincount(label.flatten(), minlength=256)[:IGNORE].nonzero()[:, 0]
    rng = sample_rng(sample["seed"], Draw.CLASS_MIXING, 1)
    chosen = rng.choice(len(classes), (len(classes) + 1) // 2, replace=False)
    is_pasted = torch.isin(label, classes[chosen])
    image = sample["image"].clone()
    top, left = (
        int(rng.integers(whole - part + 1))
        for whole, part in zip(image.shape[1:], (height, width), strict=True)
    )
    rows, columns = slice(top, top + height), slice(left, left + width)
    window = image[:, rows, columns]
    window.copy_(torch.where(is_pasted, source["image"][:, :height, :width], window))
    pasted_label = label.new_full(image.shape[1:], IGNORE)
    pasted_label[rows, columns] = label.masked_fill(~is_pasted, IGNORE)
    return cast("MixedSample", {**sample, "image": image, "pasted_label": pasted_label})


def mix_targets(targets: Targets, pasted_label: torch.Tensor) -> Targets:
    """Targets of a mixed image: where something is pasted, its label with weight 1.

    Args:
        targets: of the whole generated image, (H, W).
        pasted_label: uint8 (H, W) train ids, 255 where the generated image is seen.
    """
    label = pasted_label.to(targets.masks.device)
    pasted = label != IGNORE
    is_there = torch.bincount(label.flatten(), minlength=256)[:IGNORE] > 0
    is_there[targets.labels] = True
    labels = is_there.nonzero()[:, 0]
    masks = label == labels.to(label.dtype)[:, None, None]
    index = torch.searchsorted(labels, targets.labels)
    masks[index] |= targets.masks & ~pasted
    weights = targets.weights
    mixed = replace(
        targets,
        labels=labels,
        masks=masks,
        weights=None if weights is None else weights.masked_fill(pasted, 1.0),
        no_object_weight=_with_1(targets.no_object_weight, pasted),
        class_weight=_with_1(targets.class_weight, pasted),
    )
    return mixed.without_empty_classes()


def _with_1(weight: float | torch.Tensor, pasted: torch.Tensor) -> float | torch.Tensor:
    """A weight, or one per pixel, with 1 where something is pasted."""
    if isinstance(weight, torch.Tensor):
        return weight.masked_fill(pasted, 1.0)
    if weight == 1:
        return weight
    return torch.full(pasted.shape, weight, device=pasted.device).masked_fill(pasted, 1.0)
