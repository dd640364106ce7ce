"""What a dataset is: its folders, file names, label files and classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clouds.data.label_space import CITYSCAPES_19, LabelSpace
from clouds.data.reading import LabelFile
from clouds.data.structures import Domain


@dataclass(frozen=True)
class Folders:
    """Where images and labels lie, relative to the dataset root."""

    images: str
    labels: str


@dataclass(frozen=True)
class Row:
    """One dataset.

    Attributes:
        name: what it is called in a config.
        domain: the part it plays.
        folders: where it lies; of several, the first that exists counts.
        image_suffixes: how the names of its images end.
        label_files: kinds of label files, the preferred one first. A name is taken to be of the
            first kind that it fits.
        how_to_get: where it comes from, for messages.
        classes: train ids in its label set, which are those that a mean over classes is taken
            of; empty: all that its first-hand ids have.
        label_space: the classes that its labels are read as.
        size_mismatch: what becomes of a pair whose image and label differ in size: 'error' when
            it is read, or 'skip' when the dataset is listed.
        labels_required: whether an image without label, or the reverse, is an error.
        manifest: file that says how each image was painted, relative to the dataset root; empty:
            there is none.
    """

    name: str
    domain: Domain
    folders: tuple[Folders, ...]
    image_suffixes: tuple[str, ...]
    label_files: tuple[LabelFile, ...]
    how_to_get: str
    classes: tuple[int, ...] = ()
    label_space: LabelSpace = CITYSCAPES_19
    size_mismatch: Literal["error", "skip"] = "error"
    labels_required: bool = True
    manifest: str = ""

    @property
    def classes_present(self) -> tuple[int, ...]:
        """Train ids in its label set, ascending."""
        return self.classes or self.label_files[-1].ids.classes

    def label_file(self, file_name: str) -> LabelFile:
        """The kind of label file that a file of this name is."""
        for kind in self.label_files:
            if file_name.endswith(kind.suffix):
                return kind
        expected = ", ".join(f"*{kind.suffix}" for kind in self.label_files)
        raise ValueError(f"{file_name} is no label of {self.name}; expected {expected}")
