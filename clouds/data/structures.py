"""Types that are passed between dataset, model and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from clouds.data.label_space import IGNORE

if TYPE_CHECKING:
    import torch

    from clouds.data.augmentation import ColorJitterTransform
    from clouds.data.corruption import Corruption
    from clouds.data.labels import LabelFormat


class Domain(str, Enum):
    """Role of a dataset in domain generalization."""

    SOURCE = "source"
    """Labelled training images."""
    GENERATED = "generated"
    """Training images by a text-to-image generator: trained on pseudo-labels, or, with
    MODEL.CLOUDS.GENERATED_LABELS, on labels that they were generated for."""
    TARGET = "target"
    """Evaluation images of a domain that is not seen in training."""


class Draw(IntEnum):
    """What is drawn from a sample's seed apart from its augmentations: spawn keys of the seed."""

    REPLACEMENT = 1
    """Other files, in place of a faulty one."""
    RARE_CLASS = 2
    """The class and the image of rare-class sampling."""
    RARE_CLASS_CROP = 3
    """Further crops of rare-class sampling."""
    CLASS_MIXING = 4
    """The labelled image of class mixing, its seed, and its classes."""
    MASKED_BLOCKS = 5
    """The hidden blocks of masked consistency."""


def sample_rng(seed: int, draw: Draw, number: int = 0) -> np.random.Generator:
    """Random numbers of one kind for the sample with the seed `seed`, in [0, 2**63).

    Args:
        number: tells several generators of a kind apart.
    """
    key = (int(draw), number) if number else (int(draw),)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


@dataclass(frozen=True)
class Record:
    """One image on disk, with its label if it has one.

    Attributes:
        image: the image file.
        label: the label file, in the ids of the dataset; None when there is none.
        domain: role of its dataset.
        dataset: name of its dataset.
        label_format: how to read `label`; not part of comparisons.
        manifest_size: height and width, pixels, in the manifest of generated images, if any.
        corruption: applied to the image when it is read, if any.
        approximate_label: the image was generated for its label and may differ from it.

    Raises:
        ValueError: a label without its format.
    """

    image: Path
    label: Path | None
    domain: Domain
    dataset: str
    label_format: LabelFormat | None = field(default=None, compare=False, repr=False)
    manifest_size: tuple[int, int] | None = None
    corruption: Corruption | None = None
    approximate_label: bool = False

    def __post_init__(self) -> None:
        if self.label is not None and self.label_format is None:
            raise ValueError(f"{self.image}: a record with a label needs a label_format")


class JitterInput(TypedDict, total=False):
    """Present with INPUT.COLOR_AUG_ON_DEVICE.

    color_jitter: what the model applies to `image`.
    """

    color_jitter: ColorJitterTransform


class ModelInput(JitterInput):
    """Input of the model: Detectron2's keys, and `domain` and `dataset`.

    image: uint8 (3, H, W) RGB: the augmented input of the student, or the image at the input size
        of the evaluation protocol.
    height, width: size of the image on disk, or the one that the prediction must have, pixels.
    file_name: the image file.
    domain, dataset: role and name of its dataset.
    """

    image: torch.Tensor
    height: int
    width: int
    file_name: str
    domain: Domain
    dataset: str


class TrainInput(ModelInput):
    """Training input of the model.

    seed: seed of this sample, in [0, 2**63), a function of SEED, epoch and position; all random
        numbers of this sample are drawn from it.
    """

    seed: int


class SourceSample(TrainInput):
    """Sample of a labelled source image.

    sem_seg: uint8 (H, W) train ids, 255 where a pixel does not count.
    """

    sem_seg: torch.Tensor


class PartlyLabelledSample(SourceSample):
    """Sample of a dataset that lacks a class which another dataset of the training labels.

    partly_labelled: True. Pixels of 255 may be of such a class.
    """

    partly_labelled: bool


class GeneratedSample(TrainInput):
    """Sample of a generated image without a label: teacher and refiner predict one.

    A generated image that is trained on a given label without a teacher is a `SourceSample`.

    clean_image: uint8 (3, H, W) RGB, input of teacher and refiner: the same geometry as `image`,
        without color jitter.
    """

    clean_image: torch.Tensor


