"""Targets of the samples of a batch, and of the parts of one whose gradients are accumulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from clouds.data.label_space import IGNORE
from clouds.data.structures import Domain, Targets, masks_from_label, union_of_masks
from clouds.modeling.criterion import Normalizers

Sample = Mapping[str, Any]
"""Detectron2's input: `image` uint8 (3, H, W) RGB, and the further keys of
`clouds.data.structures`."""


@dataclass(frozen=True)
class BatchPart:
    """What the losses of a part of a batch are computed from, beside its samples.

    The losses of all parts, with the normalizers of the whole batch, add up to those of the batch.

    Attributes:
        targets: one per sample of the part.
        normalizers: of the whole batch.
    """

    targets: Sequence[Targets]
    normalizers: Normalizers


def is_generated(sample: Sample) -> bool:
    """Whether a sample is a generated image."""
    return sample.get("domain") == Domain.GENERATED


def labelled_targets(sample: Sample, unlabeled_classes: str, device: torch.device) -> Targets:
    """Targets of a labelled image, on `device`.

    Args:
        sample: has `image` (3, H, W) and `sem_seg` (H, W).
        unlabeled_classes: 'ignore' or 'absent', see `CLOUDS`.
        device: of the targets.

    Raises:
        ValueError: image and label differ in size.
    """
    label = sample["sem_seg"]
    if label.shape != sample["image"].shape[-2:]:
        raise ValueError(
            f"{sample.get('file_name', 'a sample')}: its label is {tuple(label.shape)}, its "
            f"image {tuple(sample['image'].shape[-2:])}; they must have the same size"
        )
    targets = masks_from_label(label, IGNORE, device)
    if unlabeled_classes == "absent" or not sample.get("partly_labelled", False):
        return targets
    return replace(targets, no_object_weight=union_of_masks(targets.masks).float())
