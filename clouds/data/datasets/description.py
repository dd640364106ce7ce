"""Description of a dataset: its folders, file names, label formats and classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clouds.data.label_space import CITYSCAPES_19, LabelSpace
from clouds.data.labels import LabelFormat
from clouds.data.structures import Domain


@dataclass(frozen=True)
class Folders:
    """Folders of images and labels, relative to the dataset root."""

    images: str
    labels: str


@dataclass(frozen=True)
class DatasetDescription:
    """One dataset.

    Attributes:
        name: name in a config.
        domain: role of the dataset.
        folders: its folders; of several alternatives, the first that exists is used.
        image_suffixes: ends of the names of its image files.
        label_formats: formats of its label files. Where an image has labels in several formats,
            the first one is used; a file name that fits several suffixes has the first format.
        how_to_get: where it is available, for messages.
        label_space: the classes that its ids are mapped to.
        classes: train ids in its label set, which a mean over classes is taken of; empty: all
            that its last (original) label format has.
        size_mismatch: what to do with a pair whose image and label differ in size: 'error' when
            it is read, or 'skip' when the dataset is listed.
        labels_required: whether an image without label, or a label without image, is an error.
        manifest: manifest of generated images, relative to the dataset root; empty: there is
            none.
        report_mean_over_classes: report an additional mean over `classes` in evaluations that train
            or test on it.
    """

    name: str
    domain: Domain
    folders: tuple[Folders, ...]
    image_suffixes: tuple[str, ...]
    label_formats: tuple[LabelFormat, ...]
    how_to_get: str
    label_space: LabelSpace = CITYSCAPES_19
    classes: tuple[int, ...] = ()
    size_mismatch: Literal["error", "skip"] = "error"
    labels_required: bool = True
    manifest: str = ""
    report_mean_over_classes: bool = False

    @property
    def classes_present(self) -> tuple[int, ...]:
        """Train ids in its label set, ascending."""
        return self.classes or self.label_formats[-1].ids.classes