class GivenLabelSample(GeneratedSample):
    """Sample of a generated image whose label is filtered by the teacher's scores.

    given_label: uint8 (H, W) train ids that the image was generated for, 255 where none.
    """

    given_label: torch.Tensor


class MixedSample(GeneratedSample):
    """Sample of a generated image with pixels of a labelled one in `image`, not in `clean_image`.

    pasted_label: uint8 (H, W) train ids of these pixels, 255 elsewhere.
    """

    pasted_label: torch.Tensor


TrainSample = SourceSample | GeneratedSample
"""Training sample; its `domain` tells which of the two it is."""


class EvalSample(ModelInput, total=False):
    """Evaluation input with the label that the prediction is scored on.

    label: uint8 (height, width) train ids, 255 where a pixel does not count; absent when the
        image has no label.
    """

    label: torch.Tensor


@dataclass(frozen=True)
class Targets:
    """Training targets of one image: a binary mask per class.

    Attributes:
        labels: int64 (K,), train ids, ascending.
        masks: bool (K, H, W), one per label.
        weights: float32 (H, W), at least 0, weight of each pixel in matching and in the mask
            losses; None: 1 everywhere. The masks have no effect at pixels of weight 0.
        no_object_weight: weight of the unmatched queries of this image in the class loss, relative
            to those of other images: one number in [0, 1], or one per pixel, float32 (H, W), of
            which a query has the mean over its mask. 0 where the image may have a class without
            a mask. It counts in the normalizer of the class loss.
        class_weight: factor of the class losses of this image's queries, matched or not: one
            number in [0, 1], or one per pixel, as `no_object_weight`. The normalizer of the class
            loss does not depend on it, so that an image of weight 0.1 adds a tenth of its loss.
        dice_weight: factor of this image's dice losses, at least 0.
    """

    labels: torch.Tensor
    masks: torch.Tensor
    weights: torch.Tensor | None = None
    no_object_weight: float | torch.Tensor = 1.0
    class_weight: float | torch.Tensor = 1.0
    dice_weight: float = 1.0

    @property
    def pixel_weights(self) -> torch.Tensor:
        """float32 (H, W), `weights`; 1 everywhere where they are None."""
        import torch

        if self.weights is not None:
            return self.weights
        return torch.ones(self.masks.shape[1:], device=self.masks.device)

    def without_empty_classes(self) -> Targets:
        """The targets without the classes that have no pixel of positive weight."""
        counting = self.masks if self.weights is None else self.masks & (self.weights > 0)
        kept = counting.flatten(1).any(1)
        return replace(self, labels=self.labels[kept], masks=self.masks[kept])

    def padded(self, height: int, width: int) -> Targets:
        """On an image that is padded at the bottom and on the right to a size in pixels.

        No mask covers the padding; its weights are 1.
        """
        from torch.nn import functional as F

        padding = (0, width - self.masks.shape[-1], 0, height - self.masks.shape[-2])
        if not any(padding):
            return self

        def pad_weight(weight: float | torch.Tensor) -> float | torch.Tensor:
            if isinstance(weight, int | float):
                return weight
            return F.pad(weight, padding, value=1.0)

        return replace(
            self,
            masks=F.pad(self.masks, padding),
            weights=None if self.weights is None else F.pad(self.weights, padding, value=1.0),
            no_object_weight=pad_weight(self.no_object_weight),
            class_weight=pad_weight(self.class_weight),
        )


def masks_from_label(
    sem_seg: torch.Tensor, ignore: int = 255, device: torch.device | None = None
) -> Targets:
    """Split a label map into binary masks (Mask2Former's targets of semantic segmentation).

    Args:
        sem_seg: (H, W), uint8 or wider integers, values 0..255.
        ignore: the value that belongs to no mask.
        device: device of the masks; None: that of `sem_seg`. The classes are counted on the device
            of `sem_seg`, so that a label on the host causes no GPU synchronization.

    Returns:
        One mask per class present; K = 0 and masks (0, H, W) when every pixel is ignored.
    """
    import torch  # takes seconds to import, and listing datasets does not need it

    assert sem_seg.ndim == 2, f"expected (H, W), got {tuple(sem_seg.shape)}"
    labels = torch.bincount(sem_seg.flatten(), minlength=256).nonzero().squeeze(1)
    labels = labels[labels != ignore]
    if device is not None:
        labels = labels.to(device, non_blocking=True)
        sem_seg = sem_seg.to(device, non_blocking=True)
    masks = sem_seg == labels.to(sem_seg.dtype)[:, None, None]
    return Targets(labels, masks)


