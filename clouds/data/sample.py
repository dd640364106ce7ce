"""The types that travel from the files on disk to the model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TypedDict

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
    """

    image: Path
    label: Path | None
    domain: Domain
    dataset: str


class TrainSample(TypedDict):
    """What the model gets of one picture in training; Detectron2's keys and four of our own.

    image: uint8 (3, H, W) RGB.
    sem_seg: uint8 (H, W) train ids, 255 where a pixel does not count.
    height, width: size of the picture on disk, pixels.
    file_name: that picture.
    domain, dataset: where it comes from.
    seed: this visit's own seed, in [0, 2**63), a function of SEED, epoch and index; whatever is
        drawn at random for this sample is drawn from it.
    """

    image: torch.Tensor
    sem_seg: torch.Tensor
    height: int
    width: int
    file_name: str
    domain: Domain
    dataset: str
    seed: int


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
