"""Datasets by name: their records, and their entries in Detectron2's catalogs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clouds.data import reading
from clouds.data.datasets.builtin import (
    GENERATED_PREFIX,
    GENERATED_ROOT,
    ROWS,
    get_row,
    is_generated,
)
from clouds.data.datasets.description import Row
from clouds.data.datasets.listing import Listing, list_dataset, some
from clouds.data.label_space import LabelSpace
from clouds.data.structures import Domain, Record

ROOT_VARIABLE = "DETECTRON2_DATASETS"


def dataset_root() -> Path:
    """The folder that holds all datasets: $DETECTRON2_DATASETS, or `datasets`."""
    return Path(os.environ.get(ROOT_VARIABLE, "datasets")).expanduser()


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset under one root; nothing is read before it is asked for."""

    row: Row
    root: Path

    @property
    def name(self) -> str:
        """What it is called in a config."""
        return self.row.name

    @property
    def domain(self) -> Domain:
        """The part it plays."""
        return self.row.domain

    @property
    def label_space(self) -> LabelSpace:
        """The classes that its labels are read as."""
        return self.row.label_space

    @property
    def classes_present(self) -> tuple[int, ...]:
        """Train ids in its label set, ascending: 16 for SYNTHIA, 11 for CamVid, else all 19."""
        return self.row.classes_present

    def listing(self) -> Listing:
        """What is on disk, gaps and all; raises nothing for what is missing."""
        return list_dataset(self.row, self.root)

    def records(self) -> list[Record]:
        """Its pictures, sorted by path.

        Raises:
            FileNotFoundError: the root, or the folder of images or labels, does not exist.
            ValueError: a folder holds no image, or an image has no label, or the reverse.
        """
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"the dataset root {self.root.absolute()} does not exist. Set the environment "
                f"variable {ROOT_VARIABLE} to the folder that holds gta5/, cityscapes/ and the "
                "other datasets; `python tools/make_demo_data.py` makes one to try with."
            )
        listing = self.listing()
        missing = self.missing_folders(listing)
        if missing:
            raise FileNotFoundError(
                f"dataset {self.name}: no folder {' and no folder '.join(missing)}. {self.hint()}"
            )
        problems = [f"dataset {self.name}: {gap}" for gap in self.gaps(listing)]
        if problems:
            raise ValueError("\n".join([*problems, self.hint()]))
        return list(listing.records)

    def missing_folders(self, listing: Listing) -> list[str]:
        """The folders that must exist and do not."""
        missing = [] if listing.has_images else [str(listing.images)]
        if self.row.labels_required and not listing.has_labels:
            missing.append(str(listing.labels))
        return missing

    def gaps(self, listing: Listing) -> list[str]:
        """What is wrong with the files in the folders, a sentence each."""
        gaps = []
        without_label, without_image = listing.images_without_label, listing.labels_without_image
        if self.row.labels_required and without_label:
            gaps.append(f"{len(without_label)} images have no label: {some(without_label)}.")
        if self.row.labels_required and without_image:
            gaps.append(f"{len(without_image)} labels have no image: {some(without_image)}.")
        if not listing.records and not gaps:
            names = " or ".join(f"*{suffix}" for suffix in self.row.image_suffixes)
            gaps.append(f"no image {names} in {listing.images} that can be used.")
        return gaps

    def manifest_gaps(self, listing: Listing) -> list[str]:
        """Where the images in the folder are not those of its manifest, a sentence each.

        Empty when there is no manifest: anybody's own pictures may be used as generated ones.
        """
        manifest = listing.manifest
        if manifest is None:
            return []
        again = "run the generator again with the same options: it paints what is missing"
        gaps = [manifest.error] if manifest.error else []
        if manifest.unknown:
            gaps.append(
                f"{len(manifest.unknown)} images have no entry in {manifest.path}: "
                f"{some(manifest.unknown)}. A generator was stopped before it wrote their entry, "
                f"or is still at work, or they are not its own. Delete them, or {again}."
            )
        if manifest.gone:
            gaps.append(
                f"{len(manifest.gone)} images of {manifest.path} are gone from {listing.images}: "
                f"{some(manifest.gone)}. To have them, {again}."
            )
        return gaps

    def hint(self) -> str:
        """Where the files are expected, and where to get them."""
        row = self.row
        images = " or ".join(f"*{suffix}" for suffix in row.image_suffixes)
        labels = " or ".join(f"*{kind.suffix}" for kind in row.label_files)
        places = " or ".join(
            f"{f.images}/**/{images}" + f", {f.labels}/**/{labels}" * row.labels_required
            for f in row.folders
        )
        hint = f"Expected under {self.root.absolute()}: {places}. To get it: {row.how_to_get}."
        names = dataset_names(self.root)[len(ROWS) :] if row.manifest else []
        others = [name for name in names if name != row.name]
        return hint + (f" Generated datasets that are there: {some(others)}." if others else "")

    def read_raw(self, label: Path) -> npt.NDArray[np.integer]:
        """A label file's own ids, (H, W); raises as `reading.read_label`."""
        return reading.read_label(label, self.row.label_file(label.name).channel)

    def unknown_ids(self, label: Path, raw: npt.NDArray[np.integer]) -> tuple[int, ...]:
        """The ids in `raw` (H, W), read from `label`, that the dataset does not define."""
        return self.row.label_file(label.name).ids.unknown_ids(raw)

    def read_label(self, record: Record) -> npt.NDArray[np.uint8]:
        """A record's label as train ids.

        Returns:
            (H, W) uint8: 0..18, or 255 where a pixel does not count.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the record has no label, or its file is broken or holds ids that the
                dataset does not define.
        """
        if record.label is None:
            raise ValueError(f"{record.image} has no label")
        raw = self.read_raw(record.label)
        unknown = self.unknown_ids(record.label, raw)
        if unknown:
            kind = self.row.label_file(record.label.name)
            raise ValueError(
                f"{record.label}: holds the ids {some(unknown, 10)}, which are no {kind.ids.name}. "
                f"Is it a label of {self.name}? A converted one is called *_labelTrainIds.png."
            )
        return self.row.label_file(record.label.name).ids.apply(raw)


