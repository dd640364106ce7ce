"""The types that travel from the files on disk to the model and its losses."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch


class Domain(str, Enum):
    """What part a picture plays in domain generalization."""

    SOURCE = "source"
    """Labelled, to train on."""
    GENERATED = "generated"
    """Painted by a generator, without labels, to train on with pseudo-labels."""
    TARGET = "target"
    """Never seen in training, to score on."""


@dataclass(frozen=True)
class Record:
    """One picture on disk.

    Attributes:
        image: its file.
        label: the file of its label map, in the dataset's own ids (`DatasetSpec.read_label`
            turns them into train ids); None when there is none.
        domain: the part it plays.
        dataset: name of the dataset that it belongs to.
        painted_size: height and width in pixels that a manifest says the image has; None when
            none does.
    """

    image: Path
    label: Path | None
    domain: Domain
    dataset: str
    painted_size: tuple[int, int] | None = None


class TrainInput(TypedDict):
    """What the model gets of any picture in training; Detectron2's keys and three of our own.

    image: uint8 (3, H, W) RGB, what the student sees.
    height, width: size of the picture on disk, pixels.
    file_name: that picture.
    domain, dataset: where it comes from.
    seed: this visit's own seed, in [0, 2**63), a function of SEED, epoch and the place in it;
        whatever is drawn at random for this sample is drawn from it.
    """

    image: torch.Tensor
    height: int
    width: int
    file_name: str
    domain: Domain
    dataset: str
    seed: int


class SourceSample(TrainInput):
    """A labelled one.

    sem_seg: uint8 (H, W) train ids, 255 where a pixel does not count.
    """

    sem_seg: torch.Tensor


class GeneratedSample(TrainInput):
    """A painted one, which has no label; teacher and refiner give it one.

    clean_image: uint8 (3, H, W) RGB, what they see: the geometry of `image`, the colors of the
        file. A picture has two clean views, as painted and flipped.
    flipped: whether this is the flipped one.
    """

    clean_image: torch.Tensor
    flipped: bool


TrainSample = SourceSample | GeneratedSample
"""What the model gets of one picture in training; its `domain` says which."""


class EvalInput(TypedDict):
    """What the model gets of one picture in evaluation.

    image: uint8 (3, H, W) RGB, at the size that the protocol feeds.
    height, width: size that the prediction must have, pixels.
    file_name: the picture.
    domain, dataset: where it comes from.
    """

    image: torch.Tensor
    height: int
    width: int
    file_name: str
    domain: Domain
    dataset: str


class EvalSample(EvalInput, total=False):
    """That, and the label to score the prediction on.

    label: uint8 (height, width) train ids, 255 where a pixel does not count; left out when the
        picture has no label.
    """

    label: torch.Tensor


@dataclass(frozen=True)
class Targets:
    """The classes in one image.

    Attributes:
        labels: int64 (K,), train ids, ascending.
        masks: bool (K, H, W), where each of them is.
        weights: float32 (H, W) in [0, 1], how much each pixel counts in matching and in the mask
            losses; None: all of them fully. What masks say of a pixel of weight 0 has no effect.
        void: how much the image's unmatched queries count in the class loss, relative to those
            of other images; 0 where a class that has no mask may still be there.
    """

    labels: torch.Tensor
    masks: torch.Tensor
    weights: torch.Tensor | None = None
    void: float = 1.0


def masks_from_label(
    sem_seg: torch.Tensor, ignore: int = 255, device: torch.device | None = None
) -> Targets:
    """Split a label map into binary masks (Mask2Former's targets of semantic segmentation).

    Args:
        sem_seg: (H, W), uint8 or wider integers, values 0..255.
        ignore: the value that is in no mask.
        device: where the masks are wanted; None: where `sem_seg` is. Which classes there are is
            found where `sem_seg` is, so that from a label on the host nothing waits for a GPU.

    Returns:
        One mask per class present; K = 0 and masks (0, H, W) when every pixel is ignored.
    """
    import torch  # takes seconds, and naming datasets does not need it

    assert sem_seg.ndim == 2, f"expected (H, W), got {tuple(sem_seg.shape)}"
    labels = torch.bincount(sem_seg.flatten(), minlength=256).nonzero().squeeze(1)
    labels = labels[labels != ignore]
    if device is not None:
        labels = labels.to(device, non_blocking=True)
        sem_seg = sem_seg.to(device, non_blocking=True)
    masks = sem_seg == labels.to(sem_seg.dtype)[:, None, None]
    return Targets(labels, masks)