Sample = Mapping[str, Any]
"""Input of the model, Detectron2's: `image` uint8 (3, H, W) RGB, and the further keys above."""


def is_generated(sample: Sample) -> bool:
    """Whether a sample is a generated image."""
    return sample.get("domain") == Domain.GENERATED


def needs_teacher(sample: Sample) -> bool:
    """Whether a sample is a generated image whose label depends on the teacher."""
    return is_generated(sample) and "sem_seg" not in sample


def seeds_of(batch: Sequence[Sample]) -> list[int] | None:
    """The seeds of the samples; None if they have none."""
    return [sample["seed"] for sample in batch] if "seed" in batch[0] else None


def output_size(sample: Sample) -> tuple[int, int]:
    """Height and width of the prediction of a sample; default: those of its image."""
    height, width = sample["image"].shape[-2:]
    return int(sample.get("height", height)), int(sample.get("width", width))


def pad_to(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(C, H, W), padded with 0 at the bottom and on the right where it is smaller than `size`."""
    from torch.nn import functional as F

    bottom, right = (max(0, n - m) for n, m in zip(size, image.shape[-2:], strict=True))
    return F.pad(image, (0, right, 0, bottom)) if bottom or right else image


def labelled_targets(sample: Sample, unlabeled_classes: str, device: torch.device) -> Targets:
    """Targets of a labelled image, on `device`.

    Args:
        sample: has `image` (3, H, W) and `sem_seg` (H, W).
        unlabeled_classes: of a partly labelled image: 'ignore': unmatched queries count by the
            labelled pixels of their masks; 'absent': they count as everywhere.
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


def class_map(labels: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """uint8 (H, W) train ids of masks (K, H, W), 255 outside of all; the last where they overlap.

    `labels` are the train ids (K,).
    """
    import torch

    classes = masks.new_full(masks.shape[1:], IGNORE, dtype=torch.uint8)
    for label, mask in zip(labels.tolist(), masks, strict=True):
        classes[mask] = label
    return classes


def check_image(image: torch.Tensor) -> None:
    """Check the type, shape and range of an image that the model is given.

    The values of a uint8 image are not read. Those of a floating-point image are, on its device:
    one on the scale 0 to 1, or normalized already, would only give wrong classes.

    Args:
        image: (3, H, W) RGB, not empty; uint8, or floating point from 0 to 255.

    Raises:
        TypeError: it is no tensor, or one of another type.
        ValueError: its shape or its values are others.
    """
    import torch

    if not isinstance(image, torch.Tensor):
        raise TypeError(
            f"an image is a {type(image).__name__}; the model takes torch tensors (3, H, W). "
            "Convert a NumPy array (H, W, 3) by torch.from_numpy(array).permute(2, 0, 1)."
        )
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(
            f"an image has the shape {tuple(image.shape)}; the model takes (3, H, W) RGB, not "
            "empty. Repeat a gray channel 3 times, drop alpha, and permute (H, W, 3) by (2, 0, 1)."
        )
    if image.dtype == torch.uint8:
        return
    if not image.is_floating_point():
        raise TypeError(
            f"an image has the type {image.dtype}; allowed are uint8, and floating point from 0 to "
            "255. Convert it by image.to(torch.uint8) if its values are 0..255."
        )
    low, high = (float(value) for value in image.aminmax())  # nan if one value is nan
    if not 0 <= low <= high <= 255:
        raise ValueError(
            f"a floating-point image has values from {low:.6g} to {high:.6g}; allowed are finite "
            "values from 0 to 255. The model normalizes images itself: give the pixels, clamped."
        )
    if 0 < high <= 1:
        raise ValueError(
            f"a floating-point image has values from {low:.6g} to {high:.6g}, which is the scale 0 "
            "to 1; the model takes 0 to 255. Multiply it by 255."
        )


def union_of_masks(masks: torch.Tensor) -> torch.Tensor:
    """bool (H, W), the union of masks, bool (K, H, W)."""
    # On a CPU mask after mask is several times faster than one reduction over all.
    union = masks.new_zeros(masks.shape[1:])
    for mask in masks:
        union |= mask
    return union