def get_dataset(name: str, root: Path | None = None) -> DatasetSpec:
    """The dataset of that name.

    Args:
        name: a row of the table, or `sd_<folder>`.
        root: the dataset root; None: that of the environment, now.

    Raises:
        ValueError: no such dataset; the message lists those that there are.
    """
    return DatasetSpec(get_row(name), dataset_root() if root is None else root)


def dataset_names(root: Path | None = None) -> list[str]:
    """Every dataset of the table, and the generated ones that are found under the root."""
    top = (dataset_root() if root is None else root) / GENERATED_ROOT
    folders = sorted(f.name for f in top.iterdir() if f.is_dir()) if top.is_dir() else []
    return [*ROWS, *(GENERATED_PREFIX + folder for folder in folders)]


def register_all() -> None:
    """Register every row of the table; again is harmless. No file is looked at before it is asked.

    An entry is a list of dicts with `file_name`, `sem_seg_file_name` (the dataset's own ids; read
    it with `get_dataset(name).read_label`), `domain` and `dataset`.
    """
    from clouds.d2 import DatasetCatalog, MetadataCatalog  # takes torch's seconds to import

    for name in ROWS:
        if name in DatasetCatalog:
            continue
        label_space = ROWS[name].label_space
        DatasetCatalog.register(name, _lister(name))
        MetadataCatalog.get(name).set(
            stuff_classes=list(label_space.names),
            stuff_colors=[list(color) for color in label_space.colors],
            ignore_label=label_space.ignore,
            evaluator_type="sem_seg",
        )


def _lister(name: str) -> Callable[[], list[dict[str, Any]]]:
    def samples() -> list[dict[str, Any]]:
        return [
            {
                "file_name": str(record.image),
                "domain": record.domain,
                "dataset": record.dataset,
                **({} if record.label is None else {"sem_seg_file_name": str(record.label)}),
            }
            for record in get_dataset(name).records()
        ]

    return samples


def training_label_space(names: Sequence[str]) -> LabelSpace:
    """The label space that all labelled datasets of `names` share.

    Args:
        names: as in DATASETS.TRAIN; generated datasets among them are ignored.

    Raises:
        ValueError: a dataset is unknown, none is labelled, or their label spaces differ.
    """
    spaces = {name: get_row(name).label_space for name in names if not is_generated(name)}
    if not spaces:
        raise ValueError(f"no labelled dataset among {', '.join(names) or 'none'}")
    first, *others = spaces.values()
    if any(other != first for other in others):
        counts = ", ".join(
            f"{name} ({space.num_classes} classes)" for name, space in spaces.items()
        )
        raise ValueError(f"datasets with different label spaces: {counts}")
    return first


def known_label_space(names: Sequence[str]) -> LabelSpace | None:
    """`training_label_space(names)`, or None if a dataset of `names` is not one of this project."""
    if not names or any(name not in ROWS and not is_generated(name) for name in names):
        return None
    return training_label_space(names)
